// Joins the splits of one output row of decode.metal, adds the sink to the denominator, and rotates
// back if V is turbo. A threadgroup takes a row; its SIMD groups share the splits among them, and
// then each takes one rotation group. Without a valid key the output is zero.

template <typename T, int VD, int VW>
TKV_FN void decode_merge(const device float* partial, const device float* stats,
                         const device T* sinks, const device int* params,
                         const device uint* v_constants, device T* out, threadgroup float4* shared,
                         uint3 group, uint simd, uint lane_index) {
  constexpr int N = ceil_div(VD, LANES);
  constexpr int AT_ONCE = 4;  // splits whose rows are under way together
  const int lane = int(lane_index);
  const int simd_group = int(simd);
  const int n_splits = params[P_SPLITS];
  const size_t row = group.x;
  const device float* row_stats = stats + row * n_splits * 2;
  threadgroup float* merged = (threadgroup float*)shared;

  float top = LOWEST;
  float sink = LOWEST;
  if (params[P_SINKS] != 0) {
    const int n_heads = params[P_HEADS] * (params[P_ROWS] / params[P_QUERIES]);
    sink = float(sinks[int(group.x) / params[P_QUERIES] % n_heads]) * LOG2_E;
    top = sink;
  }
  for (int s = lane; s < n_splits; s += LANES) {
    top = row_stats[2 * s] > top ? row_stats[2 * s] : top;
  }
  top = simd_max(top);
  float total = 0.0f;
  for (int s = lane; s < n_splits; s += LANES) {
    total += row_stats[2 * s + 1] * fast_exp2(row_stats[2 * s] - top);
  }
  total = simd_sum(total);
  if (params[P_SINKS] != 0) {
    total += fast_exp2(sink - top);
  }

  float x[N];
  TKV_UNROLL
  for (int j = 0; j < N; j++) {
    x[j] = 0.0f;
  }
  for (int first = simd_group; first < n_splits; first += AT_ONCE * DECODE_GROUPS) {
    float values[AT_ONCE * N];
    float factors[AT_ONCE];
    TKV_UNROLL
    for (int k = 0; k < AT_ONCE; k++) {
      const int s = first + k * DECODE_GROUPS < n_splits ? first + k * DECODE_GROUPS : first;
      factors[k] = s == first && k > 0 ? 0.0f : fast_exp2(row_stats[2 * s] - top);
      TKV_UNROLL
      for (int j = 0; j < N; j++) {
        values[k * N + j] =
            lane + j * LANES < VD ? partial[(row * n_splits + s) * VD + lane + j * LANES] : 0.0f;
      }
    }
    TKV_UNROLL
    for (int k = 0; k < AT_ONCE; k++) {
      TKV_UNROLL
      for (int j = 0; j < N; j++) {
        x[j] += factors[k] * values[k * N + j];
      }
    }
  }
  TKV_UNROLL
  for (int j = 0; j < N; j++) {
    if (lane + j * LANES < VD) {
      merged[simd_group * VD + lane + j * LANES] = x[j];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  constexpr int WIDTH = VW == 0 ? VD : VW;
  constexpr int M = ceil_div(WIDTH, LANES);
  // without a valid key the output is zero
  const float factor =
      (total == 0.0f ? 0.0f : 1.0f / total) * (VW == 0 ? 1.0f : 1.0f / sqrt(float(WIDTH)));
  if (simd_group >= VD / WIDTH) {
    return;
  }
  float y[M];
  TKV_UNROLL
  for (int j = 0; j < M; j++) {
    const int i = lane + j * LANES;
    y[j] = 0.0f;
    if (i < WIDTH) {
      for (int s = 0; s < DECODE_GROUPS; s++) {
        y[j] += merged[s * VD + simd_group * WIDTH + i];
      }
    }
  }
  if (VW != 0) {
    constexpr int W = VW == 0 ? 32 : VW;
    rotate_back<W>(y, v_constants, merged + simd_group * W, lane);
  }
  TKV_UNROLL
  for (int j = 0; j < M; j++) {
    const int i = lane + j * LANES;
    if (i < WIDTH) {
      out[row * VD + simd_group * WIDTH + i] = T(y[j] * factor);
    }
  }
}
