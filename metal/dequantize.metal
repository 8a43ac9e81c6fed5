// Packed rows to plain rows (turbo rows in the rotated basis) for MLX's own attention. A
// threadgroup handles one tile of one KV head, K or V (the grid's z).

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

// `n_tokens`: of the tile.
template <typename T, typename S, int RAW, bool IS_K, bool CENTRED>
TKV_FN void dequantize_tensor(const device uint* codes, device T* out,
                              threadgroup const float* levels, thread const TileAnchors& anchors,
                              int n_tokens, int thread_index) {
  constexpr int VEC4S = S::DIM / 4;
  for (int i = thread_index; i < n_tokens * VEC4S; i += DEQUANTIZE_THREADS) {
    const int token = i / VEC4S;
    write_vec4<T, S, RAW, IS_K, CENTRED>(out, codes, token, i % VEC4S, levels, anchors, token);
  }
}

TKV_CONST_FN int dequantize_floats(int k_dim, bool centred) {
  return MAX_LEVELS + anchor_floats(k_dim, centred) + (centred ? SCRATCH_FLOATS : 0);
}

template <typename T, typename K, typename V, int RAW, bool CENTRED>
TKV_FN void dequantize(const device uint* body, const device uint* tail, const device int* params,
                       const device uint* k_constants, const device uint* v_constants,
                       const device float* centre, const device uint* cos_sin_table,
                       const device int* left_padding, device T* keys, device T* values,
                       threadgroup float4* shared, uint3 group, uint simd, uint lane) {
  constexpr int TILE_WORDS = K::WORDS + V::WORDS;
  threadgroup float* levels = (threadgroup float*)shared;
  const int thread_index = int(simd) * LANES + int(lane);
  const int n_selected = params[param_n_selected_heads];
  const int row = int(group.y);  // of the selected heads of all sequences
  const int head =
      row / n_selected * params[param_n_kv_heads] + params[param_first_head] + row % n_selected;
  const int tile = int(group.x);
  const int body_tiles = params[param_body_tiles];
  const device uint* codes =
      tile < body_tiles
          ? body + size_t(uint(head * params[param_body_stride] + tile)) * TILE_WORDS
          : tail + size_t(uint(head * params[param_tail_stride] + tile - body_tiles)) * TILE_WORDS;
  const int all_tokens = params[param_n_tokens];
  const int n_tokens = smaller(all_tokens - tile * TILE, TILE);
  // rows and tiles of all heads are counted in 32 bits, elements and words in 64
  const size_t first = uint(row * all_tokens + tile * TILE);
  TileAnchors anchors = {levels, 0, TILE};
  if (group.z == 0) {
    load_levels<K::BITS>(levels, k_constants, thread_index);
    if (CENTRED) {
      const int padding = params[param_has_left_padding] != 0 ? left_padding[row / n_selected] : 0;
      const device float* mu =
          centre_row<K::DIM>(centre, head % params[param_n_kv_heads], CENTRE_MU);
      threadgroup float* anchor_values = levels + MAX_LEVELS;
      anchors =
          tile_anchors<K>(anchor_values, anchor_values + anchor_floats(K::DIM, true), k_constants,
                          mu, cos_sin_table, params[param_split_pairs], params[param_n_uncentred],
                          tile * TILE, padding, all_tokens, int(simd), int(lane));
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    dequantize_tensor<T, K, RAW, true, CENTRED>(codes, keys + first * K::DIM, levels, anchors,
                                                n_tokens, thread_index);
  } else {
    load_levels<V::BITS>(levels, v_constants, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    dequantize_tensor<T, V, RAW, false, false>(codes + K::WORDS, values + first * V::DIM, levels,
                                               anchors, n_tokens, thread_index);
  }
}
