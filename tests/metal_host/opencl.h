// Prelude for checking the types of Metal text with clang in C++-for-OpenCL mode: Metal's address
// spaces become OpenCL's, which clang keeps apart as strictly as Metal's compiler does. Only what a
// type check needs is defined. Operations are declared only for the types that Metal has them for.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define METAL_FUNC inline

#include "opencl_types.h"

// A type of its own that keeps to 16 bits. It narrows by itself, which Metal's does not: the host
// layer has a bfloat that refuses that, and clang 14 cannot construct such a class here.
typedef _Float16 bfloat;
typedef bfloat bfloat16_t;

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));
// clang-format off
#define CHECK_VECTORS(type)                              \
  typedef type type##2 __attribute__((ext_vector_type(2))); \
  typedef type type##3 __attribute__((ext_vector_type(3))); \
  typedef type type##4 __attribute__((ext_vector_type(4))); \
  template <typename... A> constexpr type##2 make_##type##2(A...); \
  template <typename... A> constexpr type##3 make_##type##3(A...); \
  template <typename... A> constexpr type##4 make_##type##4(A...);
#define CHECK_NUMBERS(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint) M(half) M(float)
CHECK_NUMBERS(CHECK_VECTORS)
CHECK_VECTORS(long)
CHECK_VECTORS(ulong)

template <typename To, typename From>
To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  return To();
}

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define CHECK_REAL_1(name) \
  float name(float); half name(half); float2 name(float2); float3 name(float3); \
  float4 name(float4); half2 name(half2); half3 name(half3); half4 name(half4);
#define CHECK_REAL_2(name) \
  float name(float, float); half name(half, half); float2 name(float2, float2); \
  float3 name(float3, float3); float4 name(float4, float4); half2 name(half2, half2); \
  half3 name(half3, half3); half4 name(half4, half4);
#define CHECK_REAL_3(name) \
  float name(float, float, float); half name(half, half, half); \
  float4 name(float4, float4, float4); half4 name(half4, half4, half4);
#define CHECK_REAL \
  CHECK_REAL_1(acos) CHECK_REAL_1(acosh) CHECK_REAL_1(asin) CHECK_REAL_1(asinh) \
  CHECK_REAL_1(atan) CHECK_REAL_1(atanh) CHECK_REAL_1(ceil) CHECK_REAL_1(cos) CHECK_REAL_1(cosh) \
  CHECK_REAL_1(cospi) CHECK_REAL_1(exp) CHECK_REAL_1(exp10) CHECK_REAL_1(exp2) \
  CHECK_REAL_1(fabs) CHECK_REAL_1(floor) CHECK_REAL_1(fract) CHECK_REAL_1(log) \
  CHECK_REAL_1(log10) CHECK_REAL_1(log2) CHECK_REAL_1(rint) CHECK_REAL_1(round) \
  CHECK_REAL_1(rsqrt) CHECK_REAL_1(sin) CHECK_REAL_1(sinh) CHECK_REAL_1(sinpi) \
  CHECK_REAL_1(sqrt) CHECK_REAL_1(tan) CHECK_REAL_1(tanh) CHECK_REAL_1(tanpi) \
  CHECK_REAL_1(trunc) CHECK_REAL_2(atan2) CHECK_REAL_2(copysign) CHECK_REAL_2(divide) \
  CHECK_REAL_2(fdim) CHECK_REAL_2(fmax) CHECK_REAL_2(fmin) CHECK_REAL_2(fmod) \
  CHECK_REAL_2(nextafter) CHECK_REAL_2(pow) CHECK_REAL_2(powr) CHECK_REAL_3(fmax3) \
  CHECK_REAL_3(fmedian3) CHECK_REAL_3(fmin3) \
  float ldexp(float, int); half ldexp(half, int); int ilogb(float); int ilogb(half); \
  float frexp(float, __private int&); float modf(float, __private float&); \
  float sincos(float, __private float&);
CHECK_REAL
namespace fast { CHECK_REAL }
namespace precise { CHECK_REAL }
bool isnan(float); bool isnan(half);
bool isinf(float); bool isinf(half);
bool isfinite(float); bool isfinite(half);
bool isnormal(float); bool isnormal(half);
bool isordered(float, float); bool isordered(half, half);
bool isunordered(float, float); bool isunordered(half, half);
bool signbit(float); bool signbit(half);
CHECK_REAL_1(saturate) CHECK_REAL_1(sign) CHECK_REAL_2(step) CHECK_REAL_3(mix)
CHECK_REAL_3(smoothstep)
// All names of Metal's integer functions, so that one of ours that clashes with them is an error.
#define CHECK_INTEGER(type) \
  type absdiff(type, type); type addsat(type, type); type clz(type); type ctz(type); \
  type extract_bits(type, uint, uint); type hadd(type, type); \
  type insert_bits(type, type, uint, uint); type madhi(type, type, type); \
  type madsat(type, type, type); type mulhi(type, type); type popcount(type); \
  type reverse_bits(type); type rhadd(type, type); type rotate(type, type); \
  type subsat(type, type); type max3(type, type, type); type median3(type, type, type); \
  type min3(type, type, type);
#define CHECK_INTEGERS(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint)
#define CHECK_INTEGER_ALL(type) \
  CHECK_INTEGER(type) CHECK_INTEGER(type##2) CHECK_INTEGER(type##3) CHECK_INTEGER(type##4)
CHECK_INTEGERS(CHECK_INTEGER_ALL)
int mul24(int, int); uint mul24(uint, uint); int mad24(int, int, int); uint mad24(uint, uint, uint);
CHECK_REAL_3(max3) CHECK_REAL_3(median3) CHECK_REAL_3(min3)
#define CHECK_GEOMETRIC(type, scalar) \
  scalar distance(type, type); scalar distance_squared(type, type); scalar length(type); \
  scalar length_squared(type); type faceforward(type, type, type); type normalize(type); \
  type reflect(type, type); type refract(type, type, scalar);
CHECK_GEOMETRIC(float2, float) CHECK_GEOMETRIC(float3, float) CHECK_GEOMETRIC(float4, float)
CHECK_GEOMETRIC(half2, half) CHECK_GEOMETRIC(half3, half) CHECK_GEOMETRIC(half4, half)
float3 cross(float3, float3); half3 cross(half3, half3);
uint pack_float_to_snorm4x8(float4); uint pack_float_to_unorm4x8(float4);
uint pack_half_to_snorm4x8(half4); uint pack_half_to_unorm4x8(half4);
uint pack_float_to_snorm2x16(float2); uint pack_float_to_unorm2x16(float2);
float4 unpack_snorm4x8_to_float(uint); float4 unpack_unorm4x8_to_float(uint);
half4 unpack_snorm4x8_to_half(uint); half4 unpack_unorm4x8_to_half(uint);
float2 unpack_snorm2x16_to_float(uint); float2 unpack_unorm2x16_to_float(uint);
#define CHECK_FMA(type) type fma(type, type, type); type mad(type, type, type);
CHECK_FMA(float) CHECK_FMA(half) CHECK_FMA(float2) CHECK_FMA(float4) CHECK_FMA(half2)
CHECK_FMA(half4)
float dot(float2, float2); float dot(float3, float3); float dot(float4, float4);
half dot(half2, half2); half dot(half3, half3); half dot(half4, half4);
bool any(int2); bool any(int3); bool any(int4);
bool all(int2); bool all(int3); bool all(int4);

#define CHECK_ORDERED(type) \
  type max(type, type); type min(type, type); type clamp(type, type, type); type abs(type); \
  type select(type, type, bool);
#define CHECK_ORDERED_ALL(type) \
  CHECK_ORDERED(type) CHECK_ORDERED(type##2) CHECK_ORDERED(type##3) CHECK_ORDERED(type##4)
CHECK_NUMBERS(CHECK_ORDERED_ALL)
CHECK_ORDERED(long)
CHECK_ORDERED(ulong)

// Metal shuffles and reduces scalars and vectors of up to 32 bits a component.
#define CHECK_SIMD(type) \
  type simd_sum(type); type simd_product(type); type simd_max(type); type simd_min(type); \
  type simd_prefix_inclusive_sum(type); type simd_prefix_exclusive_sum(type); \
  type simd_shuffle(type, ushort); type simd_shuffle_xor(type, ushort); \
  type simd_shuffle_down(type, ushort); type simd_shuffle_up(type, ushort); \
  type simd_shuffle_rotate_down(type, ushort); type simd_shuffle_rotate_up(type, ushort); \
  type simd_broadcast(type, ushort); type simd_broadcast_first(type); \
  type simd_prefix_inclusive_product(type); type simd_prefix_exclusive_product(type); \
  type simd_shuffle_and_fill_down(type, type, ushort); \
  type simd_shuffle_and_fill_up(type, type, ushort); \
  type quad_shuffle(type, ushort); type quad_shuffle_xor(type, ushort); \
  type quad_shuffle_down(type, ushort); type quad_shuffle_up(type, ushort); \
  type quad_broadcast(type, ushort); type quad_broadcast_first(type); type quad_sum(type); \
  type quad_product(type); type quad_max(type); type quad_min(type);
#define CHECK_SIMD_ALL(type) \
  CHECK_SIMD(type) CHECK_SIMD(type##2) CHECK_SIMD(type##3) CHECK_SIMD(type##4)
CHECK_NUMBERS(CHECK_SIMD_ALL)
#define CHECK_SIMD_BITS(type) type simd_or(type); type simd_and(type); type simd_xor(type);
CHECK_SIMD_BITS(char) CHECK_SIMD_BITS(uchar) CHECK_SIMD_BITS(short) CHECK_SIMD_BITS(ushort)
CHECK_SIMD_BITS(int) CHECK_SIMD_BITS(uint)
bool simd_any(bool);
bool simd_all(bool);
bool simd_is_first(); bool quad_is_first();
bool quad_any(bool); bool quad_all(bool);
struct simd_vote {
  ulong bits;
  explicit operator ulong() const;
};
simd_vote simd_ballot(bool);
simd_vote simd_active_threads_mask();

// clang-format on

enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
// clang-format off
#define CHECK_UPDATE(space, name) \
  template <typename T, typename V> \
  T atomic_##name##_explicit(space atomic<T>*, V, memory_order);
#define CHECK_ATOMIC(space) \
  template <typename T> T atomic_load_explicit(const space atomic<T>*, memory_order); \
  template <typename T, typename V> \
  void atomic_store_explicit(space atomic<T>*, V, memory_order); \
  CHECK_UPDATE(space, exchange) CHECK_UPDATE(space, fetch_add) CHECK_UPDATE(space, fetch_sub) \
  CHECK_UPDATE(space, fetch_or) CHECK_UPDATE(space, fetch_and) CHECK_UPDATE(space, fetch_xor) \
  CHECK_UPDATE(space, fetch_max) CHECK_UPDATE(space, fetch_min)
CHECK_ATOMIC(__global)
CHECK_ATOMIC(__local)
// clang-format on

}  // namespace metal

using namespace metal;

// A vector's constructor takes any mix of parts in Metal; a call of its name becomes a function.
#define char2(...) make_char2(__VA_ARGS__)
#define char3(...) make_char3(__VA_ARGS__)
#define char4(...) make_char4(__VA_ARGS__)
#define uchar2(...) make_uchar2(__VA_ARGS__)
#define uchar3(...) make_uchar3(__VA_ARGS__)
#define uchar4(...) make_uchar4(__VA_ARGS__)
#define short2(...) make_short2(__VA_ARGS__)
#define short3(...) make_short3(__VA_ARGS__)
#define short4(...) make_short4(__VA_ARGS__)
#define ushort2(...) make_ushort2(__VA_ARGS__)
#define ushort3(...) make_ushort3(__VA_ARGS__)
#define ushort4(...) make_ushort4(__VA_ARGS__)
#define int2(...) make_int2(__VA_ARGS__)
#define int3(...) make_int3(__VA_ARGS__)
#define int4(...) make_int4(__VA_ARGS__)
#define uint2(...) make_uint2(__VA_ARGS__)
#define uint3(...) make_uint3(__VA_ARGS__)
#define uint4(...) make_uint4(__VA_ARGS__)
#define half2(...) make_half2(__VA_ARGS__)
#define half3(...) make_half3(__VA_ARGS__)
#define half4(...) make_half4(__VA_ARGS__)
#define float2(...) make_float2(__VA_ARGS__)
#define float3(...) make_float3(__VA_ARGS__)
#define float4(...) make_float4(__VA_ARGS__)
