"""Kernels fit into a GPU's registers: by clang's back-end for AMD GPUs, whose threads have 128.

The variants are those of scripts/register_ceilings.py; each is compiled once.
"""

from __future__ import annotations

import re

import mlx.core as mx
import pytest
import register_ceilings
from metal_host import HostError, Launch, Recorder, amdgpu

from mlx_turbokv.kernels import assemble, pack
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout

pytestmark = pytest.mark.slow

LOWER = "python scripts/register_ceilings.py --write makes the present figures the ceilings"


@pytest.fixture(scope="module")
def chosen() -> list:
    return register_ceilings.chosen()


def test_no_private_array_stays_in_memory(chosen) -> None:
    found = amdgpu.of_many(amdgpu.arrays_in_memory, [v.launch for v in chosen])
    kept = [f"{v.name}: {', '.join(arrays)}" for v, arrays in zip(chosen, found) if arrays]
    assert not kept, "\n".join(kept)


def test_every_function_is_inlined(chosen) -> None:
    found = amdgpu.of_many(amdgpu.functions_out_of_line, [v.launch for v in chosen])
    kept = [f"{v.name}: {', '.join(names)}" for v, names in zip(chosen, found) if names]
    assert not kept, "\n".join(kept)


def test_registers_are_within_their_ceilings(chosen) -> None:
    version, ceilings = register_ceilings.read()
    if version != amdgpu.clang_version():
        pytest.skip(f"the ceilings are of clang {version}, not {amdgpu.clang_version()}")
    excess = register_ceilings.excess(register_ceilings.measured(), ceilings)
    assert not excess, "\n".join([*excess, LOWER])


def test_every_kernel_is_among_them(chosen) -> None:
    decoding = {"decode_partial", "decode_protected", "decode_merge"}
    reading = {"dequantize", "read_segments"}
    assert {v.kernel for v in chosen} == {"pack"} | decoding | reading
    decode = [v for v in chosen if v.kernel == "decode_partial"]
    assert {v.head_dim for v in decode} == {64, 80, 96, 128, 256}
    assert {v.rows for v in decode} == {1, 2, 4, 8}
    assert {v.centred for v in decode} == {False, True}
    assert len({v.pair for v in decode}) == 7


HEADER = """
template <int N>
METAL_FUNC float sum(thread const float* x) {
  float total = 0.0f;
  for (int i = 0; i < N; i++) {
    total += x[i];
  }
  return total;
}
"""
SOURCE = """
uint i = thread_position_in_threadgroup.x;
float loaded[8];
for (int n = 0; n < 8; n++) {
  loaded[n] = x[i * 8 + n];
}
y[i] = sum<8>(loaded);
"""


def recorded(source: str, header: str = HEADER) -> Launch:
    recorder = Recorder()
    kernel = recorder.metal_kernel(
        name="fixture", input_names=["x"], output_names=["y"], source=source, header=header
    )
    kernel(inputs=[mx.zeros((2048,))], output_shapes=[(256,)], output_dtypes=[mx.float32],
           grid=(256, 1, 1), threadgroup=(256, 1, 1))  # fmt: skip
    return recorder.launches[0]


def test_arrays_that_become_registers_pass() -> None:
    launch = recorded(SOURCE)
    assert amdgpu.arrays_in_memory(launch) == []
    assert amdgpu.functions_out_of_line(launch) == []
    found = amdgpu.registers(launch)
    assert found.registers <= 32 and found[1:] == (0, 0)


@pytest.mark.parametrize(
    "statement",
    [
        "y[i] += loaded[i & 7u];",  # an index that is only known when it runs
        "for (uint n = 0; n < i; n++) { y[i] += loaded[n & 7u]; }",
        '_Pragma("clang loop unroll(disable)") for (int n = 0; n < 8; n++) { y[n] = loaded[n]; }',
        "thread float& one = i > 9u ? loaded[2] : loaded[5]; one += 1.0f; y[i] = one + loaded[5];",
    ],
)
def test_an_array_that_stays_in_memory_is_found(statement) -> None:
    assert "loaded" in str(amdgpu.arrays_in_memory(recorded(SOURCE + statement)))


def test_a_function_out_of_line_is_found() -> None:
    header = HEADER.replace("METAL_FUNC", "__attribute__((noinline))")
    assert "sum" in str(amdgpu.functions_out_of_line(recorded(SOURCE, header)))


def test_values_beyond_128_registers_are_found() -> None:
    def found(n: int) -> amdgpu.Registers:
        return amdgpu.registers(
            recorded(
                f"""
            uint i = thread_position_in_threadgroup.x;
            float kept[{n}];
            for (int n = 0; n < {n}; n++) {{ kept[n] = *(const volatile device float*)(x + n); }}
            threadgroup_barrier(mem_flags::mem_device);
            for (int n = 0; n < {n}; n++) {{ y[i + n] = kept[n]; }}
        """.replace("for (", "TKV_UNROLL for ("),
                '#define TKV_UNROLL _Pragma("clang loop unroll(full)")\n',
            )
        )

    few, many = found(40), found(160)
    assert 40 <= few.registers <= 60 and few[1:] == (0, 0)
    assert many.registers > 120 and many.spilled >= 32 and many.scratch_bytes >= 4 * 32


def test_a_text_that_does_not_compile_is_an_error() -> None:
    with pytest.raises(HostError, match="undeclared identifier 'zero'"):
        amdgpu.registers(recorded("y[0] = zero;"))


LAYOUT = KVLayout(KVFormat.parse("turbo4"), KVFormat.parse("turbo3"), 128, 128, "float16")


def packing(monkeypatch) -> Launch:
    """The launch of pack, as the text and source are now."""
    recorder = Recorder()
    monkeypatch.setattr(assemble, "factory", recorder.metal_kernel)
    rows = mx.zeros((1, 8, 4096, 128), mx.float16)
    pack.pack(rows, rows, LAYOUT)
    return recorder.launches[0]


def broken(monkeypatch, pattern: str, replacement: str) -> None:
    """Changes the text of all kernels."""
    sound = assemble.header_text

    def header(file: str, backend: str) -> str:
        text, n = re.subn(pattern, replacement, sound(file, backend), flags=re.M)
        assert n, f"{pattern} does not occur in {file}"
        return text

    monkeypatch.setattr(assemble, "header_text", header)


def test_pack_with_rolled_loops_is_found(monkeypatch) -> None:
    assert amdgpu.arrays_in_memory(packing(monkeypatch)) == []
    broken(monkeypatch, r"clang loop unroll\(full\)", "clang loop unroll(disable)")
    assert amdgpu.arrays_in_memory(packing(monkeypatch)) != []


def test_pack_with_functions_out_of_line_is_found(monkeypatch) -> None:
    broken(monkeypatch, r"^#define TKV_FN .*$", "#define TKV_FN __attribute__((noinline))")
    assert amdgpu.functions_out_of_line(packing(monkeypatch)) != []


def test_pack_with_more_registers_is_refused(monkeypatch) -> None:
    name = "turbo4/turbo3-d128-pack"
    _, ceilings = register_ceilings.read()
    sound = amdgpu.registers(packing(monkeypatch))
    kept = """
        float kept[120];
        TKV_UNROLL for (int n = 0; n < 120; n++) {
          kept[n] = *(const volatile device float*)(centre + n);
        }
    """
    used = "TKV_UNROLL for (int n = 0; n < 120; n++) { packed[n] += uint(kept[n]); }"
    monkeypatch.setattr(pack, "SOURCE", kept + pack.SOURCE + used)
    found = amdgpu.registers(packing(monkeypatch))
    assert found.registers > sound.registers
    refused = register_ceilings.excess({**ceilings, name: found}, ceilings)
    assert refused[0].startswith(f"{name}: {found.registers} registers, at most")


def test_a_variant_without_a_ceiling_and_a_ceiling_without_a_variant_are_refused() -> None:
    low, high = amdgpu.Registers(40, 0, 0), amdgpu.Registers(41, 0, 16)
    assert register_ceilings.excess({"a": low}, {"a": high}) == []
    assert register_ceilings.excess({"a": high}, {"a": low}) == [
        "a: 41 registers, at most 40.", "a: 16 scratch_bytes, at most 0.",
    ]  # fmt: skip
    assert register_ceilings.excess({"a": low}, {"b": low}) == [
        "a has no ceiling.", "b has a ceiling and is no variant.",
    ]  # fmt: skip
