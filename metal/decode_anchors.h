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

// q.RoPE(mu) of each pair and row is u cos + w sin: u and w. The SIMD groups to which load_queries
// gives no row do it, where there are any.
template <typename T, int DIM, int ROWS>
TKV_FN void load_pairs(const device T* q, threadgroup float* pairs, const device float* mu,
                       int half_dims, int n_rows, float scale, int thread_index) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int FIRST = RP < DECODE_GROUPS ? RP * LANES : 0;
  for (int i = thread_index - FIRST; i < DIM / 2 * RP; i += DECODE_GROUPS * LANES - FIRST) {
    if (i < 0) {
      return;
    }
    const int row = i % RP;
    const int pair = i / RP;
    const int first = pair_first(pair, half_dims);
    const int second = pair_second(pair, half_dims);
    const float x = row < n_rows ? float(q[row * DIM + first]) * scale : 0.0f;
    const float y = row < n_rows ? float(q[row * DIM + second]) * scale : 0.0f;
    pairs[pair_place<DIM, RP>(pair / 4, pair % 4, 0) + row] = x * mu[first] + y * mu[second];
    pairs[pair_place<DIM, RP>(pair / 4, pair % 4, 1) + row] = y * mu[first] - x * mu[second];
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

// Block `i` of ANCHORS blocks, those of a SIMD group's tiles from `t` on, STEP tiles a step. It is
// one of the sequence's, whatever the tile.
template <int STEP>
TKV_FN int anchor_of(int i, int t, int start, int n_tokens) {
  const bool two = blocks_of_tile(start) == 2;
  const int at = two ? i / 2 : i;
  const int tile = t + at / STEP * (DECODE_GROUPS * STEP) + at % STEP;
  const int block = larger(tile - ceil_div(start, TILE) + (two ? i % 2 : 0), 0);
  const int last = anchor_block(n_tokens - 1, start);
  return block < last ? block : last;
}

// Words 4 `four` to 4 `four` + 3 of the table's rows of a lane's two blocks.
template <int DIM, int STEP>
TKV_FN void load_turns(thread uint* turns, const device uint* table, int four, int t, int start,
                       int n_tokens, int lane) {
  TKV_UNROLL
  for (int b = 0; b < 2; b++) {
    const int block = anchor_of<STEP>(lane / HALF_LANES * 2 + b, t, start, n_tokens);
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

// q.anchor of ANCHORS blocks to `found`, [block][row]; `turns`: what load_turns gives of the first
// words.
template <int DIM, int ROWS, int STEP>
TKV_FN void anchor_products(threadgroup float* found, threadgroup const float* pairs,
                            const device uint* table, thread uint* turns, int t, int start,
                            int n_tokens, int lane) {
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
        found[lane / HALF_LANES * 2 * RP + own + i] = sums[i];
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
}
