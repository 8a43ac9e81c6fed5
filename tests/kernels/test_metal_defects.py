"""Defects inserted into the kernels' text: each must be caught."""

from __future__ import annotations

import re
from collections.abc import Callable

import mlx.core as mx
import pytest
from metal_host import HostError, HostMetal, Recorder
from metal_host.typecheck import check_launches, check_same_text

from mlx_turbokv.kernels import assemble, decode, dequantize, pack, reference
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.kernels.segment_rows import segment_rows
from mlx_turbokv.kernels.segments import SegmentedKV
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout, protected_layout

pytestmark = pytest.mark.slow

LAYOUT = KVLayout(KVFormat.parse("turbo4"), KVFormat.parse("turbo3"), 80, 80, "float16")
# what the host layer says of memory that another thread has not written, or of what came of it
UNSET = "race on byte|nobody wrote|outside the range of representable values"
BARRIER = r"threadgroup_barrier\(mem_flags::mem_threadgroup\);"
SIMD_BARRIER = r"simdgroup_barrier\(mem_flags::mem_threadgroup\);"


def rows(n: int, heads: int = 1) -> mx.array:
    return mx.random.normal((1, heads, n, 80), key=mx.random.key(n)).astype(mx.float16)


def run_pack(n: int = 40) -> None:
    mx.eval(pack.pack(rows(n), rows(n + 1)[:, :, :n], LAYOUT))


def packed_rows(n: int) -> PackedKV:
    return PackedKV(
        LAYOUT, empty_tiles(), 0, reference.pack(rows(n), rows(n + 1)[:, :, :n], LAYOUT), n
    )


def run_decode(n: int = 100) -> None:
    mx.eval(decode.decode(rows(2, heads=3), packed_rows(n), 0.1, causal=True))


def run_dequantize(n: int = 40) -> None:
    mx.eval(dequantize.rotated_rows(packed_rows(n), mx.float16, 0, 1, "metal"))


def run_segments(n: int = 40) -> None:
    fresh = rows(n)
    kv = SegmentedKV(
        LAYOUT, LAYOUT, protected_layout(LAYOUT), empty_tiles(), 0, 0, empty_tiles(), 0,
        packed_rows(n).tail, 0, n, (0,), (0,), None, (fresh, fresh),
    )  # fmt: skip
    mx.eval(segment_rows(kv, mx.float16, (0, 1), "metal"))


@pytest.fixture
def kernel_text(monkeypatch) -> Callable[..., None]:
    """Changes what MLX gets: `kernel_text(file, pattern, replacement, occurrence)`."""
    sound = assemble.header_text

    def plant(file: str, pattern: str, replacement: str, occurrence: int = 0) -> None:
        text = sound(file, "metal")
        found = list(re.finditer(pattern, text))
        assert len(found) > occurrence, f"{pattern} occurs {len(found)} times in {file}"
        at = found[occurrence]
        broken = text[: at.start()] + at.expand(replacement) + text[at.end() :]
        monkeypatch.setattr(
            assemble,
            "header_text",
            lambda name, backend: broken if name == file else sound(name, backend),
        )

    return plant


def launches(run: Callable[[], None], monkeypatch) -> list:
    recorder = Recorder()
    monkeypatch.setattr(assemble, "factory", recorder.metal_kernel)
    run()
    return recorder.launches


@pytest.mark.parametrize("run", [run_pack, run_decode, run_dequantize, run_segments])
def test_sound_kernels_pass(metal_host: HostMetal, monkeypatch, run) -> None:
    assert check_launches(launches(run, monkeypatch)) == []
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    run()


def caught(run: Callable[[], None], monkeypatch) -> str:
    """The report of the first defect that the host layer finds."""
    host = HostMetal()
    monkeypatch.setattr(assemble, "factory", host.metal_kernel)
    with pytest.raises(HostError) as error:
        run()
    host.close()
    return str(error.value)


@pytest.mark.parametrize(
    ("run", "file"),
    [
        (run_pack, "pack.metal"),
        (run_decode, "decode.metal"),
        (run_dequantize, "dequantize.metal"),
        (run_segments, "segments.metal"),
    ],
)
def test_missing_first_barrier_is_caught(kernel_text, monkeypatch, run, file) -> None:
    assert re.search(BARRIER, (assemble.metal_folder() / file).read_text())
    kernel_text(file, BARRIER, "")
    assert re.search(UNSET, caught(run, monkeypatch))


def test_missing_barrier_between_simd_lanes_is_caught(kernel_text, monkeypatch) -> None:
    kernel_text("decode.metal", SIMD_BARRIER, "", occurrence=1)  # in the dense Hadamard transform
    assert re.search(UNSET, caught(run_decode, monkeypatch))


def test_barrier_of_device_memory_alone_is_caught(kernel_text, monkeypatch) -> None:
    kernel_text("pack.metal", BARRIER, "threadgroup_barrier(mem_flags::mem_device);")
    assert re.search(UNSET, caught(run_pack, monkeypatch))


def test_race_in_packing_is_caught(kernel_text, monkeypatch) -> None:
    # every second thread writes its neighbour's word, as if two rows shared a word of the output
    kernel_text("pack.metal", r"out\[i\] =", "out[i & ~1] =")
    assert "race on byte" in caught(run_pack, monkeypatch)


def test_out_of_bounds_read_is_caught(kernel_text, monkeypatch) -> None:
    kernel_text("decode.metal", r"(columns\[word / 4 \* 128) \+ token", r"\1 + 131072 + token")
    assert re.search("heap-buffer-overflow|out of bounds|SEGV", caught(run_decode, monkeypatch))


def test_read_one_past_the_queries_is_caught(kernel_text, monkeypatch) -> None:
    kernel_text("decode.metal", r"(float\(q\[row \* K::DIM \+ i)\]", r"\1 + 1]")
    assert re.search("heap-buffer-overflow|out of bounds|SEGV", caught(run_decode, monkeypatch))


def test_wrong_address_space_is_refused(kernel_text, monkeypatch) -> None:
    kernel_text("decode.metal", r"threadgroup const float\* levels", "device const float* levels")
    problems = check_launches(launches(run_decode, monkeypatch))
    assert any("no matching function for call" in str(p) for p in problems)


def test_cpp17_is_refused(kernel_text, monkeypatch) -> None:
    kernel_text("dequantize.metal", r"if \(BITS == 8\)", "if constexpr (BITS == 8)")
    problems = check_launches(launches(run_dequantize, monkeypatch))
    assert any("constexpr if is incompatible with C++" in str(p) for p in problems)


def test_a_function_that_metal_has_too_is_refused(kernel_text, monkeypatch) -> None:
    ours = r"TKV_FN uint rotate(uint x, uint n) { return x << n; }\n\1 bits = rotate(bits, 0u);"
    kernel_text("dequantize.metal", r"(TKV_FN float half_bits\(uint bits\) \{)", ours)
    problems = check_launches(launches(run_dequantize, monkeypatch))
    assert any("call to 'rotate' is ambiguous" in str(p) for p in problems)


def test_40_kib_of_threadgroup_memory_are_refused(monkeypatch) -> None:
    more = "TKV_SHARED(float, more, 40 * 256);"
    monkeypatch.setattr(pack, "SOURCE", more + pack.SOURCE)
    problems = check_launches(launches(run_pack, monkeypatch))
    assert any("threadgroup memory above 32 KiB" in str(p) for p in problems)


@pytest.mark.parametrize("run", [run_pack, run_decode, run_dequantize, run_segments])
def test_no_length_is_a_template_value(monkeypatch, run) -> None:
    many = [launches(lambda n=n: run(n), monkeypatch) for n in (9, 33, 64, 200, 1000)]
    for same_kernel in zip(*many):
        assert check_same_text(list(same_kernel)) == []


def test_a_length_as_template_value_is_refused(monkeypatch) -> None:
    recorder = Recorder()

    def with_length(**build):
        kernel = recorder.metal_kernel(**build)

        def call(*, template, output_shapes, **rest):
            template = [*template, ("LENGTH", output_shapes[0][-2])]
            return kernel(template=template, output_shapes=output_shapes, **rest)

        return call

    monkeypatch.setattr(assemble, "factory", with_length)
    for n in (9, 33, 200):
        run_dequantize(n)
    assert check_same_text(recorder.launches) != []
    run_dequantize(1500)
    assert any("is a length" in str(p) for p in check_launches(recorder.launches[-1:]))
