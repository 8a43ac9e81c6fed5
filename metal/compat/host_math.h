// Metal's type traits and arithmetic for host.h. Half precision goes through float and is rounded
// after each operation.
#pragma once

#include "host_types.h"

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
#define HOST_MATH_1(name, expression)  \
  inline float name(float x) {         \
    return expression;                 \
  }                                    \
  inline half name(half h) {           \
    float x = h;                       \
    return half(expression);           \
  }                                    \
  inline bfloat name(bfloat h) {       \
    float x = h;                       \
    return bfloat(expression);         \
  }                                    \
  template <typename T, int N>         \
  inline vec<T, N> name(vec<T, N> v) { \
    for (int i = 0; i < N; i++) {      \
      v[i] = name(v[i]);               \
    }                                  \
    return v;                          \
  }
#define HOST_MATH_FLOAT                         \
  HOST_MATH_1(exp, __builtin_expf(x))           \
  HOST_MATH_1(exp2, __builtin_exp2f(x))         \
  HOST_MATH_1(log, __builtin_logf(x))           \
  HOST_MATH_1(log2, __builtin_log2f(x))         \
  HOST_MATH_1(sqrt, __builtin_sqrtf(x))         \
  HOST_MATH_1(rsqrt, 1.0f / __builtin_sqrtf(x)) \
  HOST_MATH_1(sin, __builtin_sinf(x))           \
  HOST_MATH_1(cos, __builtin_cosf(x))           \
  HOST_MATH_1(tanh, __builtin_tanhf(x))         \
  HOST_MATH_1(fabs, __builtin_fabsf(x))         \
  HOST_MATH_1(floor, __builtin_floorf(x))       \
  HOST_MATH_1(ceil, __builtin_ceilf(x))         \
  HOST_MATH_1(trunc, __builtin_truncf(x))       \
  HOST_MATH_1(round, __builtin_roundf(x))       \
  HOST_MATH_1(rint, __builtin_rintf(x))
HOST_MATH_FLOAT
namespace fast {
HOST_MATH_FLOAT
}
namespace precise {
HOST_MATH_FLOAT
}

#define HOST_PREDICATE(name, expression) \
  inline bool name(float x) {            \
    return expression;                   \
  }                                      \
  inline bool name(half h) {             \
    return name(float(h));               \
  }                                      \
  inline bool name(bfloat h) {           \
    return name(float(h));               \
  }
HOST_PREDICATE(isnan, __builtin_isnan(x))
HOST_PREDICATE(isinf, __builtin_isinf(x))
HOST_PREDICATE(isfinite, __builtin_isfinite(x))
HOST_PREDICATE(signbit, __builtin_signbit(x))

// min and max of a NaN and a number is the number, as in Metal.
#define HOST_MINMAX(type, unordered)            \
  inline type max(type a, type b) {             \
    return a > b || unordered(b) ? a : b;       \
  }                                             \
  inline type min(type a, type b) {             \
    return a < b || unordered(b) ? a : b;       \
  }                                             \
  inline type clamp(type x, type lo, type hi) { \
    return min(max(x, lo), hi);                 \
  }                                             \
  inline type select(type a, type b, bool c) {  \
    return c ? b : a;                           \
  }
#define HOST_ORDERED(x) false
HOST_MINMAX(float, isnan)
HOST_MINMAX(half, isnan)
HOST_MINMAX(bfloat, isnan)
#define HOST_INTEGER(type)                                                                         \
  HOST_MINMAX(type, HOST_ORDERED)                                                                  \
  inline type abs(type x) {                                                                        \
    return x < type(0) ? type(-x) : x;                                                             \
  }                                                                                                \
  inline type popcount(type x) {                                                                   \
    return type(__builtin_popcountll((unsigned long long)x & (~0ull >> (64 - 8 * sizeof(type))))); \
  }                                                                                                \
  inline type ctz(type x) {                                                                        \
    return x ? type(__builtin_ctzll((unsigned long long)x)) : type(8 * sizeof(type));              \
  }                                                                                                \
  inline type clz(type x) {                                                                        \
    unsigned long long u = (unsigned long long)x & (~0ull >> (64 - 8 * sizeof(type)));             \
    return u ? type(__builtin_clzll(u) - (64 - 8 * int(sizeof(type)))) : type(8 * sizeof(type));   \
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
inline float abs(float x) {
  return __builtin_fabsf(x);
}
inline half abs(half x) {
  return fabs(x);
}
inline bfloat abs(bfloat x) {
  return fabs(x);
}
inline float fmax(float a, float b) {
  return max(a, b);
}
inline float fmin(float a, float b) {
  return min(a, b);
}
inline half fmax(half a, half b) {
  return max(a, b);
}
inline half fmin(half a, half b) {
  return min(a, b);
}
inline float fma(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
inline half fma(half a, half b, half c) {
  return half(double(a) * double(b) + double(c));
}
inline float sign(float x) {
  return isnan(x) ? 0.0f : float((x > 0) - (x < 0));
}
inline float copysign(float a, float b) {
  return __builtin_copysignf(a, b);
}
inline float ldexp(float x, int e) {
  return __builtin_ldexpf(x, e);
}
inline float pow(float a, float b) {
  return __builtin_powf(a, b);
}
inline float atan2(float a, float b) {
  return __builtin_atan2f(a, b);
}
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

}  // namespace metal
