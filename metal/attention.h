// Shared by decode.metal and merge.metal.

constant constexpr float LOWEST = -1e38f;
constant constexpr float LOG2_E = 1.44269504088896f;

// int32 parameters, in the order of kernels/decode.py.
struct DecodeParams {
  int n_rows;            // query rows of one KV head: GQA factor * queries
  int n_queries;         // queries of one head
  int n_kv_heads;        // KV heads
  int causal;            // query l sees n - queries + l + 1 tokens
  int body_stride;       // tiles of one head in the body buffer
  int body_tiles;        // valid tiles of one head in the body
  int tail_stride;       // tiles of one head in the tail buffer
  int n_tokens;          // valid tokens, body and tail
  int n_splits;          // splits of the tokens
  int has_left_padding;  // whether `left_padding` is given
  int has_sinks;         // whether `sinks` is given
  float scale;           // of the scores
  int opaque_one;        // 1, so that loops stay rolled
  int split_pairs;       // as in anchor.h
  int n_uncentred;       // first keys of a sequence without an anchor
  int stats_offset;      // offset of maxima and sums in `result`
  // of protected rows
  int n_sunk;           // rows whose first tokens are stored apart
  int first_tiles;      // most tiles of first tokens
  int first_stride;     // tiles of one head in their buffer
  int tail_start;       // the tail's first row, a multiple of 32
  int body_splits;      // splits that read the body, from the first on
  int protected_split;  // the first split that reads protected rows; it may read the body as well
  int spared_tiles;     // tiles of the body that the last of its splits reads less than the others
  int body_end;  // rows before the first that the tail holds; -1: of each sequence, after this
};
constant constexpr int DECODE_PARAMS = sizeof(DecodeParams) / sizeof(int);

// The softmax weight of an output row's sink relative to `max_score`, at most 2^120.
template <typename T>
TKV_FN float sink_weight(const device T* sinks, const device DecodeParams& params, int row,
                         float max_score) {
  const int n_heads = params.n_kv_heads * (params.n_rows / params.n_queries);
  const float above = float(sinks[row / params.n_queries % n_heads]) * LOG2_E - max_score;
  return fast_exp2(above < 120.0f ? above : 120.0f);
}

// values that one inverse rotation covers: a rotation group of V, or the whole row
TKV_CONST_FN int output_width(int dim, int rotation_width) {
  return rotation_width == 0 ? dim : rotation_width;
}

// Writes one part (output_width values) of an output row: sums `simd_rows` [SIMD group][dim] over
// SIMD groups, divides by `total` (the sum of the weights), and applies the inverse rotation if V
// is turbo. A row without a valid key is zero. The first SIMD group's values are overwritten.
template <typename T, int SIMD_GROUPS, int VD, int VW>
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
      for (int s = 0; s < SIMD_GROUPS; s++) {
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
