// The online softmax of decode.metal. Scores are in units of log2(e): a weight is
// 2^(score - max_score), and sum_exp the sum of weights.
//
// max_score is HEADROOM below the largest score at the time, and set anew when a weight would
// exceed 2^(HEADROOM + MARGIN). So a chain of half products of at most 2^10 stays finite, and
// weights of 2^-30 of the largest are not lost. Where V's scale is folded into the weights, its
// logarithm counts as a part of the score.

constant constexpr float HEADROOM = 6.0f;
constant constexpr float MARGIN = 4.0f;
// the smallest subnormal of half: smaller scales of V are taken as this
constant constexpr float LOWEST_SCALE = 5.96e-8f;

template <int ROWS>
struct Softmax {
  float max_score[ROWS];
  float sum_exp[ROWS];  // of this lane's tokens
};

template <int ROWS>
TKV_FN void start_softmax(thread Softmax<ROWS>& softmax) {
  TKV_UNROLL
  for (int r = 0; r < ROWS; r++) {
    softmax.max_score[r] = LOWEST;
    softmax.sum_exp[r] = 0.0f;
  }
}

// Stores how many rows each query sees of those that are read, up to the split's end. Earlier
// queries miss the last rows.
template <typename C>
TKV_FN void store_n_seen(threadgroup uint* n_seen, Split split, const device DecodeParams& params,
                         int thread_index) {
  if (thread_index < C::PADDED_ROWS) {
    const int n_queries = params.n_queries;
    const int query = (split.row0 + thread_index) % n_queries;
    const int n_visible = params.n_tokens - (params.causal != 0 ? n_queries - 1 - query : 0);
    const int to = C::READS == READS_BODY ? smaller(n_visible, split.to) : n_visible;
    // protected rows are cut into whole steps, after which there is none
    const int last = C::READS == READS_PROTECTED ? to : smaller(to, split.end * TILE);
    const bool valid = thread_index < C::ROWS;
    n_seen[thread_index] = valid ? uint(larger(last - split.from, 0)) : 0u;
    if (C::READS == READS_PROTECTED) {
      const int n_first = n_first_tokens(params, split.padding);
      const int n = smaller(n_visible - split.padding, n_first);
      n_seen[C::PADDED_ROWS + thread_index] = valid ? uint(larger(n, 0)) : 0u;
    }
  }
}

// V's scales of a step's tokens that are folded into the weights, and their logarithm by tile.
template <typename C>
TKV_FN void folded_scales(thread float* scales, thread float* logs, thread const uint* bits) {
  TKV_UNROLL
  for (int i = 0; i < C::STEP; i++) {
    float largest = LOWEST_SCALE;
    TKV_UNROLL
    for (int g = 0; g < C::FOLDED; g++) {
      const int at = i * C::FOLDED + g;
      scales[at] = C::V_IN_HALF ? half_bits(bits[at]) : 1.0f;
      largest = scales[at] > largest ? scales[at] : largest;
    }
    logs[i] = C::V_IN_HALF ? fast_log2(largest) : 0.0f;
  }
}

// Raises max_score where a score asks for it, and scales the sums and the output to it. `first`:
// the lane's row in the step's first tile, counted from the first that is read.
template <typename C>
TKV_FN void raise_max_scores(thread Softmax<C::ROWS>& softmax, thread float* output,
                             thread const float* score, thread const float* logs,
                             threadgroup const uint* n_seen, uint first) {
  bool grown = false;
  float highest[C::ROWS];
  TKV_UNROLL
  for (int r = 0; r < C::ROWS; r++) {
    highest[r] = LOWEST;
    TKV_UNROLL
    for (int i = 0; i < C::STEP; i++) {
      const bool seen = first + uint(i * TILE) < row_value<C::PADDED_ROWS>(n_seen, r);
      const float found = score[i * C::ROWS + r] + logs[i];
      highest[r] = seen && found > highest[r] ? found : highest[r];
    }
    grown = grown || highest[r] > softmax.max_score[r] + (HEADROOM + MARGIN);
  }
  if (!simd_any(grown)) {
    return;
  }
  TKV_UNROLL
  for (int r = 0; r < C::ROWS; r++) {
    const float found = simd_max(highest[r]) - HEADROOM;
    const float raised = found > softmax.max_score[r] ? found : softmax.max_score[r];
    const float factor = fast_exp2(softmax.max_score[r] - raised);
    softmax.max_score[r] = raised;
    softmax.sum_exp[r] *= factor;
    TKV_UNROLL
    for (int s = 0; s < C::VEC4S; s++) {
      TKV_UNROLL
      for (int d = 0; d < 4; d++) {
        output[(s * C::ROWS + r) * 4 + d] *= factor;
      }
    }
  }
}

// Adds the weights of a step's tokens to sum_exp, and stores them in threadgroup memory.
template <typename C>
TKV_FN void store_step_weights(thread Softmax<C::ROWS>& softmax, threadgroup uint* weights,
                               thread const float* score, thread const float* scales,
                               threadgroup const uint* n_seen, uint first, int lane) {
  TKV_UNROLL
  for (int i = 0; i < C::STEP; i++) {
    float weight[C::PADDED_ROWS];
    TKV_UNROLL
    for (int r = 0; r < C::PADDED_ROWS; r++) {
      weight[r] = 0.0f;
      if (r < C::ROWS) {
        const bool seen = first + uint(i * TILE) < row_value<C::PADDED_ROWS>(n_seen, r);
        weight[r] = seen ? fast_exp2(score[i * C::ROWS + r] - softmax.max_score[r]) : 0.0f;
        softmax.sum_exp[r] += weight[r];
      }
    }
    store_weights<C>(weights + i * weight_words<C>(), weight, scales + i * C::FOLDED, lane);
  }
}
