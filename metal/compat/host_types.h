// Metal's types for host.h: conversions between bits, bfloat, vectors.
#pragma once

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
  constexpr operator float() const { return __builtin_bit_cast(float, uint32_t(bits) << 16); }
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
inline bfloat operator+(bfloat a, bfloat b) {
  return bfloat(float(a) + float(b));
}
inline bfloat operator-(bfloat a, bfloat b) {
  return bfloat(float(a) - float(b));
}
inline bfloat operator*(bfloat a, bfloat b) {
  return bfloat(float(a) * float(b));
}
inline bfloat operator/(bfloat a, bfloat b) {
  return bfloat(float(a) / float(b));
}
inline bfloat operator-(bfloat a) {
  return bfloat(-float(a));
}

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

#define HOST_VECTOR_OPERATOR(op)                                                 \
  template <typename T, int N>                                                   \
  inline vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {                       \
    vec<T, N> r;                                                                 \
    for (int i = 0; i < N; i++) {                                                \
      r[i] = T(a[i] op b[i]);                                                    \
    }                                                                            \
    return r;                                                                    \
  }                                                                              \
  template <typename T, int N>                                                   \
  inline vec<T, N> operator op(vec<T, N> a, typename HostSame<T>::type b) {      \
    return a op vec<T, N>(b);                                                    \
  }                                                                              \
  template <typename T, int N>                                                   \
  inline vec<T, N> operator op(typename HostSame<T>::type a, vec<T, N> b) {      \
    return vec<T, N>(a) op b;                                                    \
  }                                                                              \
  template <typename T, int N>                                                   \
  inline vec<T, N>& operator op##=(vec<T, N>& a, vec<T, N> b) {                  \
    return a = a op b;                                                           \
  }                                                                              \
  template <typename T, int N>                                                   \
  inline vec<T, N>& operator op##=(vec<T, N>& a, typename HostSame<T>::type b) { \
    return a = a op vec<T, N>(b);                                                \
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

#define HOST_VECTOR_COMPARISON(op)                                             \
  template <typename T, int N>                                                 \
  inline vec<bool, N> operator op(vec<T, N> a, vec<T, N> b) {                  \
    vec<bool, N> r;                                                            \
    for (int i = 0; i < N; i++) {                                              \
      r[i] = a[i] op b[i];                                                     \
    }                                                                          \
    return r;                                                                  \
  }                                                                            \
  template <typename T, int N>                                                 \
  inline vec<bool, N> operator op(vec<T, N> a, typename HostSame<T>::type b) { \
    return a op vec<T, N>(b);                                                  \
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

#define HOST_VECTORS(type)      \
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
