// p.v for decode.metal. A lane handles four neighbouring dims of V (a vec4) and reads their
// columns; the weights are read from threadgroup memory, the same address for all lanes.
//
// Turbo codes whose scale can be folded into the weights are multiplied by them in half. With HALF2
// the products are summed as half2 in chains of CHAIN_TOKENS, whose sums are added in float32;
// without it every product is added in float32. All other values have float32 operands.

// Loads columns of a unit of `tile` for the lane's vec4 among the dims from 128 `s` on: from
// `begin` to `end`, or word by word where a unit has no whole columns.
template <typename C>
TKV_FN void load_unit_columns(thread uint* words, const device uint* tile, int unit, int s,
                              int begin, int end, int first_vec4) {
  constexpr int DIM_VEC4S = C::V::DIM / 4;
  // lanes past the last vec4 repeat it and drop the result
  const int own = first_vec4 + s * (LANES / C::PARTS);
  const int vec4 = own < DIM_VEC4S ? own : DIM_VEC4S - 1;
  const device uint* columns = tile + C::K::WORDS;
  words += s * C::UNIT_WORDS;
  TKV_UNROLL
  for (int c = begin; c < end; c++) {
    const int column = unit * (C::UNIT_WORDS / 4) + c;
    const uint4 v = ((const device uint4*)columns)[column * DIM_VEC4S + vec4];
    words[4 * c] = v.x;
    words[4 * c + 1] = v.y;
    words[4 * c + 2] = v.z;
    words[4 * c + 3] = v.w;
  }
}

// Loads a unit.
template <typename C>
TKV_FN void load_unit(thread uint* words, const device uint* tile, int unit, int first_vec4) {
  TKV_UNROLL
  for (int s = 0; s < C::VEC4S; s++) {
    load_unit_columns<C>(words, tile, unit, s, 0, C::UNIT_WORDS / 4, first_vec4);
  }
}

// Loads the bits of the folded scales of a lane's tokens: [tile][group].
template <typename C>
TKV_FN void load_value_scales(thread uint* scales, thread const Tiles<C>& tiles, int lane) {
  if (!C::V_IN_HALF) {
    return;
  }
  TKV_UNROLL
  for (int i = 0; i < C::STEP; i++) {
    TKV_UNROLL
    for (int g = 0; g < C::FOLDED; g++) {
      scales[i * C::FOLDED + g] =
          ((const device ushort*)
               tiles.at[i])[2 * (C::K::WORDS + C::V::CODE_WORDS) + g * TILE + lane];
    }
  }
}

// Half `i` of an array of words.
TKV_FN half half_of(thread const uint* words, int i) {
  const half2 two = as_type<half2>(words[i / 2]);
  return i % 2 == 0 ? two.x : two.y;
}

// The sums of weight times value over CHAIN_TOKENS tokens from `begin` on, as half2.
template <typename C>
TKV_FN void sum_value_chain(thread half2* chain, thread const uint* vec4s,
                            threadgroup const uint* weights, threadgroup const float4* shared,
                            uint copy, int begin) {
  constexpr int RP = C::PADDED_ROWS;
  TKV_UNROLL
  for (int i = 0; i < 2 * C::ROWS; i++) {
    chain[i] = as_type<half2>(0u);
  }
  uint w[CHAIN_TOKENS * RP / 2];
  load_words<CHAIN_TOKENS * RP / 2>(w, weights + begin * RP / 2);
  TKV_UNROLL
  for (int t = 0; t < CHAIN_TOKENS; t++) {
    half2 v[2];
    vec4_halves<C::V::BITS, C::V_COPIES>(v, vec4_bits<C::V::BITS>(vec4s, begin + t).x, shared,
                                         copy);
    TKV_UNROLL
    for (int r = 0; r < C::ROWS; r++) {
      const half one = half_of(w, t * RP + r);
      const half2 weight = half2(one, one);
      chain[2 * r] = fma(v[0], weight, chain[2 * r]);
      chain[2 * r + 1] = fma(v[1], weight, chain[2 * r + 1]);
    }
  }
}

// Adds weight times value of tokens `begin` to `end` in float32. Weights are read when they are
// used: fewer registers.
template <typename C>
TKV_FN void add_half_values(thread float* output, thread const uint* vec4s,
                            threadgroup const uint* weights, threadgroup const float4* shared,
                            uint copy, int begin, int end) {
  constexpr int RP = C::PADDED_ROWS;
  constexpr int AT_ONCE = RP >= 4 ? 1 : 4 / RP;  // tokens whose weights are read at once
  TKV_UNROLL
  for (int first = begin; first < end; first += AT_ONCE) {
    half w[AT_ONCE * RP];
    load_halves<AT_ONCE * RP>(w, (threadgroup const half*)weights + first * RP);
    TKV_UNROLL
    for (int t = 0; t < AT_ONCE; t++) {
      half2 v[2];
      vec4_halves<C::V::BITS, C::V_COPIES>(v, vec4_bits<C::V::BITS>(vec4s, first + t).x, shared,
                                           copy);
      TKV_UNROLL
      for (int r = 0; r < C::ROWS; r++) {
        const float weight = float(w[t * RP + r]);
        thread float* o = output + r * 4;
        o[0] = fma(float(v[0].x), weight, o[0]);
        o[1] = fma(float(v[0].y), weight, o[1]);
        o[2] = fma(float(v[1].x), weight, o[2]);
        o[3] = fma(float(v[1].y), weight, o[3]);
      }
    }
  }
}

// Adds p.v of `unit` of `tile` in half operands. `words`: where units are prefetched its words,
// replaced by those of `next_unit` of `next`. `weights`: of the unit, half [token][row] for each
// group, times the group's scale.
template <typename C>
TKV_FN void add_unit_in_half(thread float* output, thread uint* words,
                             threadgroup const uint* weights, threadgroup const float4* shared,
                             uint copy, const device uint* tile, int unit, const device uint* next,
                             int next_unit, int first_vec4) {
  constexpr int BITS = C::V::BITS;
  TKV_UNROLL
  for (int s = 0; s < C::VEC4S; s++) {
    thread uint* vec4s = words + s * C::UNIT_WORDS;
    threadgroup const uint* group_weights = weights + s * (TILE * C::PADDED_ROWS / 2);
    TKV_UNROLL
    for (int first = 0; first < C::UNIT_TOKENS; first += 2 * CHAIN_TOKENS) {
      if (!C::PREFETCH) {
        load_unit_columns<C>(words, tile, unit, s, ceil_div(first * BITS, 32),
                             ceil_div((first + 2 * CHAIN_TOKENS) * BITS, 32), first_vec4);
      }
      if (C::HALF2) {
        half2 sums[2 * C::ROWS];
        half2 chain[2 * C::ROWS];
        sum_value_chain<C>(sums, vec4s, group_weights, shared, copy, first);
        sum_value_chain<C>(chain, vec4s, group_weights, shared, copy, first + CHAIN_TOKENS);
        TKV_UNROLL
        for (int i = 0; i < 2 * C::ROWS; i++) {
          sums[i] = sums[i] + chain[i];
          output[s * C::ROWS * 4 + 2 * i] += float(sums[i].x);
          output[s * C::ROWS * 4 + 2 * i + 1] += float(sums[i].y);
        }
      } else {
        add_half_values<C>(output + s * C::ROWS * 4, vec4s, group_weights, shared, copy, first,
                           first + 2 * CHAIN_TOKENS);
      }
      if (C::PREFETCH) {
        load_unit_columns<C>(words, next, next_unit, s, first * BITS / 32,
                             (first + 2 * CHAIN_TOKENS) * BITS / 32, first_vec4);
      }
    }
  }
}

// Adds p.v of a unit of float32 operands. `weights`: of the unit, float [token][row]. `first`, `n`:
// the tile's tokens that are valid.
template <typename C>
TKV_FN void add_unit_in_float(thread float* output, thread const uint* words,
                              const device uint* tile, threadgroup const float* weights,
                              threadgroup const float* levels, int unit, int first_vec4, uint first,
                              uint n) {
  typedef typename C::V V;
  constexpr int RP = C::PADDED_ROWS;
  TKV_UNROLL
  for (int s = 0; s < C::VEC4S; s++) {
    const int own = first_vec4 + s * (LANES / C::PARTS);
    const int vec4 = own < V::DIM / 4 ? own : V::DIM / 4 - 1;
    const device ushort* scales = (const device ushort*)tile + 2 * (C::K::WORDS + V::CODE_WORDS) +
                                  vec4 * 4 / larger(V::GROUP, 1) * TILE + unit * C::UNIT_TOKENS;
    TKV_UNROLL
    for (int t = 0; t < C::UNIT_TOKENS; t++) {
      float4 v =
          vec4_values<V::BITS, C::RAW>(vec4_bits<V::BITS>(words + s * C::UNIT_WORDS, t), levels);
      const bool seen = uint(unit * C::UNIT_TOKENS + t) - first < n;
      if (V::GROUP != 0) {
        const float scale = seen ? half_bits(scales[t]) : 0.0f;
        v = float4(v.x * scale, v.y * scale, v.z * scale, v.w * scale);
      } else {
        v = float4(seen ? v.x : 0.0f, seen ? v.y : 0.0f, seen ? v.z : 0.0f, seen ? v.w : 0.0f);
      }
      TKV_UNROLL
      for (int r = 0; r < C::ROWS; r++) {
        const float w = row_value<RP>(weights + t * RP, r);
        thread float* o = output + (s * C::ROWS + r) * 4;
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
template <typename C>
TKV_FN void store_weights(threadgroup uint* at, thread const float* weight,
                          thread const float* scales, int lane) {
  constexpr int RP = C::PADDED_ROWS;
  if (!C::V_IN_HALF) {
    TKV_UNROLL
    for (int r = 0; r < RP; r++) {
      ((threadgroup float*)at)[lane * RP + r] = weight[r];
    }
    return;
  }
  TKV_UNROLL
  for (int g = 0; g < C::FOLDED; g++) {
    threadgroup half* row = (threadgroup half*)at + (g * TILE + lane) * RP;
    TKV_UNROLL
    for (int r = 0; r < RP; r++) {
      row[r] = half(weight[r] > 0.0f ? weight[r] * scales[g] : 0.0f);
    }
  }
}
