"""Defects in small kernels that the host layer must catch, and code that it must accept."""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from metal_host import HostError, HostMetal, ToolMissingError, toolchain

# Every thread reads its neighbour's value through threadgroup memory.
NEIGHBOUR = """
threadgroup float values[64];
uint i = thread_position_in_threadgroup.x;
values[i] = x[thread_position_in_grid.x];
threadgroup_barrier(mem_flags::mem_threadgroup);
y[thread_position_in_grid.x] = values[(i + 1) & 63];
"""

# Packs one 4-bit code of each thread, eight to a word, through atomics.
PACK = """
threadgroup atomic_uint words[8];
uint i = thread_position_in_threadgroup.x;
if (i < 8) {
  atomic_store_explicit(&words[i], 0u, memory_order_relaxed);
}
threadgroup_barrier(mem_flags::mem_threadgroup);
atomic_fetch_or_explicit(&words[i / 8], uint(x[i]) << (4 * (i % 8)), memory_order_relaxed);
threadgroup_barrier(mem_flags::mem_threadgroup);
if (i < 8) {
  y[i] = atomic_load_explicit(&words[i], memory_order_relaxed);
}
"""


@pytest.fixture(scope="module")
def metal_host() -> Iterator[HostMetal]:
    """Not the session's: a defect ends the processes, and their coverage counters are lost."""
    host = HostMetal()
    yield host
    host.close()


def run(
    host: HostMetal, source: str, x: mx.array, shape, dtype, threads: int = 64, n: int = 0,
    header: str = "", **options: object,
) -> mx.array:  # fmt: skip
    """Runs `source` over x in one threadgroup, or over n threads in groups of `threads`."""
    kernel = host.metal_kernel(
        name="fixture", input_names=["x"], output_names=["y"], source=source, header=header
    )
    (y,) = kernel(
        inputs=[x], output_shapes=[shape], output_dtypes=[dtype],
        grid=(n or threads, 1, 1), threadgroup=(threads, 1, 1), **options,
    )  # fmt: skip
    return y


def launch(*args: object, **options: object) -> np.ndarray:
    """The same, as a NumPy array."""
    return np.array(run(*args, **options))


def numbers(n: int) -> mx.array:
    return mx.arange(n).astype(mx.float32)


def test_neighbours_through_threadgroup_memory(metal_host) -> None:
    y = launch(metal_host, NEIGHBOUR, numbers(128), (128,), mx.float32, n=128)
    np.testing.assert_array_equal(y, np.roll(np.arange(128).reshape(2, 64), -1, axis=1).ravel())


def test_packing_with_atomics(metal_host) -> None:
    codes = np.arange(64, dtype=np.uint64) * 7 % 16
    y = launch(metal_host, PACK, mx.array(codes.astype(np.float32)), (8,), mx.uint32)
    want = (codes.reshape(8, 8) << (4 * np.arange(8, dtype=np.uint64))).sum(axis=1)
    np.testing.assert_array_equal(y, want)


def test_missing_barrier_is_caught(metal_host) -> None:
    broken = NEIGHBOUR.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    assert broken != NEIGHBOUR
    with pytest.raises(HostError, match="race|nobody wrote|order of lanes"):
        launch(metal_host, broken, numbers(64), (64,), mx.float32)


def test_missing_barrier_is_caught_by_lane_orders_alone() -> None:
    broken = NEIGHBOUR.replace("threadgroup_barrier(mem_flags::mem_threadgroup);", "")
    host = HostMetal(runs=[("asan", "forward", 0), ("asan", "reverse", 0)])
    with pytest.raises(HostError, match="depends on the order of lanes"):
        launch(host, broken, numbers(64), (64,), mx.float32)
    host.close()


def test_second_missing_barrier_is_caught(metal_host) -> None:
    twice = NEIGHBOUR + NEIGHBOUR.split(";", 2)[2].replace("values[i] =", "values[63 - i] =")
    with pytest.raises(HostError, match="race on byte .* of 'values'"):
        launch(metal_host, twice, numbers(64), (64,), mx.float32)


def test_barrier_of_the_wrong_memory_is_caught(metal_host) -> None:
    broken = NEIGHBOUR.replace("mem_threadgroup)", "mem_device)")
    with pytest.raises(HostError, match="race on byte .* of 'values'"):
        launch(metal_host, broken, numbers(64), (64,), mx.float32)


def test_simdgroup_barrier_orders_one_simd_group_only(metal_host) -> None:
    narrow = NEIGHBOUR.replace("threadgroup_barrier", "simdgroup_barrier")
    y = launch(metal_host, narrow.replace("63", "31"), numbers(32), (32,), mx.float32, 32)
    np.testing.assert_array_equal(y, np.roll(np.arange(32), -1))
    with pytest.raises(HostError, match="race|nobody wrote"):
        launch(metal_host, narrow, numbers(64), (64,), mx.float32)


@pytest.mark.parametrize("place", ["words", "y"])
def test_race_in_packing_is_caught(metal_host, place) -> None:
    source = {
        "words": """
            threadgroup uint words[8];
            uint i = thread_position_in_threadgroup.x;
            if (i < 8) { words[i] = 0; }
            threadgroup_barrier(mem_flags::mem_threadgroup);
            words[i / 8] |= uint(x[i]) << (4 * (i % 8));
            threadgroup_barrier(mem_flags::mem_threadgroup);
            if (i < 8) { y[i] = words[i]; }""",
        "y": """
            uint i = thread_position_in_threadgroup.x;
            if (i < 8) { y[i] = 0; }
            threadgroup_barrier(mem_flags::mem_device);
            y[i / 8] |= uint(x[i]) << (4 * (i % 8));""",
    }[place]
    with pytest.raises(HostError, match=f"race on byte .* of '{place}'"):
        launch(metal_host, source, mx.ones((64,)), (8,), mx.uint32)


def test_race_between_threadgroups_is_caught(metal_host) -> None:
    source = "y[thread_position_in_threadgroup.x] = x[0];"
    with pytest.raises(HostError, match="race on byte .* of 'y'"):
        launch(metal_host, source, mx.ones((64,)), (32,), mx.float32, threads=32, n=64)


@pytest.mark.parametrize("build", ["asan", "records"])
@pytest.mark.parametrize("element", ["x[i + 1]", "x[int(i) - 1]", "x[i + 500]"])
def test_out_of_bounds_read_is_caught(build, element) -> None:
    host = HostMetal(runs=[(build, "forward", 0)])
    source = f"uint i = thread_position_in_grid.x; y[i] = {element};"
    with pytest.raises(HostError, match="heap-buffer-overflow|out of bounds|index -1"):
        launch(host, source, numbers(64), (64,), mx.float32)
    host.close()


@pytest.mark.parametrize("build", ["asan", "records"])
def test_out_of_bounds_in_threadgroup_memory_is_caught(build) -> None:
    host = HostMetal(runs=[(build, "forward", 0)])
    source = """
        threadgroup float values[64];
        uint i = thread_position_in_threadgroup.x;
        threadgroup float* p = values;
        p[i + 1] = x[i];
        y[i] = x[i];"""
    with pytest.raises(HostError, match="use-after-poison|out of bounds"):
        launch(host, source, numbers(64), (64,), mx.float32)
    host.close()


def test_out_of_bounds_in_a_private_array_is_caught(metal_host) -> None:
    source = """
        float values[4] = {1, 2, 3, 4};
        uint i = thread_position_in_grid.x;
        y[i] = values[uint(x[i]) + i / 63];"""
    with pytest.raises(HostError, match="out of bounds"):
        launch(metal_host, source, mx.full((64,), 3.0), (64,), mx.float32)


def test_misaligned_vector_load_is_caught(metal_host) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        y[i] = i == 0 ? (*(const device float4*)(x + 1)).x : 0.0f;"""
    with pytest.raises(HostError, match="misaligned address"):
        launch(metal_host, source, numbers(64), (64,), mx.float32)


def test_not_a_number_to_integer_is_caught(metal_host) -> None:
    source = "uint i = thread_position_in_grid.x; y[i] = int(x[i]);"
    with pytest.raises(HostError, match="outside the range of representable values"):
        launch(metal_host, source, mx.full((64,), float("nan")), (64,), mx.int32)


def test_unwritten_output_is_caught(metal_host) -> None:
    source = "uint i = thread_position_in_grid.x; if (i != 17) { y[i] = x[i]; }"
    with pytest.raises(HostError, match="unwritten output: byte 68 of 'y'"):
        launch(metal_host, source, numbers(64), (64,), mx.float32)


def test_divergent_simd_operation_is_caught(metal_host) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        float v = x[i];
        if (i % 2 == 0) {
          v = simd_sum(v);
        }
        y[i] = v;"""
    with pytest.raises(HostError, match="divergent SIMD operation"):
        launch(metal_host, source, numbers(64), (64,), mx.float32)


def test_barrier_that_a_thread_misses_is_caught(metal_host) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        y[i] = x[i];
        if (i == 63) {
          return;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);"""
    with pytest.raises(HostError, match="divergent threadgroup barrier"):
        launch(metal_host, source, numbers(64), (64,), mx.float32)


def test_the_report_names_file_and_line(metal_host) -> None:
    header = """#line 1 "metal/shared.h"
METAL_FUNC void put(device float* y, uint i, float v) {
  y[i] = v;
}
"""
    source = "uint i = thread_position_in_grid.x; put(y, i / 2, x[i]);"
    with pytest.raises(HostError, match=r"at metal/shared.h:2, written by thread"):
        launch(metal_host, source, numbers(64), (32,), mx.float32, header=header)


def test_simd_operations(metal_host) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        uint lane = thread_index_in_simdgroup;
        float v = x[i];
        device float* row = y + 8 * i;
        row[0] = simd_sum(v);
        row[1] = simd_max(v);
        row[2] = simd_shuffle_xor(v, ushort(5));
        row[3] = simd_shuffle(v, ushort(31 - lane));
        row[4] = simd_broadcast(v, ushort(3));
        row[5] = simd_prefix_inclusive_sum(v);
        uint above = as_type<uint>(simd_shuffle_up(v, ushort(2)));
        row[6] = as_type<float>(lane >= 2 ? above : 0u);
        row[7] = float(simdgroup_index_in_threadgroup * 32 + lane);"""
    y = launch(metal_host, source, numbers(64), (64, 8), mx.float32).reshape(2, 32, 8)
    v = np.arange(64, dtype=np.float32).reshape(2, 32)
    lanes = np.arange(32)
    np.testing.assert_array_equal(y[..., 0], v.sum(1, keepdims=True).repeat(32, 1))
    np.testing.assert_array_equal(y[..., 1], v.max(1, keepdims=True).repeat(32, 1))
    np.testing.assert_array_equal(y[..., 2], v[:, lanes ^ 5])
    np.testing.assert_array_equal(y[..., 3], v[:, 31 - lanes])
    np.testing.assert_array_equal(y[..., 4], v[:, [3] * 32])
    np.testing.assert_array_equal(y[..., 5], v.cumsum(1))
    np.testing.assert_array_equal(y[..., 6], np.where(lanes >= 2, v[:, lanes - 2], 0))
    np.testing.assert_array_equal(y[..., 7], np.arange(64).reshape(2, 32))


def test_half_arithmetic_rounds_each_operation(metal_host) -> None:
    source = """
        uint i = thread_position_in_grid.x;
        half a = half(x[i]);
        y[i] = float(a * a + half(1.0f));"""
    x = np.random.default_rng(0).normal(size=64).astype(np.float32)
    h = x.astype(np.float16)
    y = launch(metal_host, source, mx.array(x), (64,), mx.float32)
    np.testing.assert_array_equal(y, (h * h + np.float16(1)).astype(np.float32))


def test_bfloat_rounds_to_nearest_even(metal_host) -> None:
    x = mx.array(np.random.default_rng(1).normal(size=64).astype(np.float32))
    source = "uint i = thread_position_in_grid.x; y[i] = bfloat16_t(x[i]);"
    y = run(metal_host, source, x, (64,), mx.bfloat16)
    assert y.dtype == mx.bfloat16
    assert mx.array_equal(y, x.astype(mx.bfloat16))


def test_implicit_narrowing_to_bfloat_is_refused(metal_host) -> None:
    with pytest.raises(HostError, match="does not compile as host C"):
        launch(metal_host, "y[0] = x[0];", numbers(8), (1,), mx.bfloat16, threads=1)


def test_inputs_of_every_size_class_and_templates(metal_host) -> None:
    kernel = metal_host.metal_kernel(
        name="classes", input_names=["scalar", "few", "many"], output_names=["y", "z"],
        header="template <typename T> METAL_FUNC T twice(T v) { return v + v; }\n",
        source="""
            uint i = thread_position_in_grid.x;
            y[i] = T(twice(many[i]) + few[N] * scalar);
            z[i] = many_shape[0];""",
    )  # fmt: skip
    many = numbers(40)
    y, z = kernel(
        inputs=[3, mx.array([1.0, 2.0, 4.0]), many],
        output_shapes=[(40,), (40,)], output_dtypes=[mx.float16, mx.int32],
        grid=(40, 1, 1), threadgroup=(32, 1, 1), template=[("T", mx.float16), ("N", 2)],
    )  # fmt: skip
    assert mx.array_equal(y, (2 * many + 12).astype(mx.float16))
    assert mx.array_equal(z, mx.full((40,), 40, dtype=mx.int32))


def test_initial_values_reach_the_kernel(metal_host) -> None:
    source = "uint i = thread_position_in_grid.x; if (i % 2) { y[i] = x[i]; }"
    y = launch(metal_host, source, numbers(32), (32,), mx.float32, threads=32, init_value=-1)
    np.testing.assert_array_equal(y, [i if i % 2 else -1 for i in range(32)])


def test_text_that_does_not_compile_is_reported(metal_host) -> None:
    with pytest.raises(HostError, match="does not compile as host C"):
        launch(metal_host, "y[0] = no_such_name;", numbers(64), (64,), mx.float32)


@pytest.mark.parametrize(("find", "tool"), [(toolchain.gxx, "g++"), (toolchain.clang, "clang")])
def test_a_missing_compiler_is_one_sentence(monkeypatch, find, tool) -> None:
    toolchain.tool.cache_clear()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ToolMissingError) as caught:
        find()
    toolchain.tool.cache_clear()
    assert str(caught.value) == f"{tool} is not installed; on Debian, `apt-get install {tool}`."
