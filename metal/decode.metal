// Attention of a few queries over packed rows, straight from the packed bytes.
//
// decode_partial: a threadgroup takes one KV head, one split of the tokens and up to ROWS query
// rows (the GQA group's heads times the queries), so a packed byte is read once for all of them.
// Its SIMD groups stride over tiles of 32 tokens, STEP tiles at a time. For q.k a lane is a token:
// it reads its row's 16-byte columns and sums alone, q comes from threadgroup memory by reads that
// are the same for all lanes. For p.v a lane is four dims: it reads its quad's columns, the weights
// come the same way. Scores are in units of log2 e; the running maximum follows with a margin.
// merge.metal joins the splits.
//
// A token that no query may see costs a weight of zero; what its row holds is never multiplied, so
// stale rows may hold anything. With centred keys a score gets one product q.a more, a block's: what
// q and mu give for each pair of dims is worked out once, and a block's cosines and sines multiply it.

// how far a score may lie above the running maximum before everything is rescaled
constant constexpr float MARGIN = 8.0f;

TKV_CONST_FN int padded_rows(int rows) {
  return rows <= 2 ? rows : (rows + 3) / 4 * 4;
}
TKV_CONST_FN int decode_step(int rows) {
  return rows <= 4 ? 2 : 1;
}
// dims of K that one pass of the q.k loop takes: whole columns that go into scale groups, or into
// which scale groups go; else the row
TKV_CONST_FN int key_columns(int bits) {
  return bits == 2 || bits == 6 ? 64 : (bits == 3 || bits == 5 ? 128 : 32);
}
TKV_CONST_FN bool fits_groups(int span, int group) {
  return group == 0 || group % span == 0 || span % group == 0;
}
TKV_CONST_FN int key_span(int bits, int group, int dim) {
  return dim % key_columns(bits) == 0 && fits_groups(key_columns(bits), group) ? key_columns(bits) : dim;
}
// tokens whose quads fill whole columns
TKV_CONST_FN int value_span(int bits) {
  return bits == 2 ? 16 : (bits == 6 ? 16 : (bits == 4 ? 8 : (bits == 8 ? 4 : (bits == 16 ? 2 : (bits == 32 ? 1 : 32)))));
}
TKV_CONST_FN int merge_rows(int rows, int v_dim) {
  return 4096 / (DECODE_GROUPS * v_dim) < 1 ? 1
         : (4096 / (DECODE_GROUPS * v_dim) < rows ? 4096 / (DECODE_GROUPS * v_dim) : rows);
}
// floats of threadgroup memory: levels of K and V, statistics, then queries and weights, which the
// rotation's scratch and the merge of the SIMD groups use before and after
TKV_CONST_FN int decode_head_floats(int rows) {
  return 2 * MAX_LEVELS + 2 * DECODE_GROUPS * padded_rows(rows) + 3 * padded_rows(rows);
}
TKV_CONST_FN int decode_weight_floats(int rows) {
  return larger(DECODE_GROUPS * decode_step(rows) * TILE * padded_rows(rows), DECODE_GROUPS * 128);
}
// with centred keys, what queries and mu give comes after the weights
TKV_CONST_FN int decode_floats(int rows, int k_dim, int v_dim, bool centred) {
  return (decode_head_floats(rows) + 3) / 4 * 4 +
         larger((centred ? 2 : 1) * k_dim * padded_rows(rows) + decode_weight_floats(rows),
                DECODE_GROUPS * v_dim * merge_rows(rows, v_dim));
}

// Queries to threadgroup memory, [dim][row], rotated as K is and scaled.
template <typename T, int WIDTH, int DIM, int ROWS>
TKV_FN void load_queries(const device T* q, threadgroup float* queries, threadgroup float* scratch,
                         const device uint* constants, int n_rows, float scale, int simd_group,
                         int lane) {
  constexpr int RP = padded_rows(ROWS);
  if (WIDTH == 0) {
    for (int i = simd_group * LANES + lane; i < DIM * RP; i += DECODE_GROUPS * LANES) {
      const int row = i % RP;
      queries[i] = row < n_rows ? float(q[row * DIM + i / RP]) * scale : 0.0f;
    }
    return;
  }
  constexpr int W = WIDTH == 0 ? 32 : WIDTH;
  constexpr int N = ceil_div(W, LANES);
  const float factor = scale / sqrt(float(W));
  for (int item = simd_group; item < RP * (DIM / W); item += DECODE_GROUPS) {
    const int row = item % RP;
    const int first = item / RP * W;
    float x[N];
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      const int i = lane + j * LANES;
      x[j] = row < n_rows && i < W ? float(q[row * DIM + first + i]) : 0.0f;
    }
    rotate<W>(x, constants, scratch + simd_group * 128, lane);
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      const int i = lane + j * LANES;
      if (i < W) {
        queries[(first + i) * RP + row] = x[j] * factor;
      }
    }
  }
}

// q.RoPE(mu) of each pair and row is u cos + w sin: u and w, [pair][2][row].
template <typename T, int DIM, int ROWS>
TKV_FN void load_pairs(const device T* q, threadgroup float* pairs, const device float* mu,
                       int half_dims, int n_rows, float scale, int thread_index) {
  constexpr int RP = padded_rows(ROWS);
  for (int i = thread_index; i < DIM / 2 * RP; i += DECODE_GROUPS * LANES) {
    const int row = i % RP;
    const int pair = i / RP;
    const int first = pair_first(pair, half_dims);
    const int second = pair_second(pair, half_dims);
    const float x = row < n_rows ? float(q[row * DIM + first]) * scale : 0.0f;
    const float y = row < n_rows ? float(q[row * DIM + second]) * scale : 0.0f;
    pairs[2 * pair * RP + row] = x * mu[first] + y * mu[second];
    pairs[(2 * pair + 1) * RP + row] = y * mu[first] - x * mu[second];
  }
}

// Adds q.anchor to the scores of STEP tiles, `blocks` the block of each; with `some`, to those of
// the lanes alone whose token is in it. A part of the SIMD group sums for each tile.
template <int DIM, int ROWS, int STEP>
TKV_FN void add_anchors(thread float* score, thread const int* blocks, thread const bool* some,
                        const device uint* table, threadgroup const float* pairs, int lane) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int PART = LANES / STEP;
  const device uint* words = table + (STEP == 2 && lane >= PART ? blocks[STEP - 1] : blocks[0]) * (DIM / 2);
  float found[ROWS];
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    found[r] = 0.0f;
  }
  TKV_UNROLL
  for (int j = 0; j < ceil_div(DIM / 2, PART); j++) {
    const int pair = lane % PART + j * PART;
    const bool inside = pair < DIM / 2;
    const uint word = inside ? words[pair] : 0u;
    const float cosine = half_bits(word);
    const float sine = half_bits(word >> 16);
    threadgroup const float* at = pairs + (inside ? pair : 0) * 2 * RP;
    TKV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      float u;
      float w;
      if (RP % 4 == 0) {
        u = component(((threadgroup const float4*)at)[r / 4], r % 4);
        w = component(((threadgroup const float4*)at)[RP / 4 + r / 4], r % 4);
      } else {
        u = at[r];
        w = at[RP + r];
      }
      found[r] += u * cosine + w * sine;
    }
  }
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    TKV_UNROLL
    for (int distance = 1; distance < PART; distance *= 2) {
      found[r] += simd_shuffle_xor(found[r], ushort(distance));
    }
    float other = found[r];
    if (STEP == 2) {
      other = simd_shuffle_xor(found[r], ushort(PART));
    }
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      const float anchor = (lane / PART == i) ? found[r] : other;
      score[i * ROWS + r] += some[i] ? anchor : 0.0f;
    }
  }
}

// One span of STEP tokens' rows; `at` is the word of the tile where it begins.
template <int BYTES, int WORDS, int STEP>
TKV_FN void load_rows(thread uint* words, const device uint* thread* tiles, int at, int lane) {
  TKV_UNROLL
  for (int i = 0; i < STEP; i++) {
    load_row<BYTES>(words + i * WORDS, tiles[i] + at, lane);
  }
}

// q.k of STEP tokens a lane (one in each tile) and ROWS query rows.
template <int BITS, int GROUP, int DIM, int RAW, int ROWS, int STEP>
TKV_FN void key_scores(thread float* score, const device uint* thread* tiles,
                       threadgroup const float4* queries, threadgroup const float* levels,
                       int n_spans, int lane) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int SPAN = key_span(BITS, GROUP, DIM);
  constexpr int G = GROUP == 0 || GROUP > SPAN ? SPAN : GROUP;
  constexpr int WORDS = ceil_div(SPAN * BITS, 32);
  TKV_UNROLL
  for (int i = 0; i < STEP * ROWS; i++) {
    score[i] = 0.0f;
  }
  float raw[STEP * ROWS];  // of the scale group
  TKV_UNROLL
  for (int i = 0; i < STEP * ROWS; i++) {
    raw[i] = 0.0f;
  }
  // the next span's words are under way while this one's are used, unless they are many
  constexpr bool AHEAD = STEP * WORDS <= 16;
  uint next[AHEAD ? STEP * WORDS : 1];
  if (AHEAD) {
    load_rows<SPAN * BITS / 8, WORDS, STEP>(next, tiles, 0, lane);
  }
  for (int span = 0; span < n_spans; span++) {
    uint words[STEP * WORDS];
    if (AHEAD) {
      TKV_UNROLL
      for (int i = 0; i < STEP * WORDS; i++) {
        words[i] = next[AHEAD ? i : 0];
      }
      if (span + 1 < n_spans) {
        load_rows<SPAN * BITS / 8, WORDS, STEP>(next, tiles, (span + 1) * SPAN * BITS, lane);
      }
    } else {
      load_rows<SPAN * BITS / 8, WORDS, STEP>(words, tiles, span * SPAN * BITS, lane);
    }
    TKV_UNROLL
    for (int g = 0; g < ceil_div(SPAN, G); g++) {
      TKV_UNROLL
      for (int quad = g * G / 4; quad < ((g + 1) * G < SPAN ? (g + 1) * G : SPAN) / 4; quad++) {
        float4 k[STEP];
        TKV_UNROLL
        for (int i = 0; i < STEP; i++) {
          k[i] = quad_values<BITS, RAW>(quad_bits<BITS>(words + i * WORDS, quad), levels);
        }
        TKV_UNROLL
        for (int part = 0; part < RP; part++) {
          const float4 q = queries[(span * SPAN / 4 + quad) * RP + part];
          TKV_UNROLL
          for (int e = 4 * part; e < 4 * part + 4; e++) {
            if (e % RP < ROWS) {
              TKV_UNROLL
              for (int i = 0; i < STEP; i++) {
                raw[i * ROWS + e % RP] += component(k[i], e / RP) * component(q, e % 4);
              }
            }
          }
        }
      }
      if (GROUP > SPAN && (span + 1) * SPAN % (GROUP == 0 ? 1 : GROUP) != 0 && (span + 1) * SPAN < DIM) {
        continue;
      }
      TKV_UNROLL
      for (int i = 0; i < STEP; i++) {
        float scale = 1.0f;
        if (GROUP != 0) {
          const int group = (span * SPAN + g * G) / (GROUP == 0 ? 1 : GROUP);
          const device ushort* scales = (const device ushort*)(tiles[i] + code_words(BITS, DIM));
          scale = half_bits(scales[group * TILE + lane]);
        }
        TKV_UNROLL
        for (int r = 0; r < ROWS; r++) {
          score[i * ROWS + r] += scale * raw[i * ROWS + r];
          raw[i * ROWS + r] = 0.0f;
        }
      }
    }
  }
}

template <int TILE_WORDS>
TKV_FN const device uint* tile_at(const device uint* body, const device uint* tail, int body_tiles, int tile) {
  return tile < body_tiles ? body + size_t(tile) * TILE_WORDS
                           : tail + size_t(tile - body_tiles) * TILE_WORDS;
}

// The lane's quads of one unit, the tokens that fill whole columns. `codes`: those of V in a tile.
template <int BITS, int DIM>
TKV_FN void load_unit(thread uint* words, const device uint* codes, int unit, int first_quad, int stride) {
  constexpr int COLUMNS = value_span(BITS) * BITS / 32;
  TKV_UNROLL
  for (int s = 0; s < ceil_div(DIM, 4 * LANES); s++) {
    // lanes past the last quad do its work again and drop it
    const int quad = first_quad + s * stride < DIM / 4 ? first_quad + s * stride : DIM / 4 - 1;
    const device uint4* columns = (const device uint4*)codes + unit * COLUMNS * (DIM / 4) + quad;
    TKV_UNROLL
    for (int c = 0; c < COLUMNS; c++) {
      const uint4 v = columns[c * (DIM / 4)];
      words[(s * COLUMNS + c) * 4] = v.x;
      words[(s * COLUMNS + c) * 4 + 1] = v.y;
      words[(s * COLUMNS + c) * 4 + 2] = v.z;
      words[(s * COLUMNS + c) * 4 + 3] = v.w;
    }
  }
}

// Adds p.v of one unit to the lane's quads. `weights`: the tile's. `first`, `n`: the tile's tokens
// that some query may see.
template <int BITS, int GROUP, int DIM, int RAW, int ROWS>
TKV_FN void add_values(thread float* output, thread const uint* words, const device uint* codes,
                       threadgroup const float* weights, threadgroup const float* levels, int unit,
                       int first_quad, int stride, uint first, uint n) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int TOKENS = value_span(BITS);
  constexpr bool ONE_SCALE = group_count(DIM, GROUP) == 1;
  weights += unit * TOKENS * RP;
  TKV_UNROLL
  for (int s = 0; s < ceil_div(DIM, 4 * LANES); s++) {
    const int quad = first_quad + s * stride < DIM / 4 ? first_quad + s * stride : DIM / 4 - 1;
    const device ushort* scales = (const device ushort*)(codes + code_words(BITS, DIM)) +
                                  quad * 4 / (GROUP == 0 ? 1 : GROUP) * TILE + unit * TOKENS;
    TKV_UNROLL
    for (int t = 0; t < TOKENS; t++) {
      float4 v = quad_values<BITS, RAW>(quad_bits<BITS>(words + s * TOKENS * BITS / 8, t), levels);
      if (!ONE_SCALE) {
        const bool seen = uint(unit * TOKENS + t) - first < n;
        if (GROUP != 0) {
          const float scale = seen ? half_bits(scales[t]) : 0.0f;
          v = float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
        } else {
          v = float4(seen ? v.x : 0.0f, seen ? v.y : 0.0f, seen ? v.z : 0.0f, seen ? v.w : 0.0f);
        }
      }
      TKV_UNROLL
      for (int r = 0; r < ROWS; r++) {
        float w;
        if (RP % 4 == 0) {
          w = component(((threadgroup const float4*)weights)[(t * RP + r) / 4], r % 4);
        } else {
          w = weights[t * RP + r];
        }
        thread float* o = output + (s * ROWS + r) * 4;
        o[0] += w * v.x;
        o[1] += w * v.y;
        o[2] += w * v.z;
        o[3] += w * v.w;
      }
    }
  }
}

template <typename T, int KB, int KG, int KD, int KW, int VB, int VG, int VD, int RAW, int ROWS, bool CENTRED>
TKV_FN void decode_partial(const device T* q, const device uint* body, const device uint* tail,
                           const device int* starts, const device int* params,
                           const device uint* k_constants, const device uint* v_constants,
                           const device float* mu, const device uint* table,
                           device float* partial, device float* stats, threadgroup float4* shared,
                           uint3 group, uint simd, uint lane_index) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int STEP = decode_step(ROWS);
  constexpr int QUADS = ceil_div(VD, 4 * LANES);
  constexpr int PARTS = VD <= 64 && STEP >= 2 ? 2 : 1;  // narrow heads: half a SIMD group a tile
  constexpr int SPANS = KD / key_span(KB, KG, KD);
  constexpr int UNITS = TILE / value_span(VB);
  constexpr int UNIT_WORDS = value_span(VB) * VB / 8 * QUADS;
  constexpr int V_OFFSET = side_words(KB, KG, KD);
  constexpr int TILE_WORDS = V_OFFSET + side_words(VB, VG, VD);
  const int lane = int(lane_index);
  const int simd_group = int(simd);
  const int thread_index = simd_group * LANES + lane;

  threadgroup float* k_levels = (threadgroup float*)shared;
  threadgroup float* v_levels = k_levels + MAX_LEVELS;
  threadgroup float* maxima = v_levels + MAX_LEVELS;
  threadgroup float* sums = maxima + DECODE_GROUPS * RP;
  threadgroup float* queries = k_levels + (decode_head_floats(ROWS) + 3) / 4 * 4;
  threadgroup float* all_weights = queries + KD * RP;
  threadgroup float* pairs = all_weights + (CENTRED ? decode_weight_floats(ROWS) : 0);

  const int row0 = int(group.z) * ROWS;
  const int all_rows = params[P_ROWS];
  const int n_rows = all_rows - row0 < ROWS ? all_rows - row0 : ROWS;
  const int head = int(group.x);  // of all sequences
  const int n_splits = params[P_SPLITS];
  const int n_tokens = params[P_TOKENS];
  const int body_tiles = params[P_BODY_TILES];
  const int start = params[P_STARTS] != 0 ? starts[head / params[P_HEADS]] : 0;
  const float scale = as_type<float>(params[P_SCALE]) * LOG2_E;

  load_levels<KB>(k_levels, k_constants, thread_index);
  load_levels<VB>(v_levels, v_constants, thread_index);
  const size_t first_row = size_t(head) * size_t(all_rows) + size_t(row0);
  load_queries<T, KW, KD, ROWS>(q + first_row * KD, queries, all_weights, k_constants, n_rows,
                                scale, simd_group, lane);
  if (CENTRED) {
    load_pairs<T, KD, ROWS>(q + first_row * KD, pairs, mu + head % params[P_HEADS] * KD,
                            params[P_HALF], n_rows, scale, thread_index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  // this split's tiles; those before the sequence's start are nobody's
  const int first_tile = (start < n_tokens ? start : n_tokens) / TILE;
  const int n_tiles = (n_tokens + TILE - 1) / TILE - first_tile;
  const int begin = first_tile + int(long(n_tiles) * long(group.y) / n_splits);
  const int end = first_tile + int(long(n_tiles) * long(group.y + 1) / n_splits);
  const device uint* head_body = body + size_t(head) * size_t(params[P_BODY_STRIDE]) * TILE_WORDS;
  const device uint* head_tail = tail + size_t(head) * size_t(params[P_TAIL_STRIDE]) * TILE_WORDS;

  float output[QUADS * ROWS * 4];
  float maximum[ROWS];
  float sum[ROWS];  // of this lane's tokens
  int last_token[ROWS];
  TKV_UNROLL
  for (int i = 0; i < QUADS * ROWS * 4; i++) {
    output[i] = 0.0f;
  }
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    maximum[r] = LOWEST;
    sum[r] = 0.0f;
    const int n_queries = params[P_QUERIES];
    last_token[r] = params[P_CAUSAL] != 0 ? n_tokens - n_queries + (row0 + r) % n_queries
                                          : n_tokens - 1;
  }

  // rolled: a loop that does not fit the instruction cache is slower
  const int n_units = STEP / PARTS * UNITS - 1 + params[P_ONE];
  threadgroup float* weights = all_weights + simd_group * (STEP * TILE * RP);
  const int part = PARTS == 2 ? lane >> 4 : 0;
  const int first_quad = PARTS == 2 ? lane & 15 : lane;
  for (int t = begin + simd_group * STEP; t < end; t += DECODE_GROUPS * STEP) {
    const device uint* tiles[STEP];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      // past the end: read, not used
      tiles[i] = tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, t + i < end ? t + i : end - 1);
    }
    // a unit of V is always under way, the first while q.k is worked out
    uint next[UNIT_WORDS];
    load_unit<VB, VD>(next, tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, t + part < end ? t + part : end - 1) + V_OFFSET,
                      0, first_quad, PARTS == 2 ? 16 : LANES);
    float score[STEP * ROWS];
    key_scores<KB, KG, KD, RAW, ROWS, STEP>(score, tiles, (threadgroup const float4*)queries,
                                            k_levels, SPANS == 1 ? 1 : SPANS - 1 + params[P_ONE], lane);
    if (CENTRED) {
      int blocks[STEP];
      bool some[STEP];
      const int parts = start % ANCHOR_BLOCK == 0 ? 1 : 2;  // blocks that a tile's tokens lie in
      for (int p = 0; p < parts; p++) {
        TKV_UNROLL
        for (int i = 0; i < STEP; i++) {
          const int first = (t + i < end ? t + i : end - 1) * TILE;
          const int last_block = anchor_block(n_tokens - 1, start);
          const int block = anchor_block(first, start) + p;
          blocks[i] = block < last_block ? block : last_block;
          some[i] = anchor_block(first + lane, start) == block &&
                    has_anchor(first + lane, start, params[P_BARE]);
        }
        add_anchors<KD, ROWS, STEP>(score, blocks, some, table, pairs, lane);
      }
    }

    bool grown = false;
    float highest[ROWS];
    TKV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      highest[r] = LOWEST;
      TKV_UNROLL
      for (int i = 0; i < STEP; i++) {
        const int token = (t + i) * TILE + lane;
        const bool seen = t + i < end && token >= start && token < n_tokens && token <= last_token[r];
        if (seen && score[i * ROWS + r] > highest[r]) {
          highest[r] = score[i * ROWS + r];
        }
      }
      grown = grown || highest[r] > maximum[r] + MARGIN;
    }
    if (simd_any(grown)) {
      TKV_UNROLL
      for (int r = 0; r < ROWS; r++) {
        const float found = simd_max(highest[r]);
        const float updated = found > maximum[r] ? found : maximum[r];
        const float factor = exp2(maximum[r] - updated);
        maximum[r] = updated;
        sum[r] *= factor;
        TKV_UNROLL
        for (int s = 0; s < QUADS; s++) {
          TKV_UNROLL
          for (int d = 0; d < 4; d++) {
            output[(s * ROWS + r) * 4 + d] *= factor;
          }
        }
      }
    }
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      const int token = (t + i) * TILE + lane;
      float v_scale = 1.0f;
      if (group_count(VD, VG) == 1) {
        v_scale = half_bits(((const device ushort*)(tiles[i] + V_OFFSET + code_words(VB, VD)))[lane]);
      }
      TKV_UNROLL
      for (int r = 0; r < ROWS; r++) {
        const bool seen = t + i < end && token >= start && token < n_tokens && token <= last_token[r];
        const float weight = seen ? exp2(score[i * ROWS + r] - maximum[r]) : 0.0f;
        sum[r] += weight;
        weights[(i * TILE + lane) * RP + r] = seen ? weight * v_scale : 0.0f;
      }
      TKV_UNROLL
      for (int r = ROWS; r < RP; r++) {
        weights[(i * TILE + lane) * RP + r] = 0.0f;
      }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int u = 0; u < n_units; u++) {
      uint words[UNIT_WORDS];
      TKV_UNROLL
      for (int i = 0; i < UNIT_WORDS; i++) {
        words[i] = next[i];
      }
      const int step = u / UNITS * PARTS + part;
      const int tile = t + step < end ? t + step : end - 1;
      const device uint* codes = tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, tile) + V_OFFSET;
      if (u + 1 < n_units) {
        const int next_tile = t + (u + 1) / UNITS * PARTS + part;
        load_unit<VB, VD>(next, tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, next_tile < end ? next_tile : end - 1) + V_OFFSET,
                          (u + 1) % UNITS, first_quad, PARTS == 2 ? 16 : LANES);
      }
      const int base = tile * TILE;
      const int from = start > base ? start - base : 0;
      const int to = t + step >= end ? 0 : (n_tokens - base < TILE ? n_tokens - base : TILE);
      add_values<VB, VG, VD, RAW, ROWS>(output, words, codes, weights + step * TILE * RP, v_levels,
                                        u % UNITS, first_quad, PARTS == 2 ? 16 : LANES, uint(from),
                                        uint(to > from ? to - from : 0));
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  // join the SIMD groups
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const float total = simd_sum(sum[r]);
    if (lane == 0) {
      maxima[simd_group * RP + r] = maximum[r];
      sums[simd_group * RP + r] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float joint[ROWS];
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    joint[r] = LOWEST;
    for (int s = 0; s < DECODE_GROUPS; s++) {
      joint[r] = maxima[s * RP + r] > joint[r] ? maxima[s * RP + r] : joint[r];
    }
  }
  if (thread_index < n_rows) {
    float top = LOWEST;
    float total = 0.0f;
    for (int s = 0; s < DECODE_GROUPS; s++) {
      top = maxima[s * RP + thread_index] > top ? maxima[s * RP + thread_index] : top;
    }
    for (int s = 0; s < DECODE_GROUPS; s++) {
      total += sums[s * RP + thread_index] * exp2(maxima[s * RP + thread_index] - top);
    }
    device float* out = stats + ((first_row + size_t(thread_index)) * n_splits + group.y) * 2;
    out[0] = top;
    out[1] = total;
  }
  constexpr int AT_ONCE = merge_rows(ROWS, VD);
  threadgroup float* merged = queries;
  for (int r0 = 0; r0 < ROWS; r0 += AT_ONCE) {
    TKV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      if (r >= r0 && r < r0 + AT_ONCE) {
        const float factor = exp2(maximum[r] - joint[r]);
        TKV_UNROLL
        for (int s = 0; s < QUADS; s++) {
          TKV_UNROLL
          for (int d = 0; d < 4; d++) {
            float value = output[(s * ROWS + r) * 4 + d] * factor;
            if (PARTS == 2) {
              value += simd_shuffle_xor(value, ushort(16));
            }
            const int quad = first_quad + s * LANES;
            if (part == 0 && quad < VD / 4) {
              merged[((r - r0) * DECODE_GROUPS + simd_group) * VD + quad * 4 + d] = value;
            }
          }
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = thread_index; i < AT_ONCE * VD; i += DECODE_GROUPS * LANES) {
      const int row = r0 + i / VD;
      if (row < n_rows) {
        float total = 0.0f;
        for (int s = 0; s < DECODE_GROUPS; s++) {
          total += merged[(i / VD * DECODE_GROUPS + s) * VD + i % VD];
        }
        partial[((first_row + size_t(row)) * n_splits + group.y) * VD + i % VD] = total;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
