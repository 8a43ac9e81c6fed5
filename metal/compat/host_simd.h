// Metal's barriers, SIMD operations and atomics for host.h.
#pragma once

#include "host_math.h"

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };
inline mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}

inline void threadgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  host_barrier(1, int(flags), line);
}
inline void simdgroup_barrier(mem_flags flags, int line = __builtin_LINE()) {
  host_barrier(0, int(flags), line);
}

// A lane's operand; of a lane that does not exist all bits are set (a NaN in each float type).
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
// Reduces over 32 lanes as a tree; every lane gets the same value.
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
HOST_UNRECORDED inline T host_prefix(T x, bool inclusive, T zero, int kind, int line,
                                     Combine combine) {
  HostSimd* simd = host_exchange(x, kind, line);
  T acc = zero;
  for (uint i = 0; i < host_current->lane + (inclusive ? 1 : 0); i++) {
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
inline bool simd_is_first() {
  return host_current->lane == 0;
}
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
#define HOST_FETCH(name, expression)                                         \
  template <typename T>                                                      \
  inline T atomic_fetch_##name##_explicit(atomic<T>* a, T v, memory_order) { \
    return host_fetch(a, [v](T old) { return T(expression); });              \
  }
HOST_FETCH(add, old + v)
HOST_FETCH(sub, old - v)
HOST_FETCH(or, old | v)
HOST_FETCH(and, old& v)
HOST_FETCH(xor, old ^ v)
HOST_FETCH(max, old > v ? old : v)
HOST_FETCH(min, old < v ? old : v)

}  // namespace metal

using namespace metal;
