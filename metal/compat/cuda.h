// Prelude for compiling the Metal sources of the kernels with NVRTC (mx.fast.cuda_kernel): the
// words of Metal that they use, in CUDA C++. A warp is a SIMD group. MLX compiles with
// --device-as-default-execution-space, so functions need no __device__; nor could they have it,
// since `device` is a macro here and CUDA's __device__ is spelled with it.
#pragma once

#define TKV_PRELUDE
#define TKV_FN __forceinline__
#define TKV_CONST_FN constexpr
#define TKV_SHARED(type, name, count) __shared__ type name[count]
// Shared memory is not aligned to 16 KiB, so a gap is left before the array.
#define TKV_SHARED_ALIGNED(type, name, count)                                               \
  __shared__ __align__(1024) type name##_all[(count) + (16384 - 1024) / int(sizeof(type))]; \
  type* name =                                                                              \
      name##_all + (0u - uint(__cvta_generic_to_shared(name##_all))) % 16384u / sizeof(type)
#define TKV_UNROLL _Pragma("unroll")

// Limits registers so that two threadgroups of 256 threads fit on a multiprocessor.
#undef __global__
#define __global__ __attribute__((global)) __launch_bounds__(256, 2)

#define device
#define threadgroup
#define thread
#define constant

#define threadgroup_position_in_grid blockIdx
#define simdgroup_index_in_threadgroup (threadIdx.x >> 5)
#define thread_index_in_simdgroup (threadIdx.x & 31)

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

template <typename To, typename From>
TKV_FN To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

struct __align__(8) half4 {
  half x, y, z, w;
};

// Metal's vector constructors.
#define uint2(...) make_uint2(__VA_ARGS__)
#define uint4(...) make_uint4(__VA_ARGS__)
#define float4(...) make_float4(__VA_ARGS__)
#define half2(...) __halves2half2(__VA_ARGS__)

namespace mem_flags {
enum Flag { mem_none, mem_device, mem_threadgroup };
}

TKV_FN void threadgroup_barrier(mem_flags::Flag) {
  __syncthreads();
}
TKV_FN void simdgroup_barrier(mem_flags::Flag) {
  __syncwarp();
}
TKV_FN float simd_shuffle_xor(float x, ushort mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
TKV_FN float simd_sum(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    x += __shfl_xor_sync(0xffffffffu, x, mask);
  }
  return x;
}
TKV_FN float simd_max(float x) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, mask));
  }
  return x;
}
TKV_FN bool simd_any(bool x) {
  return __any_sync(0xffffffffu, x);
}

TKV_FN half2 fma(half2 a, half2 b, half2 c) {
  return __hfma2(a, b, c);
}
TKV_FN float fma(float a, float b, float c) {
  return fmaf(a, b, c);
}

// Approximate and flushing denormals, as in Metal.
TKV_FN float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
TKV_FN float fast_log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Offsets are addresses in the shared window, so no base is added to each.
TKV_FN uint shared_base(const float4* shared) {
  return uint(__cvta_generic_to_shared(shared));
}
template <typename T>
TKV_FN T shared_load(const float4*, uint offset) {
  return *(const T*)__cvta_shared_to_generic(offset);
}

TKV_FN void biased_pairs(half2* pairs, uint word) {
  const uint flipped = word ^ 0x80808080u;
  pairs[0] = as_type<half2>(__byte_perm(flipped, 0x64646464u, 0x4240u));
  pairs[1] = as_type<half2>(__byte_perm(flipped, 0x64646464u, 0x4341u));
}

TKV_FN float signed_byte(uint word, int index) {
  return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440u + index)) -
         8388736.0f;
}
TKV_FN float4 signed_bytes(uint word) {
  return make_float4(signed_byte(word, 0), signed_byte(word, 1), signed_byte(word, 2),
                     signed_byte(word, 3));
}
