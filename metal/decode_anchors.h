// Centred keys in decode.metal: q.anchor, which is added to the scores of a block's keys.
//
// For a pair of dims q.RoPE(mu) is u cos + w sin. u and w are computed once (store_pairs). q.anchor
// of a block is the sum over pairs of u and w times the block's cosines and sines; a SIMD group
// computes it for its next ANCHORS blocks at a time (anchor_products).

// Words of threadgroup memory for u and w of all pairs of dims.
TKV_CONST_FN int pair_words(int dim, int rows) {
  return 8 * ceil_div(dim / 2, 4) * padded_rows(rows);
}
// Offset of u (value 0) or w (1) of pair 4 `vec4` + `k`, row 0, in the layout
// [k][value][vec4][row]: neighbouring lanes, which handle neighbouring `vec4`, read neighbouring
// words.
template <int DIM, int RP>
TKV_FN int pair_offset(int vec4, int k, int value) {
  return ((2 * k + value) * ceil_div(DIM / 2, 4) + vec4) * RP;
}

// u and w are computed by the SIMD groups that have no row in load_queries, or by all if there are
// none: the first such thread, and the number of (pair, row) that a thread computes.
TKV_CONST_FN int first_pair_thread(int rows) {
  return padded_rows(rows) < DECODE_GROUPS ? padded_rows(rows) * LANES : 0;
}
TKV_CONST_FN int pairs_of_thread(int dim, int rows) {
  return ceil_div(dim / 2 * padded_rows(rows), DECODE_GROUPS * LANES - first_pair_thread(rows));
}

// Loads two dims of q and two of mu for each (pair, row) of a thread: [(pair, row)][4].
template <typename T, int DIM, int ROWS>
TKV_FN void fetch_pairs(thread float* fetched, const device T* q, const device float* mu,
                        int split_pairs, int n_rows, int thread_index) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int FIRST = first_pair_thread(ROWS);
  TKV_UNROLL
  for (int n = 0; n < pairs_of_thread(DIM, ROWS); n++) {
    const int i = n * (DECODE_GROUPS * LANES - FIRST) + thread_index - FIRST;
    const int row = i % RP;
    const int pair = i / RP;
    if (thread_index >= FIRST && pair < DIM / 2) {
      const int first = pair_first(pair, split_pairs);
      const int second = pair_second(pair, split_pairs);
      fetched[4 * n] = row < n_rows ? float(q[row * DIM + first]) : 0.0f;
      fetched[4 * n + 1] = row < n_rows ? float(q[row * DIM + second]) : 0.0f;
      fetched[4 * n + 2] = mu[first];
      fetched[4 * n + 3] = mu[second];
    }
  }
}

// Stores u and w of each (pair, row) of a thread in threadgroup memory.
template <int DIM, int ROWS>
TKV_FN void store_pairs(threadgroup float* pairs, thread const float* fetched, float scale,
                        int thread_index) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int FIRST = first_pair_thread(ROWS);
  TKV_UNROLL
  for (int n = 0; n < pairs_of_thread(DIM, ROWS); n++) {
    const int i = n * (DECODE_GROUPS * LANES - FIRST) + thread_index - FIRST;
    const int row = i % RP;
    const int pair = i / RP;
    if (thread_index >= FIRST && pair < DIM / 2) {
      const float x = fetched[4 * n] * scale;
      const float y = fetched[4 * n + 1] * scale;
      threadgroup float* u = pairs + pair_offset<DIM, RP>(pair / 4, pair % 4, 0) + row;
      threadgroup float* w = pairs + pair_offset<DIM, RP>(pair / 4, pair % 4, 1) + row;
      *u = x * fetched[4 * n + 2] + y * fetched[4 * n + 3];
      *w = y * fetched[4 * n + 2] - x * fetched[4 * n + 3];
    }
  }
}

// Row `r` of RP contiguous values, by a read of four where RP allows.
template <int RP>
TKV_FN float row_value(threadgroup const float* at, int r) {
  return RP % 4 == 0 ? component(((threadgroup const float4*)at)[r / 4], r % 4) : at[r];
}

// Blocks whose q.anchor a SIMD group computes at a time, two by each half of its lanes.
constant constexpr int ANCHORS = 4;
constant constexpr int HALF_LANES = LANES / 2;

// Words of threadgroup memory for the products: [SIMD group][block][row].
TKV_CONST_FN int anchor_words(int rows) {
  return DECODE_GROUPS * ANCHORS * padded_rows(rows);
}

// A tile's tokens are in one block, or in two where the left padding is no multiple of a tile.
static_assert(TILE == ANCHOR_BLOCK, "a tile is as long as a block");
TKV_FN int blocks_of_tile(int padding) {
  return padding % TILE == 0 ? 1 : 2;
}

// Block `b` (0 or 1) of the two that a lane's half computes, among the ANCHORS blocks of a SIMD
// group's tiles from `t` on, STEP tiles a step. Clamped to the sequence's blocks.
template <int STEP>
TKV_FN int anchor_of(int b, int t, int padding, int n_tokens, int lane) {
  const bool two = blocks_of_tile(padding) == 2;
  // distance in tiles between the first blocks of the halves, and between a half's blocks
  const int half_stride = two ? (STEP == 2 ? 1 : DECODE_GROUPS) : 2 * DECODE_GROUPS;
  const int next = STEP == 2 || two ? 1 : DECODE_GROUPS;
  const int block = t + (lane / HALF_LANES) * half_stride + b * next - ceil_div(padding, TILE);
  const int last = anchor_block(n_tokens - 1, padding);
  return block < 0 ? 0 : (block < last ? block : last);
}

// Loads words 4 `vec4` to 4 `vec4` + 3 of the table's rows of a lane's two blocks.
template <int DIM, int STEP>
TKV_FN void load_cos_sin(thread uint* cos_sin, const device uint* cos_sin_table, int vec4, int t,
                         int padding, int n_tokens, int lane) {
  TKV_UNROLL
  for (int b = 0; b < 2; b++) {
    const int block = anchor_of<STEP>(b, t, padding, n_tokens, lane);
    const device uint4* row = (const device uint4*)(cos_sin_table + block * (DIM / 2));
    const uint4 v = 4 * vec4 < DIM / 2 ? row[vec4] : uint4(0, 0, 0, 0);
    cos_sin[4 * b] = v.x;
    cos_sin[4 * b + 1] = v.y;
    cos_sin[4 * b + 2] = v.z;
    cos_sin[4 * b + 3] = v.w;
  }
}

// One step of a reduce-scatter of N sums: a lane sends half of them to the lane `distance` apart
// and adds what it receives to the other half. A single sum is all-reduced.
template <int N>
TKV_FN void reduce_scatter(thread float* sums, int distance, int lane) {
  if (N < 2) {
    sums[0] += simd_shuffle_xor(sums[0], ushort(distance));
    return;
  }
  const bool high = (lane & distance) != 0;
  TKV_UNROLL
  for (int i = 0; i < N / 2; i++) {
    const float kept = high ? sums[N / 2 + i] : sums[i];
    const float sent = high ? sums[i] : sums[N / 2 + i];
    sums[i] = kept + simd_shuffle_xor(sent, ushort(distance));
  }
}

// Number of sums of two blocks, rounded up to a power of two.
TKV_CONST_FN int anchor_sums(int rows) {
  return rows <= 1 ? 2 : (rows <= 2 ? 4 : (rows <= 4 ? 8 : (rows <= 8 ? 16 : 32)));
}

// q.anchor of ANCHORS blocks, divided by `row_scales` as q.k is. `products`: [block][row];
// `cos_sin`: from load_cos_sin for the first words.
template <int DIM, int ROWS, int STEP>
TKV_FN void anchor_products(threadgroup float* products, threadgroup const float* pairs,
                            threadgroup const float* row_scales, const device uint* cos_sin_table,
                            thread uint* cos_sin, int t, int padding, int n_tokens, int lane) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int SUMS = anchor_sums(ROWS);
  float sums[SUMS];
  TKV_UNROLL
  for (int i = 0; i < SUMS; i++) {
    sums[i] = 0.0f;
  }
  TKV_UNROLL
  for (int first = 0; 4 * first < DIM / 2; first += HALF_LANES) {
    const int vec4 = first + lane % HALF_LANES;
    if (first > 0) {
      load_cos_sin<DIM, STEP>(cos_sin, cos_sin_table, vec4, t, padding, n_tokens, lane);
    }
    const int clamped = 4 * vec4 < DIM / 2 ? vec4 : 0;
    TKV_UNROLL
    for (int k = 0; k < 4; k++) {
      threadgroup const float* u = pairs + pair_offset<DIM, RP>(clamped, k, 0);
      threadgroup const float* w = pairs + pair_offset<DIM, RP>(clamped, k, 1);
      TKV_UNROLL
      for (int i = 0; i < 2 * RP; i++) {
        sums[i] += row_value<RP>(u, i % RP) * half_bits(cos_sin[i / RP * 4 + k]);
        sums[i] += row_value<RP>(w, i % RP) * half_bits(cos_sin[i / RP * 4 + k] >> 16);
      }
    }
  }
  reduce_scatter<SUMS>(sums, 8, lane);
  reduce_scatter<SUMS / 2>(sums, 4, lane);
  reduce_scatter<SUMS / 4>(sums, 2, lane);
  reduce_scatter<SUMS / 8>(sums, 1, lane);
  const int first_sum = (lane & 8 ? SUMS / 2 : 0) + (lane & 4 ? SUMS / 4 : 0) +
                        (lane & 2 ? SUMS / 8 : 0) + (lane & 1 ? SUMS / 16 : 0);
  if (lane % (SUMS < HALF_LANES ? HALF_LANES / SUMS : 1) == 0) {
    TKV_UNROLL
    for (int i = 0; i < ceil_div(SUMS, HALF_LANES); i++) {
      if (first_sum + i < 2 * RP) {
        const float scale = row_scales[(first_sum + i) % RP];
        products[lane / HALF_LANES * 2 * RP + first_sum + i] =
            scale > 0.0f ? sums[i] / scale : 0.0f;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
