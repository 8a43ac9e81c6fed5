// Prelude that lets the Metal text of the kernels compile under NVRTC (mx.fast.cuda_kernel): the
// words of Metal that they use, in CUDA C++. A warp is a SIMD group. MLX compiles with
// --device-as-default-execution-space, so functions need no __device__; they may not have it either
// once `device` is a macro, because CUDA's own __device__ is spelled with that word.
#pragma once

#define TKV_PRELUDE
#define TKV_FN __forceinline__
#define TKV_CONST_FN constexpr
#define TKV_SHARED(type, name, count) __shared__ type name[count]
#define TKV_UNROLL _Pragma("unroll")

#define device
#define threadgroup
#define thread
#define constant static

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

// Vectors are built by call in Metal.
#define uint4(...) make_uint4(__VA_ARGS__)
#define float4(...) make_float4(__VA_ARGS__)

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

TKV_FN float signed_byte(uint word, int index) {
  return __uint_as_float(__byte_perm(word ^ 0x80808080u, 0x4b000000u, 0x7440u + index)) -
         8388736.0f;
}
