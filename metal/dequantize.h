// Shared by dequantize.metal and segments.metal: packed rows to plain ones, turbo rows in the
// rotated basis. A thread handles one vec4 (four dims) of a token, and neighbouring threads write
// neighbouring vec4s.

constant constexpr int DEQUANTIZE_THREADS = 256;
constant constexpr int SCRATCH_FLOATS = DEQUANTIZE_THREADS / LANES * 128;  // of rotations

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

// A value of a row; of rows that are quantised what is beyond half's largest number is cut to it,
// and NaN stays.
template <typename T, int BITS>
TKV_FN float read_back(float x) {
  if (IsHalf<T>::value != 0 && BITS <= 8) {
    return x > FP16_MAX ? FP16_MAX : (x < -FP16_MAX ? -FP16_MAX : x);
  }
  return x;
}

// Four neighbouring values of a token of a tile. `codes`: the tile's K or V.
template <typename S, int RAW, bool IS_K>
TKV_FN float4 stored_vec4(const device uint* codes, int token, int vec4,
                          threadgroup const float* levels) {
  constexpr int BITS = S::BITS;
  constexpr int DIM = S::DIM;
  constexpr int LAST = (DIM * BITS / 8 + 3) / 4 - 1;
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
  return vec4_values<BITS, RAW>(bits, levels);
}

// The scale of a vec4 of a token.
template <typename S>
TKV_FN float stored_scale(const device uint* codes, int token, int vec4) {
  const device ushort* scales = (const device ushort*)(codes + S::CODE_WORDS);
  return S::GROUP == 0 ? 1.0f : half_bits(scales[vec4 * 4 / larger(S::GROUP, 1) * TILE + token]);
}

// The anchors of a tile's rows.
struct TileAnchors {
  threadgroup const float* values;  // of two blocks
  int first_centred;                // the first row with an anchor
  int next_block;                   // the first row of the second block
};

// Threadgroup memory that anchors take, in floats.
TKV_CONST_FN int anchor_floats(int k_dim, bool centred) {
  return centred ? 2 * k_dim : 0;
}

// Computes the anchors of the tile whose first row is `first_row`. `padding`: rows before the
// sequence's first token. `n_rows`: those of the sequence that are packed.
template <typename K>
TKV_FN TileAnchors tile_anchors(threadgroup float* values, threadgroup float* scratch,
                                const device uint* constants, const device float* mu,
                                const device uint* cos_sin_table, int split_pairs, int n_uncentred,
                                int first_row, int padding, int n_rows, int simd_group, int lane) {
  const int block = anchor_block(first_row, padding);
  rotated_anchors<K::DIM, K::WIDTH>(values, scratch, constants, mu, cos_sin_table, split_pairs,
                                    block, anchor_block(n_rows - 1, padding), simd_group, lane);
  TileAnchors anchors;
  anchors.values = values;
  anchors.first_centred = padding + n_uncentred - first_row;
  anchors.next_block = padding + (block + 1) * ANCHOR_BLOCK - first_row;
  return anchors;
}

// Writes a vec4 of a token to its row.
template <typename T, typename S, int RAW, bool IS_K, bool CENTRED>
TKV_FN void write_vec4(device T* out, const device uint* codes, int token, int vec4,
                       threadgroup const float* levels, thread const TileAnchors& anchors,
                       int row) {
  constexpr int BITS = S::BITS;
  const float4 v = stored_vec4<S, RAW, IS_K>(codes, token, vec4, levels);
  const float scale = stored_scale<S>(codes, token, vec4);
  device T* o = out + size_t(row) * S::DIM + vec4 * 4;
  float4 a = float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (CENTRED && row >= anchors.first_centred) {
    threadgroup const float* from =
        anchors.values + (row < anchors.next_block ? 0 : S::DIM) + vec4 * 4;
    a = float4(from[0], from[1], from[2], from[3]);
  }
  o[0] = T(read_back<T, BITS>(v.x * scale + a.x));
  o[1] = T(read_back<T, BITS>(v.y * scale + a.y));
  o[2] = T(read_back<T, BITS>(v.z * scale + a.z));
  o[3] = T(read_back<T, BITS>(v.w * scale + a.w));
}
