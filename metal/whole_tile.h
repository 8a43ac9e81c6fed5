// The rows of a whole tile, for segments.metal. A thread handles a vec4 of four neighbouring
// tokens: words of turbo values, and of scales, are of several.

// The bits of a vec4 of V of four tokens, from token `token` on.
template <typename S>
TKV_FN void value_bits_of_four(thread uint4* bits, const device uint* codes, int token, int vec4) {
  constexpr int BITS = S::BITS;
  constexpr int N = ceil_div(BITS, 2);
  uint words[N];
  TKV_UNROLL
  for (int w = 0; w < N; w++) {
    words[w] = stream_word<S::DIM>(codes, vec4, token * BITS / 8 + w);
  }
  // they begin on a word, or in the middle of one
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

// The same of K or V.
template <typename S, bool IS_K>
TKV_FN void bits_of_four(thread uint4* bits, const device uint* codes, int token, int vec4) {
  if (IS_K) {
    TKV_UNROLL
    for (int j = 0; j < 4; j++) {
      bits[j] = stored_bits<S, true>(codes, token + j, vec4);
    }
  } else {
    value_bits_of_four<S>(bits, codes, token, vec4);
  }
}

// Their scales; 1 where there are none.
template <typename S>
TKV_FN float4 scales_of_four(const device uint* codes, int token, int vec4) {
  if (S::GROUP == 0) {
    return float4(1.0f, 1.0f, 1.0f, 1.0f);
  }
  const device ushort* scales = (const device ushort*)(codes + S::CODE_WORDS);
  const uint2 v = *(const device uint2*)(scales + vec4 * 4 / larger(S::GROUP, 1) * TILE + token);
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
    bits_of_four<S, IS_K>(bits, codes, token, vec4);
    const float4 scales = scales_of_four<S>(codes, token, vec4);
    device T* to = out + token * S::DIM + vec4 * 4;
    TKV_UNROLL
    for (int j = 0; j < 4; j++) {
      const float4 v = vec4_values<S::BITS, RAW>(bits[j], levels);
      write_vec4<T, S, CENTRED>(to + j * S::DIM, v, component(scales, j), anchors, token + j, vec4);
    }
  }
}
