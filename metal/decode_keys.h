// q.k for decode.metal. A lane handles a token: it reads its row's columns and sums over dims
// alone. Queries are read from threadgroup memory, the same address for all lanes.
//
// Half operands are multiplied in one of two ways. With HALF2 they are summed as half2 for a chain
// of dims; the sums of two chains are added in half, and the rest in float32. Without it every
// product is added in float32. Unquantised rows, narrow heads and float32 models have float32
// operands.

// One chain: the sums of the products of vec4s `begin` to `end` of a span, as half2.
template <typename C>
TKV_FN void sum_chain(thread half2* chain, thread const uint* words,
                      threadgroup const uint* queries, threadgroup const float4* shared, uint copy,
                      int begin, int end) {
  TKV_UNROLL
  for (int i = 0; i < C::STEP * C::ROWS; i++) {
    chain[i] = as_type<half2>(0u);
  }
  TKV_UNROLL
  for (int vec4 = begin; vec4 < end; vec4++) {
    half2 k[C::STEP * 2];
    TKV_UNROLL
    for (int i = 0; i < C::STEP; i++) {
      vec4_halves<C::K::BITS, C::K_COPIES>(
          k + 2 * i, vec4_bits<C::K::BITS>(words + i * C::SPAN_WORDS, vec4).x, shared, copy);
    }
    uint q[2 * C::PADDED_ROWS];
    load_words<2 * C::PADDED_ROWS>(q, queries + vec4 * 2 * C::PADDED_ROWS);
    TKV_UNROLL
    for (int pair = 0; pair < 2; pair++) {
      TKV_UNROLL
      for (int r = 0; r < C::ROWS; r++) {
        TKV_UNROLL
        for (int i = 0; i < C::STEP; i++) {
          chain[i * C::ROWS + r] =
              fma(k[2 * i + pair], as_type<half2>(q[pair * C::PADDED_ROWS + r]),
                  chain[i * C::ROWS + r]);
        }
      }
    }
  }
}

// Adds the products of half operands in float32.
template <typename C>
TKV_FN void add_half_products(thread float* sums, thread const uint* words,
                              threadgroup const uint* queries, threadgroup const float4* shared,
                              uint copy, int begin, int end) {
  TKV_UNROLL
  for (int vec4 = begin; vec4 < end; vec4++) {
    half2 k[C::STEP * 2];
    TKV_UNROLL
    for (int i = 0; i < C::STEP; i++) {
      const uint bits = vec4_bits<C::K::BITS>(words + i * C::SPAN_WORDS, vec4).x;
      if (C::K_BIASED) {
        biased_halves<C::K::BITS, C::K_COPIES>(k + 2 * i, bits, shared, copy);
      } else {
        vec4_halves<C::K::BITS, C::K_COPIES>(k + 2 * i, bits, shared, copy);
      }
    }
    half q[4 * C::PADDED_ROWS];
    load_halves<4 * C::PADDED_ROWS>(q,
                                    (threadgroup const half*)queries + vec4 * 4 * C::PADDED_ROWS);
    TKV_UNROLL
    for (int pair = 0; pair < 2; pair++) {
      TKV_UNROLL
      for (int r = 0; r < C::ROWS; r++) {
        TKV_UNROLL
        for (int i = 0; i < C::STEP; i++) {
          thread float* sum = sums + i * C::ROWS + r;
          thread const half* two = q + (pair * C::PADDED_ROWS + r) * 2;
          *sum = fma(float(k[2 * i + pair].x), float(two[0]), *sum);
          *sum = fma(float(k[2 * i + pair].y), float(two[1]), *sum);
        }
      }
    }
  }
}

// Adds the products of float32 operands.
template <typename C>
TKV_FN void add_float_products(thread float* sums, thread const uint* words,
                               threadgroup const float4* queries, threadgroup const float* levels,
                               int begin, int end) {
  constexpr int RP = C::PADDED_ROWS;
  TKV_UNROLL
  for (int vec4 = begin; vec4 < end; vec4++) {
    float4 k[C::STEP];
    TKV_UNROLL
    for (int i = 0; i < C::STEP; i++) {
      k[i] = vec4_values<C::K::BITS, C::RAW>(vec4_bits<C::K::BITS>(words + i * C::SPAN_WORDS, vec4),
                                             levels);
    }
    TKV_UNROLL
    for (int part = 0; part < RP; part++) {
      const float4 q = queries[vec4 * RP + part];
      TKV_UNROLL
      for (int e = 4 * part; e < 4 * part + 4; e++) {
        if (e % RP < C::ROWS) {
          TKV_UNROLL
          for (int i = 0; i < C::STEP; i++) {
            sums[i * C::ROWS + e % RP] += component(k[i], e / RP) * component(q, e % 4);
          }
        }
      }
    }
  }
}

// Adds q.k of dims `first` to `end` of a span, which share a scale, to `sums`. Columns are loaded
// when they are used, or those of the next span after it where spans are prefetched.
template <typename C>
TKV_FN void add_products(thread float* sums, thread Keys<C>& keys, thread const Tiles<C>& tiles,
                         int span, thread const Tiles<C>& next, int next_span,
                         threadgroup const uint* queries, threadgroup const float4* shared,
                         uint copy, threadgroup const float* levels, int first, int end, int lane) {
  half2 chains[C::STEP * C::ROWS];
  TKV_UNROLL
  for (int begin = first; begin < end; begin += CHAIN) {
    const int stop = begin + CHAIN < end ? begin + CHAIN : end;
    load_when_used<C>(keys.words, tiles, span, begin, stop, lane);
    if (!C::K_IN_HALF) {
      add_float_products<C>(sums, keys.words, (threadgroup const float4*)queries, levels, begin / 4,
                            stop / 4);
    } else if (!C::HALF2) {
      add_half_products<C>(sums, keys.words, queries, shared, copy, begin / 4, stop / 4);
    } else {
      half2 chain[C::STEP * C::ROWS];
      sum_chain<C>(chain, keys.words, queries, shared, copy, begin / 4, stop / 4);
      const bool odd = (begin - first) / CHAIN % 2 != 0;
      TKV_UNROLL
      for (int i = 0; i < C::STEP * C::ROWS; i++) {
        chains[i] = odd ? chains[i] + chain[i] : chain[i];
        if (odd || stop == end) {
          sums[i] += float(chains[i].x) + float(chains[i].y);
        }
      }
    }
    if (C::PREFETCH_KEYS) {
      TKV_UNROLL
      for (int c = begin * C::K::BITS / 128; c < stop * C::K::BITS / 128; c++) {
        load_column<C>(keys.words, next, next_span, c, lane);
      }
    }
  }
}

// Adds `sums` times the scale of a span's group `g`, and loads the next span's.
template <typename C>
TKV_FN void scale_sums(thread float* score, thread const float* sums, thread Keys<C>& keys,
                       thread const Tiles<C>& tiles, int span, thread const Tiles<C>& next,
                       int next_span, int g, int lane) {
  if (!C::PREFETCH) {
    load_key_scale<C>(keys, tiles, span, g, lane);
  }
  TKV_UNROLL
  for (int i = 0; i < C::STEP; i++) {
    const float scale = C::K::GROUP == 0 ? 1.0f : half_bits(keys.scales[g * C::STEP + i]);
    TKV_UNROLL
    for (int r = 0; r < C::ROWS; r++) {
      score[i * C::ROWS + r] += scale * sums[i * C::ROWS + r];
    }
  }
  if (C::PREFETCH) {
    load_key_scale<C>(keys, next, next_span, g, lane);
  }
}

// Adds q.k of ROWS query rows and STEP tokens of a lane (one of each tile) to `score`, without the
// row scales. `keys`: of the first span of `tiles`; on return, of `next_tiles`.
template <typename C>
TKV_FN void key_scores(thread float* score, thread Keys<C>& keys, thread const Tiles<C>& tiles,
                       thread const Tiles<C>& next_tiles, threadgroup const float4* shared,
                       uint copy, int n_spans, int lane) {
  typedef typename C::K K;
  typedef DecodeMemory<C> Memory;
  constexpr int GROUP = K::GROUP == 0 || K::GROUP > C::SPAN ? C::SPAN : K::GROUP;
  threadgroup const float* floats = (threadgroup const float*)shared;
  for (int span = 0; span < n_spans; span++) {
    const bool last = span + 1 == n_spans;
    const int next_span = last ? 0 : span + 1;
    Tiles<C> next;
    TKV_UNROLL
    for (int i = 0; i < C::STEP; i++) {
      next.at[i] = last ? next_tiles.at[i] : tiles.at[i];
    }
    if (!C::WHOLE_COLUMNS && !C::BROKEN_ROW) {
      load_broken_span<C>(keys.words, tiles, span, lane);
    }
    threadgroup const uint* queries =
        (threadgroup const uint*)shared + Memory::QUERIES + span * query_words<C>(C::SPAN);
    TKV_UNROLL
    for (int g = 0; g < ceil_div(C::SPAN, GROUP); g++) {
      float sums[C::STEP * C::ROWS];
      threadgroup const float* biases =
          floats + Memory::BIASES + (span * ceil_div(C::SPAN, GROUP) + g) * C::PADDED_ROWS;
      TKV_UNROLL
      for (int i = 0; i < C::STEP * C::ROWS; i++) {
        sums[i] = C::K_BIASED ? row_value<C::PADDED_ROWS>(biases, i % C::ROWS) : 0.0f;
      }
      add_products<C>(C::ONE_SCALE ? score : sums, keys, tiles, span, next, next_span, queries,
                      shared, copy, floats + Memory::K_LUT, g * GROUP,
                      (g + 1) * GROUP < C::SPAN ? (g + 1) * GROUP : C::SPAN, lane);
      if (!C::ONE_SCALE) {
        scale_sums<C>(score, sums, keys, tiles, span, next, next_span, g, lane);
      }
    }
  }
  if (C::ONE_SCALE && K::GROUP != 0) {
    float sums[C::STEP * C::ROWS];
    TKV_UNROLL
    for (int i = 0; i < C::STEP * C::ROWS; i++) {
      sums[i] = score[i];
      score[i] = 0.0f;
    }
    scale_sums<C>(score, sums, keys, tiles, 0, next_tiles, 0, 0, lane);
  }
}
