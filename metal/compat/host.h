// Prelude for compiling the Metal text of a kernel as host C++ (g++ 12 or newer).
//
// It replaces <metal_stdlib> and MLX's utilities. Barriers, SIMD operations and threadgroup memory
// are calls of the run time in tests/metal_host (the host_* functions below). The words `constant`
// and `threadgroup` in declarations are rewritten by tests/metal_host/text.py. No standard C++
// header is included, so that names of the C library cannot hide names that Metal lacks.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define METAL_FUNC inline
#define always_inline  // so that gcov counts the lines of calls
#define device
#define thread
#define kernel
#define MLX_MTL_PRAGMA_UNROLL
#define MTL_CONST

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
#if defined(__x86_64__)
typedef _Float16 half;
#else
typedef __fp16 half;
#endif
typedef half float16_t;

constexpr half operator""h(long double x) {
  return half(x);
}

// ---- the run time -----------------------------------------------------------------------------

struct HostSimd {                          // one SIMD operation of one SIMD group
  alignas(32) unsigned char slot[32][32];  // each lane's operand
  alignas(32) unsigned char result[32];    // of a reduction, once a lane has computed it
  uint32_t mask;                           // lanes that exist
  uint32_t have_result;
};

struct HostThread {
  uint32_t grid[3], group[3], groups[3], local[3], group_size[3], grid_size[3];
  uint32_t linear, lane, simd, n_simd;
};

extern "C" {
extern HostThread* host_current;
HostSimd* host_simd(const void* value, unsigned size, int kind, int line);
void host_barrier(int scope, int flags, int line);
void* host_threadgroup(const void* key, size_t bytes, size_t align, const char* name);
void host_atomic(const void* address, size_t bytes);
}

template <typename Array>
inline Array& host_threadgroup_variable(const void* key, const char* name) {
  return *static_cast<Array*>(host_threadgroup(key, sizeof(Array), alignof(Array), name));
}

#if defined(__SANITIZE_THREAD__)
#define HOST_UNRECORDED __attribute__((no_sanitize("thread")))
#else
#define HOST_UNRECORDED
#endif

#include "host_types.h"
#include "host_math.h"
#include "host_simd.h"

// ---- MLX's utilities --------------------------------------------------------------------------

template <typename T>
struct Limits {
  static constexpr T max = numeric_limits<T>::max();
  static constexpr T min = numeric_limits<T>::min();
  static constexpr T finite_max = numeric_limits<T>::max();
  static constexpr T finite_min = numeric_limits<T>::min();
};
#define HOST_FLOAT_LIMITS(type)                                        \
  template <>                                                          \
  struct Limits<type> {                                                \
    static constexpr type max = numeric_limits<type>::infinity();      \
    static constexpr type min = type(-__builtin_inff());               \
    static constexpr type finite_max = numeric_limits<type>::max();    \
    static constexpr type finite_min = numeric_limits<type>::lowest(); \
  };
HOST_FLOAT_LIMITS(float)
HOST_FLOAT_LIMITS(half)
HOST_FLOAT_LIMITS(bfloat)

// ---- the call ---------------------------------------------------------------------------------

template <typename F>
struct HostParameters;
template <typename... P>
struct HostParameters<void (*)(P...)> {
  template <int I, typename First, typename... Rest>
  struct At {
    typedef typename At<I - 1, Rest...>::type type;
  };
  template <typename First, typename... Rest>
  struct At<0, First, Rest...> {
    typedef First type;
  };
  template <int I>
  using at = typename At<I, P...>::type;
};
template <typename P>
struct HostArgument {
  static P from(void* buffer) { return static_cast<P>(buffer); }
};
template <typename P>
struct HostArgument<P&> {
  static P& from(void* buffer) { return *static_cast<P*>(buffer); }
};
template <typename P>
struct HostAttribute {  // position of a thread, in the shape that the parameter asks for
  static P from(const uint32_t* v) { return P(v[0]); }
};
template <typename T, int N>
struct HostAttribute<vec<T, N>> {
  static vec<T, N> from(const uint32_t* v) {
    vec<T, N> r;
    for (int i = 0; i < N; i++) {
      r[i] = T(v[i]);
    }
    return r;
  }
};
