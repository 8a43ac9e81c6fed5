// Prelude for compiling Metal text for AMD GPUs in wave32, whose SIMD groups have 32 lanes as
// Apple's have. Metal's words get definitions here, as far as the kernels need them; opencl.h,
// which checks types, only declares them. A word that is missing is an error of the compiler.
#pragma OPENCL EXTENSION cl_khr_fp16 : enable

#define device __global
#define threadgroup __local
#define constant __constant
#define thread __private
#define METAL_FUNC inline __attribute__((always_inline))

#include "opencl_types.h"
typedef _Float16 bfloat;  // 16 bits, as in opencl.h
typedef bfloat bfloat16_t;

// clang-format off
#define GPU_VECTORS(type) \
  typedef type type##2 __attribute__((ext_vector_type(2))); \
  typedef type type##3 __attribute__((ext_vector_type(3))); \
  typedef type type##4 __attribute__((ext_vector_type(4)));
#define GPU_NUMBERS(M) M(char) M(uchar) M(short) M(ushort) M(int) M(uint) M(half) M(float)
GPU_NUMBERS(GPU_VECTORS)
// clang-format on

template <typename To, typename From>
METAL_FUNC To as_type(From x) {
  return __builtin_bit_cast(To, x);
}

// work items; a SIMD group's index is not known to be the same in all of its lanes, as in Metal
METAL_FUNC uint get_local_id(uint i) {
  return i == 0 ? __builtin_amdgcn_workitem_id_x() : 0;
}
METAL_FUNC uint get_group_id(uint i) {
  return i == 0   ? __builtin_amdgcn_workgroup_id_x()
         : i == 1 ? __builtin_amdgcn_workgroup_id_y()
                  : __builtin_amdgcn_workgroup_id_z();
}
METAL_FUNC uint get_sub_group_id() {
  return get_local_id(0) / 32;
}
METAL_FUNC uint get_sub_group_local_id() {
  return get_local_id(0) % 32;
}

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
METAL_FUNC mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}
METAL_FUNC void threadgroup_barrier(mem_flags) {
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "workgroup");
  __builtin_amdgcn_s_barrier();
}
METAL_FUNC void simdgroup_barrier(mem_flags) {
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
}

// clang-format off
#define GPU_REAL \
  METAL_FUNC float exp2(float x) { return __builtin_exp2f(x); } \
  METAL_FUNC float log2(float x) { return __builtin_log2f(x); } \
  METAL_FUNC float sqrt(float x) { return __builtin_amdgcn_sqrtf(x); } \
  METAL_FUNC float rsqrt(float x) { return __builtin_amdgcn_rsqf(x); } \
  METAL_FUNC float rint(float x) { return __builtin_rintf(x); } \
  METAL_FUNC float floor(float x) { return __builtin_floorf(x); } \
  METAL_FUNC float fabs(float x) { return __builtin_fabsf(x); }
GPU_REAL
namespace fast { GPU_REAL }
namespace precise { GPU_REAL }
METAL_FUNC float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// one instruction, by -ffp-contract=on
#define GPU_FMA(type) METAL_FUNC type fma(type a, type b, type c) { return a * b + c; }
GPU_FMA(half) GPU_FMA(half2) GPU_FMA(half4) GPU_FMA(float2) GPU_FMA(float4)
#define GPU_ORDERED(type) \
  METAL_FUNC type max(type a, type b) { return a < b ? b : a; } \
  METAL_FUNC type min(type a, type b) { return b < a ? b : a; } \
  METAL_FUNC type clamp(type x, type a, type b) { return min(max(x, a), b); } \
  METAL_FUNC type select(type a, type b, bool c) { return c ? b : a; }
GPU_ORDERED(int) GPU_ORDERED(uint) GPU_ORDERED(half) GPU_ORDERED(float)
METAL_FUNC int abs(int x) { return x < 0 ? -x : x; }
METAL_FUNC float abs(float x) { return __builtin_fabsf(x); }

// sums and maxima over a SIMD group as Metal has them cost five shuffles here
#define GPU_SIMD(type) \
  METAL_FUNC type simd_shuffle(type x, ushort lane) { \
    return as_type<type>(__builtin_amdgcn_ds_bpermute(int(lane) * 4, as_type<int>(x))); \
  } \
  METAL_FUNC type simd_broadcast(type x, ushort lane) { return simd_shuffle(x, lane); } \
  METAL_FUNC type simd_shuffle_xor(type x, ushort mask) { \
    return simd_shuffle(x, ushort(get_sub_group_local_id() ^ mask)); \
  } \
  METAL_FUNC type simd_shuffle_down(type x, ushort n) { \
    return simd_shuffle(x, ushort(get_sub_group_local_id() + n)); \
  } \
  METAL_FUNC type simd_shuffle_up(type x, ushort n) { \
    return simd_shuffle(x, ushort(get_sub_group_local_id() - n)); \
  } \
  METAL_FUNC type simd_sum(type x) { \
    for (ushort n = 16; n > 0; n /= 2) x += simd_shuffle_xor(x, n); \
    return x; \
  } \
  METAL_FUNC type simd_max(type x) { \
    for (ushort n = 16; n > 0; n /= 2) x = max(x, simd_shuffle_xor(x, n)); \
    return x; \
  } \
  METAL_FUNC type simd_min(type x) { \
    for (ushort n = 16; n > 0; n /= 2) x = min(x, simd_shuffle_xor(x, n)); \
    return x; \
  }
GPU_SIMD(int) GPU_SIMD(uint) GPU_SIMD(float)
METAL_FUNC bool simd_any(bool x) { return __builtin_amdgcn_uicmp(x, 0, 33) != 0; }
METAL_FUNC bool simd_all(bool x) { return !simd_any(!x); }
// clang-format on

}  // namespace metal

using namespace metal;

// A vector's constructor takes any mix of parts in Metal.
#define char4(...) ((char4)(__VA_ARGS__))
#define uchar4(...) ((uchar4)(__VA_ARGS__))
#define ushort2(...) ((ushort2)(__VA_ARGS__))
#define ushort4(...) ((ushort4)(__VA_ARGS__))
#define int2(...) ((int2)(__VA_ARGS__))
#define int4(...) ((int4)(__VA_ARGS__))
#define uint2(...) ((uint2)(__VA_ARGS__))
#define uint4(...) ((uint4)(__VA_ARGS__))
#define half2(...) ((half2)(__VA_ARGS__))
#define half4(...) ((half4)(__VA_ARGS__))
#define float2(...) ((float2)(__VA_ARGS__))
#define float4(...) ((float4)(__VA_ARGS__))
