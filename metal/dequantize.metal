// Packed rows to plain rows (turbo rows in the rotated basis) for MLX's own attention. A
// threadgroup handles one tile of one KV head, K or V (the grid's z); a thread handles one vec4
// (four dims) of a token, and neighbouring threads write neighbouring vec4s.

// int32 parameters, in the order of kernels/dequantize.py.
constant constexpr int param_n_kv_heads = 0;        // KV heads of the buffers
constant constexpr int param_first_head = 1;        // first KV head to dequantise
constant constexpr int param_n_selected_heads = 2;  // KV heads to dequantise
constant constexpr int param_body_stride = 3;       // tiles of one head in the body buffer
constant constexpr int param_body_tiles = 4;        // valid tiles of one head in the body
constant constexpr int param_tail_stride = 5;
constant constexpr int param_n_tokens = 6;
constant constexpr int param_has_left_padding = 7;  // whether `left_padding` is given
constant constexpr int param_split_pairs = 8;       // as in anchor.h
constant constexpr int param_n_uncentred = 9;       // first keys of a sequence without an anchor
constant constexpr int param_output_rows = 10;      // rows of one head in `keys` and `values`

constant constexpr int DEQUANTIZE_THREADS = 256;

// Word `word` of a vec4's bitstream.
template <int DIM>
TKV_FN uint stream_word(const device uint* columns, int vec4, int word) {
  return columns[(word / 4 * (DIM / 4) + vec4) * 4 + word % 4];
}

// The anchors of two blocks in the rotated basis: [2][DIM]. `scratch`: 128 floats per SIMD group.
template <int DIM, int WIDTH>
TKV_FN void rotated_anchors(threadgroup float* anchors, threadgroup float* scratch,
                            const device uint* constants, const device float* mu,
                            const device uint* cos_sin_table, int split_pairs, int block,
                            int last_block, int simd_group, int lane) {
  constexpr int W = WIDTH == 0 ? 32 : WIDTH;
  constexpr int N = ceil_div(W, LANES);
  const float factor = 1.0f / sqrt(float(W));
  for (int item = simd_group; item < 2 * (DIM / W); item += DEQUANTIZE_THREADS / LANES) {
    const int b = item / (DIM / W);
    const int first = item % (DIM / W) * W;
    const device uint* cos_sin =
        cos_sin_table + (block + b < last_block ? block + b : last_block) * (DIM / 2);
    float x[N];
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      const int i = lane + j * LANES;
      x[j] = i < W ? anchor_value(mu, cos_sin, split_pairs, first + i) : 0.0f;
    }
    rotate<W>(x, constants, scratch + simd_group * 128, lane);
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      const int i = lane + j * LANES;
      if (i < W) {
        anchors[b * DIM + first + i] = x[j] * factor;
      }
    }
  }
}

// A value read back; of quantised rows what is beyond half's largest number is cut to it, and NaN
// stays.
template <typename T, int BITS>
TKV_FN float read_back(float x) {
  if (IsHalf<T>::value != 0 && BITS <= 8) {
    return x > FP16_MAX ? FP16_MAX : (x < -FP16_MAX ? -FP16_MAX : x);
  }
  return x;
}

// `n_tokens`: of the tile; rows after them are zero up to `n_rows`. `first_centred`: the first
// token with an anchor. `next_block`: the first token of the second block.
template <typename T, typename S, int RAW, bool IS_K, bool CENTRED>
TKV_FN void dequantize_tensor(const device uint* codes, device T* out,
                              threadgroup const float* levels, threadgroup const float* anchors,
                              int first_centred, int next_block, int n_tokens, int n_rows,
                              int thread_index) {
  constexpr int BITS = S::BITS;
  constexpr int DIM = S::DIM;
  constexpr int VEC4S = DIM / 4;
  constexpr int LAST = (DIM * BITS / 8 + 3) / 4 - 1;
  const device ushort* scales = (const device ushort*)(codes + S::CODE_WORDS);
  for (int i = thread_index; i < n_tokens * VEC4S; i += DEQUANTIZE_THREADS) {
    const int token = i / VEC4S;
    const int vec4 = i % VEC4S;
    const int bit = (IS_K ? vec4 : token) * 4 * BITS;
    uint words[4];
    TKV_UNROLL
    for (int w = 0; w < (BITS == 32 ? 4 : 2); w++) {
      const int word = bit / 32 + w;
      if (IS_K) {
        words[w] = word <= LAST ? row_word<DIM * BITS / 8>(codes, token, word) : 0u;
      } else {
        words[w] = word < 4 * BITS ? stream_word<DIM>(codes, vec4, word) : 0u;
      }
    }
    uint4 bits = uint4(words[0], words[1], BITS == 32 ? words[2] : 0u, BITS == 32 ? words[3] : 0u);
    if (BITS < 8 && bit % 32 != 0) {
      bits.x = (words[0] >> (bit % 32)) | (words[1] << (32 - bit % 32));
    }
    const float4 v = vec4_values<BITS, RAW>(bits, levels);
    const float scale =
        S::GROUP == 0 ? 1.0f : half_bits(scales[vec4 * 4 / larger(S::GROUP, 1) * TILE + token]);
    device T* o = out + size_t(token) * DIM + vec4 * 4;
    float4 a = float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (CENTRED && token >= first_centred) {
      threadgroup const float* from = anchors + (token < next_block ? 0 : DIM) + vec4 * 4;
      a = float4(from[0], from[1], from[2], from[3]);
    }
    o[0] = T(read_back<T, BITS>(v.x * scale + a.x));
    o[1] = T(read_back<T, BITS>(v.y * scale + a.y));
    o[2] = T(read_back<T, BITS>(v.z * scale + a.z));
    o[3] = T(read_back<T, BITS>(v.w * scale + a.w));
  }
  for (int i = n_tokens * DIM + thread_index; i < n_rows * DIM; i += DEQUANTIZE_THREADS) {
    out[i] = T(0.0f);
  }
}

TKV_CONST_FN int dequantize_floats(int k_dim, bool centred) {
  return MAX_LEVELS + (centred ? 2 * k_dim + DEQUANTIZE_THREADS / LANES * 128 : 0);
}

template <typename T, typename K, typename V, int RAW, bool CENTRED>
TKV_FN void dequantize(const device uint* body, const device uint* tail, const device int* params,
                       const device uint* k_constants, const device uint* v_constants,
                       const device float* centre, const device uint* cos_sin_table,
                       const device int* left_padding, device T* keys, device T* values,
                       threadgroup float4* shared, uint3 group, uint simd, uint lane) {
  constexpr int TILE_WORDS = K::WORDS + V::WORDS;
  threadgroup float* levels = (threadgroup float*)shared;
  const int thread_index = int(simd) * LANES + int(lane);
  const int n_selected = params[param_n_selected_heads];
  const int row = int(group.y);  // of the selected heads of all sequences
  const int head =
      row / n_selected * params[param_n_kv_heads] + params[param_first_head] + row % n_selected;
  const int tile = int(group.x);
  const int body_tiles = params[param_body_tiles];
  const device uint* codes =
      tile < body_tiles
          ? body + size_t(uint(head * params[param_body_stride] + tile)) * TILE_WORDS
          : tail + size_t(uint(head * params[param_tail_stride] + tile - body_tiles)) * TILE_WORDS;
  const int n_tokens = larger(smaller(params[param_n_tokens] - tile * TILE, TILE), 0);
  const int n_rows = smaller(params[param_output_rows] - tile * TILE, TILE);
  // rows and tiles of all heads are counted in 32 bits, elements and words in 64
  const size_t first = uint(row * params[param_output_rows] + tile * TILE);
  if (group.z == 0) {
    load_levels<K::BITS>(levels, k_constants, thread_index);
    threadgroup float* anchors = levels + MAX_LEVELS;
    int next_block = TILE;
    int first_centred = 0;
    if (CENTRED) {
      const int padding = params[param_has_left_padding] != 0 ? left_padding[row / n_selected] : 0;
      first_centred = padding + params[param_n_uncentred] - tile * TILE;
      const int block = anchor_block(tile * TILE, padding);
      next_block = padding + (block + 1) * ANCHOR_BLOCK - tile * TILE;
      rotated_anchors<K::DIM, K::WIDTH>(
          anchors, anchors + 2 * K::DIM, k_constants,
          centre_row<K::DIM>(centre, head % params[param_n_kv_heads], CENTRE_MU), cos_sin_table,
          params[param_split_pairs], block, anchor_block(params[param_n_tokens] - 1, padding),
          int(simd), int(lane));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    dequantize_tensor<T, K, RAW, true, CENTRED>(codes, keys + first * K::DIM, levels, anchors,
                                                first_centred, next_block, n_tokens, n_rows,
                                                thread_index);
  } else {
    load_levels<V::BITS>(levels, v_constants, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    dequantize_tensor<T, V, RAW, false, false>(codes + K::WORDS, values + first * V::DIM, levels,
                                               levels, 0, TILE, n_tokens, n_rows, thread_index);
  }
}
