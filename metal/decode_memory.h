// Threadgroup memory of decode.metal. Sizes and offsets are in words.

// Tiles that a SIMD group handles at a time: as many as fit registers and threadgroup memory.
TKV_CONST_FN int decode_step(int rows, int v_dim) {
  return rows <= 4 && v_dim <= 256 ? 2 : 1;
}
// Query rows that are summed over SIMD groups at a time.
TKV_CONST_FN int merge_rows(int rows, int v_dim) {
  return 4096 / (DECODE_GROUPS * v_dim) < 1
             ? 1
             : (4096 / (DECODE_GROUPS * v_dim) < rows ? 4096 / (DECODE_GROUPS * v_dim) : rows);
}
// Copies of the LUT of K or V: fewer where queries and weights need more memory. V gets K's words
// where K has no LUT.
TKV_CONST_FN int tensor_lut_copies(bool keys, int k_bits, int v_bits, int rows, int k_dim,
                                   int v_dim) {
  return lut_copies(keys ? k_bits : v_bits,
                    padded_rows(rows) * (k_dim + v_dim) > 1024
                        ? 1024
                        : max_lut_words(keys || (k_bits > 6 && v_dim <= 128)));
}
TKV_CONST_FN int key_lut_words(int k_bits, int v_bits, int rows, int k_dim, int v_dim, int raw) {
  return keys_in_half(k_bits, k_dim, raw)
             ? lut_words(k_bits, tensor_lut_copies(true, k_bits, v_bits, rows, k_dim, v_dim))
             : MAX_LEVELS;
}
TKV_CONST_FN int value_lut_words(int k_bits, int v_bits, int v_group, int rows, int k_dim,
                                 int v_dim, int raw) {
  return values_in_half(v_bits, v_group, v_dim, raw)
             ? lut_words(v_bits, tensor_lut_copies(false, k_bits, v_bits, rows, k_dim, v_dim))
             : MAX_LEVELS;
}
TKV_CONST_FN int all_weight_words(int bits, int group, int dim, int rows, int raw) {
  return DECODE_GROUPS *
         larger(decode_step(rows, dim) * weight_words(bits, group, dim, rows, raw), 128);
}
// Offsets in threadgroup memory, in words, in this order: LUTs (or levels) of K and V, row scales,
// queries, weights (first the rotation's scratch), with centred keys the pairs and anchor products
// of decode_anchors.h, maxima and sums. In the end the SIMD groups' rows overwrite all but the last
// two.
TKV_CONST_FN int queries_offset(int k_bits, int k_dim, int v_bits, int v_group, int v_dim, int rows,
                                int raw) {
  return (key_lut_words(k_bits, v_bits, rows, k_dim, v_dim, raw) +
          value_lut_words(k_bits, v_bits, v_group, rows, k_dim, v_dim, raw) + padded_rows(rows) +
          3) /
         4 * 4;
}
TKV_CONST_FN int maxima_offset(int k_bits, int k_dim, int v_bits, int v_group, int v_dim, int rows,
                               int raw, bool centred) {
  return larger(queries_offset(k_bits, k_dim, v_bits, v_group, v_dim, rows, raw) +
                    query_words(k_bits, k_dim, k_dim, rows, raw) +
                    all_weight_words(v_bits, v_group, v_dim, rows, raw) +
                    (centred ? pair_words(k_dim, rows) + anchor_words(rows) : 0),
                DECODE_GROUPS * v_dim * merge_rows(rows, v_dim));
}
TKV_CONST_FN int decode_words(int k_bits, int k_dim, int v_bits, int v_group, int v_dim, int rows,
                              int raw, bool centred) {
  return (maxima_offset(k_bits, k_dim, v_bits, v_group, v_dim, rows, raw, centred) +
          2 * DECODE_GROUPS * padded_rows(rows) + 3) /
         4 * 4;
}
