// Centred keys in decode.metal: q.anchor, which is added to the scores of a block's keys.
//
// For a pair of dims q.RoPE(mu) is u cos + w sin. u and w are computed once (store_pairs). q.anchor
// of a block is the sum over pairs of u and w times the block's cosines and sines; a SIMD group
// computes it for its next ANCHORS blocks at a time, a few lanes a block (store_anchor_scores).

// Offset of u (value 0) or w (1) of pair 4 `vec4` + `k`, row 0, in the layout
// [k][value][vec4][row]: neighbouring lanes, which handle neighbouring `vec4`, read neighbouring
// words.
template <int DIM, int RP>
TKV_FN int pair_offset(int vec4, int k, int value) {
  return ((2 * k + value) * ceil_div(DIM / 2, 4) + vec4) * RP;
}

// u and w are computed by the SIMD groups that have no row in store_queries, or by all if there are
// none: the first such thread, and the number of (pair, row) that a thread computes.
TKV_CONST_FN int first_pair_thread(int padded_rows, int simd_groups) {
  return padded_rows < simd_groups ? padded_rows * LANES : 0;
}
template <typename C>
struct PairWork {
  static constant constexpr int FIRST = first_pair_thread(C::PADDED_ROWS, C::SIMD_GROUPS);
  static constant constexpr int STRIDE = C::THREADS - FIRST;
  static constant constexpr int COUNT = ceil_div(C::K::DIM / 2 * C::PADDED_ROWS, STRIDE);
};

// Loads two dims of q, times `inverse`, and two of mu for each (pair, row) of a thread:
// [(pair, row)][4].
template <typename C>
TKV_FN void fetch_pairs(thread float* fetched, const device typename C::T* q,
                        const device float* mu, const device float* inverse, int split_pairs,
                        int n_rows, int thread_index) {
  typedef PairWork<C> Work;
  constexpr int DIM = C::K::DIM;
  TKV_UNROLL
  for (int n = 0; n < Work::COUNT; n++) {
    const int i = n * Work::STRIDE + thread_index - Work::FIRST;
    const int row = i % C::PADDED_ROWS;
    const int pair = i / C::PADDED_ROWS;
    if (thread_index >= Work::FIRST && pair < DIM / 2) {
      const int first = pair_first(pair, split_pairs);
      const int second = pair_second(pair, split_pairs);
      const float factor = inverse[first];  // both dims of a pair have the same
      fetched[4 * n] = row < n_rows ? float(q[row * DIM + first]) * factor : 0.0f;
      fetched[4 * n + 1] = row < n_rows ? float(q[row * DIM + second]) * factor : 0.0f;
      fetched[4 * n + 2] = mu[first];
      fetched[4 * n + 3] = mu[second];
    }
  }
}

// Stores u and w of each (pair, row) of a thread in threadgroup memory.
template <typename C>
TKV_FN void store_pairs(threadgroup float* pairs, thread const float* fetched, float scale,
                        int thread_index) {
  typedef PairWork<C> Work;
  constexpr int DIM = C::K::DIM;
  TKV_UNROLL
  for (int n = 0; n < Work::COUNT; n++) {
    const int i = n * Work::STRIDE + thread_index - Work::FIRST;
    const int row = i % C::PADDED_ROWS;
    const int pair = i / C::PADDED_ROWS;
    if (thread_index >= Work::FIRST && pair < DIM / 2) {
      const float x = fetched[4 * n] * scale;
      const float y = fetched[4 * n + 1] * scale;
      pairs[pair_offset<DIM, C::PADDED_ROWS>(pair / 4, pair % 4, 0) + row] =
          x * fetched[4 * n + 2] + y * fetched[4 * n + 3];
      pairs[pair_offset<DIM, C::PADDED_ROWS>(pair / 4, pair % 4, 1) + row] =
          y * fetched[4 * n + 2] - x * fetched[4 * n + 3];
    }
  }
}

// A tile's tokens are in one block, or in two where the left padding is no multiple of a tile.
static_assert(TILE == ANCHOR_BLOCK, "a tile is as long as a block");
TKV_FN int blocks_of_tile(int padding) {
  return padding % TILE == 0 ? 1 : 2;
}

// Block `index` of the ANCHORS blocks of a SIMD group's tiles from `t` on, STEP tiles a step.
// Clamped to the sequence's blocks.
template <typename C>
TKV_FN int anchor_of(int index, int t, int padding, int n_tokens) {
  const bool two = blocks_of_tile(padding) == 2;
  const int tile = two ? index / 2 : index;
  const int block = t + tile / C::STEP * C::STRIDE + tile % C::STEP + (two ? index % 2 : 0) -
                    ceil_div(padding, TILE);
  const int last = anchor_block(n_tokens - 1, padding);
  return block < 0 ? 0 : (block < last ? block : last);
}

// Stores q.anchor of ANCHORS blocks: [block][row].
template <typename C>
TKV_FN void store_anchor_scores(threadgroup float* scores, threadgroup const float* pairs,
                                const device uint* cos_sin_table, int t, int padding, int n_tokens,
                                int opaque_one, int lane) {
  constexpr int RP = C::PADDED_ROWS;
  constexpr int WORDS = C::K::DIM / 2;
  constexpr int PARTS = LANES / C::ANCHORS;  // lanes of a block, which take 4 pairs of dims in turn
  constexpr int TURNS = ceil_div(WORDS, 4 * PARTS);
  const int part = lane % PARTS;
  const int block = anchor_of<C>(lane / PARTS, t, padding, n_tokens);
  const device uint4* row = (const device uint4*)(cos_sin_table + block * WORDS);
  float sums[RP];
  TKV_UNROLL
  for (int r = 0; r < RP; r++) {
    sums[r] = 0.0f;
  }
  const int n_turns = TURNS - 1 + opaque_one;
  for (int turn = 0; turn < n_turns; turn++) {
    const int vec4 = turn * PARTS + part;
    const bool inside = WORDS % (4 * PARTS) == 0 || 4 * vec4 < WORDS;
    const uint4 words = inside ? row[vec4] : uint4(0, 0, 0, 0);
    const uint cos_sin[4] = {words.x, words.y, words.z, words.w};
    TKV_UNROLL
    for (int k = 0; k < 4; k++) {
      const int at = inside ? vec4 : 0;
      threadgroup const float* u = pairs + pair_offset<C::K::DIM, RP>(at, k, 0);
      threadgroup const float* w = pairs + pair_offset<C::K::DIM, RP>(at, k, 1);
      TKV_UNROLL
      for (int r = 0; r < RP; r++) {
        sums[r] += row_value<RP>(u, r) * half_bits(cos_sin[k]);
        sums[r] += row_value<RP>(w, r) * half_bits(cos_sin[k] >> 16);
      }
    }
  }
  TKV_UNROLL
  for (int r = 0; r < RP; r++) {
    TKV_UNROLL
    for (int distance = 1; distance < PARTS; distance *= 2) {
      sums[r] += simd_shuffle_xor(sums[r], ushort(distance));
    }
  }
  if (part == 0) {
    threadgroup float* at = scores + lane / PARTS * RP;
    TKV_UNROLL
    for (int r = 0; r < RP; r += 4) {
      if (RP % 4 == 0) {
        ((threadgroup float4*)at)[r / 4] = float4(sums[r], sums[r + 1], sums[r + 2], sums[r + 3]);
      } else {
        at[r] = sums[r];
        at[RP - 1] = sums[RP - 1];
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}

// Adds q.anchor to the scores of a step's tokens that have one. `step`: steps since
// store_anchor_scores.
template <typename C>
TKV_FN void add_anchor_scores(thread float* score, threadgroup const float* anchor_scores, int step,
                              int t, int padding, int first_centred, int lane) {
  const int tile_blocks = blocks_of_tile(padding);
  const int lane_block = tile_blocks == 2 && lane >= padding % TILE ? 1 : 0;
  TKV_UNROLL
  for (int i = 0; i < C::STEP; i++) {
    threadgroup const float* anchor =
        anchor_scores + ((step * C::STEP + i) * tile_blocks + lane_block) * C::PADDED_ROWS;
    const bool centred = (t + i) * TILE + lane >= first_centred;
    TKV_UNROLL
    for (int r = 0; r < C::ROWS; r++) {
      const float value = row_value<C::PADDED_ROWS>(anchor, r);
      score[i * C::ROWS + r] += centred ? value : 0.0f;
    }
  }
}
