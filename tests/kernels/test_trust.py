"""Kernels are checked before their first launch on a machine, and remembered."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import mlx.core as mx
import pytest
import selfcheck_gpu
from selfcheck_gpu import forget

from mlx_turbokv import TurboKVCache
from mlx_turbokv.errors import InputError
from mlx_turbokv.kernels import (
    assemble,
    backend,
    decode_launch,
    reference,
    trust,
)
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout

LAYOUT = KVLayout(KVFormat.parse("q8_0"), KVFormat.parse("turbo2"), 64, 64, "float16")
KERNEL = trust.Kernel("pack", "metal", LAYOUT, mx.float16)


@pytest.fixture
def checked(monkeypatch, tmp_path) -> list[str]:
    """Kernels that were checked; each agrees. No kernel is really launched."""
    names: list[str] = []
    monkeypatch.setenv(trust.VARIABLE, "1")
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "checker", lambda kernel: names.append(str(kernel)))

    def metal_kernel(**_):
        def kernel(output_shapes, output_dtypes, **_):
            return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes)]

        return kernel

    monkeypatch.setattr(assemble, "factory", metal_kernel)
    forget()
    yield names
    forget()


def memo(tmp_path: Path) -> Path:
    return tmp_path / "cache" / trust.FILE_NAME


def rows(n: int) -> mx.array:
    return mx.random.normal((1, 2, n, 64), key=mx.random.key(n)).astype(mx.float16)


def packed(n: int = 40) -> PackedKV:
    tiles = reference.pack(rows(n), rows(n + 1)[:, :, :n], LAYOUT)
    return PackedKV(LAYOUT, empty_tiles(), 0, tiles, n)


def test_a_kernel_is_checked_once_on_a_machine(checked, tmp_path) -> None:
    for _ in range(3):
        trust.require(KERNEL)
    assert len(checked) == 1
    forget()
    trust.require(KERNEL)
    assert len(checked) == 1
    (names,) = json.loads(memo(tmp_path).read_text())["agreed"].values()
    assert names == [KERNEL.name]


@pytest.mark.parametrize("what", ["chip", "system", "mlx", "package", "text", "launcher"])
def test_another_machine_or_text_is_checked_anew(what, checked, monkeypatch) -> None:
    trust.require(KERNEL)
    forget()
    if what == "chip":
        info = {"device_name": "Apple M9", "architecture": "applegpu_g99s"}
        monkeypatch.setattr(mx, "device_info", lambda *_: info)
    elif what == "system":
        monkeypatch.setattr(trust, "system_build", lambda: "macOS 99A1")
    elif what == "mlx":
        monkeypatch.setattr(trust, "version", lambda name: "9.9")
    elif what == "package":
        monkeypatch.setattr(trust, "__version__", "9.9")
    elif what == "text":
        monkeypatch.setattr(assemble, "header_text", lambda file, backend: f"{file} is other text")
    else:
        monkeypatch.setattr(trust, "_digest", lambda *texts: "another")
    trust.require(KERNEL)
    assert len(checked) == 2
    forget()
    trust.require(KERNEL)
    assert len(checked) == 2


def test_every_kernel_that_a_launch_needs_is_checked_before_it(checked) -> None:
    metal = backend.select_backend("metal")
    metal.pack(rows(3), rows(3), LAYOUT)
    assert [name.split(" of ")[0] for name in checked] == ["pack"]
    queries = mx.zeros((1, 4, 1, 64), mx.float16)
    for n in (40, 3000, 3001):
        metal.decode(queries, packed(n), 0.125)
    assert len(checked) == 3 and "in one launch" in checked[1] and "in splits" in checked[2]
    metal.rotated_rows(packed(), mx.float16, 0, 2)
    metal.dequantize(packed(), mx.float16)  # through float32
    kinds = [name.split(" of ")[0] for name in checked]
    assert kinds == ["pack", "decode", "decode", "dequantize", "dequantize"]
    metal.rotated_rows(selfcheck_gpu.segmented(), mx.float16, 0, 2)
    assert checked[5].startswith("segments of K")
    for dtype in (mx.bfloat16, mx.float32):
        metal.pack(rows(3).astype(dtype), rows(3).astype(dtype), LAYOUT)
    assert len(checked) == 8


def test_a_launch_that_is_known_asks_nothing(checked, monkeypatch) -> None:
    metal, queries, tiles = backend.select_backend("metal"), mx.zeros((1, 4, 1, 64)), packed()
    metal.decode(queries, tiles, 0.125)

    def asked(kernel):
        raise AssertionError(kernel)

    monkeypatch.setattr(decode_launch, "require", asked)
    metal.decode(queries, tiles, 0.125)


@pytest.mark.parametrize(
    "damage",
    [
        b"", b"{", b"\xff\xfe\x00", b"[]", b"3", b'{"agreed": 3}', b'{"agreed": {"m": 3}}',
        b'{"agreed": {"m": [3]}}', b'{"agreed": [["m"]]}', b'{"other": {}}', b"[" * 100_000,
    ],
)  # fmt: skip
def test_a_damaged_file_means_a_check(damage, checked, tmp_path) -> None:
    trust.require(KERNEL)
    memo(tmp_path).write_bytes(damage)
    forget()
    trust.require(KERNEL)
    assert len(checked) == 2
    forget()
    trust.require(KERNEL)
    assert len(checked) == 2  # it is whole again


@pytest.mark.parametrize("there", ["folder", "fifo", "a file for the folder"])
def test_what_cannot_be_written_means_a_check_each_time(there, checked, tmp_path) -> None:
    path = memo(tmp_path)
    if there == "a file for the folder":
        path.parent.write_text("")
    else:
        path.parent.mkdir()
        (path.mkdir if there == "folder" else lambda: os.mkfifo(path))()
    for n in (1, 2):
        trust.require(KERNEL)
        assert len(checked) == n
        forget()


def test_what_another_process_remembered_is_kept(checked, tmp_path) -> None:
    trust.require(KERNEL)
    forget()
    other = trust.Kernel("pack", "metal", LAYOUT, mx.bfloat16)
    trust.require(other)
    (names,) = trust.remembered(memo(tmp_path)).values()
    assert names == [KERNEL.name, other.name]


def test_the_file_forgets_the_oldest_machines(checked, monkeypatch, tmp_path) -> None:
    for i in range(trust.MOST_MACHINES + 5):
        monkeypatch.setattr(trust, "system_build", lambda i=i: f"build {i}")
        forget()
        trust.require(KERNEL)
    machines = trust.remembered(memo(tmp_path))
    assert len(machines) == trust.MOST_MACHINES and "build 20" in list(machines)[-1]


@pytest.fixture
def broken(checked, monkeypatch) -> list[str]:
    """Kernels that were checked; each is off."""

    def problem(kernel):
        checked.append(str(kernel))
        return "differs from the reference: attention is off by 3.1e-01 of the largest value."

    monkeypatch.setattr(trust, "checker", problem)
    return checked


def test_auto_goes_on_with_the_reference_and_says_so_once(broken, caplog, monkeypatch) -> None:
    monkeypatch.setattr("mlx_turbokv.log._given", set())
    auto = backend.select_backend("auto")
    assert auto.name == "metal"
    want = reference.pack(rows(3), rows(3), LAYOUT)
    for _ in range(2):
        assert mx.array_equal(auto.pack(rows(3), rows(3), LAYOUT), want)
    (record,) = caplog.records
    assert record.message == (
        "The metal kernel pack of K q8_0 with V turbo2, head_dim 64, float16 differs from the "
        "reference: attention is off by 3.1e-01 of the largest value. The reference back-end takes "
        "over, which is slower: run `mlx_turbokv doctor` and report what it says."
    )
    assert len(broken) == 1 and trust.refused()


def test_every_operation_has_the_reference_behind_it(broken) -> None:
    auto, tiles = backend.select_backend("auto"), packed(70)
    queries = mx.random.normal((1, 4, 3, 64), key=mx.random.key(0)).astype(mx.float16)
    sinks = mx.array([0.5, 1, 2, 3], mx.float16)
    padding = mx.array([5], mx.int32)
    got = auto.decode(queries, tiles, 0.125, True, sinks, padding)
    want = reference.attention(queries, tiles, 0.125, "causal", sinks, padding)
    assert mx.array_equal(got, want)
    for got, want in (
        (auto.rotated_rows(tiles, mx.float16, 1, 1),
         reference.rotated_rows(tiles, mx.float16, 1, 1)),
        (auto.dequantize(tiles, mx.float16), reference.dequantize(tiles, mx.float16)),
    ):  # fmt: skip
        assert all(mx.array_equal(a, b) for a, b in zip(got, want))


def test_a_back_end_that_was_asked_for_is_refused(broken) -> None:
    metal, tiles = backend.select_backend("metal"), packed()
    for call in (
        lambda: metal.pack(rows(3), rows(3), LAYOUT),
        lambda: metal.decode(mx.zeros((1, 4, 1, 64), mx.float16), tiles, 0.125),
        lambda: metal.rotated_rows(tiles, mx.float16, 0, 1),
        lambda: metal.dequantize(tiles, mx.float16),
    ):
        with pytest.raises(InputError, match="'metal' cannot be used here: .* off by 3.1e-01.* "
                           "Accepted are auto and reference"):  # fmt: skip
            call()


def test_a_failure_is_not_remembered(broken, tmp_path) -> None:
    for n in (1, 2):
        with pytest.raises(trust.UntrustedKernelError):
            trust.require(KERNEL)
        assert len(broken) == n and not memo(tmp_path).exists()
        forget()


def test_caches_keep_what_was_asked_for(broken) -> None:
    for name, forced in (("auto", False), (None, False), ("metal", True)):
        cache = TurboKVCache("q8_0", "turbo2", backend=name)
        if forced:
            with pytest.raises(InputError, match="cannot be used"):
                cache.update_and_fetch(rows(3), rows(3))
        else:
            cache.update_and_fetch(rows(3), rows(3))
            assert cache.offset == 3
    wide = mx.zeros((1, 1, 2, 640), mx.float16)
    TurboKVCache("f16", "q8_0", backend="auto").update_and_fetch(wide, wide)
    with pytest.raises(InputError, match="640"):
        TurboKVCache("f16", "q8_0", backend="metal").update_and_fetch(wide, wide)


@pytest.mark.parametrize(("value", "n"), [("0", 0), ("1", 1), ("", 0)])
def test_the_variable_turns_checks_off_and_on(value, n, checked, monkeypatch) -> None:
    monkeypatch.setenv(trust.VARIABLE, value)  # empty: not where something else runs kernels
    trust.require(KERNEL)
    assert len(checked) == n


def test_another_value_is_refused(checked, monkeypatch) -> None:
    monkeypatch.setenv(trust.VARIABLE, "off")
    with pytest.raises(InputError, match="TURBOKV_SELFCHECK is 'off': accepted are 0 and 1"):
        backend.select_backend("metal").pack(rows(3), rows(3), LAYOUT)


def test_on_a_gpu_checks_are_on(monkeypatch) -> None:
    monkeypatch.delenv(trust.VARIABLE, raising=False)
    monkeypatch.setattr(assemble, "factory", None)
    assert trust.is_on()


def test_a_second_start_costs_little(checked) -> None:
    layouts = [KVLayout(KVFormat.parse(k), KVFormat.parse("turbo2"), 64, 64)
               for k in ("q8_0", "turbo4", "turbo3")]  # fmt: skip
    kernels = [trust.Kernel(op, "metal", layout, dtype)
               for op in trust.FILES for layout in layouts
               for dtype in (mx.float16, mx.float32)]  # fmt: skip
    for kernel in kernels:
        trust.require(kernel)
    seconds = []
    for _ in range(5):
        forget()
        trust._digest.cache_clear()
        assemble.header_text.cache_clear()
        start = time.process_time()
        for kernel in kernels:
            trust.require(kernel)
        seconds.append(time.process_time() - start)
    assert len(checked) == len(kernels)
    assert min(seconds) < 0.05
