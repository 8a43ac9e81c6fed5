// Packed rows to plain rows, turbo rows still in the rotated basis, for MLX's own attention. A
// threadgroup takes one tile of one KV head, its K or its V (the grid's z); a thread takes one quad
// (four dims) of one token, neighbouring threads neighbouring quads, so that rows are written
// whole. A tile's packed bytes are few enough to stay in the nearest cache meanwhile.

// int32 parameters, in the order of kernels/dequantize.py.
constant constexpr int P_HEADS = 0;        // KV heads of the buffers
constant constexpr int P_FIRST_HEAD = 1;   // the first of those that are wanted
constant constexpr int P_SOME_HEADS = 2;   // how many are wanted
constant constexpr int P_BODY_STRIDE = 3;  // tiles of one head in the body's buffer
constant constexpr int P_BODY_TILES = 4;   // and those that are valid
constant constexpr int P_TAIL_STRIDE = 5;
constant constexpr int P_TOKENS = 6;
constant constexpr int P_STARTS = 7;       // whether `starts` holds each sequence's first row
constant constexpr int P_HALF = 8;         // pairs of dims that lie apart
constant constexpr int P_BARE = 9;         // first keys of a sequence that have no anchor

constant constexpr int DEQUANTIZE_THREADS = 256;

// Word `word` of one token's row.
template <int BYTES>
TKV_FN uint row_word(const device uint* columns, int token, int word) {
  constexpr int FULL = BYTES / 16;
  if (word < 4 * FULL) {
    return columns[word / 4 * 128 + token * 4 + word % 4];
  }
  const device uint* rest = columns + FULL * 128;
  word -= 4 * FULL;
  if (BYTES & 8) {
    if (word < 2) {
      return rest[token * 2 + word];
    }
    rest += 64;
    word -= 2;
  }
  if (BYTES & 4) {
    if (word == 0) {
      return rest[token];
    }
    rest += 32;
    word -= 1;
  }
  uint last = 0;
  if (word == 0) {
    if (BYTES & 2) {
      last = ((const device ushort*)rest)[token];
      rest += 16;
    }
    if (BYTES & 1) {
      last |= uint(((const device uchar*)rest)[token]) << ((BYTES & 2) ? 16 : 0);
    }
  }
  return last;
}

// Word `word` of one quad's stream.
template <int DIM>
TKV_FN uint stream_word(const device uint* columns, int quad, int word) {
  return columns[(word / 4 * (DIM / 4) + quad) * 4 + word % 4];
}

// The anchors of two blocks in the rotated basis, [2][DIM]; `scratch`: 128 floats a SIMD group.
template <int DIM, int WIDTH>
TKV_FN void rotated_anchors(threadgroup float* anchors, threadgroup float* scratch,
                            const device uint* constants, const device float* mu,
                            const device uint* table, int half_dims, int block, int last_block,
                            int simd_group, int lane) {
  constexpr int W = WIDTH == 0 ? 32 : WIDTH;
  constexpr int N = ceil_div(W, LANES);
  const float factor = 1.0f / sqrt(float(W));
  for (int item = simd_group; item < 2 * (DIM / W); item += DEQUANTIZE_THREADS / LANES) {
    const int side = item / (DIM / W);
    const int first = item % (DIM / W) * W;
    const device uint* words = table + (block + side < last_block ? block + side : last_block) * (DIM / 2);
    float x[N];
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      const int i = lane + j * LANES;
      x[j] = i < W ? anchor_value(mu, words, half_dims, first + i) : 0.0f;
    }
    rotate<W>(x, constants, scratch + simd_group * 128, lane);
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      const int i = lane + j * LANES;
      if (i < W) {
        anchors[side * DIM + first + i] = x[j] * factor;
      }
    }
  }
}

// Tokens before `bare` have no anchor; those from `split` on are in the second block of `anchors`.
template <typename T, int BITS, int GROUP, int DIM, int RAW, bool IS_K, bool CENTRED>
TKV_FN void dequantize_side(const device uint* codes, device T* out, threadgroup const float* levels,
                            threadgroup const float* anchors, int bare, int split, int n_tokens,
                            int thread_index) {
  constexpr int QUADS = DIM / 4;
  constexpr int LAST = (DIM * BITS / 8 + 3) / 4 - 1;
  const device ushort* scales = (const device ushort*)(codes + code_words(BITS, DIM));
  for (int i = thread_index; i < n_tokens * QUADS; i += DEQUANTIZE_THREADS) {
    const int token = i / QUADS;
    const int quad = i % QUADS;
    const int bit = (IS_K ? quad : token) * 4 * BITS;
    uint words[4];
    TKV_UNROLL
    for (int w = 0; w < (BITS == 32 ? 4 : 2); w++) {
      const int word = bit / 32 + w;
      if (IS_K) {
        words[w] = word <= LAST ? row_word<DIM * BITS / 8>(codes, token, word) : 0u;
      } else {
        words[w] = word < 4 * BITS ? stream_word<DIM>(codes, quad, word) : 0u;
      }
    }
    uint4 bits = uint4(words[0], words[1], BITS == 32 ? words[2] : 0u, BITS == 32 ? words[3] : 0u);
    if (BITS < 8 && bit % 32 != 0) {
      bits.x = (words[0] >> (bit % 32)) | (words[1] << (32 - bit % 32));
    }
    const float4 v = quad_values<BITS, RAW>(bits, levels);
    const float scale = GROUP == 0 ? 1.0f : half_bits(scales[quad * 4 / (GROUP == 0 ? 1 : GROUP) * TILE + token]);
    device T* o = out + size_t(token) * DIM + quad * 4;
    float4 a = float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (CENTRED && token >= bare) {
      threadgroup const float* from = anchors + (token < split ? 0 : DIM) + quad * 4;
      a = float4(from[0], from[1], from[2], from[3]);
    }
    o[0] = T(v.x * scale + a.x);
    o[1] = T(v.y * scale + a.y);
    o[2] = T(v.z * scale + a.z);
    o[3] = T(v.w * scale + a.w);
  }
}

TKV_CONST_FN int dequantize_floats(int k_dim, bool centred) {
  return MAX_LEVELS + (centred ? 2 * k_dim + DEQUANTIZE_THREADS / LANES * 128 : 0);
}

template <typename T, int KB, int KG, int KD, int KW, int VB, int VG, int VD, int RAW, bool CENTRED>
TKV_FN void dequantize(const device uint* body, const device uint* tail, const device int* params,
                       const device uint* k_constants, const device uint* v_constants,
                       const device float* mu, const device uint* table, const device int* starts,
                       device T* keys, device T* values, threadgroup float4* shared, uint3 group,
                       uint simd, uint lane) {
  constexpr int K_WORDS = side_words(KB, KG, KD);
  constexpr int TILE_WORDS = K_WORDS + side_words(VB, VG, VD);
  threadgroup float* levels = (threadgroup float*)shared;
  const int thread_index = int(simd) * LANES + int(lane);
  const int some = params[P_SOME_HEADS];
  const int row = int(group.y);  // of the heads wanted, of all sequences
  const size_t head = size_t(row / some * params[P_HEADS] + params[P_FIRST_HEAD] + row % some);
  const int tile = int(group.x);
  const int body_tiles = params[P_BODY_TILES];
  const device uint* codes =
      tile < body_tiles ? body + (head * params[P_BODY_STRIDE] + tile) * TILE_WORDS
                        : tail + (head * params[P_TAIL_STRIDE] + tile - body_tiles) * TILE_WORDS;
  const int left = params[P_TOKENS] - tile * TILE;
  const int n_tokens = left < TILE ? left : TILE;
  const size_t first = size_t(row) * params[P_TOKENS] + tile * TILE;
  if (group.z == 0) {
    load_levels<KB>(levels, k_constants, thread_index);
    threadgroup float* anchors = levels + MAX_LEVELS;
    int split = TILE;
    int bare = 0;
    if (CENTRED) {
      const int start = params[P_STARTS] != 0 ? starts[row / some] : 0;
      bare = start + params[P_BARE] - tile * TILE;
      const int block = anchor_block(tile * TILE, start);
      split = start + (block + 1) * ANCHOR_BLOCK - tile * TILE;
      rotated_anchors<KD, KW>(anchors, anchors + 2 * KD, k_constants,
                              mu + head % size_t(params[P_HEADS]) * KD, table, params[P_HALF], block,
                              anchor_block(params[P_TOKENS] - 1, start), int(simd), int(lane));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    dequantize_side<T, KB, KG, KD, RAW, true, CENTRED>(codes, keys + first * KD, levels, anchors,
                                                       bare, split, n_tokens, thread_index);
  } else {
    load_levels<VB>(levels, v_constants, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    dequantize_side<T, VB, VG, VD, RAW, false, false>(codes + K_WORDS, values + first * VD, levels,
                                                      levels, 0, TILE, n_tokens, thread_index);
  }
}
