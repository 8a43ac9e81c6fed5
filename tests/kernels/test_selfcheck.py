"""The self-check's small inputs: sound kernels pass on the CPU, planted faults do not."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
import selfcheck_gpu
from metal_host import HostMetal
from selfcheck_gpu import AS_REFERENCE, FAULTS, LAYOUT, forget, launched

from mlx_turbokv.errors import InputError
from mlx_turbokv.kernels import (
    assemble,
    backend,
    decode,
    pack,
    reference,
    selfcheck,
    small_inputs,
    trust,
)
from mlx_turbokv.kernels.trust import Kernel
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout

pytestmark = pytest.mark.slow


def layout(k: str, v: str, dim: int = 64, dtype: str = "float16") -> KVLayout:
    return KVLayout(KVFormat.parse(k), KVFormat.parse(v), dim, dim, dtype)


WHOLE = {"rows": 1, "whole": True, "heads": (3, 1)}
SPLIT = {"rows": 4, "heads": (2, 2)}


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Kernels run on the CPU, and are checked."""
    host = HostMetal(runs=(("asan", "forward", 0),))
    monkeypatch.setattr(assemble, "factory", host.metal_kernel)
    monkeypatch.setenv(trust.VARIABLE, "1")
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path))
    forget()
    yield host
    forget()
    host.close()


@pytest.mark.parametrize(
    ("own", "centred"),
    [
        (LAYOUT, False),
        (layout("turbo4", "turbo3:32", 64, "bfloat16"), True),
        (layout("f16", "turbo5", 72, "float32"), False),
    ],
)
def test_sound_kernels_pass(own, centred, host) -> None:
    dtype = getattr(mx, own.dtype)
    for op, options in (
        *(("pack", {}), ("decode", WHOLE), ("decode", SPLIT)),
        *(("dequantize", {}), ("segments", {"protected": False, "fresh": dtype})),
    ):
        kernel = Kernel(op, "metal", own, dtype, centred, **options)
        assert selfcheck.problem(kernel) is None, kernel


@pytest.mark.parametrize(
    ("op", "own", "options"),
    [
        ("decode", LAYOUT, {**WHOLE, "protected": True}),
        ("decode", layout("turbo4", "turbo3:32", 64, "bfloat16"),
         {**SPLIT, "protected": True, "centred": True}),
        ("decode", layout("f16", "turbo5", 72, "float32"), {**SPLIT, "protected": False}),
        ("pack", layout("turbo4", "turbo3", 64, "float32"), {"rotated": True}),
        ("segments", LAYOUT, {"protected": True, "fresh": mx.float16}),
        ("segments", layout("turbo4", "turbo3:32", 80, "bfloat16"),
         {"protected": True, "fresh": mx.bfloat16, "centred": True}),
        # what the first and newest tokens of most models are packed in
        *[("pack", layout("turbo8", "turbo8", dim, dtype), {"centred": dim != 96})
          for dim, dtype in ((80, "bfloat16"), (96, "float32"), (128, "bfloat16"),
                             (128, "float16"), (256, "float32"))],
    ],
)  # fmt: skip
def test_sound_kernels_of_protected_tokens_pass(op, own, options, host) -> None:
    kernel = Kernel(op, "metal", own, getattr(mx, own.dtype), **options)
    assert selfcheck.problem(kernel) is None, kernel


def test_new_rows_beyond_half_are_cut_to_it(host) -> None:
    """As packed ones are: infinite keys would make attention NaN."""
    for own, centred in ((layout("turbo4", "turbo3", 64, "bfloat16"), True),
                         (layout("q8_0", "turbo2", 64, "bfloat16"), False)):  # fmt: skip
        new = {"protected": True, "fresh": mx.bfloat16}
        kernel = Kernel("segments", "metal", own, mx.float16, centred, **new)
        assert selfcheck.problem(kernel) is None


@pytest.fixture
def plant(monkeypatch):
    """Changes what MLX gets."""
    sound = assemble.header_text
    return lambda fault: monkeypatch.setattr(
        assemble, "header_text", selfcheck_gpu.planted_text(fault, sound)
    )


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.file} {fault.said}")
def test_a_planted_fault_is_refused(fault, host, plant, caplog) -> None:
    plant(fault)
    got = launched(fault.launch, backend.select_backend("auto"))
    assert mx.array_equal(got, launched(fault.launch, AS_REFERENCE))
    (record,) = caplog.records
    op = {"merge.metal": "decode"}.get(fault.file, fault.file.removesuffix(".metal"))
    assert f"metal kernel {op}" in record.message and fault.said in record.message
    assert "doctor" in record.message and "\n" not in record.message
    with pytest.raises(InputError, match="'metal' cannot be used here"):
        launched(fault.launch, backend.select_backend("metal"))


def test_what_is_sound_goes_on_beside_a_fault(host, plant, caplog) -> None:
    plant(next(fault for fault in FAULTS if fault.file == "merge.metal"))
    auto = backend.select_backend("auto")
    launched("pack", auto)
    launched("decode", auto)
    assert not caplog.records and len(host.launches) > 2
    launched("decode long", auto)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("broken", ["reads a stale row", "reads a tile before"])
def test_rows_that_must_not_be_read_are_nan(broken, monkeypatch) -> None:
    """A launcher that reads too much is refused even where memory lets it."""

    def read_on(queries, found, scale, causal, sinks, padding, **_):
        if broken == "reads a stale row":
            found = found._replace(n_tail=found.n_tail + 1)
        else:
            n = found.body.shape[2]
            stale = mx.full((*found.body.shape[:2], 1, found.body.shape[3]), 2**32 - 1, mx.uint32)
            found = found._replace(body=mx.concatenate([stale, found.body], axis=2)[:, :, :n])
        mask = "causal" if causal else None
        return reference.attention(queries, found, scale, mask, sinks, padding)

    monkeypatch.setattr(decode, "decode", read_on)
    problem = selfcheck.problem(Kernel("decode", "metal", LAYOUT, mx.float16, **WHOLE))
    assert problem is not None and "not finite" in problem


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32, mx.uint32, mx.int32])
def test_arrays_lie_between_nan(dtype) -> None:
    array = mx.ones((2, 3, 4), dtype)
    inner = small_inputs.between_nan(array)
    mx.eval(inner)
    seen = np.array(inner, copy=False)
    assert seen.flags.c_contiguous and mx.array_equal(inner, array)
    outside = seen.base if isinstance(seen.base, np.ndarray) else None
    assert outside is None or outside.size >= seen.size
    nothing = mx.array(small_inputs._nothing(dtype)).astype(dtype)
    assert not mx.isfinite(nothing).item() or nothing.item() > 1e7


@pytest.mark.parametrize("off", [2.0**-7, float("nan")])
@pytest.mark.parametrize("at", ["first", "last"])
def test_one_wrong_element_is_found(off, at, monkeypatch) -> None:
    sound = reference.attention

    def wrong(queries, found, scale, causal, sinks, padding, **_):
        mask = "causal" if causal else None
        out = np.array(sound(queries, found, scale, mask, sinks, padding).astype(mx.float32))
        row = (0, 0, 0) if at == "first" else (-1, -1, -1)
        out[(*row, 0 if at == "first" else -1)] += off * np.abs(out[row]).max()
        return mx.array(out)

    monkeypatch.setattr(decode, "decode", wrong)
    assert selfcheck.problem(Kernel("decode", "metal", LAYOUT, mx.float16, **WHOLE))


def test_unwritten_output_is_found(monkeypatch) -> None:
    monkeypatch.setattr(pack, "pack", lambda k, v, own, *_, **__: mx.zeros((2, 2, 2, 1), mx.uint32))
    problem = selfcheck.problem(Kernel("pack", "metal", LAYOUT, mx.float16))
    assert problem is not None and "instead of" in problem


def test_the_script_for_gpus_tells_sound_kernels_from_faults(host, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(selfcheck_gpu, "HEAD_DIM", 32)
    monkeypatch.setattr(selfcheck_gpu, "PAIRS", selfcheck_gpu.PAIRS[:1])
    harmless = FAULTS[0]._replace(new=r"\g<0>")
    monkeypatch.setattr(selfcheck_gpu, "FAULTS", (FAULTS[0], harmless))
    out = tmp_path / "record.json"
    assert selfcheck_gpu.main(["--backend", "metal", "--out", str(out)]) == 1
    record = json.loads(out.read_text())
    assert [c["problem"] for c in record["checks"]] == [None] * 5
    assert [f["refused"] for f in record["faults"]] == [True, False]
    assert "1 not as they should be" in capsys.readouterr().out
