// Rotates and quantises K and V of new tokens, and writes the tail's tiles: rows kept from the old
// tail, then the new rows, then zeros. A threadgroup writes one tile of one KV head, K or V (the
// grid's z). Its SIMD groups quantise a row each into threadgroup memory (pack_quantize.h); then
// each thread assembles whole words of the output (pack_words.h), so no two threads write the same
// word.

// int32 parameters, in the order of kernels/pack.py.
constant constexpr int param_n_new = 0;             // new tokens of one head
constant constexpr int param_n_kept = 1;            // rows kept, or minus new ones left out
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
template <typename K, typename V>
TKV_CONST_FN int pack_scales() {
  return TILE * larger(1, larger(K::GROUPS, V::GROUPS));
}

template <typename T, typename S, int GROUPS, bool IS_K, bool CENTRED, bool ROTATED>
TKV_FN void pack_tensor(const device T* rows, const device uint* old, device uint* out,
                        const device uint* constants, threadgroup float* row_buffers,
                        threadgroup uchar* codes, threadgroup ushort* scales,
                        threadgroup float* levels, Anchors anchors, int first, int end,
                        int simd_group, int lane) {
  constexpr int BITS = S::BITS;
  constexpr int DIM = S::DIM;
  constexpr int WIDTH = S::WIDTH;
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
        constexpr int G = S::GROUP == 0 ? 32 : S::GROUP;
        constexpr int B = BITS > 8 ? 8 : BITS;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        Anchors row_anchors = anchors;
        row_anchors.row += token - first;
        quantize_turbo<T, B, G, DIM, W, CENTRED, ROTATED>(x, row_buffers + simd_group * DIM,
                                                          codes + token * DIM, scales + token,
                                                          levels, constants, row_anchors, lane);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  for (int i = thread_index; i < S::WORDS; i += GROUPS * LANES) {
    Word word;
    if (i < S::CODE_WORDS) {
      word = IS_K ? key_word<T, BITS, DIM>(rows, codes, i, first, end)
                  : value_word<T, BITS, DIM>(rows, codes, i, first, end);
    } else {
      const int token = 2 * ((i - S::CODE_WORDS) % 16);
      threadgroup const ushort* pair = scales + (i - S::CODE_WORDS) / 16 * TILE + token;
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

// ROTATED: turbo rows are in the rotated basis already.
template <typename T, typename K, typename V, bool CENTRED, bool ROTATED>
TKV_FN void pack(const device T* keys, const device T* values, const device uint* tail,
                 const device int* params, const device uint* k_constants,
                 const device uint* v_constants, const device float* centre,
                 const device uint* cos_sin_table, const device int* left_padding,
                 device uint* packed, threadgroup float* row_buffers, threadgroup uchar* codes,
                 threadgroup ushort* scales, threadgroup float* levels, uint3 group, uint simd,
                 uint lane) {
  constexpr int GROUPS = pack_groups(larger(K::DIM, V::DIM));
  constexpr int TILE_WORDS = K::WORDS + V::WORDS;
  const int n_new = params[param_n_new];
  const int n_kept = params[param_n_kept];
  const int tile = int(group.x);
  const int head = int(group.y);  // of all sequences'
  // new tokens of this tile: first to end
  const int n_before = n_kept - tile * TILE;
  const int first = n_before < 0 ? 0 : (n_before < TILE ? n_before : TILE);
  const int end = n_before + n_new < TILE ? n_before + n_new : TILE;
  const int skipped = n_before < 0 ? -n_before : 0;  // new tokens of earlier tiles
  // rows and tiles of all heads are counted in 32 bits, elements and words in 64
  const size_t row = uint(head * n_new + skipped);
  const device uint* old = tail + size_t(uint(head * params[param_old_stride] + tile)) * TILE_WORDS;
  device uint* out = packed + size_t(uint(head * params[param_n_tiles] + tile)) * TILE_WORDS;
  Anchors anchors;
  const int centre_head = head % (CENTRED ? params[param_n_kv_heads] : 1);
  anchors.mu = centre_row<K::DIM>(centre, centre_head, CENTRE_MU);
  anchors.scales = centre_row<K::DIM>(centre, centre_head, CENTRE_SCALES);
  anchors.cos_sin_table = cos_sin_table;
  anchors.split_pairs = params[param_split_pairs];
  anchors.row = params[param_first_row] + skipped;
  anchors.n_uncentred = params[param_n_uncentred];
  anchors.padding = CENTRED && params[param_has_left_padding] != 0
                        ? left_padding[head / params[param_n_kv_heads]]
                        : 0;
  if (group.z == 0) {
    pack_tensor<T, K, GROUPS, true, CENTRED, ROTATED>(keys + row * K::DIM, old, out, k_constants,
                                                      row_buffers, codes, scales, levels, anchors,
                                                      first, end, int(simd), int(lane));
  } else {
    pack_tensor<T, V, GROUPS, false, false, ROTATED>(
        values + row * V::DIM, old + K::WORDS, out + K::WORDS, v_constants, row_buffers, codes,
        scales, levels, anchors, first, end, int(simd), int(lane));
  }
}
