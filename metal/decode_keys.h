// q.k for decode.metal. A lane handles a token: it reads its row's columns and sums over dims
// alone. Queries are read from threadgroup memory, the same address for all lanes.
//
// Codes are multiplied as half2 and summed in half for a chain of dims; the sums of two chains are
// added in half, and the rest in float32. Unquantised rows, narrow heads and float32 models are
// multiplied in float32.

// Dims of K in one pass (a span) of the q.k loop: whole columns that divide scale groups or are
// divided by them, else the whole row.
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
// One chain: the products of vec4s `begin` to `end` of a span, in half precision.
template <int BITS, int COPIES, int WORDS, int ROWS, int STEP>
TKV_FN void half_products(thread half2* chain, thread const uint* words,
                          threadgroup const uint* queries, threadgroup const float4* shared,
                          uint copy, int begin, int end) {
  constexpr int RP = padded_rows(ROWS);
  TKV_UNROLL
  for (int i = 0; i < STEP * ROWS; i++) {
    chain[i] = as_type<half2>(0u);
  }
  TKV_UNROLL
  for (int vec4 = begin; vec4 < end; vec4++) {
    half2 k[STEP * 2];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      vec4_halves<BITS, COPIES>(k + 2 * i, vec4_bits<BITS>(words + i * WORDS, vec4).x, shared,
                                copy);
    }
    uint q[2 * RP];
    load_half_queries<2 * RP>(q, queries + vec4 * 2 * RP);
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

// Adds the products of vec4s `begin` to `end` of a span, in float32.
template <int BITS, int RAW, int WORDS, int ROWS, int STEP>
TKV_FN void add_float_products(thread float* sums, thread const uint* words,
                               threadgroup const float4* queries, threadgroup const float* levels,
                               int begin, int end) {
  constexpr int RP = padded_rows(ROWS);
  TKV_UNROLL
  for (int vec4 = begin; vec4 < end; vec4++) {
    float4 k[STEP];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      k[i] = vec4_values<BITS, RAW>(vec4_bits<BITS>(words + i * WORDS, vec4), levels);
    }
    TKV_UNROLL
    for (int part = 0; part < RP; part++) {
      const float4 q = queries[vec4 * RP + part];
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

// Whether a column of the next span is loaded as soon as this span's has been used.
TKV_CONST_FN bool prefetch_keys(int bits, int group, int dim, int step) {
  return key_span(bits, group, dim) * bits % 128 == 0 &&
         key_span(bits, group, dim) * bits * step <= 1024;
}
TKV_CONST_FN int key_words(int bits, int group, int dim) {
  return ceil_div(key_span(bits, group, dim) * bits, 32);
}

// Loads column `c` of STEP tokens' rows. `at`: the span's first word in each tile.
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

// Loads the first span of STEP tiles, where spans are prefetched.
template <int BITS, int GROUP, int DIM, int STEP>
TKV_FN void load_first_span(thread uint* words, const device uint* thread* tiles, int lane) {
  constexpr int WORDS = key_words(BITS, GROUP, DIM);
  if (prefetch_keys(BITS, GROUP, DIM, STEP)) {
    TKV_UNROLL
    for (int c = 0; c < WORDS / 4; c++) {
      load_column<WORDS, STEP>(words, tiles, c, lane);
    }
  }
}

// Scale groups of a span.
TKV_CONST_FN int key_scales(int bits, int group, int dim) {
  return group == 0 ? 1 : ceil_div(key_span(bits, group, dim), group);
}

// Loads the bits of the scale of a span's group `g`. `scales`: [group][tile].
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

// Adds q.k of ROWS query rows and STEP tokens a lane (one of each tile) to `score`, without the
// factors in `row_scales`. `scales`: the scales of the first span of `tiles`; `words`: its columns
// where spans are prefetched. On return they are those of `next_tiles`.
template <int BITS, int GROUP, int DIM, int COPIES, int RAW, int ROWS, int STEP>
TKV_FN void key_scores(thread float* score, thread uint* words, thread uint* scales,
                       const device uint* thread* tiles, const device uint* thread* next_tiles,
                       threadgroup const uint* queries, threadgroup const float4* shared, uint copy,
                       threadgroup const float* levels, int n_spans, int lane) {
  constexpr int SPAN = key_span(BITS, GROUP, DIM);
  constexpr int G = GROUP == 0 || GROUP > SPAN ? SPAN : GROUP;
  constexpr int WORDS = key_words(BITS, GROUP, DIM);
  constexpr int SPAN_WORDS = SPAN * BITS;
  constexpr int SPAN_QUERIES = query_words(BITS, DIM, SPAN, ROWS, RAW);
  constexpr bool PREFETCH = prefetch_keys(BITS, GROUP, DIM, STEP);
  for (int span = 0; span < n_spans; span++) {
    const bool last = span + 1 == n_spans;
    const int next_span = last ? 0 : span + 1;
    const device uint* sources[STEP];
    const device uint* next[STEP];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      sources[i] = last ? next_tiles[i] : tiles[i];
      next[i] = sources[i] + next_span * SPAN_WORDS;
      if (!PREFETCH) {
        load_row<SPAN * BITS / 8>(words + i * WORDS, tiles[i] + span * SPAN_WORDS, lane);
      }
    }
    threadgroup const uint* span_queries = queries + span * SPAN_QUERIES;
    TKV_UNROLL
    for (int g = 0; g < ceil_div(SPAN, G); g++) {
      constexpr int CHAIN_VEC4S = CHAIN / 4;
      const int group_end = ((g + 1) * G < SPAN ? (g + 1) * G : SPAN) / 4;
      float sums[STEP * ROWS];
      half2 chains[STEP * ROWS];
      TKV_UNROLL
      for (int i = 0; i < STEP * ROWS; i++) {
        sums[i] = 0.0f;
      }
      TKV_UNROLL
      for (int begin = g * G / 4; begin < group_end; begin += CHAIN_VEC4S) {
        const int end = begin + CHAIN_VEC4S < group_end ? begin + CHAIN_VEC4S : group_end;
        if (keys_in_half(BITS, DIM, RAW)) {
          half2 chain[STEP * ROWS];
          half_products<BITS, COPIES, WORDS, ROWS, STEP>(chain, words, span_queries, shared, copy,
                                                         begin, end);
          // pairs of chains are added in half, the rest in float32
          const bool first = (begin - g * G / 4) / CHAIN_VEC4S % 2 == 0;
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
        if (PREFETCH) {
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
