"""Small kernels that the type check must refuse, and some that it must accept."""

from __future__ import annotations

import mlx.core as mx
import pytest
from metal_host import HostError, Launch, Recorder, metal_text
from metal_host.typecheck import check_launch, check_launches, check_same_text

HEADER = """
constant constexpr int PAIR = 2;
constant float LEVELS[2] = {0.5f, 2.0f};
template <typename T>
METAL_FUNC float pair_sum(threadgroup const T* values, thread float& largest, uint i) {
  largest = max(float(values[i]), float(values[i ^ 1u]));
  return float(values[i]) + float(values[i ^ 1u]);
}
struct Pair {
  float low, high;
};
METAL_FUNC Pair pair(uint i, float v) {
  Pair p;
  p.low = i < 8 && v > 0.0f ? v * v : v;
  p.high = v;
  return p;
}
METAL_FUNC float level(const device float* x, uint i) {
  return x[i] * LEVELS[i % PAIR];
}
"""

SOURCE = """
threadgroup float values[64];
uint i = thread_position_in_threadgroup.x;
values[i] = level(x, i) * float(half(2.0h)) + scale;
threadgroup_barrier(mem_flags::mem_threadgroup);
float largest;
float4 parts = float4(pair_sum<float>(values, largest, i), few[0], float2(1.0f, 2.0f));
parts *= 0.5f;
const device float4* wide = (const device float4*)x;
Pair both = pair(i, wide[0].x * parts.y);
parts.z = both.low * few[2] + (i & 1u ? 1.0f : both.high);
y[i] = T(simd_sum(parts.x) + largest + float(as_type<ushort>(half(parts.y))));
"""


def recorded(source: str = SOURCE, header: str = HEADER, threads: int = 64, dtype=mx.bfloat16,
             template: tuple = (), n: int = 64,
             names: tuple = ("x", "few", "scale")) -> Launch:  # fmt: skip
    recorder = Recorder()
    kernel = recorder.metal_kernel(
        name="fixture", input_names=list(names), output_names=["y"], source=source, header=header
    )
    kernel(
        inputs=[mx.zeros((n,)), mx.zeros((3,)), mx.array(1.0)], output_shapes=[(n,)],
        output_dtypes=[dtype], grid=(n, 1, 1), threadgroup=(threads, 1, 1),
        template=[("T", dtype), *template],
    )  # fmt: skip
    return recorder.launches[0]


def messages(launch: Launch) -> str:
    return "\n".join(str(p) for p in check_launch(launch))


def replaced(old: str, new: str) -> tuple[str, str]:
    assert (old in HEADER) != (old in SOURCE)
    return SOURCE.replace(old, new), HEADER.replace(old, new)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_sound_kernel_passes(dtype) -> None:
    assert messages(recorded(dtype=dtype)) == ""


def test_text_is_what_mlx_generates() -> None:
    kernel = mx.fast.metal_kernel(name="twice", input_names=["x"], output_names=["y"],
                                  source="y[0] = 2 * x[0];")  # fmt: skip

    def call(x: mx.array) -> list[mx.array]:
        return kernel(inputs=[x], output_shapes=[(1,)], output_dtypes=[mx.float32],
                      grid=(1, 1, 1), threadgroup=(1, 1, 1))  # fmt: skip

    name, text = metal_text(call, [mx.zeros((9,))])
    assert f"[[kernel]] void {name}(" in text
    assert "const device float* x [[buffer(0)]]" in text
    assert "y[0] = 2 * x[0];" in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("threadgroup const T* values", "device const T* values", "call to 'pair_sum'"),
        ("const device float* x", "threadgroup const float* x", "call to 'level'"),
        ("const device float* x", "constant float* x", "call to 'level'"),
        ("thread float& largest", "threadgroup float& largest", "call to 'pair_sum'"),
        ("values[i] = level", "threadgroup float* p = x; values[i] = level",
         "'__local float *__private' with an lvalue of type 'const __global float"),
        ("y[i] = T(", "device float* p = values; y[i] = T(",
         "'__global float *__private' with an lvalue of type '__local float"),
    ],
)  # fmt: skip
def test_wrong_address_space_is_refused(old, new, message) -> None:
    source, header = replaced(old, new)
    assert message in messages(recorded(source, header))


def test_pointer_to_no_address_space_is_refused() -> None:
    source, header = replaced("const device float* x", "const float* x")
    assert "names no address space" in messages(recorded(source, header))


@pytest.mark.parametrize(
    "statement",
    [
        "const float* p = x;",
        "float4 v = *(const float4*)x;",
        "vec<float, 4>& v = parts;",
        "for (float* p = values; p != values; p++) {}",
        "float f = *reinterpret_cast<const float*>(x);",
    ],
)
def test_statement_with_a_pointer_to_no_address_space_is_refused(statement) -> None:
    assert "names no address space" in messages(recorded(SOURCE + statement))


@pytest.mark.parametrize("target", ["x[i]", "LEVELS[0]", "few[0]"])
def test_writing_to_inputs_and_constants_is_refused(target) -> None:
    assert "read-only variable" in messages(recorded(SOURCE + f"{target} = 1.0f;"))


def test_simd_sum_of_64_bits_is_refused() -> None:
    assert "'simd_sum' is ambiguous" in messages(recorded(SOURCE + "simd_sum(long(i));"))


def test_40_kib_of_threadgroup_memory_are_refused() -> None:
    big = SOURCE.replace("values[64]", "values[64], more[40 * 256 - 64]")
    assert "threadgroup memory above 32 KiB" in messages(recorded(big))
    fits = SOURCE.replace("values[64]", "values[64], more[32 * 256 - 64]")
    assert messages(recorded(fits)) == ""


def test_threadgroup_variable_in_a_helper_is_refused() -> None:
    header = HEADER.replace("return x[i]", "threadgroup float t[4]; return x[i]")
    assert "cannot be declared in local address space" in messages(recorded(SOURCE, header))


def test_length_as_a_template_value_is_refused() -> None:
    assert "is a length" in messages(recorded(template=(("N", 4096),)))
    assert messages(recorded(template=(("D", 512), ("CAUSAL", True)))) == ""


def test_short_length_as_a_template_value_is_refused() -> None:
    launches = [recorded(template=(("N", n),), n=n) for n in (64, 128, 192)]
    assert "depend on a length" in str(check_same_text(launches)[0])
    assert check_same_text([recorded(n=n) for n in (64, 128, 192)]) == []


def test_too_many_threads_are_refused() -> None:
    assert "1024 threads" in messages(recorded(threads=1024, n=1024))


def test_shape_that_mlx_adds_by_accident_is_refused() -> None:
    # an input called `w`, and a variable that happens to end in w_shape
    source = SOURCE.replace("scale", "w").replace("float largest;", "float largest; int few_shape;")
    assert "'few_shape'" in messages(recorded(source, names=("x", "few", "w")))


def test_too_many_buffers_are_refused() -> None:
    names = [f"a{i:02d}" for i in range(31)]
    recorder = Recorder()
    kernel = recorder.metal_kernel(name="many", input_names=names, output_names=["y"],
                                   source="y[0] = a00[0];")  # fmt: skip
    kernel(inputs=[mx.zeros((2,))] * 31, output_shapes=[(1,)], output_dtypes=[mx.float32],
           grid=(1, 1, 1), threadgroup=(1, 1, 1))  # fmt: skip
    assert "32 buffers" in messages(recorder.launches[0])


@pytest.mark.parametrize(
    "statement",
    ["double d = 1;", "auto f = [&](int a) { return a; };", "float s = std::sqrt(2.0f);"],
)
def test_what_metal_lacks_is_refused(statement) -> None:
    assert "Metal lacks" in messages(recorded(SOURCE + statement))


CPP17 = {
    "if constexpr (PAIR == 2) { y[0] = T(0); }": "constexpr if",
    "if (uint n = i; n > 3) { y[0] = T(n); }": "if initialization statements",
    "auto [low, high] = both; y[0] = T(low + high);": "decomposition declarations",
    "static_assert(PAIR == 2);": "with no message",
    "Pair named = {.low = 1.0f, .high = 2.0f}; y[0] = T(named.low);": "designated initializers",
}


@pytest.mark.parametrize("statement", CPP17)
def test_what_metal_before_4_lacks_is_refused(statement) -> None:
    found = messages(recorded(SOURCE + statement))
    assert CPP17[statement] in found and ("C++17" in found or "C++20" in found), found


@pytest.mark.parametrize(
    "declaration",
    [
        "constant constexpr inline int TWO = 2;",
        "namespace a::b { constant int two = 2; }",
        "template <auto N> METAL_FUNC int n() { return N; }",
        "template <int... N> METAL_FUNC int sum() { return (N + ...); }",
    ],
)
def test_declarations_that_metal_before_4_lacks_are_refused(declaration) -> None:
    assert "C++17" in messages(recorded(header=HEADER + declaration))


CLASHES = {
    "METAL_FUNC uint rotate(uint x, uint n) { return x << n; }": "y[0] = T(rotate(i, 3u));",
    "METAL_FUNC float mix(float a, float b, float t) { return a + (b - a) * t; }":
        "y[0] = T(mix(parts.x, parts.y, 0.5f));",
    "METAL_FUNC uint popcount(uint x) { return x; }": "y[0] = T(popcount(i));",
    "METAL_FUNC float length(float4 v) { return v.x; }": "y[0] = T(length(parts));",
    "constant constexpr int step = 32;": "y[0] = T(step);",
    "struct atomic_int { int value; };": "atomic_int n; n.value = 2; y[0] = T(n.value);",
}  # fmt: skip


@pytest.mark.parametrize("declaration", CLASHES)
def test_a_name_of_ours_that_metal_has_too_is_refused(declaration) -> None:
    used = recorded(SOURCE + CLASHES[declaration], HEADER + declaration)
    assert "ambiguous" in messages(used)


def test_a_function_named_as_one_of_metal_with_other_parameters_passes() -> None:
    header = HEADER + "METAL_FUNC uint rotate(thread uint* x, uint n) { return x[0] << n; }"
    assert messages(recorded(SOURCE + "y[0] = T(rotate(&i, 3u) + rotate(i, 3u));", header)) == ""


def test_text_beyond_ascii_is_refused() -> None:
    assert "not ASCII" in messages(recorded(SOURCE + "// caf\u00e9"))


def test_unknown_name_is_refused_with_its_line() -> None:
    header = '#line 7 "metal/fixture.h"\n' + HEADER.replace("return x[i]", "return z[i]")
    assert "metal/fixture.h:" in messages(recorded(SOURCE, header))


def test_many_launches_are_checked_once_each() -> None:
    launches = [recorded(dtype=d) for d in (mx.float32, mx.float16, mx.float32)]
    assert check_launches(launches) == []


def test_preprocessor_errors_are_reported() -> None:
    with pytest.raises(HostError, match="no such dialect"):
        check_launch(recorded(SOURCE, HEADER + "#error no such dialect\n"))
