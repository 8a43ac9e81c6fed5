// Packed rows to plain rows (turbo rows in the rotated basis) for MLX's own attention. A
// threadgroup handles one tile, K and V, of one of the wanted KV heads (the grid's y) of a sequence
// (its z).

// int32 parameters, in the order of kernels/dequantize.py.
constant constexpr int param_n_kv_heads = 0;        // KV heads of the buffers
constant constexpr int param_first_head = 1;        // first KV head to dequantise
constant constexpr int param_n_selected_heads = 2;  // KV heads to dequantise
constant constexpr int param_body_stride = 3;       // tiles of one head in the body buffer
constant constexpr int param_body_tiles = 4;        // valid tiles of one head in the body
constant constexpr int param_tail_stride = 5;
constant constexpr int param_n_tokens = 6;
constant constexpr int param_has_left_padding = 7;  // whether `left_padding` is given
constant constexpr int param_split_pairs = 8;       // as in anchor.h
constant constexpr int param_n_uncentred = 9;       // first keys of a sequence without an anchor

TKV_CONST_FN int dequantize_floats(int k_dim, bool centred) {
  return 2 * MAX_LEVELS + anchor_floats(k_dim, centred) + (centred ? SCRATCH_FLOATS : 0);
}

template <typename T, typename K, typename V, int RAW, bool CENTRED>
TKV_FN void dequantize(const device uint* body, const device uint* tail, const device int* params,
                       const device uint* k_constants, const device uint* v_constants,
                       const device float* centre, const device uint* cos_sin_table,
                       const device int* left_padding, device T* keys, device T* values,
                       threadgroup float4* shared, uint3 group, uint simd, uint lane) {
  constexpr int TILE_WORDS = K::WORDS + V::WORDS;
  threadgroup float* k_levels = (threadgroup float*)shared;
  threadgroup float* v_levels = k_levels + MAX_LEVELS;
  const int thread_index = int(simd) * LANES + int(lane);
  const int tile = int(group.x);
  const int sequence = int(group.z);
  const int own_head = params[param_first_head] + int(group.y);
  const int head = sequence * params[param_n_kv_heads] + own_head;
  const int body_tiles = params[param_body_tiles];
  const device uint* codes =
      tile < body_tiles
          ? body + size_t(uint(head * params[param_body_stride] + tile)) * TILE_WORDS
          : tail + size_t(uint(head * params[param_tail_stride] + tile - body_tiles)) * TILE_WORDS;
  const int all_tokens = params[param_n_tokens];
  const int n_tokens = smaller(all_tokens - tile * TILE, TILE);
  const int out_head = sequence * params[param_n_selected_heads] + int(group.y);
  // rows and tiles of all heads are counted in 32 bits, elements and words in 64
  const size_t first = uint(out_head * all_tokens + tile * TILE);
  load_levels<K::BITS>(k_levels, k_constants, thread_index);
  load_levels<V::BITS>(v_levels, v_constants, thread_index);
  TileAnchors anchors = {k_levels, 0, TILE};
  if (CENTRED) {
    const int padding = params[param_has_left_padding] != 0 ? left_padding[sequence] : 0;
    const device float* mu = centre_row<K::DIM>(centre, own_head, CENTRE_MU);
    threadgroup float* anchor_values = v_levels + MAX_LEVELS;
    anchors =
        tile_anchors<K>(anchor_values, anchor_values + anchor_floats(K::DIM, true), k_constants, mu,
                        cos_sin_table, params[param_split_pairs], params[param_n_uncentred],
                        tile * TILE, padding, all_tokens, int(simd), int(lane));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  write_rows<T, K, RAW, true, CENTRED>(keys + first * K::DIM, codes, k_levels, anchors, 0, n_tokens,
                                       0, thread_index);
  write_rows<T, V, RAW, false, false>(values + first * V::DIM, codes + K::WORDS, v_levels, anchors,
                                      0, n_tokens, 0, thread_index);
}
