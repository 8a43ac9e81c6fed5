// Prelude that lets the Metal text of a kernel compile as host C++ (g++ 12 or newer).
//
// It stands for <metal_stdlib> and for MLX's own utilities, and hands barriers, SIMD operations
// and threadgroup memory to a run time that plays the GPU (the host_* functions below). The
// words `constant` and `threadgroup` at a declaration need more than a macro: the tool that
// prepares the text rewrites them. No standard header is included, so no name of the C library
// can stand in for one that Metal lacks.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define METAL_FUNC inline
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

constexpr half operator""h(long double x) { return half(x); }

// ---- the run time -----------------------------------------------------------------------------

struct HostSimd {  // one SIMD operation of one SIMD group
  alignas(32) unsigned char slot[32][32];  // what each lane handed in
  alignas(32) unsigned char result[32];    // of a reduction, once a lane has worked it out
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

// ---- types ------------------------------------------------------------------------------------

template <typename To, typename From>
HOST_UNRECORDED inline To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type: sizes differ");
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

struct bfloat {
  uint16_t bits;
  bfloat() = default;
  constexpr explicit bfloat(float x) : bits(round(x)) {}
  constexpr explicit bfloat(half x) : bits(round(float(x))) {}
  constexpr explicit bfloat(double x) : bits(round(float(x))) {}
  constexpr explicit bfloat(int x) : bits(round(float(x))) {}
  constexpr explicit bfloat(uint x) : bits(round(float(x))) {}
  constexpr explicit bfloat(bool x) : bits(round(float(x))) {}
  constexpr operator float() const {
    return __builtin_bit_cast(float, uint32_t(bits) << 16);
  }
  bfloat& operator+=(float x) { return *this = bfloat(float(*this) + x); }
  bfloat& operator-=(float x) { return *this = bfloat(float(*this) - x); }
  bfloat& operator*=(float x) { return *this = bfloat(float(*this) * x); }
  bfloat& operator/=(float x) { return *this = bfloat(float(*this) / x); }
  static constexpr uint16_t round(float x) {
    uint32_t b = __builtin_bit_cast(uint32_t, x);
    if ((b & 0x7fffffffu) > 0x7f800000u) {
      return uint16_t((b >> 16) | 0x40);
    }
    return uint16_t((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
};
typedef bfloat bfloat16_t;
inline bfloat operator+(bfloat a, bfloat b) { return bfloat(float(a) + float(b)); }
inline bfloat operator-(bfloat a, bfloat b) { return bfloat(float(a) - float(b)); }
inline bfloat operator*(bfloat a, bfloat b) { return bfloat(float(a) * float(b)); }
inline bfloat operator/(bfloat a, bfloat b) { return bfloat(float(a) / float(b)); }
inline bfloat operator-(bfloat a) { return bfloat(-float(a)); }

template <typename T, int N>
struct vec;

template <typename T, int N>
struct HostParts;
template <typename T>
struct HostParts<T, 2> {
  T x, y;
};
template <typename T>
struct HostParts<T, 3> {
  T x, y, z;
};
template <typename T>
struct HostParts<T, 4> {
  T x, y, z, w;
};

template <typename T, int N>
struct alignas(sizeof(T) * (N == 3 ? 4 : N)) vec : HostParts<T, N> {
  vec() = default;
  vec(T s) {
    for (int i = 0; i < N; i++) {
      (*this)[i] = s;
    }
  }
  template <typename U>
  explicit vec(vec<U, N> v) {
    for (int i = 0; i < N; i++) {
      (*this)[i] = T(v[i]);
    }
  }
  template <typename A, typename B, typename... Rest>
  vec(A a, B b, Rest... rest) {
    int at = 0;
    put(at, a), put(at, b), (put(at, rest), ...);
    if (at != N) {
      __builtin_trap();
    }
  }
  T& operator[](int i) { return reinterpret_cast<T*>(this)[i]; }
  const T& operator[](int i) const { return reinterpret_cast<const T*>(this)[i]; }

 private:
  template <typename U>
  void put(int& at, U s) {
    (*this)[at++] = T(s);
  }
  template <typename U, int M>
  void put(int& at, vec<U, M> v) {
    for (int i = 0; i < M; i++) {
      (*this)[at++] = T(v[i]);
    }
  }
};

template <typename T>
struct HostSame {
  typedef T type;
};

#define HOST_VECTOR_OPERATOR(op)                                                     \
  template <typename T, int N>                                                       \
  inline vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                           \
    vec<T, N> r;                                                                     \
    for (int i = 0; i < N; i++) {                                                    \
      r[i] = T(a[i] op b[i]);                                                        \
    }                                                                                \
    return r;                                                                        \
  }                                                                                  \
  template <typename T, int N>                                                       \
  inline vec<T, N> operator op(vec<T, N> a, typename HostSame<T>::type b) {          \
    return a op vec<T, N>(b);                                                        \
  }                                                                                  \
  template <typename T, int N>                                                       \
  inline vec<T, N> operator op(typename HostSame<T>::type a, vec<T, N> b) {          \
    return vec<T, N>(a) op b;                                                        \
  }                                                                                  \
  template <typename T, int N>                                                       \
  inline vec<T, N>& operator op##=(vec<T, N>& a, vec<T, N> b) {                      \
    return a = a op b;                                                               \
  }                                                                                  \
  template <typename T, int N>                                                       \
  inline vec<T, N>& operator op##=(vec<T, N>& a, typename HostSame<T>::type b) {     \
    return a = a op vec<T, N>(b);                                                    \
  }
HOST_VECTOR_OPERATOR(+)
HOST_VECTOR_OPERATOR(-)
HOST_VECTOR_OPERATOR(*)
HOST_VECTOR_OPERATOR(/)
HOST_VECTOR_OPERATOR(%)
HOST_VECTOR_OPERATOR(&)
HOST_VECTOR_OPERATOR(|)
HOST_VECTOR_OPERATOR(^)
HOST_VECTOR_OPERATOR(<<)
HOST_VECTOR_OPERATOR(>>)

#define HOST_VECTOR_COMPARISON(op)                                                   \
  template <typename T, int N>                                                       \
  inline vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) {                        \
    vec<bool, N> r;                                                                  \
    for (int i = 0; i < N; i++) {                                                    \
      r[i] = a[i] op b[i];                                                           \
    }                                                                                \
    return r;                                                                        \
  }                                                                                  \
  template <typename T, int N>                                                       \
  inline vec<bool, N> operator op(vec<T, N> a, typename HostSame<T>::type b) {       \
    return a op vec<T, N>(b);                                                        \
  }
HOST_VECTOR_COMPARISON(==)
HOST_VECTOR_COMPARISON(!=)
HOST_VECTOR_COMPARISON(<)
HOST_VECTOR_COMPARISON(<=)
HOST_VECTOR_COMPARISON(>)
HOST_VECTOR_COMPARISON(>=)

template <typename T, int N>
inline vec<T, N> operator-(vec<T, N> a) {
  return vec<T, N>(T(0)) - a;
}
template <typename T, int N>
inline vec<T, N> operator~(vec<T, N> a) {
  return a ^ vec<T, N>(T(~T(0)));
}

#define HOST_VECTORS(type) \
  typedef vec<type, 2> type##2; \
  typedef vec<type, 3> type##3; \
  typedef vec<type, 4> type##4;
HOST_VECTORS(bool)
HOST_VECTORS(char)
HOST_VECTORS(uchar)
HOST_VECTORS(short)
HOST_VECTORS(ushort)
HOST_VECTORS(int)
HOST_VECTORS(uint)
HOST_VECTORS(long)
HOST_VECTORS(ulong)
HOST_VECTORS(half)
HOST_VECTORS(float)
HOST_VECTORS(bfloat)

// ---- namespace metal --------------------------------------------------------------------------

namespace metal {

using ::vec;

template <bool B, typename T = void>
struct enable_if {};
template <typename T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool B, typename T = void>
using enable_if_t = typename enable_if<B, T>::type;
template <bool B, typename T, typename F>
struct conditional {
  typedef T type;
};
template <typename T, typename F>
struct conditional<false, T, F> {
  typedef F type;
};
template <bool B, typename T, typename F>
using conditional_t = typename conditional<B, T, F>::type;
template <typename A, typename B>
struct is_same {
  static constexpr bool value = false;
};
template <typename A>
struct is_same<A, A> {
  static constexpr bool value = true;
};
template <typename A, typename B>
constexpr bool is_same_v = is_same<A, B>::value;

template <typename T>
struct numeric_limits {
  static constexpr T max() { return T(~T(0)) > T(0) ? T(~T(0)) : T(~min()); }
  static constexpr T min() { return T(~T(0)) > T(0) ? T(0) : T(T(1) << (sizeof(T) * 8 - 1)); }
};
template <>
struct numeric_limits<float> {
  static constexpr float max() { return __FLT_MAX__; }
  static constexpr float min() { return __FLT_MIN__; }
  static constexpr float lowest() { return -__FLT_MAX__; }
  static constexpr float epsilon() { return __FLT_EPSILON__; }
  static constexpr float infinity() { return __builtin_inff(); }
  static constexpr float quiet_NaN() { return __builtin_nanf(""); }
};
template <>
struct numeric_limits<half> {
  static constexpr half max() { return half(65504.0f); }
  static constexpr half min() { return half(6.103515625e-05f); }
  static constexpr half lowest() { return half(-65504.0f); }
  static constexpr half epsilon() { return half(9.765625e-04f); }
  static constexpr half infinity() { return half(__builtin_inff()); }
  static constexpr half quiet_NaN() { return half(__builtin_nanf("")); }
};
template <>
struct numeric_limits<bfloat> {
  static constexpr bfloat max() { return bfloat(3.38953139e38f); }
  static constexpr bfloat min() { return bfloat(__FLT_MIN__); }
  static constexpr bfloat lowest() { return bfloat(-3.38953139e38f); }
  static constexpr bfloat epsilon() { return bfloat(7.8125e-03f); }
  static constexpr bfloat infinity() { return bfloat(__builtin_inff()); }
  static constexpr bfloat quiet_NaN() { return bfloat(__builtin_nanf("")); }
};

// Arithmetic on one value: float as it is, half through float and rounded, vectors by component.
#define HOST_MATH_1(name, expression)                                                \
  inline float name(float x) { return expression; }                                  \
  inline half name(half h) {                                                         \
    float x = h;                                                                     \
    return half(expression);                                                         \
  }                                                                                  \
  inline bfloat name(bfloat h) {                                                     \
    float x = h;                                                                     \
    return bfloat(expression);                                                       \
  }                                                                                  \
  template <typename T, int N>                                                       \
  inline vec<T, N> name(vec<T, N> v) {                                               \
    for (int i = 0; i < N; i++) {                                                    \
      v[i] = name(v[i]);                                                             \
    }                                                                                \
    return v;                                                                        \
  }
#define HOST_MATH_FLOAT                                  \
  HOST_MATH_1(exp, __builtin_expf(x))                    \
  HOST_MATH_1(exp2, __builtin_exp2f(x))                  \
  HOST_MATH_1(log, __builtin_logf(x))                    \
  HOST_MATH_1(log2, __builtin_log2f(x))                  \
  HOST_MATH_1(sqrt, __builtin_sqrtf(x))                  \
  HOST_MATH_1(rsqrt, 1.0f / __builtin_sqrtf(x))          \
  HOST_MATH_1(sin, __builtin_sinf(x))                    \
  HOST_MATH_1(cos, __builtin_cosf(x))                    \
  HOST_MATH_1(tanh, __builtin_tanhf(x))                  \
  HOST_MATH_1(fabs, __builtin_fabsf(x))                  \
  HOST_MATH_1(floor, __builtin_floorf(x))                \
  HOST_MATH_1(ceil, __builtin_ceilf(x))                  \
  HOST_MATH_1(trunc, __builtin_truncf(x))                \
  HOST_MATH_1(round, __builtin_roundf(x))                \
  HOST_MATH_1(rint, __builtin_rintf(x))
HOST_MATH_FLOAT
namespace fast {
HOST_MATH_FLOAT
}
namespace precise {
HOST_MATH_FLOAT
}

#define HOST_PREDICATE(name, expression)         \
  inline bool name(float x) { return expression; } \
  inline bool name(half h) { return name(float(h)); } \
  inline bool name(bfloat h) { return name(float(h)); }
HOST_PREDICATE(isnan, __builtin_isnan(x))
HOST_PREDICATE(isinf, __builtin_isinf(x))
HOST_PREDICATE(isfinite, __builtin_isfinite(x))
HOST_PREDICATE(signbit, __builtin_signbit(x))

// A NaN loses against a number, as Metal has it for floating-point min and max.
#define HOST_MINMAX(type, unordered)                                                       \
  inline type max(type a, type b) { return a > b || unordered(b) ? a : b; }                \
  inline type min(type a, type b) { return a < b || unordered(b) ? a : b; }                \
  inline type clamp(type x, type lo, type hi) { return min(max(x, lo), hi); }              \
  inline type select(type a, type b, bool c) { return c ? b : a; }
#define HOST_ORDERED(x) false
HOST_MINMAX(float, isnan)
HOST_MINMAX(half, isnan)
HOST_MINMAX(bfloat, isnan)
#define HOST_INTEGER(type)                                                                 \
  HOST_MINMAX(type, HOST_ORDERED)                                                          \
  inline type abs(type x) { return x < type(0) ? type(-x) : x; }                           \
  inline type popcount(type x) {                                                           \
    return type(__builtin_popcountll((unsigned long long)x & (~0ull >> (64 - 8 * sizeof(type))))); \
  }                                                                                        \
  inline type ctz(type x) { return x ? type(__builtin_ctzll((unsigned long long)x)) : type(8 * sizeof(type)); } \
  inline type clz(type x) {                                                                \
    unsigned long long u = (unsigned long long)x & (~0ull >> (64 - 8 * sizeof(type)));     \
    return u ? type(__builtin_clzll(u) - (64 - 8 * int(sizeof(type)))) : type(8 * sizeof(type)); \
  }
HOST_INTEGER(char)
HOST_INTEGER(int8_t)
HOST_INTEGER(uchar)
HOST_INTEGER(short)
HOST_INTEGER(ushort)
HOST_INTEGER(int)
HOST_INTEGER(uint)
HOST_INTEGER(long)
HOST_INTEGER(ulong)
inline float abs(float x) { return __builtin_fabsf(x); }
inline half abs(half x) { return fabs(x); }
inline bfloat abs(bfloat x) { return fabs(x); }
inline float fmax(float a, float b) { return max(a, b); }
inline float fmin(float a, float b) { return min(a, b); }
inline half fmax(half a, half b) { return max(a, b); }
inline half fmin(half a, half b) { return min(a, b); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline half fma(half a, half b, half c) { return half(double(a) * double(b) + double(c)); }
inline float sign(float x) { return isnan(x) ? 0.0f : float((x > 0) - (x < 0)); }
inline float copysign(float a, float b) { return __builtin_copysignf(a, b); }
inline float ldexp(float x, int e) { return __builtin_ldexpf(x, e); }
inline float pow(float a, float b) { return __builtin_powf(a, b); }
inline float atan2(float a, float b) { return __builtin_atan2f(a, b); }
inline uint extract_bits(uint x, uint offset, uint bits) {
  return bits == 0 ? 0 : (x >> offset) & (~0u >> (32 - bits));
}
inline uint reverse_bits(uint x) {
  uint r = 0;
  for (int i = 0; i < 32; i++) {
    r |= ((x >> i) & 1u) << (31 - i);
  }
  return r;
}

template <typename T, int N>
inline vec<T, N> max(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) {
    a[i] = max(a[i], b[i]);
  }
  return a;
}
template <typename T, int N>
inline vec<T, N> min(vec<T, N> a, vec<T, N> b) {
  for (int i = 0; i < N; i++) {
    a[i] = min(a[i], b[i]);
  }
  return a;
}
template <typename T, int N>
inline vec<T, N> abs(vec<T, N> a) {
  for (int i = 0; i < N; i++) {
    a[i] = abs(a[i]);
  }
  return a;
}
template <typename T, int N>
inline vec<T, N> clamp(vec<T, N> a, vec<T, N> lo, vec<T, N> hi) {
  return min(max(a, lo), hi);
}
template <typename T, int N>
inline vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<bool, N> c) {
  for (int i = 0; i < N; i++) {
    a[i] = c[i] ? b[i] : a[i];
  }
  return a;
}
template <typename T, int N>
inline vec<T, N> fma(vec<T, N> a, vec<T, N> b, vec<T, N> c) {
  for (int i = 0; i < N; i++) {
    a[i] = fma(a[i], b[i], c[i]);
  }
  return a;
}
template <typename T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T s = T(a[0] * b[0]);
  for (int i = 1; i < N; i++) {
    s = T(s + a[i] * b[i]);
  }
  return s;
}
template <int N>
inline bool any(vec<bool, N> a) {
  bool r = false;
  for (int i = 0; i < N; i++) {
    r = r || a[i];
  }
  return r;
}
template <int N>
inline bool all(vec<bool, N> a) {
  return !any(a == vec<bool, N>(false));
}

// ---- barriers and SIMD operations -------------------------------------------------------------

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) { return mem_flags(int(a) | int(b)); }

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  host_barrier(1, int(flags), line);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  host_barrier(0, int(flags), line);
}

// What a lane reads from one that does not exist: every bit set, a NaN in each float type.
template <typename T>
HOST_UNRECORDED inline T host_lane(const HostSimd* simd, uint lane) {
  T value;
  if (lane < 32 && ((simd->mask >> lane) & 1)) {
    __builtin_memcpy(&value, simd->slot[lane], sizeof(T));
  } else {
    __builtin_memset(&value, 0xff, sizeof(T));
  }
  return value;
}
template <typename T>
HOST_UNRECORDED inline HostSimd* host_exchange(const T& value, int kind, int line) {
  static_assert(sizeof(T) <= 32, "SIMD operations take scalars and vectors");
  return host_simd(&value, sizeof(T), kind, line);
}
// Combined as a tree over 32 lanes, the same value for every lane.
template <typename T, typename Combine>
HOST_UNRECORDED inline T host_reduce(T x, int kind, int line, Combine combine) {
  HostSimd* simd = host_exchange(x, kind, line);
  if (!simd->have_result) {
    T v[32];
    bool there[32];
    for (uint i = 0; i < 32; i++) {
      there[i] = (simd->mask >> i) & 1;
      v[i] = host_lane<T>(simd, i);
    }
    for (uint step = 16; step > 0; step /= 2) {
      for (uint i = 0; i < step; i++) {
        v[i] = there[i] && there[i + step] ? combine(v[i], v[i + step])
                                           : (there[i] ? v[i] : v[i + step]);
        there[i] = there[i] || there[i + step];
      }
    }
    __builtin_memcpy(simd->result, &v[0], sizeof(T));
    simd->have_result = 1;
  }
  T result;
  __builtin_memcpy(&result, simd->result, sizeof(T));
  return result;
}
template <typename T, typename Combine>
HOST_UNRECORDED inline T host_prefix(T x, bool own, T zero, int kind, int line, Combine combine) {
  HostSimd* simd = host_exchange(x, kind, line);
  T acc = zero;
  for (uint i = 0; i < host_current->lane + (own ? 1 : 0); i++) {
    acc = combine(acc, host_lane<T>(simd, i));
  }
  return acc;
}

#define HOST_LINE int line = __builtin_LINE()
template <typename T>
inline T simd_sum(T x, HOST_LINE) {
  return host_reduce(x, 1, line, [](T a, T b) { return T(a + b); });
}
template <typename T>
inline T simd_product(T x, HOST_LINE) {
  return host_reduce(x, 2, line, [](T a, T b) { return T(a * b); });
}
template <typename T>
inline T simd_max(T x, HOST_LINE) {
  return host_reduce(x, 3, line, [](T a, T b) { return max(a, b); });
}
template <typename T>
inline T simd_min(T x, HOST_LINE) {
  return host_reduce(x, 4, line, [](T a, T b) { return min(a, b); });
}
template <typename T>
inline T simd_or(T x, HOST_LINE) {
  return host_reduce(x, 5, line, [](T a, T b) { return T(a | b); });
}
template <typename T>
inline T simd_and(T x, HOST_LINE) {
  return host_reduce(x, 6, line, [](T a, T b) { return T(a & b); });
}
template <typename T>
inline T simd_xor(T x, HOST_LINE) {
  return host_reduce(x, 7, line, [](T a, T b) { return T(a ^ b); });
}
inline bool simd_any(bool x, HOST_LINE) {
  return host_reduce(int(x), 8, line, [](int a, int b) { return a | b; }) != 0;
}
inline bool simd_all(bool x, HOST_LINE) {
  return host_reduce(int(x), 9, line, [](int a, int b) { return a & b; }) != 0;
}
template <typename T>
inline T simd_prefix_inclusive_sum(T x, HOST_LINE) {
  return host_prefix(x, true, T(0), 10, line, [](T a, T b) { return T(a + b); });
}
template <typename T>
inline T simd_prefix_exclusive_sum(T x, HOST_LINE) {
  return host_prefix(x, false, T(0), 11, line, [](T a, T b) { return T(a + b); });
}
template <typename T>
inline T simd_shuffle(T x, ushort lane, HOST_LINE) {
  return host_lane<T>(host_exchange(x, 12, line), lane);
}
template <typename T>
inline T simd_shuffle_xor(T x, ushort mask, HOST_LINE) {
  return host_lane<T>(host_exchange(x, 13, line), host_current->lane ^ mask);
}
template <typename T>
inline T simd_shuffle_down(T x, ushort delta, HOST_LINE) {
  return host_lane<T>(host_exchange(x, 14, line), host_current->lane + delta);
}
template <typename T>
inline T simd_shuffle_up(T x, ushort delta, HOST_LINE) {
  return host_lane<T>(host_exchange(x, 15, line), host_current->lane - delta);
}
template <typename T>
inline T simd_shuffle_rotate_down(T x, ushort delta, HOST_LINE) {
  return host_lane<T>(host_exchange(x, 16, line), (host_current->lane + delta) & 31);
}
template <typename T>
inline T simd_shuffle_rotate_up(T x, ushort delta, HOST_LINE) {
  return host_lane<T>(host_exchange(x, 17, line), (host_current->lane - delta) & 31);
}
template <typename T>
inline T simd_broadcast(T x, ushort lane, HOST_LINE) {
  return host_lane<T>(host_exchange(x, 18, line), lane);
}
template <typename T>
inline T simd_broadcast_first(T x, HOST_LINE) {
  return host_lane<T>(host_exchange(x, 19, line), 0);
}
template <typename T>
inline T quad_shuffle_xor(T x, ushort mask, HOST_LINE) {
  return host_lane<T>(host_exchange(x, 20, line), host_current->lane ^ (mask & 3));
}
inline bool simd_is_first() { return host_current->lane == 0; }
struct simd_vote {
  uint64_t bits;
  explicit operator uint64_t() const { return bits; }
};
inline simd_vote simd_ballot(bool x, HOST_LINE) {
  uint mine = x ? 1u << host_current->lane : 0u;
  return simd_vote{host_reduce(mine, 21, line, [](uint a, uint b) { return a | b; })};
}

// ---- atomics (one thread runs at a time, so plain arithmetic is atomic) -----------------------

enum memory_order { memory_order_relaxed };
template <typename T>
struct atomic {
  T value;
};
typedef atomic<int> atomic_int;
typedef atomic<uint> atomic_uint;
typedef atomic<float> atomic_float;
template <typename T, typename Combine>
HOST_UNRECORDED inline T host_fetch(atomic<T>* a, Combine combine) {
  host_atomic(a, sizeof(T));
  T old = a->value;
  a->value = combine(old);
  return old;
}
template <typename T>
HOST_UNRECORDED inline T atomic_load_explicit(const atomic<T>* a, memory_order) {
  return a->value;
}
template <typename T>
inline void atomic_store_explicit(atomic<T>* a, T v, memory_order) {
  host_fetch(a, [v](T) { return v; });
}
template <typename T>
inline T atomic_exchange_explicit(atomic<T>* a, T v, memory_order) {
  return host_fetch(a, [v](T) { return v; });
}
#define HOST_FETCH(name, expression)                                       \
  template <typename T>                                                    \
  inline T atomic_fetch_##name##_explicit(atomic<T>* a, T v, memory_order) { \
    return host_fetch(a, [v](T old) { return T(expression); });            \
  }
HOST_FETCH(add, old + v)
HOST_FETCH(sub, old - v)
HOST_FETCH(or, old | v)
HOST_FETCH(and, old & v)
HOST_FETCH(xor, old ^ v)
HOST_FETCH(max, old > v ? old : v)
HOST_FETCH(min, old < v ? old : v)

}  // namespace metal

using namespace metal;

// ---- what MLX's utilities give besides --------------------------------------------------------

template <typename T>
struct Limits {
  static constexpr T max = numeric_limits<T>::max();
  static constexpr T min = numeric_limits<T>::min();
  static constexpr T finite_max = numeric_limits<T>::max();
  static constexpr T finite_min = numeric_limits<T>::min();
};
#define HOST_FLOAT_LIMITS(type)                                          \
  template <>                                                            \
  struct Limits<type> {                                                  \
    static constexpr type max = numeric_limits<type>::infinity();        \
    static constexpr type min = type(-__builtin_inff());                 \
    static constexpr type finite_max = numeric_limits<type>::max();      \
    static constexpr type finite_min = numeric_limits<type>::lowest();   \
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
