// Merges the splits of an output row of decode.metal and adds the attention sink to the softmax's
// denominator. One threadgroup for each row: its SIMD groups sum a part of the splits each, then
// write a part of the output each.

constant constexpr int MERGE_GROUPS = 8;  // SIMD groups of a threadgroup
// splits that a SIMD group loads at once
constant constexpr int MERGED_AT_ONCE = 5;

// Loads the rows of splits `first`, `first` + MERGE_GROUPS, ...; past the end, split `first`
// again.
template <int VD>
TKV_FN void load_splits(thread float* values, const device float* rows, int first, int n_splits,
                        int lane) {
  constexpr int N = ceil_div(VD, LANES);
  TKV_UNROLL
  for (int k = 0; k < MERGED_AT_ONCE; k++) {
    const int s = first + k * MERGE_GROUPS < n_splits ? first + k * MERGE_GROUPS : first;
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      values[k * N + j] = lane + j * LANES < VD ? rows[s * VD + lane + j * LANES] : 0.0f;
    }
  }
}

template <typename T, int VD, int VW>
TKV_FN void decode_merge(const device float* partial, const device T* sinks,
                         const device int* params_words, const device uint* v_constants,
                         device T* out, threadgroup float4* shared, uint3 group, uint simd,
                         uint lane_index) {
  constexpr int N = ceil_div(VD, LANES);
  const int lane = int(lane_index);
  const int simd_group = int(simd);
  const device DecodeParams& params = *(const device DecodeParams*)params_words;
  const int n_splits = params.n_splits;
  const size_t row = group.x;
  const device float* row_stats = partial + params.stats_offset + row * n_splits * 2;
  const device float* rows = partial + row * n_splits * VD;
  threadgroup float* merged = (threadgroup float*)shared;

  // these loads overlap with the search for the largest score
  float values[MERGED_AT_ONCE * N];
  if (simd_group < n_splits) {
    load_splits<VD>(values, rows, simd_group, n_splits, lane);
  }
  float lane_top = LOWEST;
  float lane_total = 0.0f;
  for (int s = lane; s < n_splits; s += LANES) {
    const float split_top = row_stats[2 * s];
    const float higher = split_top > lane_top ? split_top : lane_top;
    lane_total = lane_total * fast_exp2(lane_top - higher) +
                 row_stats[2 * s + 1] * fast_exp2(split_top - higher);
    lane_top = higher;
  }
  const float top = simd_max(lane_top);
  float total = simd_sum(lane_total * fast_exp2(lane_top - top));
  if (params.has_sinks != 0) {
    total += sink_weight(sinks, params, int(row), top);
  }

  float x[N];
  TKV_UNROLL
  for (int j = 0; j < N; j++) {
    x[j] = 0.0f;
  }
  constexpr int STRIDE = MERGED_AT_ONCE * MERGE_GROUPS;
  for (int first = simd_group; first < n_splits; first += STRIDE) {
    TKV_UNROLL
    for (int k = 0; k < MERGED_AT_ONCE; k++) {
      const int s = first + k * MERGE_GROUPS;
      const float factor = s < n_splits ? fast_exp2(row_stats[2 * s] - top) : 0.0f;
      TKV_UNROLL
      for (int j = 0; j < N; j++) {
        x[j] += factor * values[k * N + j];
      }
    }
    if (first + STRIDE < n_splits) {
      load_splits<VD>(values, rows, first + STRIDE, n_splits, lane);
    }
  }
  TKV_UNROLL
  for (int j = 0; j < N; j++) {
    if (lane + j * LANES < VD) {
      merged[simd_group * VD + lane + j * LANES] = x[j];
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  if (simd_group < VD / output_width(VD, VW)) {
    write_output<T, MERGE_GROUPS, VD, VW>(out + row * VD, merged, total, simd_group, v_constants,
                                          lane);
  }
}
