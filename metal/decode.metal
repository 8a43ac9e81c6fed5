// Attention of a few queries over packed rows, straight from the packed bytes.
//
// decode_partial: a threadgroup takes one KV head, one split of the tokens and up to ROWS query
// rows (the GQA group's heads times the queries), so a packed byte is read once for all of them.
// Its SIMD groups stride over tiles of 32 tokens, STEP tiles at a time: q.k (decode_keys.h), the
// softmax's weights, p.v (decode_values.h). `result` is each split's rows, then its maxima and
// sums, for merge.metal to join; or, of a split that is the WHOLE, the output.
//
// Scores are in units of log2 e. Weights are powers of two of a score less a reference, which
// follows the largest score with a margin; where weights take V's scale along, so does the
// reference.
//
// A token that no query may see costs a weight of zero; what its row holds is never multiplied, so
// stale rows may hold anything. With centred keys a score gets one product q.a more, a block's
// (decode_anchors.h).

// A weight at the reference is 2^HEADROOM; one above 2^(HEADROOM + MARGIN) moves the reference.
// A chain of half products of 2^10 stays finite, and weights of 2^-30 of the largest still count.
constant constexpr float HEADROOM = 6.0f;
constant constexpr float MARGIN = 4.0f;
// scales below half's smallest count as that
constant constexpr float LOWEST_SCALE = 5.96e-8f;

// tiles that a SIMD group takes at once: as many as registers and threadgroup memory hold
TKV_CONST_FN int decode_step(int rows, int v_dim) {
  return rows <= 4 && v_dim <= 256 ? 2 : 1;
}
// rows that SIMD groups join at once
TKV_CONST_FN int merge_rows(int rows, int v_dim) {
  return 4096 / (DECODE_GROUPS * v_dim) < 1
             ? 1
             : (4096 / (DECODE_GROUPS * v_dim) < rows ? 4096 / (DECODE_GROUPS * v_dim) : rows);
}
// The tables' copies: fewer of them where queries and weights take much. V has the words of K's
// where K needs no table.
TKV_CONST_FN int table_copies(bool keys, int k_bits, int v_bits, int rows, int k_dim, int v_dim) {
  return lookup_copies(keys ? k_bits : v_bits,
                       padded_rows(rows) * (k_dim + v_dim) > 1024
                           ? 1024
                           : most_lookup_words(keys || (k_bits > 6 && v_dim <= 128)));
}
TKV_CONST_FN int key_table_words(int k_bits, int v_bits, int rows, int k_dim, int v_dim, int raw) {
  return keys_in_halves(k_bits, k_dim, raw)
             ? lookup_words(k_bits, table_copies(true, k_bits, v_bits, rows, k_dim, v_dim))
             : MAX_LEVELS;
}
TKV_CONST_FN int value_table_words(int k_bits, int v_bits, int v_group, int rows, int k_dim,
                                   int v_dim, int raw) {
  return values_in_halves(v_bits, v_group, v_dim, raw)
             ? lookup_words(v_bits, table_copies(false, k_bits, v_bits, rows, k_dim, v_dim))
             : MAX_LEVELS;
}
TKV_CONST_FN int all_weight_words(int bits, int group, int dim, int rows, int raw) {
  return DECODE_GROUPS *
         larger(decode_step(rows, dim) * weight_words(bits, group, dim, rows, raw), 128);
}
// Words of threadgroup memory: tables of K and V, row scales, queries, weights (first the
// rotation's scratch) and, with centred keys, what queries and mu give. The SIMD groups' results
// take their place in the end; maxima and sums lie behind.
TKV_CONST_FN int queries_at(int k_bits, int k_dim, int v_bits, int v_group, int v_dim, int rows,
                            int raw) {
  return (key_table_words(k_bits, v_bits, rows, k_dim, v_dim, raw) +
          value_table_words(k_bits, v_bits, v_group, rows, k_dim, v_dim, raw) + padded_rows(rows) +
          3) /
         4 * 4;
}
TKV_CONST_FN int maxima_at(int k_bits, int k_dim, int v_bits, int v_group, int v_dim, int rows,
                           int raw, bool centred) {
  return larger(queries_at(k_bits, k_dim, v_bits, v_group, v_dim, rows, raw) +
                    query_words(k_bits, k_dim, k_dim, rows, raw) +
                    all_weight_words(v_bits, v_group, v_dim, rows, raw) +
                    (centred ? pair_words(k_dim, rows) + anchor_words(rows) : 0),
                DECODE_GROUPS * v_dim * merge_rows(rows, v_dim));
}
TKV_CONST_FN int decode_words(int k_bits, int k_dim, int v_bits, int v_group, int v_dim, int rows,
                              int raw, bool centred) {
  return (maxima_at(k_bits, k_dim, v_bits, v_group, v_dim, rows, raw, centred) +
          2 * DECODE_GROUPS * padded_rows(rows) + 3) /
         4 * 4;
}

// The largest reference of a row's SIMD groups; `maxima` [SIMD group][row].
template <int RP>
TKV_FN float joint_maximum(threadgroup const float* maxima, int row) {
  float top = LOWEST;
  for (int s = 0; s < DECODE_GROUPS; s++) {
    top = maxima[s * RP + row] > top ? maxima[s * RP + row] : top;
  }
  return top;
}

// The sum of a row's weights, relative to the score `top`.
template <int RP>
TKV_FN float joint_sum(threadgroup const float* maxima, threadgroup const float* sums, int row,
                       float top) {
  float total = 0.0f;
  for (int s = 0; s < DECODE_GROUPS; s++) {
    total += sums[s * RP + row] * fast_exp2(maxima[s * RP + row] - top);
  }
  return total;
}

// The words of tile `tile`, or of the split's last where it lies behind: read, not used.
template <int TILE_WORDS>
TKV_FN const device uint* tile_at(const device uint* body, const device uint* tail, int body_tiles,
                                  int tile, int end) {
  const int at = tile < end ? tile : end - 1;
  const bool in_body = at < body_tiles;
  return (in_body ? body : tail) + size_t(uint(in_body ? at : at - body_tiles)) * TILE_WORDS;
}

template <typename T, int KB, int KG, int KD, int KW, int VB, int VG, int VD, int VW, int RAW,
          int ROWS, bool CENTRED, bool WHOLE, typename Result>
TKV_FN void decode_partial(const device T* q, const device uint* body, const device uint* tail,
                           const device int* starts, const device int* params,
                           const device uint* k_constants, const device uint* v_constants,
                           const device float* mu, const device uint* table, const device T* sinks,
                           device Result* result, threadgroup float4* shared, uint3 group,
                           uint simd, uint lane_index) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int STEP = decode_step(ROWS, VD);
  constexpr int QUADS = ceil_div(VD, 4 * LANES);
  constexpr int PARTS = VD <= 64 && STEP >= 2 ? 2 : 1;  // narrow heads: half a SIMD group a tile
  constexpr int SPANS = KD / key_span(KB, KG, KD);
  constexpr int UNITS = TILE / value_span(VB);
  constexpr int UNIT_WORDS = unit_words(VB, VD);
  constexpr int KEY_WORDS = key_words(KB, KG, KD);
  constexpr int KEY_SCALES = key_scales(KB, KG, KD);
  constexpr bool V_HALVES = values_in_halves(VB, VG, VD, RAW);
  constexpr int WEIGHT_GROUPS = weight_groups(VB, VG, VD, RAW);
  constexpr int V_OFFSET = side_words(KB, KG, KD);
  constexpr int WEIGHT_WORDS = weight_words(VB, VG, VD, ROWS, RAW);
  constexpr int TILE_WORDS = V_OFFSET + side_words(VB, VG, VD);
  constexpr int STRIDE = DECODE_GROUPS * STEP;  // tiles of all SIMD groups' steps
  const int lane = int(lane_index);
  const int simd_group = int(simd);
  const int thread_index = simd_group * LANES + lane;

  // the larger table first: each begins at a multiple of its size
  constexpr int K_COPIES = table_copies(true, KB, VB, ROWS, KD, VD);
  constexpr int V_COPIES = table_copies(false, KB, VB, ROWS, KD, VD);
  constexpr int K_TABLE_WORDS = key_table_words(KB, VB, ROWS, KD, VD, RAW);
  constexpr int V_TABLE_WORDS = value_table_words(KB, VB, VG, ROWS, KD, VD, RAW);
  constexpr int K_TABLE = K_TABLE_WORDS < V_TABLE_WORDS ? V_TABLE_WORDS : 0;
  constexpr int V_TABLE = K_TABLE == 0 ? K_TABLE_WORDS : 0;
  constexpr int QUERIES = queries_at(KB, KD, VB, VG, VD, ROWS, RAW);
  constexpr int WEIGHTS = QUERIES + query_words(KB, KD, KD, ROWS, RAW);
  constexpr int PAIRS = WEIGHTS + (CENTRED ? all_weight_words(VB, VG, VD, ROWS, RAW) : 0);
  constexpr int MAXIMA = maxima_at(KB, KD, VB, VG, VD, ROWS, RAW, CENTRED);
  threadgroup uint* words = (threadgroup uint*)shared;
  threadgroup float* floats = (threadgroup float*)shared;
  threadgroup float* row_scales = floats + K_TABLE_WORDS + V_TABLE_WORDS;
  threadgroup uint* queries = words + QUERIES;
  threadgroup float* pairs = floats + PAIRS;
  threadgroup float* anchors = pairs + pair_words(KD, ROWS) + simd_group * (ANCHORS * RP);
  threadgroup float* maxima = floats + MAXIMA;
  threadgroup float* sums = maxima + DECODE_GROUPS * RP;

  const int row0 = int(group.z) * ROWS;
  const int all_rows = params[P_ROWS];
  const int n_rows = all_rows - row0 < ROWS ? all_rows - row0 : ROWS;
  const int head = int(group.x);  // of all sequences
  const int n_splits = params[P_SPLITS];
  const int n_tokens = params[P_TOKENS];
  const int body_tiles = params[P_BODY_TILES];
  const int start = params[P_STARTS] != 0 ? starts[head / params[P_HEADS]] : 0;
  const float scale = as_type<float>(params[P_SCALE]) * LOG2_E;

  // what does not depend on the parameters is asked for while they arrive
  constexpr int THREADS = DECODE_GROUPS * LANES;
  constexpr bool K_HALVES = keys_in_halves(KB, KD, RAW);
  uint k_entries[2 * larger(lookup_turns(KB, K_COPIES, THREADS), 1)];
  uint v_entries[2 * larger(lookup_turns(VB, V_COPIES, THREADS), 1)];
  if (K_HALVES) {
    fetch_lookup<KB, K_COPIES, THREADS>(k_entries, k_constants, thread_index);
  }
  if (V_HALVES) {
    fetch_lookup<VB, V_COPIES, THREADS>(v_entries, v_constants, thread_index);
  }
  uint signs[4];
  TKV_UNROLL
  for (int j = 0; j < 4; j++) {
    signs[j] = k_constants[j];
  }
  const size_t first_row = size_t(head) * size_t(all_rows) + size_t(row0);
  float query[query_values(KW, KD)];
  fetch_query<T, KW, KD>(query, q + first_row * KD, simd_group, n_rows, lane);
  float pair_values[4 * pairs_of_thread(KD, ROWS)];
  if (CENTRED) {
    const int n_heads = params[P_HEADS];
    fetch_pairs<T, KD, ROWS>(pair_values, q + first_row * KD,
                             mu + (head < n_heads ? head : head % n_heads) * KD, params[P_HALF],
                             n_rows, thread_index);
  }

  // this split's tiles; those before the sequence's start are nobody's
  const int first_tile = (start < n_tokens ? start : n_tokens) / TILE;
  const int n_tiles = (n_tokens + TILE - 1) / TILE - first_tile;
  const int split = int(group.y);
  const int each = WHOLE ? n_tiles : int(uint(n_tiles) / uint(n_splits));
  const int rest = WHOLE ? 0 : n_tiles - each * n_splits;
  const int begin = first_tile + split * each + (split < rest ? split : rest);
  const int end = begin + each + (split < rest ? 1 : 0);
  const device uint* head_body = body + size_t(head) * size_t(params[P_BODY_STRIDE]) * TILE_WORDS;
  const device uint* head_tail = tail + size_t(head) * size_t(params[P_TAIL_STRIDE]) * TILE_WORDS;

  const int part = PARTS == 2 ? lane >> 4 : 0;
  const int first_quad = PARTS == 2 ? lane & 15 : lane;
  const int first_own = begin + simd_group * STEP;
  // the lane's block among those of a tile, and steps whose anchors are worked out at once
  const int tile_blocks = blocks_of_tile(start);
  const int own_block = tile_blocks == 2 && lane >= start % TILE ? 1 : 0;
  const int first_centred = start + params[P_BARE];
  const int anchor_steps = ANCHORS / (STEP * tile_blocks);
  uint turns[8];
  const device uint* tiles[STEP];
  TKV_UNROLL
  for (int i = 0; i < STEP; i++) {
    tiles[i] = tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, first_own + i, end);
  }
  // what is used next is always under way: K's first span while p.v is worked out, V's first unit
  // while q.k is
  uint k_words[STEP * KEY_WORDS];
  uint k_scales[STEP * KEY_SCALES];
  uint v_words[UNIT_WORDS];
  uint v_scales[STEP * WEIGHT_GROUPS];
  if (first_own < end) {
    load_first_span<KB, KG, KD, STEP>(k_words, tiles, lane);
    if (CENTRED) {
      load_turns<KD, STEP>(turns, table, lane % HALF_LANES, first_own, start, n_tokens, lane);
    }
    load_key_scales<KB, KG, KD, STEP>(k_scales, tiles, 0, lane);
    load_value_scales<VB, VG, VD, RAW, STEP>(v_scales, tiles, V_OFFSET, lane);
    const device uint* first =
        tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, first_own + part, end);
    load_unit<VB, VD>(v_words, first + V_OFFSET, 0, first_quad, LANES / PARTS);
  }

  const uint k_own = own_copy<KB, K_COPIES>(shared, K_TABLE, lane);
  const uint v_own = own_copy<VB, V_COPIES>(shared, V_TABLE, lane);
  if (K_HALVES) {
    store_lookup<KB, K_COPIES, THREADS>(words + K_TABLE, k_entries, thread_index);
  } else {
    load_levels<KB>(floats + K_TABLE, k_constants, thread_index);
  }
  if (V_HALVES) {
    store_lookup<VB, V_COPIES, THREADS>(words + V_TABLE, v_entries, thread_index);
  } else {
    load_levels<VB>(floats + V_TABLE, v_constants, thread_index);
  }
  load_queries<T, KB, KW, KD, RAW, ROWS>(query, signs, q + first_row * KD, queries, row_scales,
                                         floats + WEIGHTS, k_constants, n_rows, scale, simd_group,
                                         lane);
  if (CENTRED) {
    store_pairs<KD, ROWS>(pairs, pair_values, scale, thread_index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float output[QUADS * ROWS * 4];
  float reference[ROWS];
  float sum[ROWS];    // of this lane's tokens
  uint n_seen[ROWS];  // tokens from the sequence's start on that a row sees, of this split
  TKV_UNROLL
  for (int i = 0; i < QUADS * ROWS * 4; i++) {
    output[i] = 0.0f;
  }
  const bool causal = params[P_CAUSAL] != 0;
  const int n_queries = params[P_QUERIES];
  int later = causal ? n_queries - 1 - row0 % n_queries : 0;  // tokens that a row does not see
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    reference[r] = LOWEST;
    sum[r] = 0.0f;
    const int past = n_tokens - later;
    n_seen[r] = uint(larger((past < end * TILE ? past : end * TILE) - start, 0));
    later = !causal ? 0 : (later == 0 ? n_queries - 1 : later - 1);
  }

  // rolled: a loop that does not fit the instruction cache is slower
  const int n_spans = SPANS == 1 ? 1 : SPANS - 1 + params[P_ONE];
  const int n_units = STEP / PARTS * UNITS - 1 + params[P_ONE];
  threadgroup uint* weights = words + WEIGHTS + simd_group * (STEP * WEIGHT_WORDS);
  for (int t = first_own; t < end; t += STRIDE) {
    const int next_t = t + STRIDE;
    const device uint* next_tiles[STEP];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      next_tiles[i] = tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, next_t + i, end);
    }
    float score[STEP * ROWS];
    TKV_UNROLL
    for (int i = 0; i < STEP * ROWS; i++) {
      score[i] = 0.0f;
    }
    if (CENTRED) {
      const int step = (t - first_own) / STRIDE % anchor_steps;
      if (step == 0) {
        if (t != first_own) {
          load_turns<KD, STEP>(turns, table, lane % HALF_LANES, t, start, n_tokens, lane);
        }
        anchor_products<KD, ROWS, STEP>(anchors, pairs, row_scales, table, turns, t, start,
                                        n_tokens, lane);
      }
      TKV_UNROLL
      for (int i = 0; i < STEP; i++) {
        threadgroup const float* anchor =
            anchors + ((step * STEP + i) * tile_blocks + own_block) * RP;
        TKV_UNROLL
        for (int r = 0; r < ROWS; r++) {
          score[i * ROWS + r] = row_value<RP>(anchor, r);
        }
        if ((t + i) * TILE < first_centred) {
          const bool bare = (t + i) * TILE + lane < first_centred;
          TKV_UNROLL
          for (int r = 0; r < ROWS; r++) {
            score[i * ROWS + r] = bare ? 0.0f : score[i * ROWS + r];
          }
        }
      }
    }
    key_scores<KB, KG, KD, K_COPIES, RAW, ROWS, STEP>(score, k_words, k_scales, tiles, next_tiles,
                                                      queries, shared, k_own, floats + K_TABLE,
                                                      n_spans, lane);
    TKV_UNROLL
    for (int i = 0; i < STEP * ROWS; i++) {
      score[i] *= row_scales[i % ROWS];
    }

    float v_scale[STEP * WEIGHT_GROUPS];
    float v_log[STEP];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      float most = LOWEST_SCALE;
      TKV_UNROLL
      for (int g = 0; g < WEIGHT_GROUPS; g++) {
        const int at = i * WEIGHT_GROUPS + g;
        v_scale[at] = V_HALVES ? half_bits(v_scales[at]) : 1.0f;
        most = v_scale[at] > most ? v_scale[at] : most;
      }
      v_log[i] = V_HALVES ? fast_log2(most) : 0.0f;
    }
    load_value_scales<VB, VG, VD, RAW, STEP>(v_scales, next_tiles, V_OFFSET, lane);
    bool grown = false;
    float highest[ROWS];
    TKV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      highest[r] = LOWEST;
      TKV_UNROLL
      for (int i = 0; i < STEP; i++) {
        const bool seen = uint((t + i) * TILE + lane - start) < n_seen[r];
        const float found = score[i * ROWS + r] + v_log[i];
        highest[r] = seen && found > highest[r] ? found : highest[r];
      }
      grown = grown || highest[r] > reference[r] + (HEADROOM + MARGIN);
    }
    if (simd_any(grown)) {
      TKV_UNROLL
      for (int r = 0; r < ROWS; r++) {
        const float found = simd_max(highest[r]) - HEADROOM;
        const float updated = found > reference[r] ? found : reference[r];
        const float factor = fast_exp2(reference[r] - updated);
        reference[r] = updated;
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
      float weight[RP];
      TKV_UNROLL
      for (int r = 0; r < RP; r++) {
        weight[r] = 0.0f;
        if (r < ROWS) {
          const bool seen = uint((t + i) * TILE + lane - start) < n_seen[r];
          weight[r] = seen ? fast_exp2(score[i * ROWS + r] - reference[r]) : 0.0f;
          sum[r] += weight[r];
        }
      }
      store_weights<VB, VG, VD, RAW, ROWS>(weights + i * WEIGHT_WORDS, weight,
                                           v_scale + i * WEIGHT_GROUPS, lane);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int u = 0; u < n_units; u++) {
      const int step = u / UNITS * PARTS + part;
      const int unit = u % UNITS;
      threadgroup const uint* tile_weights = weights + step * WEIGHT_WORDS;
      const bool last = u + 1 == n_units;
      const int next_tile = (last ? next_t : t + (u + 1) / UNITS * PARTS) + part;
      const int next_unit = last ? 0 : (u + 1) % UNITS;
      const device uint* next_codes =
          tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, next_tile, end) + V_OFFSET;
      if (V_HALVES) {
        add_half_values<VB, VG, VD, V_COPIES, ROWS>(
            output, v_words, tile_weights + unit * (value_span(VB) * RP / 2), shared, v_own,
            next_codes, next_unit, first_quad, LANES / PARTS);
      } else {
        const device uint* codes =
            tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, t + step, end) + V_OFFSET;
        const int base = (t + step) * TILE;
        const int from = larger(start - base, 0);
        const int to = t + step >= end ? 0 : (n_tokens - base < TILE ? n_tokens - base : TILE);
        add_float_values<VB, VG, VD, RAW, ROWS>(
            output, v_words, codes,
            (threadgroup const float*)tile_weights + unit * (value_span(VB) * RP), floats + V_TABLE,
            unit, first_quad, LANES / PARTS, uint(from), uint(larger(to - from, 0)));
        load_unit<VB, VD>(v_words, next_codes, next_unit, first_quad, LANES / PARTS);
      }
    }
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      tiles[i] = next_tiles[i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  // join the SIMD groups
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const float total = simd_sum(sum[r]);
    if (lane == 0) {
      maxima[simd_group * RP + r] = reference[r];
      sums[simd_group * RP + r] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float joint[ROWS];
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    joint[r] = joint_maximum<RP>(maxima, r);
  }
  if (!WHOLE && thread_index < n_rows) {
    const float top = joint_maximum<RP>(maxima, thread_index);
    device Result* stats =
        result + params[P_STATS] + ((first_row + size_t(thread_index)) * n_splits + group.y) * 2;
    stats[0] = Result(top);
    stats[1] = Result(joint_sum<RP>(maxima, sums, thread_index, top));
  }
  constexpr int AT_ONCE = merge_rows(ROWS, VD);
  threadgroup float* merged = floats;
  for (int r0 = 0; r0 < ROWS; r0 += AT_ONCE) {
    TKV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      if (r >= r0 && r < r0 + AT_ONCE) {
        const float factor = fast_exp2(reference[r] - joint[r]);
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
    const int n_joined = n_rows - r0 < AT_ONCE ? n_rows - r0 : AT_ONCE;
    if (WHOLE) {
      constexpr int OUTPUT_PARTS = VD / output_width(VD, VW);
      for (int i = simd_group; i < n_joined * OUTPUT_PARTS; i += DECODE_GROUPS) {
        const int row = r0 + i / OUTPUT_PARTS;
        const float top = joint_maximum<RP>(maxima, row);
        float total = joint_sum<RP>(maxima, sums, row, top);
        if (params[P_SINKS] != 0) {
          total += sink_weight(sinks, params, int(first_row) + row, top);
        }
        write_output<Result, VD, VW>(result + (first_row + size_t(row)) * VD,
                                     merged + i / OUTPUT_PARTS * DECODE_GROUPS * VD, total,
                                     i % OUTPUT_PARTS, v_constants, lane);
      }
    } else {
      TKV_UNROLL
      for (int first = 0; first < AT_ONCE * VD; first += DECODE_GROUPS * LANES) {
        const int i = first + thread_index;
        if (i / VD < n_joined) {
          float total = 0.0f;
          TKV_UNROLL
          for (int s = 0; s < DECODE_GROUPS; s++) {
            total += merged[(i / VD * DECODE_GROUPS + s) * VD + i % VD];
          }
          result[((first_row + size_t(r0 + i / VD)) * n_splits + group.y) * VD + i % VD] =
              Result(total);
        }
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
