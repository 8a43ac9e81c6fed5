// Queries of decode.metal in threadgroup memory: rotated as K is, and divided by the row's largest
// magnitude, so that half precision neither overflows nor underflows (`row_scales` has the
// factors).

// dims whose products are summed in half precision
constant constexpr int CHAIN = 16;

// Whether q.k is computed in half precision. Heads narrower than four chains are not: too few
// rounding errors to average out. float32 models (`raw` as in raw_value) get float32 products.
TKV_CONST_FN bool keys_in_half(int bits, int dim, int raw) {
  return bits <= 8 && dim >= 4 * CHAIN && raw != 2;
}
// Query rows with padding, so that vector reads are whole.
TKV_CONST_FN int padded_rows(int rows) {
  return rows <= 2 ? rows : (rows + 3) / 4 * 4;
}
// Words of threadgroup memory for `n` dims of the queries.
TKV_CONST_FN int query_words(int bits, int dim, int n, int rows, int raw) {
  return n * padded_rows(rows) / (keys_in_half(bits, dim, raw) ? 2 : 1);
}

// Index of dim `d` of row `row`: floats [dim][row], or halves [vec4][half2][row][2].
template <int BITS, int DIM, int RAW, int RP>
TKV_FN int query_index(int d, int row) {
  if (keys_in_half(BITS, DIM, RAW)) {
    const int place = half_index(BITS, d % 4);
    return ((d / 4 * 2 + place / 2) * RP + row) * 2 + place % 2;
  }
  return d * RP + row;
}

template <int BITS, int DIM, int RAW>
TKV_FN void store_query(threadgroup uint* queries, int at, float x) {
  if (keys_in_half(BITS, DIM, RAW)) {
    ((threadgroup half*)queries)[at] = half(x);
  } else {
    ((threadgroup float*)queries)[at] = x;
  }
}

// Dims that a SIMD group rotates at a time, and the values of a row that a lane holds.
TKV_CONST_FN int query_width(int width) {
  return width == 0 ? LANES : width;
}
TKV_CONST_FN int query_values(int width, int dim) {
  return ceil_div(dim, query_width(width)) * ceil_div(query_width(width), LANES);
}

// Loads a lane's values of query row `row`.
template <typename T, int WIDTH, int DIM>
TKV_FN void fetch_query(thread float* x, const device T* q, int row, int n_rows, int lane) {
  constexpr int W = query_width(WIDTH);
  constexpr int N = ceil_div(W, LANES);
  TKV_UNROLL
  for (int j = 0; j < query_values(WIDTH, DIM); j++) {
    const int i = j / N * W + lane + j % N * LANES;
    const bool inside = row < n_rows && lane + j % N * LANES < W && i < DIM;
    x[j] = inside ? float(q[row * DIM + i]) : 0.0f;
  }
}

// Rotates the queries as K is and stores them in threadgroup memory. `x`: from fetch_query, of the
// SIMD group's first row. `signs`: the first words of `constants`. `row_scales`: the factor of a
// row's sums, attention scale included.
template <typename T, int BITS, int WIDTH, int DIM, int RAW, int ROWS>
TKV_FN void load_queries(thread float* x, thread const uint* signs, const device T* q,
                         threadgroup uint* queries, threadgroup float* row_scales,
                         threadgroup float* scratch, const device uint* constants, int n_rows,
                         float scale, int simd_group, int lane) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int W = query_width(WIDTH);
  constexpr int N = ceil_div(W, LANES);
  for (int row = simd_group; row < RP; row += DECODE_GROUPS) {
    if (row >= DECODE_GROUPS) {
      fetch_query<T, WIDTH, DIM>(x, q, row, n_rows, lane);
    }
    float largest = 0.0f;
    TKV_UNROLL
    for (int j = 0; j < query_values(WIDTH, DIM); j++) {
      largest = abs(x[j]) > largest ? abs(x[j]) : largest;
      if (WIDTH != 0) {
        x[j] = flip_sign(x[j], (signs[j % N] >> lane) & 1u);
      }
    }
    largest = simd_max(largest);
    const float factor = largest > 0.0f ? 1.0f / largest : 0.0f;
    if (lane == 0) {
      row_scales[row] = largest * scale / (WIDTH == 0 ? 1.0f : sqrt(float(W)));
    }
    TKV_UNROLL
    for (int part = 0; part < ceil_div(DIM, W); part++) {
      if (WIDTH != 0) {
        hadamard_transform<W>(x + part * N, constants, scratch + simd_group * 128, lane);
      }
      TKV_UNROLL
      for (int j = 0; j < N; j++) {
        const int i = part * W + lane + j * LANES;
        if (lane + j * LANES < W && i < DIM) {
          store_query<BITS, DIM, RAW>(queries, query_index<BITS, DIM, RAW, RP>(i, row),
                                      x[part * N + j] * factor);
        }
      }
    }
  }
}

// Loads N half2 of q, four at a time where possible.
template <int N>
TKV_FN void load_half_queries(thread uint* q, threadgroup const uint* queries) {
  if (N == 2) {
    const uint2 v = *(threadgroup const uint2*)queries;
    q[0] = v.x;
    q[1] = v.y;
    return;
  }
  TKV_UNROLL
  for (int i = 0; i < N / 4; i++) {
    const uint4 v = ((threadgroup const uint4*)queries)[i];
    q[4 * i] = v.x;
    q[4 * i + 1] = v.y;
    q[4 * i + 2] = v.z;
    q[4 * i + 3] = v.w;
  }
}
