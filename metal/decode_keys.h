// q.k of a lane's tokens for decode.metal. A lane is a token: it reads its row's columns and sums
// alone; q comes from threadgroup memory by reads that are the same for all lanes.
//
// Codes are multiplied as half2 and summed in half for a chain of dims; the sums of two chains are
// added in half, and the rest in float32. Raw rows, narrow heads and models in float32 are
// multiplied in float32. Every query row is divided by its largest value beforehand (`row_scales`),
// so that halves neither overflow nor vanish.

// dims of a chain
constant constexpr int CHAIN = 16;

// Heads narrower than four chains have too few of them for their rounding to average out. A model
// in float32 (`raw` as in raw_value) gets float32 products.
TKV_CONST_FN bool keys_in_halves(int bits, int dim, int raw) {
  return bits <= 8 && dim >= 4 * CHAIN && raw != 2;
}
// Query rows are padded so that reads are whole.
TKV_CONST_FN int padded_rows(int rows) {
  return rows <= 2 ? rows : (rows + 3) / 4 * 4;
}
// dims of K that one pass of the q.k loop takes: whole columns that go into scale groups, or into
// which scale groups go; else the row
TKV_CONST_FN int key_columns(int bits) {
  return bits == 3 || bits == 5 ? 128 : (bits > 8 ? 32 : 64);
}
TKV_CONST_FN bool fits_groups(int span, int group) {
  return group == 0 || group % span == 0 || span % group == 0;
}
TKV_CONST_FN int key_span(int bits, int group, int dim) {
  return dim % key_columns(bits) == 0 && fits_groups(key_columns(bits), group) ? key_columns(bits)
                                                                               : dim;
}
// words of threadgroup memory that `n` dims of queries take
TKV_CONST_FN int query_words(int bits, int dim, int n, int rows, int raw) {
  return n * padded_rows(rows) / (keys_in_halves(bits, dim, raw) ? 2 : 1);
}

// Where dim `d` of row `row` lies: floats [dim][row], or halves [quad][half2][row][2].
template <int BITS, int DIM, int RAW, int RP>
TKV_FN int query_place(int d, int row) {
  if (keys_in_halves(BITS, DIM, RAW)) {
    const int place = half_place(BITS, d % 4);
    return ((d / 4 * 2 + place / 2) * RP + row) * 2 + place % 2;
  }
  return d * RP + row;
}

template <int BITS, int DIM, int RAW>
TKV_FN void store_query(threadgroup uint* queries, int at, float x) {
  if (keys_in_halves(BITS, DIM, RAW)) {
    ((threadgroup half*)queries)[at] = half(x);
  } else {
    ((threadgroup float*)queries)[at] = x;
  }
}

// What a SIMD group rotates of a query row at once, and its values that a lane holds.
TKV_CONST_FN int query_width(int width) {
  return width == 0 ? LANES : width;
}
TKV_CONST_FN int query_values(int width, int dim) {
  return ceil_div(dim, query_width(width)) * ceil_div(query_width(width), LANES);
}

// A lane's values of query row `row`.
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

// Queries to threadgroup memory, rotated as K is. `x`: what fetch_query gives of the SIMD group's
// first row; `signs`: the constants' first words; `row_scales`: what a row's sums are to be
// multiplied by, the attention's scale among it.
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
        rotate_flipped<W>(x + part * N, constants, scratch + simd_group * 128, lane);
      }
      TKV_UNROLL
      for (int j = 0; j < N; j++) {
        const int i = part * W + lane + j * LANES;
        if (lane + j * LANES < W && i < DIM) {
          store_query<BITS, DIM, RAW>(queries, query_place<BITS, DIM, RAW, RP>(i, row),
                                      x[part * N + j] * factor);
        }
      }
    }
  }
}

// Four half2 of q, one read where rows allow it.
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

// Products of quads `begin` to `end` of a span, in halves, a chain.
template <int BITS, int COPIES, int WORDS, int ROWS, int STEP>
TKV_FN void half_products(thread half2* chain, thread const uint* words,
                          threadgroup const uint* queries, threadgroup const float4* shared,
                          uint own, int begin, int end) {
  constexpr int RP = padded_rows(ROWS);
  TKV_UNROLL
  for (int i = 0; i < STEP * ROWS; i++) {
    chain[i] = as_type<half2>(0u);
  }
  TKV_UNROLL
  for (int quad = begin; quad < end; quad++) {
    half2 k[STEP * 2];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      quad_halves<BITS, COPIES>(k + 2 * i, quad_bits<BITS>(words + i * WORDS, quad).x, shared, own);
    }
    uint q[2 * RP];
    load_half_queries<2 * RP>(q, queries + quad * 2 * RP);
    TKV_UNROLL
    for (int pair = 0; pair < 2; pair++) {
      TKV_UNROLL
      for (int r = 0; r < ROWS; r++) {
        TKV_UNROLL
        for (int i = 0; i < STEP; i++) {
          chain[i * ROWS + r] =
              fma(k[2 * i + pair], as_type<half2>(q[pair * RP + r]), chain[i * ROWS + r]);
        }
      }
    }
  }
}

// Adds the products of quads `begin` to `end` of a span, in float32.
template <int BITS, int RAW, int WORDS, int ROWS, int STEP>
TKV_FN void add_float_products(thread float* sums, thread const uint* words,
                               threadgroup const float4* queries, threadgroup const float* levels,
                               int begin, int end) {
  constexpr int RP = padded_rows(ROWS);
  TKV_UNROLL
  for (int quad = begin; quad < end; quad++) {
    float4 k[STEP];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      k[i] = quad_values<BITS, RAW>(quad_bits<BITS>(words + i * WORDS, quad), levels);
    }
    TKV_UNROLL
    for (int part = 0; part < RP; part++) {
      const float4 q = queries[quad * RP + part];
      TKV_UNROLL
      for (int e = 4 * part; e < 4 * part + 4; e++) {
        if (e % RP < ROWS) {
          TKV_UNROLL
          for (int i = 0; i < STEP; i++) {
            sums[i * ROWS + e % RP] += component(k[i], e / RP) * component(q, e % 4);
          }
        }
      }
    }
  }
}

// Whether a span's columns are loaded again as soon as they are used, for the next span.
TKV_CONST_FN bool keys_ahead(int bits, int group, int dim, int step) {
  return key_span(bits, group, dim) * bits % 128 == 0 &&
         key_span(bits, group, dim) * bits * step <= 1024;
}
TKV_CONST_FN int key_words(int bits, int group, int dim) {
  return ceil_div(key_span(bits, group, dim) * bits, 32);
}

// Column `c` of STEP tokens' rows; `at`: each tile's word where the span begins.
template <int WORDS, int STEP>
TKV_FN void load_column(thread uint* words, const device uint* thread* at, int c, int lane) {
  TKV_UNROLL
  for (int i = 0; i < STEP; i++) {
    const uint4 v = ((const device uint4*)at[i])[c * TILE + lane];
    words[i * WORDS + 4 * c] = v.x;
    words[i * WORDS + 4 * c + 1] = v.y;
    words[i * WORDS + 4 * c + 2] = v.z;
    words[i * WORDS + 4 * c + 3] = v.w;
  }
}

// The first span of STEP tiles, where spans are loaded ahead.
template <int BITS, int GROUP, int DIM, int STEP>
TKV_FN void load_first_span(thread uint* words, const device uint* thread* tiles, int lane) {
  constexpr int WORDS = key_words(BITS, GROUP, DIM);
  if (keys_ahead(BITS, GROUP, DIM, STEP)) {
    TKV_UNROLL
    for (int c = 0; c < WORDS / 4; c++) {
      load_column<WORDS, STEP>(words, tiles, c, lane);
    }
  }
}

// scale groups that a span touches
TKV_CONST_FN int key_scales(int bits, int group, int dim) {
  return group == 0 ? 1 : ceil_div(key_span(bits, group, dim), group);
}

// Bits of the scale of a span's group `g`; `scales` [group][tile].
template <int BITS, int GROUP, int DIM, int STEP>
TKV_FN void load_key_scale(thread uint* scales, const device uint* thread* tiles, int span, int g,
                           int lane) {
  if (GROUP == 0) {
    return;
  }
  constexpr int WIDTH = GROUP == 0 ? 1 : GROUP;
  TKV_UNROLL
  for (int i = 0; i < STEP; i++) {
    const device ushort* at = (const device ushort*)(tiles[i] + code_words(BITS, DIM));
    scales[g * STEP + i] = at[(span * key_span(BITS, GROUP, DIM) / WIDTH + g) * TILE + lane];
  }
}

template <int BITS, int GROUP, int DIM, int STEP>
TKV_FN void load_key_scales(thread uint* scales, const device uint* thread* tiles, int span,
                            int lane) {
  TKV_UNROLL
  for (int g = 0; g < key_scales(BITS, GROUP, DIM); g++) {
    load_key_scale<BITS, GROUP, DIM, STEP>(scales, tiles, span, g, lane);
  }
}

// Adds q.k of STEP tokens a lane (one in each tile) and ROWS query rows to `score`, but for the
// factors that load_queries gives. `scales` holds the scales of the first span of `tiles`, `words`
// its columns where spans are loaded ahead; in the end, those of `next_tiles`.
template <int BITS, int GROUP, int DIM, int COPIES, int RAW, int ROWS, int STEP>
TKV_FN void key_scores(thread float* score, thread uint* words, thread uint* scales,
                       const device uint* thread* tiles, const device uint* thread* next_tiles,
                       threadgroup const uint* queries, threadgroup const float4* shared, uint own,
                       threadgroup const float* levels, int n_spans, int lane) {
  constexpr int SPAN = key_span(BITS, GROUP, DIM);
  constexpr int G = GROUP == 0 || GROUP > SPAN ? SPAN : GROUP;
  constexpr int WORDS = key_words(BITS, GROUP, DIM);
  constexpr int SPAN_WORDS = SPAN * BITS;
  constexpr int SPAN_QUERIES = query_words(BITS, DIM, SPAN, ROWS, RAW);
  constexpr bool AHEAD = keys_ahead(BITS, GROUP, DIM, STEP);
  for (int span = 0; span < n_spans; span++) {
    const bool last = span + 1 == n_spans;
    const int next_span = last ? 0 : span + 1;
    const device uint* sources[STEP];
    const device uint* next[STEP];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      sources[i] = last ? next_tiles[i] : tiles[i];
      next[i] = sources[i] + next_span * SPAN_WORDS;
      if (!AHEAD) {
        load_row<SPAN * BITS / 8>(words + i * WORDS, tiles[i] + span * SPAN_WORDS, lane);
      }
    }
    threadgroup const uint* span_queries = queries + span * SPAN_QUERIES;
    TKV_UNROLL
    for (int g = 0; g < ceil_div(SPAN, G); g++) {
      constexpr int CHAIN_QUADS = CHAIN / 4;
      const int group_end = ((g + 1) * G < SPAN ? (g + 1) * G : SPAN) / 4;
      float sums[STEP * ROWS];
      half2 chains[STEP * ROWS];
      TKV_UNROLL
      for (int i = 0; i < STEP * ROWS; i++) {
        sums[i] = 0.0f;
      }
      TKV_UNROLL
      for (int begin = g * G / 4; begin < group_end; begin += CHAIN_QUADS) {
        const int end = begin + CHAIN_QUADS < group_end ? begin + CHAIN_QUADS : group_end;
        if (keys_in_halves(BITS, DIM, RAW)) {
          half2 chain[STEP * ROWS];
          half_products<BITS, COPIES, WORDS, ROWS, STEP>(chain, words, span_queries, shared, own,
                                                         begin, end);
          // two chains are added up before they go into float32
          const bool first = (begin - g * G / 4) / CHAIN_QUADS % 2 == 0;
          TKV_UNROLL
          for (int i = 0; i < STEP * ROWS; i++) {
            chains[i] = first ? chain[i] : chains[i] + chain[i];
            if (!first || end == group_end) {
              sums[i] += float(chains[i].x) + float(chains[i].y);
            }
          }
        } else {
          add_float_products<BITS, RAW, WORDS, ROWS, STEP>(
              sums, words, (threadgroup const float4*)span_queries, levels, begin, end);
        }
        if (AHEAD) {
          TKV_UNROLL
          for (int c = begin * BITS / 32; c < end * BITS / 32; c++) {
            load_column<WORDS, STEP>(words, next, c, lane);
          }
        }
      }
      TKV_UNROLL
      for (int i = 0; i < STEP; i++) {
        const float scale = GROUP == 0 ? 1.0f : half_bits(scales[g * STEP + i]);
        TKV_UNROLL
        for (int r = 0; r < ROWS; r++) {
          score[i * ROWS + r] += scale * sums[i * ROWS + r];
        }
      }
      load_key_scale<BITS, GROUP, DIM, STEP>(scales, sources, next_span, g, lane);
    }
  }
}
