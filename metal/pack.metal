// Rotates and quantises K and V of new tokens, and writes the tail's tiles: rows kept from the old
// tail, then the new rows, then zeros. A threadgroup writes one tile of one KV head, K or V (the
// grid's z). Its SIMD groups quantise a row each into threadgroup memory (pack_quantize.h); then
// each thread assembles whole words of the output (pack_words.h), so no two threads write the same
// word.

// int32 parameters, in the order of kernels/pack.py.
constant constexpr int param_n_new = 0;             // new tokens of one head
constant constexpr int param_n_kept = 1;            // rows kept of the old tail
constant constexpr int param_old_stride = 2;        // tiles of one head in the old tail
constant constexpr int param_n_tiles = 3;           // tiles of one head in the output
constant constexpr int param_first_row = 4;         // row of the first new token in the sequence
constant constexpr int param_split_pairs = 5;       // as in anchor.h
constant constexpr int param_n_kv_heads = 6;        // KV heads
constant constexpr int param_has_left_padding = 7;  // whether `left_padding` is given
constant constexpr int param_n_uncentred = 8;       // first keys of a sequence without an anchor

// SIMD groups: fewer for wide rows, whose codes need more threadgroup memory.
TKV_CONST_FN int pack_groups(int dim) {
  return dim > 256 ? 4 : 8;
}
TKV_CONST_FN int pack_scales(int k_group, int k_dim, int v_group, int v_dim) {
  return TILE * larger(1, larger(group_count(k_dim, k_group), group_count(v_dim, v_group)));
}

template <typename T, int BITS, int GROUP, int DIM, int WIDTH, int GROUPS, bool IS_K, bool CENTRED>
TKV_FN void pack_tensor(const device T* rows, const device uint* old, device uint* out,
                        const device uint* constants, threadgroup float* row_buffers,
                        threadgroup uchar* codes, threadgroup ushort* scales,
                        threadgroup float* levels, Anchors anchors, int first, int end,
                        int simd_group, int lane) {
  const int thread_index = simd_group * LANES + lane;
  if (WIDTH != 0 && BITS != 8) {
    for (int i = thread_index; i < 2 * MAX_LEVELS; i += GROUPS * LANES) {
      levels[i] = as_type<float>(constants[TABLE_LEVELS + i]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (BITS <= 8) {
    for (int token = first + simd_group; token < end; token += GROUPS) {
      const device T* x = rows + size_t(token - first) * DIM;
      if (WIDTH == 0) {
        quantize_q8<T, DIM>(x, codes + token * DIM, scales + token, lane);
      } else {
        constexpr int W = WIDTH == 0 ? 32 : WIDTH;
        constexpr int G = GROUP == 0 ? 32 : GROUP;
        constexpr int B = BITS > 8 ? 8 : BITS;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        Anchors row_anchors = anchors;
        row_anchors.row += token - first;
        quantize_turbo<T, B, G, DIM, W, CENTRED>(x, row_buffers + simd_group * DIM,
                                                 codes + token * DIM, scales + token, levels,
                                                 constants, row_anchors, lane);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  constexpr int CODE_WORDS = code_words(BITS, DIM);
  for (int i = thread_index; i < tensor_words(BITS, GROUP, DIM); i += GROUPS * LANES) {
    Word word;
    if (i < CODE_WORDS) {
      word = IS_K ? key_word<T, BITS, DIM>(rows, codes, i, first, end)
                  : value_word<T, BITS, DIM>(rows, codes, i, first, end);
    } else {
      const int token = 2 * ((i - CODE_WORDS) % 16);
      threadgroup const ushort* pair = scales + (i - CODE_WORDS) / 16 * TILE + token;
      word.bits = token >= first && token < end ? uint(pair[0]) : 0u;
      word.bits |= token + 1 >= first && token + 1 < end ? uint(pair[1]) << 16 : 0u;
      word.kept = kept_bits(first, token, 16);
    }
    if (word.kept > 0) {
      word.bits |= word.kept == 32 ? old[i] : old[i] & ((1u << word.kept) - 1u);
    }
    out[i] = word.bits;
  }
}

template <typename T, int KB, int KG, int KD, int KW, int VB, int VG, int VD, int VW, bool CENTRED>
TKV_FN void pack(const device T* keys, const device T* values, const device uint* tail,
                 const device int* params, const device uint* k_constants,
                 const device uint* v_constants, const device float* mu,
                 const device uint* cos_sin_table, const device int* left_padding,
                 device uint* packed, threadgroup float* row_buffers, threadgroup uchar* codes,
                 threadgroup ushort* scales, threadgroup float* levels, uint3 group, uint simd,
                 uint lane) {
  constexpr int GROUPS = pack_groups(larger(KD, VD));
  constexpr int K_WORDS = tensor_words(KB, KG, KD);
  constexpr int TILE_WORDS = K_WORDS + tensor_words(VB, VG, VD);
  const int n_new = params[param_n_new];
  const int n_kept = params[param_n_kept];
  const int tile = int(group.x);
  const size_t head = group.y;
  // new tokens of this tile: first to end
  const int first =
      n_kept <= tile * TILE ? 0 : (n_kept - tile * TILE < TILE ? n_kept - tile * TILE : TILE);
  const int left = n_kept + n_new - tile * TILE;
  const int end = left < TILE ? left : TILE;
  const int skipped = tile * TILE + first - n_kept > 0 ? tile * TILE + first - n_kept : 0;
  const size_t row = head * n_new + size_t(skipped);
  const device uint* old = tail + (head * params[param_old_stride] + tile) * TILE_WORDS;
  device uint* out = packed + (head * params[param_n_tiles] + tile) * TILE_WORDS;
  Anchors anchors;
  anchors.mu = mu + head % size_t(CENTRED ? params[param_n_kv_heads] : 1) * KD;
  anchors.cos_sin_table = cos_sin_table;
  anchors.split_pairs = params[param_split_pairs];
  anchors.row = params[param_first_row] + skipped;
  anchors.n_uncentred = params[param_n_uncentred];
  anchors.padding = CENTRED && params[param_has_left_padding] != 0
                        ? left_padding[head / params[param_n_kv_heads]]
                        : 0;
  if (group.z == 0) {
    pack_tensor<T, KB, KG, KD, KW, GROUPS, true, CENTRED>(
        keys + row * KD, old, out, k_constants, row_buffers, codes, scales, levels, anchors, first,
        end, int(simd), int(lane));
  } else {
    pack_tensor<T, VB, VG, VD, VW, GROUPS, false, false>(
        values + row * VD, old + K_WORDS, out + K_WORDS, v_constants, row_buffers, codes, scales,
        levels, anchors, first, end, int(simd), int(lane));
  }
}
