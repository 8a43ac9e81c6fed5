// The softmax of decode.metal. Scores are in units of log2(e). A weight is 2^(score - reference);
// the reference follows the largest score seen so far. Where V's scale is folded into the weights,
// it is included in the score that the reference follows.
//
// The reference is set HEADROOM below the largest score, and again when a weight would exceed
// 2^(HEADROOM + MARGIN). So a chain of half products of at most 2^10 stays finite, and weights of
// 2^-30 of the largest are not lost.

constant constexpr float HEADROOM = 6.0f;
constant constexpr float MARGIN = 4.0f;
// the smallest subnormal of half: smaller scales of V are taken as this
constant constexpr float LOWEST_SCALE = 5.96e-8f;

// The largest reference of a row over SIMD groups. `maxima`: [SIMD group][row].
template <int RP>
TKV_FN float max_over_simds(threadgroup const float* maxima, int row) {
  float top = LOWEST;
  for (int s = 0; s < DECODE_GROUPS; s++) {
    top = maxima[s * RP + row] > top ? maxima[s * RP + row] : top;
  }
  return top;
}

// The sum of a row's weights over SIMD groups, relative to the score `top`.
template <int RP>
TKV_FN float sum_over_simds(threadgroup const float* maxima, threadgroup const float* sums, int row,
                            float top) {
  float total = 0.0f;
  for (int s = 0; s < DECODE_GROUPS; s++) {
    total += sums[s * RP + row] * fast_exp2(maxima[s * RP + row] - top);
  }
  return total;
}
