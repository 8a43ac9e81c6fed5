// The end of decode.metal: the SIMD groups' rows become one, scaled to the largest of their
// max_scores, which is written as a part of a split or, with WHOLE, as the output.

// The largest max_score of a row. `max_scores`: [SIMD group][row].
template <typename C>
TKV_FN float max_over_simds(threadgroup const float* max_scores, int row) {
  float largest = LOWEST;
  for (int s = 0; s < C::SIMD_GROUPS; s++) {
    const float score = max_scores[s * C::PADDED_ROWS + row];
    largest = score > largest ? score : largest;
  }
  return largest;
}

// The sum of a row's weights relative to `max_score`.
template <typename C>
TKV_FN float sum_over_simds(threadgroup const float* max_scores, threadgroup const float* sums,
                            int row, float max_score) {
  float total = 0.0f;
  for (int s = 0; s < C::SIMD_GROUPS; s++) {
    const int at = s * C::PADDED_ROWS + row;
    total += sums[at] * fast_exp2(max_scores[at] - max_score);
  }
  return total;
}

// Stores rows `r0` on of a SIMD group, ROWS_JOINED at a time, as [row][SIMD group][dim].
template <typename C>
TKV_FN void store_rows(threadgroup float* joined, thread const float* output,
                       thread const float* factors, int r0, int simd_group, int lane) {
  constexpr int ROWS_JOINED = DecodeMemory<C>::ROWS_JOINED;
  const int part = C::OUTPUT_PARTS == 2 ? lane / HALF_LANES : 0;
  const int first_vec4 = C::OUTPUT_PARTS == 2 ? lane % HALF_LANES : lane;
  TKV_UNROLL
  for (int r = 0; r < C::ROWS; r++) {
    if (r >= r0 && r < r0 + ROWS_JOINED) {
      TKV_UNROLL
      for (int s = 0; s < C::VEC4S; s++) {
        TKV_UNROLL
        for (int d = 0; d < 4; d++) {
          float value = output[(s * C::ROWS + r) * 4 + d] * factors[r];
          if (C::OUTPUT_PARTS == 2) {
            value += simd_shuffle_xor(value, ushort(HALF_LANES));
          }
          const int vec4 = first_vec4 + s * LANES;
          if (part == 0 && vec4 < C::V::DIM / 4) {
            joined[((r - r0) * C::SIMD_GROUPS + simd_group) * C::V::DIM + vec4 * 4 + d] = value;
          }
        }
      }
    }
  }
}

// Writes the sums over SIMD groups of rows `r0` on: a split's part.
template <typename C, typename Result>
TKV_FN void write_partial(device Result* result, threadgroup const float* joined, Split split,
                          int n_splits, int index, int r0, int n_joined, int thread_index) {
  constexpr int DIM = C::V::DIM;
  TKV_UNROLL
  for (int first = 0; first < DecodeMemory<C>::ROWS_JOINED * DIM; first += C::THREADS) {
    const int i = first + thread_index;
    if (i / DIM < n_joined) {
      float total = 0.0f;
      TKV_UNROLL
      for (int s = 0; s < C::SIMD_GROUPS; s++) {
        total += joined[(i / DIM * C::SIMD_GROUPS + s) * DIM + i % DIM];
      }
      result[(size_t(split.first_row + r0 + i / DIM) * n_splits + index) * DIM + i % DIM] =
          Result(total);
    }
  }
}

// Writes rows `r0` on of the output.
template <typename C, typename Result>
TKV_FN void write_whole(device Result* result, threadgroup float* words, Split split,
                        DecodeInputs<typename C::T> inputs, int r0, int n_joined, int simd_group,
                        int lane) {
  typedef DecodeMemory<C> Memory;
  constexpr int DIM = C::V::DIM;
  constexpr int WIDTH = C::V::WIDTH;
  constexpr int PARTS = DIM / output_width(DIM, WIDTH);
  threadgroup float* joined = words + Memory::JOINED;
  for (int i = simd_group; i < n_joined * PARTS; i += C::SIMD_GROUPS) {
    const int row = r0 + i / PARTS;
    const float max_score = max_over_simds<C>(words + Memory::MAX_SCORES, row);
    float total =
        sum_over_simds<C>(words + Memory::MAX_SCORES, words + Memory::SUMS, row, max_score);
    if (inputs.params->has_sinks != 0) {
      total += sink_weight(inputs.sinks, *inputs.params, split.first_row + row, max_score);
    }
    write_output<Result, C::SIMD_GROUPS, DIM, WIDTH>(result + size_t(split.first_row + row) * DIM,
                                                     joined + i / PARTS * C::SIMD_GROUPS * DIM,
                                                     total, i % PARTS, inputs.v_constants, lane);
  }
}

// Joins the SIMD groups' rows and writes them.
template <typename C, typename Result>
TKV_FN void join(device Result* result, threadgroup float* words, thread const float* output,
                 thread const Softmax<C::ROWS>& softmax, Split split,
                 DecodeInputs<typename C::T> inputs, int index, int simd_group, int lane) {
  typedef DecodeMemory<C> Memory;
  const int thread_index = simd_group * LANES + lane;
  threadgroup float* max_scores = words + Memory::MAX_SCORES;
  threadgroup float* sums = words + Memory::SUMS;
  TKV_UNROLL
  for (int r = 0; r < C::ROWS; r++) {
    const float total = simd_sum(softmax.sum_exp[r]);
    if (lane == 0) {
      max_scores[simd_group * C::PADDED_ROWS + r] = softmax.max_score[r];
      sums[simd_group * C::PADDED_ROWS + r] = total;
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float factors[C::ROWS];
  TKV_UNROLL
  for (int r = 0; r < C::ROWS; r++) {
    factors[r] = fast_exp2(softmax.max_score[r] - max_over_simds<C>(max_scores, r));
  }
  const int n_splits = inputs.params->n_splits;
  if (!C::WHOLE && thread_index < split.n_rows) {
    const float max_score = max_over_simds<C>(max_scores, thread_index);
    device Result* stats = result + inputs.params->stats_offset +
                           (size_t(split.first_row + thread_index) * n_splits + index) * 2;
    stats[0] = Result(max_score);
    stats[1] = Result(sum_over_simds<C>(max_scores, sums, thread_index, max_score));
  }
  for (int r0 = 0; r0 < C::ROWS; r0 += Memory::ROWS_JOINED) {
    const int left = split.n_rows - r0;
    const int n_joined = left < Memory::ROWS_JOINED ? left : Memory::ROWS_JOINED;
    store_rows<C>(words + Memory::JOINED, output, factors, r0, simd_group, lane);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (C::WHOLE) {
      write_whole<C>(result, words, split, inputs, r0, n_joined, simd_group, lane);
    } else {
      write_partial<C>(result, words + Memory::JOINED, split, n_splits, index, r0, n_joined,
                       thread_index);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}
