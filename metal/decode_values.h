// p.v for decode.metal. A lane handles four neighbouring dims of V (a vec4) and reads their
// columns; the weights are read from threadgroup memory, the same address for all lanes.
//
// Turbo codes whose scale can be folded into the weights are multiplied as half2, in chains of
// CHAIN_TOKENS whose sums are added in float32. All others are multiplied in float32.

constant constexpr int CHAIN_TOKENS = 8;

// Whether the vec4s that all lanes handle at a time share one scale per token. float32 models
// (`raw` as in raw_value) get float32 products.
TKV_CONST_FN bool values_in_half(int bits, int group, int dim, int raw) {
  return bits <= 6 && raw != 2 && (group_count(dim, group) == 1 || group == 4 * LANES);
}
// Scales per token that are folded into the weights.
TKV_CONST_FN int weight_groups(int bits, int group, int dim, int raw) {
  return values_in_half(bits, group, dim, raw) ? group_count(dim, group) : 1;
}
// Words of threadgroup memory for the weights of a tile.
TKV_CONST_FN int weight_words(int bits, int group, int dim, int rows, int raw) {
  return values_in_half(bits, group, dim, raw)
             ? group_count(dim, group) * TILE * padded_rows(rows) / 2
             : TILE * padded_rows(rows);
}
// Tokens of a unit: those whose vec4s fill whole columns. Units are prefetched.
TKV_CONST_FN int value_span(int bits) {
  return bits == 8 ? 8 : (bits == 16 ? 4 : (bits == 32 ? 2 : (bits == 4 || bits == 6 ? 16 : 32)));
}
TKV_CONST_FN int unit_columns(int bits) {
  return value_span(bits) * bits / 32;
}
// Words of a unit that a lane loads.
TKV_CONST_FN int unit_words(int bits, int dim) {
  return unit_columns(bits) * 4 * ceil_div(dim, 4 * LANES);
}

// Loads column `c` of a unit for the lane's vec4 among the dims from 128 `s` on. `codes`: V's part
// of a tile.
template <int BITS, int DIM>
TKV_FN void load_unit_column(thread uint* words, const device uint* codes, int unit, int s, int c,
                             int first_vec4, int stride) {
  // lanes past the last vec4 repeat it and drop the result
  const int vec4 = first_vec4 + s * stride < DIM / 4 ? first_vec4 + s * stride : DIM / 4 - 1;
  const uint4 v = ((const device uint4*)codes)[(unit * unit_columns(BITS) + c) * (DIM / 4) + vec4];
  words += (s * unit_columns(BITS) + c) * 4;
  words[0] = v.x;
  words[1] = v.y;
  words[2] = v.z;
  words[3] = v.w;
}

template <int BITS, int DIM>
TKV_FN void load_unit(thread uint* words, const device uint* codes, int unit, int first_vec4,
                      int stride) {
  TKV_UNROLL
  for (int s = 0; s < ceil_div(DIM, 4 * LANES); s++) {
    TKV_UNROLL
    for (int c = 0; c < unit_columns(BITS); c++) {
      load_unit_column<BITS, DIM>(words, codes, unit, s, c, first_vec4, stride);
    }
  }
}

// Loads the bits of the scales of a lane's tokens: [tile][group].
template <int BITS, int GROUP, int DIM, int RAW, int STEP>
TKV_FN void load_value_scales(thread uint* scales, const device uint* thread* tiles, int offset,
                              int lane) {
  constexpr int GROUPS = weight_groups(BITS, GROUP, DIM, RAW);
  if (!values_in_half(BITS, GROUP, DIM, RAW)) {
    return;
  }
  TKV_UNROLL
  for (int i = 0; i < STEP; i++) {
    TKV_UNROLL
    for (int g = 0; g < GROUPS; g++) {
      scales[i * GROUPS + g] =
          ((const device ushort*)(tiles[i] + offset + code_words(BITS, DIM)))[g * TILE + lane];
    }
  }
}

// Adds p.v of a unit to `output` in half precision. `words`: the unit's words, replaced by those of
// `next_unit` in tile `next_codes`. `weights`: of the unit, half [token][row] for each group, times
// the group's scale.
template <int BITS, int GROUP, int DIM, int COPIES, int ROWS>
TKV_FN void add_half_values(thread float* output, thread uint* words,
                            threadgroup const uint* weights, threadgroup const float4* shared,
                            uint copy, const device uint* next_codes, int next_unit, int first_vec4,
                            int stride) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int TOKENS = value_span(BITS);
  TKV_UNROLL
  for (int s = 0; s < ceil_div(DIM, 4 * LANES); s++) {
    thread uint* vec4s = words + s * unit_columns(BITS) * 4;
    TKV_UNROLL
    for (int first = 0; first < TOKENS; first += 2 * CHAIN_TOKENS) {
      half2 sums[2 * ROWS];
      TKV_UNROLL
      for (int begin = first; begin < first + 2 * CHAIN_TOKENS; begin += CHAIN_TOKENS) {
        half2 chain[2 * ROWS];
        TKV_UNROLL
        for (int i = 0; i < 2 * ROWS; i++) {
          chain[i] = as_type<half2>(0u);
        }
        uint w[4 * RP];
        TKV_UNROLL
        for (int i = 0; i < RP; i++) {
          const uint4 v =
              ((threadgroup const uint4*)(weights + s * (TILE * RP / 2)))[begin * RP / 8 + i];
          w[4 * i] = v.x;
          w[4 * i + 1] = v.y;
          w[4 * i + 2] = v.z;
          w[4 * i + 3] = v.w;
        }
        TKV_UNROLL
        for (int t = 0; t < CHAIN_TOKENS; t++) {
          half2 v[2];
          vec4_halves<BITS, COPIES>(v, vec4_bits<BITS>(vec4s, begin + t).x, shared, copy);
          TKV_UNROLL
          for (int r = 0; r < ROWS; r++) {
            const half2 two = as_type<half2>(w[(t * RP + r) / 2]);
            const half2 weight = (t * RP + r) % 2 == 0 ? half2(two.x, two.x) : half2(two.y, two.y);
            chain[2 * r] = fma(v[0], weight, chain[2 * r]);
            chain[2 * r + 1] = fma(v[1], weight, chain[2 * r + 1]);
          }
        }
        TKV_UNROLL
        for (int i = 0; i < 2 * ROWS; i++) {
          sums[i] = begin == first ? chain[i] : sums[i] + chain[i];
        }
      }
      TKV_UNROLL
      for (int i = 0; i < 2 * ROWS; i++) {
        output[s * ROWS * 4 + 2 * i] += float(sums[i].x);
        output[s * ROWS * 4 + 2 * i + 1] += float(sums[i].y);
      }
      TKV_UNROLL
      for (int c = first * BITS / 32; c < (first + 2 * CHAIN_TOKENS) * BITS / 32; c++) {
        load_unit_column<BITS, DIM>(words, next_codes, next_unit, s, c, first_vec4, stride);
      }
    }
  }
}

// The same in float32. `weights`: of the unit, float [token][row]. `first`, `n`: the tile's tokens
// that are valid.
template <int BITS, int GROUP, int DIM, int RAW, int ROWS>
TKV_FN void add_float_values(thread float* output, thread uint* words, const device uint* codes,
                             threadgroup const float* weights, threadgroup const float* levels,
                             int unit, int first_vec4, int stride, uint first, uint n) {
  constexpr int RP = padded_rows(ROWS);
  constexpr int TOKENS = value_span(BITS);
  TKV_UNROLL
  for (int s = 0; s < ceil_div(DIM, 4 * LANES); s++) {
    const int vec4 = first_vec4 + s * stride < DIM / 4 ? first_vec4 + s * stride : DIM / 4 - 1;
    const device ushort* scales = (const device ushort*)(codes + code_words(BITS, DIM)) +
                                  vec4 * 4 / (GROUP == 0 ? 1 : GROUP) * TILE + unit * TOKENS;
    TKV_UNROLL
    for (int t = 0; t < TOKENS; t++) {
      float4 v = vec4_values<BITS, RAW>(vec4_bits<BITS>(words + s * TOKENS * BITS / 8, t), levels);
      const bool seen = uint(unit * TOKENS + t) - first < n;
      if (GROUP != 0) {
        const float scale = seen ? half_bits(scales[t]) : 0.0f;
        v = float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
      } else {
        v = float4(seen ? v.x : 0.0f, seen ? v.y : 0.0f, seen ? v.z : 0.0f, seen ? v.w : 0.0f);
      }
      TKV_UNROLL
      for (int r = 0; r < ROWS; r++) {
        float w;
        if (RP % 4 == 0) {
          w = component(((threadgroup const float4*)weights)[(t * RP + r) / 4], r % 4);
        } else {
          w = weights[t * RP + r];
        }
        thread float* o = output + (s * ROWS + r) * 4;
        o[0] += w * v.x;
        o[1] += w * v.y;
        o[2] += w * v.z;
        o[3] += w * v.w;
      }
    }
  }
}

// Stores a token's weights in threadgroup memory: float [token][row], or half [group][token][row]
// times the group's scale. A weight of zero stays zero even where the scale is not finite.
template <int BITS, int GROUP, int DIM, int RAW, int ROWS>
TKV_FN void store_weights(threadgroup uint* at, thread const float* weight,
                          thread const float* scales, int lane) {
  constexpr int RP = padded_rows(ROWS);
  if (!values_in_half(BITS, GROUP, DIM, RAW)) {
    TKV_UNROLL
    for (int r = 0; r < RP; r++) {
      ((threadgroup float*)at)[lane * RP + r] = weight[r];
    }
    return;
  }
  TKV_UNROLL
  for (int g = 0; g < weight_groups(BITS, GROUP, DIM, RAW); g++) {
    threadgroup half* row = (threadgroup half*)at + (g * TILE + lane) * RP;
    TKV_UNROLL
    for (int r = 0; r < RP; r++) {
      row[r] = half(weight[r] > 0.0f ? weight[r] * scales[g] : 0.0f);
    }
  }
}
