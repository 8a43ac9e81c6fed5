// Attention of a few queries over packed rows, without dequantising them to memory.
//
// decode_partial: a threadgroup handles one KV head, one split of the tokens and up to ROWS query
// rows (GQA factor * queries), so packed bytes are read once for all of them. Its SIMD groups
// stride over tiles of 32 tokens, STEP tiles at a time: q.k (decode_keys.h), the online softmax
// (decode_softmax.h), p.v (decode_values.h). `result`: the rows of each split, then its maxima and
// sums, which merge.metal merges; with WHOLE (one split) the output (decode_join.h).
//
// A masked token gets a weight of zero and what its row holds is never multiplied, so stale rows
// may hold anything. For centred keys q.anchor of the key's block is added to the score
// (decode_anchors.h).

// Adds p.v of a step's tiles to `output`. `words`: of the first unit; on return, of the step from
// tile `next_t` on.
template <typename C>
TKV_FN void add_values(thread float* output, thread uint* words, threadgroup const uint* weights,
                       threadgroup const float4* shared, uint copy,
                       DecodeInputs<typename C::T> inputs, Split split, Place place, int t,
                       int next_t, int n_units, int lane) {
  const int part = C::PARTS == 2 ? lane / HALF_LANES : 0;
  const int first_vec4 = C::PARTS == 2 ? lane % HALF_LANES : lane;
  for (int u = 0; u < n_units; u++) {
    const int step = u / C::UNITS * C::PARTS + part;
    const int unit = u % C::UNITS;
    threadgroup const uint* tile_weights = weights + step * weight_words<C>();
    const bool last = u + 1 == n_units;
    const int next_tile = (last ? next_t : t + (u + 1) / C::UNITS * C::PARTS) + part;
    const int next_unit = last ? 0 : (u + 1) % C::UNITS;
    const device uint* next = tile_at<C>(inputs, split, next_tile);
    const device uint* tile = tile_at<C>(inputs, split, t + step);
    if (C::V_IN_HALF) {
      add_unit_in_half<C>(output, words,
                          tile_weights + unit * (C::UNIT_TOKENS * C::PADDED_ROWS / 2), shared, copy,
                          tile, unit, next, next_unit, first_vec4);
    } else {
      const int base = (place.tile + step) * TILE;
      const int from = larger(place.from - base, 0);
      const bool idle = C::PARTS < C::OUTPUT_PARTS && lane >= HALF_LANES;
      const int to = idle || t + step >= split.end ? 0 : smaller(place.to - base, TILE);
      if (!C::PREFETCH) {
        load_unit<C>(words, tile, unit, first_vec4);
      }
      add_unit_in_float<C>(
          output, words, tile,
          (threadgroup const float*)tile_weights + unit * (C::UNIT_TOKENS * C::PADDED_ROWS),
          (threadgroup const float*)shared + DecodeMemory<C>::V_LUT, unit, first_vec4, uint(from),
          uint(larger(to - from, 0)));
      if (C::PREFETCH) {
        load_unit<C>(words, next, next_unit, first_vec4);
      }
    }
  }
}

// What a pass needs before its first tiles and does not depend on where they are.
template <typename C>
struct SetUp {
  const device typename C::T* queries;  // of the threadgroup's rows
  const device float* inverse;          // of the scales of centred keys
  Loaded<C> loaded;
  float pair_values[4 * PairWork<C>::COUNT];
};

template <typename C>
TKV_FN void fetch_set_up(thread SetUp<C>& set_up, DecodeInputs<typename C::T> inputs, Split split,
                         int simd_group, int lane) {
  constexpr int DIM = C::K::DIM;
  const device DecodeParams& params = *inputs.params;
  const int head = C::CENTRED ? split.head % params.n_kv_heads : 0;
  set_up.queries = inputs.queries + size_t(split.first_row) * DIM;
  set_up.inverse = centre_row<DIM>(inputs.centre, head, CENTRE_INVERSE);
  fetch_tables_and_query<C>(set_up.loaded, inputs.k_constants, inputs.v_constants, set_up.queries,
                            set_up.inverse, split.n_rows, simd_group, lane);
  if (C::CENTRED) {
    fetch_pairs<C>(set_up.pair_values, set_up.queries,
                   centre_row<DIM>(inputs.centre, head, CENTRE_MU), set_up.inverse,
                   params.split_pairs, split.n_rows, simd_group * LANES + lane);
  }
}

// Attends to the tiles of a split: adds to `softmax` and `output`.
template <typename C>
TKV_FN void attend(thread Softmax<C::ROWS>& softmax, thread float* output, thread SetUp<C>& set_up,
                   DecodeInputs<typename C::T> inputs, Split split, threadgroup float4* shared,
                   int simd_group, int lane) {
  typedef typename C::K K;
  typedef typename C::V V;
  typedef DecodeMemory<C> Memory;
  const int thread_index = simd_group * LANES + lane;
  threadgroup uint* words = (threadgroup uint*)shared;
  threadgroup float* floats = (threadgroup float*)shared;
  const device DecodeParams& params = *inputs.params;
  const float scale = params.scale * LOG2_E;

  const int first_t = split.begin + simd_group * C::STEP;
  Tiles<C> tiles;
  TKV_UNROLL
  for (int i = 0; i < C::STEP; i++) {
    tiles.at[i] = tile_at<C>(inputs, split, first_t + i);
  }
  // the loads of the first tiles: later K's first span is loaded during p.v of the step before, V's
  // first unit during q.k
  Keys<C> keys;
  uint v_words[C::VEC4S * C::UNIT_WORDS];
  uint v_scales[C::STEP * C::FOLDED];
  if (C::PREFETCH && first_t < split.end) {
    const int part = C::PARTS == 2 ? lane / HALF_LANES : 0;
    load_keys<C>(keys, tiles, lane);
    load_value_scales<C>(v_scales, tiles, lane);
    load_unit<C>(v_words, tile_at<C>(inputs, split, first_t + part), 0,
                 C::PARTS == 2 ? lane % HALF_LANES : lane);
  }
  store_tables<C>(words, set_up.loaded, inputs.k_constants, inputs.v_constants, thread_index);
  store_queries<C>(words, set_up.loaded, set_up.queries, set_up.inverse, inputs.k_constants,
                   split.n_rows, scale, simd_group, lane);
  if (C::CENTRED) {
    store_pairs<C>(floats + Memory::PAIRS, set_up.pair_values, scale, thread_index);
  }
  store_n_seen<C>(words + Memory::N_SEEN, split, params, thread_index);
  threadgroup_barrier(mem_flags::mem_threadgroup);

  const int one = params.opaque_one;  // keeps the compiler from adding offsets at each use
  const uint k_copy = lane_copy<K::BITS, C::K_COPIES>(shared, Memory::K_LUT * one, lane);
  const uint v_copy = lane_copy<V::BITS, C::V_COPIES>(shared, Memory::V_LUT * one, lane);
  threadgroup uint* weights = words + Memory::WEIGHTS + simd_group * Memory::WEIGHT_WORDS;
  threadgroup float* anchor_scores =
      floats + Memory::ANCHOR_SCORES + simd_group * Memory::ANCHOR_WORDS;
  int anchor_step = 0;  // since store_anchor_scores
  const int anchor_steps =
      C::READS == READS_PROTECTED ? 1 : C::ANCHORS / (C::STEP * blocks_of_tile(split.padding));
  // loops stay rolled: unrolled they exceed the instruction cache
  const int n_spans = C::SPANS == 1 ? 1 : C::SPANS - 1 + one;
  const int n_units = C::STEP / C::PARTS * C::UNITS - 1 + one;
  for (int t = first_t; t < split.end; t += C::STRIDE) {
    const Place place = place_of<C>(split, t, params);
    threadgroup const uint* n_seen = words + Memory::N_SEEN + place.n_seen;
    Tiles<C> next_tiles;
    float score[C::STEP * C::ROWS];
    TKV_UNROLL
    for (int i = 0; i < C::STEP; i++) {
      if (C::PREFETCH) {
        next_tiles.at[i] = tile_at<C>(inputs, split, t + C::STRIDE + i);
      } else {
        tiles.at[i] = tile_at<C>(inputs, split, t + i);
      }
    }
    TKV_UNROLL
    for (int i = 0; i < C::STEP * C::ROWS; i++) {
      score[i] = 0.0f;
    }
    key_scores<C>(score, keys, tiles, next_tiles, shared, k_copy, n_spans, lane);
    TKV_UNROLL
    for (int i = 0; i < C::STEP * C::ROWS; i++) {
      score[i] *= floats[Memory::ROW_SCALES + i % C::ROWS];
    }
    if (C::CENTRED) {
      if (anchor_step == 0) {
        store_anchor_scores<C>(anchor_scores, floats + Memory::PAIRS, inputs.cos_sin_table,
                               place.tile, place.padding, params.n_tokens, one, lane);
      }
      add_anchor_scores<C>(score, anchor_scores, anchor_step, place.tile, place.padding,
                           place.padding + params.n_uncentred, lane);
      anchor_step = anchor_step + 1 < anchor_steps ? anchor_step + 1 : 0;
    }

    float scales[C::STEP * C::FOLDED];
    float logs[C::STEP];
    if (!C::PREFETCH) {
      load_value_scales<C>(v_scales, tiles, lane);
    }
    folded_scales<C>(scales, logs, v_scales);
    if (C::PREFETCH && !C::LATE_SCALES) {
      load_value_scales<C>(v_scales, next_tiles, lane);
    }
    const uint first = uint(place.tile * TILE + lane - place.from);
    raise_max_scores<C>(softmax, output, score, logs, n_seen, first);
    store_step_weights<C>(softmax, weights, score, scales, n_seen, first, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    add_values<C>(output, v_words, weights, shared, v_copy, inputs, split, place, t, t + C::STRIDE,
                  n_units, lane);
    if (C::LATE_SCALES) {
      load_value_scales<C>(v_scales, next_tiles, lane);
    }
    if (C::PREFETCH) {
      tiles = next_tiles;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
  }
}

// Starts sums of nothing.
template <typename C>
TKV_FN void start(thread Softmax<C::ROWS>& softmax, thread float* output) {
  start_softmax(softmax);
  TKV_UNROLL
  for (int i = 0; i < C::VEC4S * C::ROWS * 4; i++) {
    output[i] = 0.0f;
  }
}

template <typename C, typename Result>
TKV_FN void decode_partial(DecodeInputs<typename C::T> inputs, device Result* result,
                           threadgroup float4* shared, uint3 group, uint simd_group, uint lane) {
  Split split = query_rows_of<C>(inputs, group);
  take_all<C>(split, inputs, int(group.y), inputs.params->n_splits, 0);
  SetUp<C> set_up;
  fetch_set_up<C>(set_up, inputs, split, int(simd_group), int(lane));
  Softmax<C::ROWS> softmax;
  float output[C::VEC4S * C::ROWS * 4];
  start<C>(softmax, output);
  attend<C>(softmax, output, set_up, inputs, split, shared, int(simd_group), int(lane));
  join<C>(result, (threadgroup float*)shared, output, softmax, split, inputs, int(group.y),
          int(simd_group), int(lane));
}

// The same where tokens are protected. C: of the other rows, P: of protected ones. The first splits
// read the others, the last ones protected rows; one may read both.
template <typename C, typename P, typename Result>
TKV_FN void decode_protected(DecodeInputs<typename C::T> inputs, device Result* result,
                             threadgroup float4* shared, uint3 group, uint simd_group, uint lane) {
  static_assert(C::ROWS == P::ROWS && C::VEC4S == P::VEC4S, "both add to the same sums");
  static_assert(C::OUTPUT_PARTS == P::OUTPUT_PARTS, "both add to the same sums");
  const int index = int(group.y);
  Split split = query_rows_of<C>(inputs, group);
  Softmax<C::ROWS> softmax;
  float output[C::VEC4S * C::ROWS * 4];
  start<C>(softmax, output);
  if (C::WHOLE || index < inputs.params->body_splits) {
    SetUp<C> set_up;
    if (C::PREFETCH) {  // before the loads that say where the tiles are
      fetch_set_up<C>(set_up, inputs, split, int(simd_group), int(lane));
    }
    take_body<C>(split, inputs, index);
    if (split.begin < split.end) {
      if (!C::PREFETCH) {  // after them: fewer registers
        fetch_set_up<C>(set_up, inputs, split, int(simd_group), int(lane));
      }
      attend<C>(softmax, output, set_up, inputs, split, shared, int(simd_group), int(lane));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  // parameters that the compiler cannot know to be the same: otherwise what the second loop needs
  // of them stays in registers during the first
  inputs.params += inputs.params->opaque_one - 1;
  split = query_rows_of<C>(inputs, group);
  const int first = inputs.params->protected_split;
  if (C::WHOLE || index >= first) {
    take_protected<P>(split, inputs, C::WHOLE ? 0 : index - first);
    SetUp<P> set_up;
    fetch_set_up<P>(set_up, inputs, split, int(simd_group), int(lane));
    attend<P>(softmax, output, set_up, inputs, split, shared, int(simd_group), int(lane));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  join<C>(result, (threadgroup float*)shared, output, softmax, split, inputs, index,
          int(simd_group), int(lane));
}
