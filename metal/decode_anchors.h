// q.a of centred keys for decode.metal: what a score gets for its key's block.
//
// What q and mu give for each pair of dims is worked out once (load_pairs). A block's product is
// the sum over pairs of that times the block's cosines and sines; a SIMD group works out those of
// its next ANCHORS blocks at once (anchor_products).

// Words of threadgroup memory for what queries and mu give: two values for each pair of dims.
TKV_CONST_FN int pair_words(int dim, int rows) {
  return 8 * ceil_div(dim / 2, 4) * padded_rows(rows);
}
// Where the first (0) or second (1) value of the `k`-th of four neighbouring pairs lies, row 0:
// [k][value][four][row], so that lanes that take the next four read the next words.
template <int DIM, int RP>
TKV_FN int pair_place(int four, int k, int value) {
  return ((2 * k + value) * ceil_div(DIM / 2, 4) + four) * RP;
}

// Pairs of dims and rows are worked out by the SIMD groups to which load_queries gives no row,
// where there are any: the first such thread, and the pairs and rows of a thread.
TKV_CONST_FN int first_pair_thread(int rows) {
  return padded_rows(rows) < DECODE_GROUPS ? padded_rows(rows) * LANES : 0;
}
TKV_CONST_FN int pairs_of_thread(int dim, int rows) {
  return ceil_div(dim / 2 * padded_rows(rows), DECODE_GROUPS * LANES - first_pair_thread(rows));
}

// What a thread's pairs and rows need: of each two dims of q and of mu, [pair and row][4].
template <typename T, int DIM, int ROWS>
TKV_FN void fetch_pairs(thread float* held, const device T* q, const device float* mu,
                        int half_dims, int n_rows, int thread_index) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int FIRST = first_pair_thread(ROWS);
  TKV_UNROLL
  for (int n = 0; n < pairs_of_thread(DIM, ROWS); n++) {
    const int i = n * (DECODE_GROUPS * LANES - FIRST) + thread_index - FIRST;
    const int row = i % RP;
    const int pair = i / RP;
    if (thread_index >= FIRST && pair < DIM / 2) {
      const int first = pair_first(pair, half_dims);
      const int second = pair_second(pair, half_dims);
      held[4 * n] = row < n_rows ? float(q[row * DIM + first]) : 0.0f;
      held[4 * n + 1] = row < n_rows ? float(q[row * DIM + second]) : 0.0f;
      held[4 * n + 2] = mu[first];
      held[4 * n + 3] = mu[second];
    }
  }
}

// q.RoPE(mu) of each pair and row is u cos + w sin: u and w to threadgroup memory.
template <int DIM, int ROWS>
TKV_FN void store_pairs(threadgroup float* pairs, thread const float* held, float scale,
                        int thread_index) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int FIRST = first_pair_thread(ROWS);
  TKV_UNROLL
  for (int n = 0; n < pairs_of_thread(DIM, ROWS); n++) {
    const int i = n * (DECODE_GROUPS * LANES - FIRST) + thread_index - FIRST;
    const int row = i % RP;
    const int pair = i / RP;
    if (thread_index >= FIRST && pair < DIM / 2) {
      const float x = held[4 * n] * scale;
      const float y = held[4 * n + 1] * scale;
      threadgroup float* u = pairs + pair_place<DIM, RP>(pair / 4, pair % 4, 0) + row;
      threadgroup float* w = pairs + pair_place<DIM, RP>(pair / 4, pair % 4, 1) + row;
      *u = x * held[4 * n + 2] + y * held[4 * n + 3];
      *w = y * held[4 * n + 2] - x * held[4 * n + 3];
    }
  }
}

// Row `r` of RP values that lie together, by whole reads where there are four.
template <int RP>
TKV_FN float row_value(threadgroup const float* at, int r) {
  return RP % 4 == 0 ? component(((threadgroup const float4*)at)[r / 4], r % 4) : at[r];
}

// A SIMD group works out q.anchor for so many blocks at once, each half of it for two.
constant constexpr int ANCHORS = 4;
constant constexpr int HALF_LANES = LANES / 2;

// Words of threadgroup memory for them: [block][row] of each SIMD group.
TKV_CONST_FN int anchor_words(int rows) {
  return DECODE_GROUPS * ANCHORS * padded_rows(rows);
}

// The tokens of a tile lie in one block, or in two where the sequence does not start with a tile.
static_assert(TILE == ANCHOR_BLOCK, "a tile is as long as a block");
TKV_FN int blocks_of_tile(int start) {
  return start % TILE == 0 ? 1 : 2;
}

// Block `b` (0 or 1) of the two that a lane's half takes: of ANCHORS blocks, those of a SIMD
// group's tiles from `t` on, STEP tiles a step. It is one of the sequence's, whatever the tile.
template <int STEP>
TKV_FN int anchor_of(int b, int t, int start, int n_tokens, int lane) {
  const bool two = blocks_of_tile(start) == 2;
  // tiles between what the halves take, and between a half's blocks
  const int apart = two ? (STEP == 2 ? 1 : DECODE_GROUPS) : 2 * DECODE_GROUPS;
  const int next = STEP == 2 || two ? 1 : DECODE_GROUPS;
  const int block = t + (lane / HALF_LANES) * apart + b * next - ceil_div(start, TILE);
  const int last = anchor_block(n_tokens - 1, start);
  return block < 0 ? 0 : (block < last ? block : last);
}

// Words 4 `four` to 4 `four` + 3 of the table's rows of a lane's two blocks.
template <int DIM, int STEP>
TKV_FN void load_turns(thread uint* turns, const device uint* table, int four, int t, int start,
                       int n_tokens, int lane) {
  TKV_UNROLL
  for (int b = 0; b < 2; b++) {
    const int block = anchor_of<STEP>(b, t, start, n_tokens, lane);
    const device uint4* row = (const device uint4*)(table + block * (DIM / 2));
    const uint4 v = 4 * four < DIM / 2 ? row[four] : uint4(0, 0, 0, 0);
    turns[4 * b] = v.x;
    turns[4 * b + 1] = v.y;
    turns[4 * b + 2] = v.z;
    turns[4 * b + 3] = v.w;
  }
}

// A lane hands half of its N sums on to the lane `distance` apart, and adds what that hands on; the
// last sum they both get.
template <int N>
TKV_FN void hand_on(thread float* sums, int distance, int lane) {
  if (N < 2) {
    sums[0] += simd_shuffle_xor(sums[0], ushort(distance));
    return;
  }
  const bool high = (lane & distance) != 0;
  TKV_UNROLL
  for (int i = 0; i < N / 2; i++) {
    const float kept = high ? sums[N / 2 + i] : sums[i];
    const float handed = high ? sums[i] : sums[N / 2 + i];
    sums[i] = kept + simd_shuffle_xor(handed, ushort(distance));
  }
}

// the smallest power of two that holds the sums of two blocks
TKV_CONST_FN int anchor_sums(int rows) {
  return rows <= 1 ? 2 : (rows <= 2 ? 4 : (rows <= 4 ? 8 : (rows <= 8 ? 16 : 32)));
}

// q.anchor of ANCHORS blocks to `found`, [block][row], in units of `row_scales`, as q.k is before
// it is multiplied by these; `turns`: what load_turns gives of the first words.
template <int DIM, int ROWS, int STEP>
TKV_FN void anchor_products(threadgroup float* found, threadgroup const float* pairs,
                            threadgroup const float* row_scales, const device uint* table,
                            thread uint* turns, int t, int start, int n_tokens, int lane) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int SUMS = anchor_sums(ROWS);
  float sums[SUMS];
  TKV_UNROLL
  for (int i = 0; i < SUMS; i++) {
    sums[i] = 0.0f;
  }
  TKV_UNROLL
  for (int first = 0; 4 * first < DIM / 2; first += HALF_LANES) {
    const int four = first + lane % HALF_LANES;
    if (first > 0) {
      load_turns<DIM, STEP>(turns, table, four, t, start, n_tokens, lane);
    }
    const int held = 4 * four < DIM / 2 ? four : 0;
    TKV_UNROLL
    for (int k = 0; k < 4; k++) {
      threadgroup const float* u = pairs + pair_place<DIM, RP>(held, k, 0);
      threadgroup const float* w = pairs + pair_place<DIM, RP>(held, k, 1);
      TKV_UNROLL
      for (int i = 0; i < 2 * RP; i++) {
        sums[i] += row_value<RP>(u, i % RP) * half_bits(turns[i / RP * 4 + k]);
        sums[i] += row_value<RP>(w, i % RP) * half_bits(turns[i / RP * 4 + k] >> 16);
      }
    }
  }
  hand_on<SUMS>(sums, 8, lane);
  hand_on<SUMS / 2>(sums, 4, lane);
  hand_on<SUMS / 4>(sums, 2, lane);
  hand_on<SUMS / 8>(sums, 1, lane);
  const int own = (lane & 8 ? SUMS / 2 : 0) + (lane & 4 ? SUMS / 4 : 0) +
                  (lane & 2 ? SUMS / 8 : 0) + (lane & 1 ? SUMS / 16 : 0);
  if (lane % (SUMS < HALF_LANES ? HALF_LANES / SUMS : 1) == 0) {
    TKV_UNROLL
    for (int i = 0; i < ceil_div(SUMS, HALF_LANES); i++) {
      if (own + i < 2 * RP) {
        const float scale = row_scales[(own + i) % RP];
        found[lane / HALF_LANES * 2 * RP + own + i] = scale > 0.0f ? sums[i] / scale : 0.0f;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
