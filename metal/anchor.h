// Anchors of centred keys (mlx_turbokv/centring/centre.py). The anchor of a block of 32 positions
// is mu of the KV head with RoPE applied for that block. The table of cosines and sines is shared
// by all layers: a row for each block, a word for each pair of dims, the cosine in its low half and
// the sine in its high half. The first `split_pairs` pairs are dims (i, split_pairs + i), as in
// non-traditional RoPE; the others are (2 i, 2 i + 1).
//
// `centre` has three rows for each KV head: mu, what keys are multiplied by before anchors are
// subtracted (mlx_turbokv/centring/scales.py), and its inverse, which queries are multiplied by.

constant constexpr int ANCHOR_BLOCK = 32;
constant constexpr int CENTRE_MU = 0;
constant constexpr int CENTRE_SCALES = 1;
constant constexpr int CENTRE_INVERSE = 2;
constant constexpr int CENTRE_ROWS = 3;

// A row of `centre`.
template <int DIM>
TKV_FN const device float* centre_row(const device float* centre, int head, int row) {
  return centre + (head * CENTRE_ROWS + row) * DIM;
}

// The dims of pair `i`.
TKV_FN int pair_first(int i, int split_pairs) {
  return i < split_pairs ? i : 2 * i;
}
TKV_FN int pair_second(int i, int split_pairs) {
  return i < split_pairs ? split_pairs + i : 2 * i + 1;
}

// The block of a row; `padding`: rows before the sequence's first token.
TKV_FN int anchor_block(int row, int padding) {
  return row > padding ? (row - padding) / ANCHOR_BLOCK : 0;
}

// Whether a row has an anchor. The first `n_uncentred` keys of a sequence are stored uncentred.
TKV_FN bool has_anchor(int row, int padding, int n_uncentred) {
  return row >= padding + n_uncentred;
}

// One dim of an anchor. `cos_sin`: the block's row of the table.
TKV_FN float anchor_value(const device float* mu, const device uint* cos_sin, int split_pairs,
                          int dim) {
  const bool first = dim < split_pairs;
  const bool split = dim < 2 * split_pairs;
  const bool second = split ? !first : (dim & 1) != 0;
  const int other = split ? (first ? dim + split_pairs : dim - split_pairs) : (dim ^ 1);
  const uint word = cos_sin[split ? (first ? dim : dim - split_pairs) : dim / 2];
  const float rotated = mu[other] * half_bits(word >> 16);
  return mu[dim] * half_bits(word) + (second ? rotated : -rotated);
}
