// What decode.metal and merge.metal agree on.

constant constexpr int DECODE_GROUPS = 8;
constant constexpr float LOWEST = -1e38f;
constant constexpr float LOG2_E = 1.44269504088896f;

// int32 parameters, in the order of kernels/decode.py.
constant constexpr int P_ROWS = 0;         // query rows of one KV head: GQA factor * queries
constant constexpr int P_QUERIES = 1;      // queries of one head
constant constexpr int P_HEADS = 2;        // KV heads
constant constexpr int P_CAUSAL = 3;       // query l sees tokens up to n - queries + l
constant constexpr int P_BODY_STRIDE = 4;  // tiles of one head in the body's buffer
constant constexpr int P_BODY_TILES = 5;   // and those that are valid
constant constexpr int P_TAIL_STRIDE = 6;
constant constexpr int P_TOKENS = 7;  // valid tokens, body and tail
constant constexpr int P_SPLITS = 8;
constant constexpr int P_STARTS = 9;  // whether `starts` holds each sequence's first token
constant constexpr int P_SINKS = 10;  // whether `sinks` holds a logit per query head
constant constexpr int P_SCALE = 11;  // bits of the float
constant constexpr int P_ONE = 12;    // 1: makes a loop's count unknown, so that it stays rolled
constant constexpr int P_HALF = 13;   // pairs of dims that lie apart, for anchors
constant constexpr int P_BARE = 14;   // first keys of a sequence that have no anchor
constant constexpr int P_STATS = 15;  // where the splits' maxima and sums lie, behind their rows

// The weight of an output row's sink, relative to the score `top`: large where that is tiny beside
// it, but no more than what float32 holds.
template <typename T>
TKV_FN float sink_weight(const device T* sinks, const device int* params, int row, float top) {
  const int n_heads = params[P_HEADS] * (params[P_ROWS] / params[P_QUERIES]);
  const float above = float(sinks[row / params[P_QUERIES] % n_heads]) * LOG2_E - top;
  return fast_exp2(above < 120.0f ? above : 120.0f);
}

// values that a SIMD group turns back at once: a rotation group of V, or the row
TKV_CONST_FN int output_width(int dim, int rotation_width) {
  return rotation_width == 0 ? dim : rotation_width;
}

// One part of an output row, of output_width values: sums what the SIMD groups hold of it, `joined`
// [SIMD group][dim], divides by the sum of the weights and rotates back if V is turbo. Without a
// valid key the output is zero. The part's values of the first SIMD group are overwritten.
template <typename T, int VD, int VW>
TKV_FN void write_output(device T* out, threadgroup float* joined, float total, int part,
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
        y[j] += joined[s * VD + part * WIDTH + i];
      }
    }
  }
  if (VW != 0) {
    constexpr int W = VW == 0 ? 32 : VW;
    rotate_back<W>(y, v_constants, joined + part * W, lane);
  }
  TKV_UNROLL
  for (int j = 0; j < N; j++) {
    const int i = lane + j * LANES;
    if (i < WIDTH) {
      out[part * WIDTH + i] = T(y[j] * factor);
    }
  }
}
