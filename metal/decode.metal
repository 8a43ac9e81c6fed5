// Attention of a few queries over packed rows, without dequantising them to memory.
//
// decode_partial: a threadgroup handles one KV head, one split of the tokens and up to ROWS query
// rows (GQA factor * queries), so packed bytes are read once for all of them. Its SIMD groups
// stride over tiles of 32 tokens, STEP tiles at a time: q.k (decode_keys.h), the softmax's weights
// (decode_softmax.h), p.v (decode_values.h). `result`: the rows of each split, then its maxima and
// sums, which merge.metal merges; with WHOLE (one split) the output.
//
// A masked token gets a weight of zero and what its row holds is never multiplied, so stale rows
// may hold anything. For centred keys q.anchor of the key's block is added to the score
// (decode_anchors.h).

// The words of tile `tile`; past the split's end those of its last tile, which are then unused.
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
                           const device int* left_padding, const device int* params,
                           const device uint* k_constants, const device uint* v_constants,
                           const device float* mu, const device uint* cos_sin_table,
                           const device T* sinks, device Result* result, threadgroup float4* shared,
                           uint3 group, uint simd, uint lane_index) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int STEP = decode_step(ROWS, VD);
  constexpr int VEC4S = ceil_div(VD, 4 * LANES);
  constexpr int PARTS = VD <= 64 && STEP >= 2 ? 2 : 1;  // narrow heads: half a SIMD group per tile
  constexpr int SPANS = KD / key_span(KB, KG, KD);
  constexpr int UNITS = TILE / value_span(VB);
  constexpr int UNIT_WORDS = unit_words(VB, VD);
  constexpr int KEY_WORDS = key_words(KB, KG, KD);
  constexpr int KEY_SCALES = key_scales(KB, KG, KD);
  constexpr bool V_IN_HALF = values_in_half(VB, VG, VD, RAW);
  constexpr int WEIGHT_GROUPS = weight_groups(VB, VG, VD, RAW);
  constexpr int V_OFFSET = tensor_words(KB, KG, KD);
  constexpr int WEIGHT_WORDS = weight_words(VB, VG, VD, ROWS, RAW);
  constexpr int TILE_WORDS = V_OFFSET + tensor_words(VB, VG, VD);
  constexpr int STRIDE = DECODE_GROUPS * STEP;  // tiles of one step of all SIMD groups
  const int lane = int(lane_index);
  const int simd_group = int(simd);
  const int thread_index = simd_group * LANES + lane;

  // the larger LUT first, so that each is aligned to its size
  constexpr int K_COPIES = tensor_lut_copies(true, KB, VB, ROWS, KD, VD);
  constexpr int V_COPIES = tensor_lut_copies(false, KB, VB, ROWS, KD, VD);
  constexpr int K_LUT_WORDS = key_lut_words(KB, VB, ROWS, KD, VD, RAW);
  constexpr int V_LUT_WORDS = value_lut_words(KB, VB, VG, ROWS, KD, VD, RAW);
  constexpr int K_LUT = K_LUT_WORDS < V_LUT_WORDS ? V_LUT_WORDS : 0;
  constexpr int V_LUT = K_LUT == 0 ? K_LUT_WORDS : 0;
  constexpr int QUERIES = queries_offset(KB, KD, VB, VG, VD, ROWS, RAW);
  constexpr int WEIGHTS = QUERIES + query_words(KB, KD, KD, ROWS, RAW);
  constexpr int PAIRS = WEIGHTS + (CENTRED ? all_weight_words(VB, VG, VD, ROWS, RAW) : 0);
  constexpr int MAXIMA = maxima_offset(KB, KD, VB, VG, VD, ROWS, RAW, CENTRED);
  threadgroup uint* words = (threadgroup uint*)shared;
  threadgroup float* floats = (threadgroup float*)shared;
  threadgroup float* row_scales = floats + K_LUT_WORDS + V_LUT_WORDS;
  threadgroup uint* queries = words + QUERIES;
  threadgroup float* pairs = floats + PAIRS;
  threadgroup float* anchors = pairs + pair_words(KD, ROWS) + simd_group * (ANCHORS * RP);
  threadgroup float* maxima = floats + MAXIMA;
  threadgroup float* sums = maxima + DECODE_GROUPS * RP;

  const int row0 = int(group.z) * ROWS;
  const int all_rows = params[param_n_rows];
  const int n_rows = all_rows - row0 < ROWS ? all_rows - row0 : ROWS;
  const int head = int(group.x);  // of all sequences' KV heads
  const int n_splits = params[param_n_splits];
  const int n_tokens = params[param_n_tokens];
  const int body_tiles = params[param_body_tiles];
  const int padding =
      params[param_has_left_padding] != 0 ? left_padding[head / params[param_n_kv_heads]] : 0;
  const float scale = as_type<float>(params[param_scale_bits]) * LOG2_E;

  // loads that do not depend on the parameters overlap with theirs
  constexpr int THREADS = DECODE_GROUPS * LANES;
  constexpr bool K_IN_HALF = keys_in_half(KB, KD, RAW);
  uint k_entries[2 * larger(lut_writes(KB, K_COPIES, THREADS), 1)];
  uint v_entries[2 * larger(lut_writes(VB, V_COPIES, THREADS), 1)];
  if (K_IN_HALF) {
    fetch_lut<KB, K_COPIES, THREADS>(k_entries, k_constants, thread_index);
  }
  if (V_IN_HALF) {
    fetch_lut<VB, V_COPIES, THREADS>(v_entries, v_constants, thread_index);
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
    const int n_heads = params[param_n_kv_heads];
    fetch_pairs<T, KD, ROWS>(pair_values, q + first_row * KD,
                             mu + (head < n_heads ? head : head % n_heads) * KD,
                             params[param_split_pairs], n_rows, thread_index);
  }

  // this split's tiles; tiles of nothing but left padding are skipped
  const int first_tile = (padding < n_tokens ? padding : n_tokens) / TILE;
  const int n_tiles = (n_tokens + TILE - 1) / TILE - first_tile;
  const int split = int(group.y);
  const int split_tiles = WHOLE ? n_tiles : int(uint(n_tiles) / uint(n_splits));
  const int n_longer = WHOLE ? 0 : n_tiles - split_tiles * n_splits;
  const int begin = first_tile + split * split_tiles + (split < n_longer ? split : n_longer);
  const int end = begin + split_tiles + (split < n_longer ? 1 : 0);
  const device uint* head_body =
      body + size_t(head) * size_t(params[param_body_stride]) * TILE_WORDS;
  const device uint* head_tail =
      tail + size_t(head) * size_t(params[param_tail_stride]) * TILE_WORDS;

  const int part = PARTS == 2 ? lane >> 4 : 0;
  const int first_vec4 = PARTS == 2 ? lane & 15 : lane;
  const int simd_first = begin + simd_group * STEP;
  // the lane's block among those of a tile, and the steps that anchor_products covers
  const int tile_blocks = blocks_of_tile(padding);
  const int lane_block = tile_blocks == 2 && lane >= padding % TILE ? 1 : 0;
  const int first_centred = padding + params[param_n_uncentred];
  const int anchor_steps = ANCHORS / (STEP * tile_blocks);
  uint cos_sin[8];
  const device uint* tiles[STEP];
  TKV_UNROLL
  for (int i = 0; i < STEP; i++) {
    tiles[i] = tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, simd_first + i, end);
  }
  // prefetch: K's first span is loaded during p.v, V's first unit during q.k
  uint k_words[STEP * KEY_WORDS];
  uint k_scales[STEP * KEY_SCALES];
  uint v_words[UNIT_WORDS];
  uint v_scales[STEP * WEIGHT_GROUPS];
  if (simd_first < end) {
    load_first_span<KB, KG, KD, STEP>(k_words, tiles, lane);
    if (CENTRED) {
      load_cos_sin<KD, STEP>(cos_sin, cos_sin_table, lane % HALF_LANES, simd_first, padding,
                             n_tokens, lane);
    }
    load_key_scales<KB, KG, KD, STEP>(k_scales, tiles, 0, lane);
    load_value_scales<VB, VG, VD, RAW, STEP>(v_scales, tiles, V_OFFSET, lane);
    const device uint* first =
        tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, simd_first + part, end);
    load_unit<VB, VD>(v_words, first + V_OFFSET, 0, first_vec4, LANES / PARTS);
  }

  const uint k_copy = lane_copy<KB, K_COPIES>(shared, K_LUT, lane);
  const uint v_copy = lane_copy<VB, V_COPIES>(shared, V_LUT, lane);
  if (K_IN_HALF) {
    store_lut<KB, K_COPIES, THREADS>(words + K_LUT, k_entries, thread_index);
  } else {
    load_levels<KB>(floats + K_LUT, k_constants, thread_index);
  }
  if (V_IN_HALF) {
    store_lut<VB, V_COPIES, THREADS>(words + V_LUT, v_entries, thread_index);
  } else {
    load_levels<VB>(floats + V_LUT, v_constants, thread_index);
  }
  load_queries<T, KB, KW, KD, RAW, ROWS>(query, signs, q + first_row * KD, queries, row_scales,
                                         floats + WEIGHTS, k_constants, n_rows, scale, simd_group,
                                         lane);
  if (CENTRED) {
    store_pairs<KD, ROWS>(pairs, pair_values, scale, thread_index);
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  float output[VEC4S * ROWS * 4];
  float reference[ROWS];
  float sum[ROWS];    // of the weights of this lane's tokens
  uint n_seen[ROWS];  // tokens after the left padding, up to the split's end, that a row attends to
  TKV_UNROLL
  for (int i = 0; i < VEC4S * ROWS * 4; i++) {
    output[i] = 0.0f;
  }
  const bool causal = params[param_causal] != 0;
  const int n_queries = params[param_n_queries];
  int n_unseen = causal ? n_queries - 1 - row0 % n_queries : 0;  // later tokens, masked for a row
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    reference[r] = LOWEST;
    sum[r] = 0.0f;
    const int n_visible = n_tokens - n_unseen;
    n_seen[r] = uint(larger((n_visible < end * TILE ? n_visible : end * TILE) - padding, 0));
    n_unseen = !causal ? 0 : (n_unseen == 0 ? n_queries - 1 : n_unseen - 1);
  }

  // loops stay rolled: unrolled they exceed the instruction cache
  const int n_spans = SPANS == 1 ? 1 : SPANS - 1 + params[param_opaque_one];
  const int n_units = STEP / PARTS * UNITS - 1 + params[param_opaque_one];
  threadgroup uint* weights = words + WEIGHTS + simd_group * (STEP * WEIGHT_WORDS);
  for (int t = simd_first; t < end; t += STRIDE) {
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
      const int step = (t - simd_first) / STRIDE % anchor_steps;
      if (step == 0) {
        if (t != simd_first) {
          load_cos_sin<KD, STEP>(cos_sin, cos_sin_table, lane % HALF_LANES, t, padding, n_tokens,
                                 lane);
        }
        anchor_products<KD, ROWS, STEP>(anchors, pairs, row_scales, cos_sin_table, cos_sin, t,
                                        padding, n_tokens, lane);
      }
      TKV_UNROLL
      for (int i = 0; i < STEP; i++) {
        threadgroup const float* anchor =
            anchors + ((step * STEP + i) * tile_blocks + lane_block) * RP;
        TKV_UNROLL
        for (int r = 0; r < ROWS; r++) {
          score[i * ROWS + r] = row_value<RP>(anchor, r);
        }
        if ((t + i) * TILE < first_centred) {
          const bool uncentred = (t + i) * TILE + lane < first_centred;
          TKV_UNROLL
          for (int r = 0; r < ROWS; r++) {
            score[i * ROWS + r] = uncentred ? 0.0f : score[i * ROWS + r];
          }
        }
      }
    }
    key_scores<KB, KG, KD, K_COPIES, RAW, ROWS, STEP>(score, k_words, k_scales, tiles, next_tiles,
                                                      queries, shared, k_copy, floats + K_LUT,
                                                      n_spans, lane);
    TKV_UNROLL
    for (int i = 0; i < STEP * ROWS; i++) {
      score[i] *= row_scales[i % ROWS];
    }

    float v_scale[STEP * WEIGHT_GROUPS];
    float v_log[STEP];
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      float largest_scale = LOWEST_SCALE;
      TKV_UNROLL
      for (int g = 0; g < WEIGHT_GROUPS; g++) {
        const int at = i * WEIGHT_GROUPS + g;
        v_scale[at] = V_IN_HALF ? half_bits(v_scales[at]) : 1.0f;
        largest_scale = v_scale[at] > largest_scale ? v_scale[at] : largest_scale;
      }
      v_log[i] = V_IN_HALF ? fast_log2(largest_scale) : 0.0f;
    }
    load_value_scales<VB, VG, VD, RAW, STEP>(v_scales, next_tiles, V_OFFSET, lane);
    bool grown = false;
    float highest[ROWS];
    TKV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      highest[r] = LOWEST;
      TKV_UNROLL
      for (int i = 0; i < STEP; i++) {
        const bool seen = uint((t + i) * TILE + lane - padding) < n_seen[r];
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
        for (int s = 0; s < VEC4S; s++) {
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
          const bool seen = uint((t + i) * TILE + lane - padding) < n_seen[r];
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
      if (V_IN_HALF) {
        add_half_values<VB, VG, VD, V_COPIES, ROWS>(
            output, v_words, tile_weights + unit * (value_span(VB) * RP / 2), shared, v_copy,
            next_codes, next_unit, first_vec4, LANES / PARTS);
      } else {
        const device uint* codes =
            tile_at<TILE_WORDS>(head_body, head_tail, body_tiles, t + step, end) + V_OFFSET;
        const int base = (t + step) * TILE;
        const int from = larger(padding - base, 0);
        const int to = t + step >= end ? 0 : (n_tokens - base < TILE ? n_tokens - base : TILE);
        add_float_values<VB, VG, VD, RAW, ROWS>(
            output, v_words, codes,
            (threadgroup const float*)tile_weights + unit * (value_span(VB) * RP), floats + V_LUT,
            unit, first_vec4, LANES / PARTS, uint(from), uint(larger(to - from, 0)));
        load_unit<VB, VD>(v_words, next_codes, next_unit, first_vec4, LANES / PARTS);
      }
    }
    TKV_UNROLL
    for (int i = 0; i < STEP; i++) {
      tiles[i] = next_tiles[i];
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }

  // sum over SIMD groups
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    const float total = simd_sum(sum[r]);
    if (lane == 0) {
      maxima[simd_group * RP + r] = reference[r];
      sums[simd_group * RP + r] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float row_max[ROWS];
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    row_max[r] = max_over_simds<RP>(maxima, r);
  }
  if (!WHOLE && thread_index < n_rows) {
    const float top = max_over_simds<RP>(maxima, thread_index);
    device Result* stats = result + params[param_stats_offset] +
                           ((first_row + size_t(thread_index)) * n_splits + group.y) * 2;
    stats[0] = Result(top);
    stats[1] = Result(sum_over_simds<RP>(maxima, sums, thread_index, top));
  }
  constexpr int AT_ONCE = merge_rows(ROWS, VD);
  threadgroup float* merged = floats;
  for (int r0 = 0; r0 < ROWS; r0 += AT_ONCE) {
    TKV_UNROLL
    for (int r = 0; r < ROWS; r++) {
      if (r >= r0 && r < r0 + AT_ONCE) {
        const float factor = fast_exp2(reference[r] - row_max[r]);
        TKV_UNROLL
        for (int s = 0; s < VEC4S; s++) {
          TKV_UNROLL
          for (int d = 0; d < 4; d++) {
            float value = output[(s * ROWS + r) * 4 + d] * factor;
            if (PARTS == 2) {
              value += simd_shuffle_xor(value, ushort(16));
            }
            const int vec4 = first_vec4 + s * LANES;
            if (part == 0 && vec4 < VD / 4) {
              merged[((r - r0) * DECODE_GROUPS + simd_group) * VD + vec4 * 4 + d] = value;
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
        const float top = max_over_simds<RP>(maxima, row);
        float total = sum_over_simds<RP>(maxima, sums, row, top);
        if (params[param_has_sinks] != 0) {
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
