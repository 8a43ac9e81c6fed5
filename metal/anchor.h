// Anchors of centred keys (mlx_turbokv/centre.py): mu of a KV head, its pairs of dims turned by a
// table of cosines and sines that all layers share. A word of the table is a pair's cosine and sine
// in half; a row of it is a block of positions. The first `half` pairs are dims (i, half + i), the
// others (2 i, 2 i + 1).

constant constexpr int ANCHOR_BLOCK = 32;

// The dims of pair `i`.
TKV_FN int pair_first(int i, int half_dims) {
  return i < half_dims ? i : 2 * i;
}
TKV_FN int pair_second(int i, int half_dims) {
  return i < half_dims ? half_dims + i : 2 * i + 1;
}

// The block of a row of a sequence whose first token is row `start`.
TKV_FN int anchor_block(int row, int start) {
  return row > start ? (row - start) / ANCHOR_BLOCK : 0;
}

// The first row that has an anchor: a sequence's first key may be stored bare.
TKV_FN bool has_anchor(int row, int start, int bare) {
  return row >= start + bare;
}

// One dim of an anchor; `words`: the block's row of the table.
TKV_FN float anchor_value(const device float* mu, const device uint* words, int half_dims, int dim) {
  const bool low = dim < half_dims;
  const bool apart = dim < 2 * half_dims;
  const bool second = apart ? !low : (dim & 1) != 0;
  const int other = apart ? (low ? dim + half_dims : dim - half_dims) : (dim ^ 1);
  const uint word = words[apart ? (low ? dim : dim - half_dims) : dim / 2];
  const float turned = mu[other] * half_bits(word >> 16);
  return mu[dim] * half_bits(word) + (second ? turned : -turned);
}
