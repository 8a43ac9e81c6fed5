// A whole tile's rows, for segments.metal: a thread reads a vec4 (four dims) of four neighbouring
// tokens at once, a quad, for the words and scales of V are of several tokens.

// Codes of a quad, from token `token` of a tile's K on: of each token those of the vec4.
template <typename S>
TKV_FN void quad_of_keys(thread uint4* bits, const device uint* codes, int token, int vec4) {
  constexpr int BITS = S::BITS;
  constexpr int BYTES = S::DIM * BITS / 8;
  constexpr int LAST = (BYTES + 3) / 4 - 1;
  constexpr bool STRADDLES = BITS < 8 && 32 % (4 * (BITS & 7)) != 0;
  constexpr int N = BITS < 8 ? (STRADDLES ? 2 : 1) : BITS / 8;
  const int word = vec4 * BITS / 8;
  const int shift = BITS < 8 ? vec4 * 4 * BITS % 32 : 0;
  TKV_UNROLL
  for (int j = 0; j < 4; j++) {
    uint words[4] = {0u, 0u, 0u, 0u};
    TKV_UNROLL
    for (int w = 0; w < N; w++) {
      words[w] = word + w <= LAST ? row_word<BYTES>(codes, token + j, word + w) : 0u;
    }
    if (STRADDLES) {
      words[0] = words[0] >> shift | words[1] << 1 << (31 - shift);
    } else if (BITS < 8) {
      words[0] >>= shift;
    }
    bits[j] = uint4(words[0], words[1], words[2], words[3]);
  }
}

// The same of V, whose vec4s are bitstreams: a quad begins on a word or in the middle of one.
template <typename S>
TKV_FN void quad_of_values(thread uint4* bits, const device uint* codes, int token, int vec4) {
  constexpr int BITS = S::BITS;
  constexpr int N = ceil_div(BITS, 2);
  const int first = token * BITS / 8;
  uint words[N];
  TKV_UNROLL
  for (int w = 0; w < N; w++) {
    const int word = first + w;
    words[w] = codes[(word / 4 * (S::DIM / 4) + vec4) * 4 + word % 4];
  }
  if (BITS % 2 != 0 && token % 8 != 0) {
    TKV_UNROLL
    for (int w = 0; w < N; w++) {
      words[w] = words[w] >> 16 | (w + 1 < N ? words[w + 1] << 16 : 0u);
    }
  }
  TKV_UNROLL
  for (int j = 0; j < 4; j++) {
    bits[j] = vec4_bits<BITS>(words, j);
  }
}

// The scales of a quad; 1 where there are none.
template <typename S>
TKV_FN float4 quad_scales(const device uint* codes, int token, int vec4) {
  if (S::GROUP == 0) {
    return float4(1.0f, 1.0f, 1.0f, 1.0f);
  }
  const device ushort* scales = (const device ushort*)(codes + S::CODE_WORDS);
  const uint2 v =
      *(const device uint2*)(scales + vec4 * 4 / larger(S::GROUP, 1) * TILE + token);
  return float4(half_bits(v.x), half_bits(v.x >> 16), half_bits(v.y), half_bits(v.y >> 16));
}

// Writes the 32 rows of a tile. `codes`: its K or V.
template <typename T, typename S, int RAW, bool IS_K, bool CENTRED>
TKV_FN void write_tile(device T* out, const device uint* codes, threadgroup const float* levels,
                       thread const TileAnchors& anchors, int thread_index) {
  constexpr uint VEC4S = S::DIM / 4;
  for (uint i = uint(thread_index); i < TILE / 4 * VEC4S; i += DEQUANTIZE_THREADS) {
    const int token = int(i / VEC4S) * 4;
    const int vec4 = int(i % VEC4S);
    uint4 bits[4];
    if (IS_K) {
      quad_of_keys<S>(bits, codes, token, vec4);
    } else {
      quad_of_values<S>(bits, codes, token, vec4);
    }
    const float4 scales = quad_scales<S>(codes, token, vec4);
    device T* to = out + token * S::DIM + vec4 * 4;
    TKV_UNROLL
    for (int j = 0; j < 4; j++) {
      const float4 v = vec4_values<S::BITS, RAW>(bits[j], levels);
      write_vec4<T, S, CENTRED>(to + j * S::DIM, v, component(scales, j), anchors, token + j, vec4);
    }
  }
}
