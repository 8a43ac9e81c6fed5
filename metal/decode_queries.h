// What decode.metal puts into threadgroup memory first: the LUTs, and the queries, rotated as K is
// and divided by their largest magnitude, so that half precision neither overflows nor underflows
// (the row scales have the factors). All loads from device memory come before the first store.

// Dims that a SIMD group rotates at a time, and the values of a row that a lane holds.
TKV_CONST_FN int query_width(int width) {
  return width == 0 ? LANES : width;
}
TKV_CONST_FN int query_values(int width, int dim) {
  return ceil_div(dim, query_width(width)) * ceil_div(query_width(width), LANES);
}

// What a thread loads before it stores.
template <typename C>
struct Loaded {
  uint k_entries[2 * larger(lut_writes(C::K::BITS, C::K_COPIES, C::THREADS), 1)];
  uint v_entries[2 * larger(lut_writes(C::V::BITS, C::V_COPIES, C::THREADS), 1)];
  uint signs[4];
  float query[query_values(C::K::WIDTH, C::K::DIM)];  // of the SIMD group's first row
};

// Loads a lane's values of query row `row` of `q`; where keys are centred, times `inverse`.
template <typename C>
TKV_FN void fetch_query(thread float* x, const device typename C::T* q, const device float* inverse,
                        int row, int n_rows, int lane) {
  typedef typename C::K K;
  constexpr int W = query_width(K::WIDTH);
  constexpr int N = ceil_div(W, LANES);
  TKV_UNROLL
  for (int j = 0; j < query_values(K::WIDTH, K::DIM); j++) {
    const int i = j / N * W + lane + j % N * LANES;
    const bool inside = row < n_rows && lane + j % N * LANES < W && i < K::DIM;
    x[j] = inside ? float(q[row * K::DIM + i]) : 0.0f;
    if (C::CENTRED && inside) {
      x[j] *= inverse[i];
    }
  }
}

template <typename C>
TKV_FN void fetch_tables_and_query(thread Loaded<C>& loaded, const device uint* k_constants,
                                   const device uint* v_constants, const device typename C::T* q,
                                   const device float* inverse, int n_rows, int simd_group,
                                   int lane) {
  const int thread_index = simd_group * LANES + lane;
  if (C::K_IN_HALF) {
    fetch_lut<C::K::BITS, C::K_COPIES, C::THREADS>(loaded.k_entries, k_constants, thread_index);
  }
  if (C::V_IN_HALF) {
    fetch_lut<C::V::BITS, C::V_COPIES, C::THREADS>(loaded.v_entries, v_constants, thread_index);
  }
  TKV_UNROLL
  for (int j = 0; j < 4; j++) {
    loaded.signs[j] = k_constants[j];
  }
  fetch_query<C>(loaded.query, q, inverse, simd_group, n_rows, lane);
}

// Stores the LUTs, or the levels where products are not in half.
template <typename C>
TKV_FN void store_tables(threadgroup uint* words, thread const Loaded<C>& loaded,
                         const device uint* k_constants, const device uint* v_constants,
                         int thread_index) {
  typedef DecodeMemory<C> Memory;
  threadgroup float* floats = (threadgroup float*)words;
  if (C::K_IN_HALF) {
    store_lut<C::K::BITS, C::K_COPIES, C::THREADS>(words + Memory::K_LUT, loaded.k_entries,
                                                   thread_index);
  } else {
    load_levels<C::K::BITS>(floats + Memory::K_LUT, k_constants, thread_index);
  }
  if (C::V_IN_HALF) {
    store_lut<C::V::BITS, C::V_COPIES, C::THREADS>(words + Memory::V_LUT, loaded.v_entries,
                                                   thread_index);
  } else {
    load_levels<C::V::BITS>(floats + Memory::V_LUT, v_constants, thread_index);
  }
}

// Stores dim `d` of row `row`: floats [dim][row], or halves [vec4][half2][row][2]. Returns the
// stored value.
template <typename C>
TKV_FN float store_query(threadgroup uint* queries, int d, int row, float x) {
  if (!C::K_IN_HALF) {
    ((threadgroup float*)queries)[d * C::PADDED_ROWS + row] = x;
    return x;
  }
  const int place = half_index(C::K::BITS, d % 4);
  const half rounded = half(x);
  ((threadgroup half*)queries)[((d / 4 * 2 + place / 2) * C::PADDED_ROWS + row) * 2 + place % 2] =
      rounded;
  return float(rounded);
}

// Rotates a row and stores it, times `factor`. `x`: a lane's values, with the signs applied.
template <typename C>
TKV_FN void rotate_query(threadgroup uint* words, thread float* x, const device uint* constants,
                         float factor, int row, int simd_group, int lane) {
  typedef typename C::K K;
  typedef DecodeMemory<C> Memory;
  constexpr int W = query_width(K::WIDTH);
  constexpr int N = ceil_div(W, LANES);
  static_assert(!C::K_BIASED || ceil_div(K::DIM, W) * N == K::GROUPS, "a bias for each group");
  threadgroup float* scratch =
      (threadgroup float*)words + Memory::WEIGHTS + simd_group * Memory::WEIGHT_WORDS;
  TKV_UNROLL
  for (int part = 0; part < ceil_div(K::DIM, W); part++) {
    if (K::WIDTH != 0) {
      hadamard_transform<W>(x + part * N, constants, scratch, lane);
    }
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      const int i = part * W + lane + j * LANES;
      float stored = 0.0f;
      if (lane + j * LANES < W && i < K::DIM) {
        stored = store_query<C>(words + Memory::QUERIES, i, row, x[part * N + j] * factor);
      }
      if (C::K_BIASED) {
        const float sum = simd_sum(stored);  // over the dims of a scale group
        if (lane == 0) {
          ((threadgroup float*)words)[Memory::BIASES + (part * N + j) * C::PADDED_ROWS + row] =
              -BIAS * sum;
        }
      }
    }
  }
}

// Stores the rotated queries and their row scales, the factors of a row's scores: its largest
// magnitude and `scale`.
template <typename C>
TKV_FN void store_queries(threadgroup uint* words, thread Loaded<C>& loaded,
                          const device typename C::T* q, const device float* inverse,
                          const device uint* constants, int n_rows, float scale, int simd_group,
                          int lane) {
  typedef typename C::K K;
  constexpr int W = query_width(K::WIDTH);
  constexpr int N = ceil_div(W, LANES);
  threadgroup float* row_scales = (threadgroup float*)words + DecodeMemory<C>::ROW_SCALES;
  for (int row = simd_group; row < C::PADDED_ROWS; row += C::SIMD_GROUPS) {
    if (row >= C::SIMD_GROUPS) {
      fetch_query<C>(loaded.query, q, inverse, row, n_rows, lane);
    }
    float largest = 0.0f;
    TKV_UNROLL
    for (int j = 0; j < query_values(K::WIDTH, K::DIM); j++) {
      const float x = loaded.query[j];
      largest = abs(x) > largest ? abs(x) : largest;
      if (K::WIDTH != 0) {
        loaded.query[j] = flip_sign(x, (loaded.signs[j % N] >> lane) & 1u);
      }
    }
    largest = simd_max(largest);
    if (lane == 0) {
      row_scales[row] = largest * scale / (K::WIDTH == 0 ? 1.0f : sqrt(float(W)));
    }
    rotate_query<C>(words, loaded.query, constants, largest > 0.0f ? 1.0f / largest : 0.0f, row,
                    simd_group, lane);
  }
}
