// Shared by dequantize.metal and segments.metal: packed rows to plain ones, turbo rows in the
// rotated basis. Neighbouring threads write neighbouring vec4s (four dims).

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
    const float low = x < -FP16_MAX ? -FP16_MAX : x;
    return low > FP16_MAX ? FP16_MAX : low;
  }
  return x;
}

// The bits of a vec4 of a token, as in vec4_bits. `codes`: the tile's K or V.
template <typename S, bool IS_K>
TKV_FN uint4 stored_bits(const device uint* codes, int token, int vec4) {
  constexpr int BITS = S::BITS;
  constexpr int BYTES = S::DIM * BITS / 8;
  constexpr bool STRADDLES = BITS < 8 && 32 % (4 * BITS) != 0;
  constexpr int N = BITS == 32 ? 4 : (STRADDLES || BITS == 16 ? 2 : 1);
  const int bit = (IS_K ? vec4 : token) * 4 * BITS;
  const int first = bit / 32;
  const int last = (IS_K ? (BYTES + 3) / 4 : 4 * BITS) - 1;
  uint words[4] = {0u, 0u, 0u, 0u};
  TKV_UNROLL
  for (int w = 0; w < N; w++) {
    if (first + w <= last) {
      words[w] = IS_K ? row_word<BYTES>(codes, token, first + w)
                      : stream_word<S::DIM>(codes, vec4, first + w);
    }
  }
  if (STRADDLES) {
    words[0] = words[0] >> bit % 32 | words[1] << 1 << (31 - bit % 32);
  } else if (BITS < 8) {
    words[0] >>= bit % 32;
  }
  return uint4(words[0], words[1], words[2], words[3]);
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

// Writes four neighbouring values at once.
template <typename T>
TKV_FN void store_vec4(device T* to, T x, T y, T z, T w) {
  const uint low = as_type<ushort>(x) | uint(as_type<ushort>(y)) << 16;
  const uint high = as_type<ushort>(z) | uint(as_type<ushort>(w)) << 16;
  *(device uint2*)to = uint2(low, high);
}
TKV_FN void store_vec4(device float* to, float x, float y, float z, float w) {
  *(device float4*)to = float4(x, y, z, w);
}

// Writes a vec4 of a row. `v`: without its scale.
template <typename T, typename S, bool CENTRED>
TKV_FN void write_vec4(device T* to, float4 v, float scale, thread const TileAnchors& anchors,
                       int row, int vec4) {
  float4 a = float4(0.0f, 0.0f, 0.0f, 0.0f);
  if (CENTRED && row >= anchors.first_centred) {
    const int block = row < anchors.next_block ? 0 : S::DIM;
    a = *(threadgroup const float4*)(anchors.values + block + vec4 * 4);
  }
  store_vec4(
      to, T(read_back<T, S::BITS>(v.x * scale + a.x)), T(read_back<T, S::BITS>(v.y * scale + a.y)),
      T(read_back<T, S::BITS>(v.z * scale + a.z)), T(read_back<T, S::BITS>(v.w * scale + a.w)));
}

// Writes rows `begin` to `end` of `out`. `codes`: K or V of a tile whose token 0 is row `shift`.
template <typename T, typename S, int RAW, bool IS_K, bool CENTRED>
TKV_FN void write_rows(device T* out, const device uint* codes, threadgroup const float* levels,
                       thread const TileAnchors& anchors, int begin, int end, int shift,
                       int thread_index) {
  constexpr uint VEC4S = S::DIM / 4;
  if (begin >= end) {
    return;
  }
  for (uint i = uint(begin) * VEC4S + uint(thread_index); i < uint(end) * VEC4S;
       i += DEQUANTIZE_THREADS) {
    const int row = int(i / VEC4S);
    const int vec4 = int(i % VEC4S);
    const uint4 bits = stored_bits<S, IS_K>(codes, row - shift, vec4);
    const float4 v = vec4_values<S::BITS, RAW>(bits, levels);
    const float scale = stored_scale<S>(codes, row - shift, vec4);
    write_vec4<T, S, CENTRED>(out + i * 4, v, scale, anchors, row, vec4);
  }
}
