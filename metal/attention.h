// Shared by decode.metal and merge.metal.

constant constexpr int DECODE_GROUPS = 8;
constant constexpr float LOWEST = -1e38f;
constant constexpr float LOG2_E = 1.44269504088896f;

// int32 parameters, in the order of kernels/decode.py.
constant constexpr int param_n_rows = 0;       // query rows of one KV head: GQA factor * queries
constant constexpr int param_n_queries = 1;    // queries of one head
constant constexpr int param_n_kv_heads = 2;   // KV heads
constant constexpr int param_causal = 3;       // query l sees n - queries + l + 1 tokens
constant constexpr int param_body_stride = 4;  // tiles of one head in the body buffer
constant constexpr int param_body_tiles = 5;   // valid tiles of one head in the body
constant constexpr int param_tail_stride = 6;
constant constexpr int param_n_tokens = 7;  // valid tokens, body and tail
constant constexpr int param_n_splits = 8;
constant constexpr int param_has_left_padding = 9;  // whether `left_padding` is given
constant constexpr int param_has_sinks = 10;        // whether `sinks` is given
constant constexpr int param_scale_bits = 11;       // bits of the float32 attention scale
constant constexpr int param_opaque_one = 12;       // 1, so that loops stay rolled
constant constexpr int param_split_pairs = 13;      // as in anchor.h
constant constexpr int param_n_uncentred = 14;      // first keys of a sequence without an anchor
constant constexpr int param_stats_offset = 15;     // offset of maxima and sums in `result`

// The softmax weight of an output row's sink relative to the score `top`, at most 2^120.
template <typename T>
TKV_FN float sink_weight(const device T* sinks, const device int* params, int row, float top) {
  const int n_heads = params[param_n_kv_heads] * (params[param_n_rows] / params[param_n_queries]);
  const float above = float(sinks[row / params[param_n_queries] % n_heads]) * LOG2_E - top;
  return fast_exp2(above < 120.0f ? above : 120.0f);
}

// values that one inverse rotation covers: a rotation group of V, or the whole row
TKV_CONST_FN int output_width(int dim, int rotation_width) {
  return rotation_width == 0 ? dim : rotation_width;
}

// Writes one part (output_width values) of an output row: sums `simd_rows` [SIMD group][dim] over
// SIMD groups, divides by `total` (the sum of the weights), and applies the inverse rotation if V
// is turbo. A row without a valid key is zero. The first SIMD group's values are overwritten.
template <typename T, int VD, int VW>
TKV_FN void write_output(device T* out, threadgroup float* simd_rows, float total, int part,
                         const device uint* v_constants, int lane) {
  constexpr int WIDTH = output_width(VD, VW);
  constexpr int N = ceil_div(WIDTH, LANES);
  const float factor =
      (total == 0.0f ? 0.0f : 1.0f / total) * (VW == 0 ? 1.0f : 1.0f / sqrt(float(WIDTH)));
  float y[N];
  TKV_UNROLL
  for (int j = 0; j < N; j++) {
    const int i = lane + j * LANES;
    y[j] = 0.0f;
    if (i < WIDTH) {
      for (int s = 0; s < DECODE_GROUPS; s++) {
        y[j] += simd_rows[s * VD + part * WIDTH + i];
      }
    }
  }
  if (VW != 0) {
    constexpr int W = VW == 0 ? 32 : VW;
    rotate_inverse<W>(y, v_constants, simd_rows + part * W, lane);
  }
  TKV_UNROLL
  for (int j = 0; j < N; j++) {
    const int i = lane + j * LANES;
    if (i < WIDTH) {
      out[part * WIDTH + i] = T(y[j] * factor);
    }
  }
}
