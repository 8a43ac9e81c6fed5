// Rotates and quantises the K and V of new tokens, and writes the tail's tiles anew: the rows kept
// from the old tail, the new ones, zero bits. A threadgroup takes one tile of one KV head, its K
// or its V (the grid's z). Its SIMD groups quantise a row each; codes and scales wait in
// threadgroup memory, and then each thread puts together whole words of the output, so no two
// threads ever write to the same word.

// int32 parameters, in the order of kernels/pack.py.
constant constexpr int P_NEW = 0;          // new tokens of a head
constant constexpr int P_OLD = 1;          // rows kept from the old tail
constant constexpr int P_OLD_STRIDE = 2;   // tiles of one head in the old tail's buffer
constant constexpr int P_TILES = 3;        // tiles of one head in the output
constant constexpr int P_FIRST = 4;        // row of the sequence of the first new token
constant constexpr int P_HALF = 5;         // pairs of dims that lie apart
constant constexpr int P_HEADS = 6;        // KV heads
constant constexpr int P_STARTS = 7;       // whether `starts` holds each sequence's first row
constant constexpr int P_BARE = 8;         // first keys of a sequence that have no anchor

constant constexpr int RULE_RAW = 0;
constant constexpr int RULE_MATCHED = 1;
constant constexpr int RULE_LEAST_SQUARES = 2;
constant constexpr float FP16_MAX = 65504.0f;

// wide rows: fewer SIMD groups, so that what they stage fits
TKV_CONST_FN int pack_groups(int dim) {
  return dim > 256 ? 4 : 8;
}
TKV_CONST_FN int pack_scales(int k_group, int k_dim, int v_group, int v_dim) {
  return TILE * larger(1, larger(group_count(k_dim, k_group), group_count(v_dim, v_group)));
}

// Saturates; every NaN gets the same bits.
TKV_FN ushort scale_bits(float scale) {
  if (!(scale == scale)) {
    return ushort(0x7e00);
  }
  return as_type<ushort>(half(scale > FP16_MAX ? FP16_MAX : scale));
}

// int8 codes and scales of one row; the scale maps the largest magnitude to 127.
template <typename T, int DIM>
TKV_FN void quantize_bytes(const device T* x, threadgroup uchar* codes, threadgroup ushort* scales,
                           int lane) {
  TKV_UNROLL
  for (int g = 0; g < ceil_div(DIM, LANES); g++) {
    const bool inside = g * LANES + lane < DIM;
    const float value = inside ? float(x[g * LANES + lane]) : 0.0f;
    const float magnitude = flip_sign(value, as_type<uint>(value) >> 31);
    const bool broken = !(magnitude <= 3.402823466e38f);  // NaN or infinite
    float largest = simd_max(broken ? 0.0f : magnitude);
    if (simd_any(broken)) {
      largest = as_type<float>(0x7fc00000u);
    }
    const ushort bits = scale_bits(largest / 127.0f);
    const float step = half_bits(bits);
    float code = step > 0.0f && !broken ? rint(value / step) : 0.0f;
    code = code > 127.0f ? 127.0f : (code < -127.0f ? -127.0f : code);
    if (inside) {
      codes[g * LANES + lane] = uchar(int(code) & 255);
    }
    if (lane == 0) {
      scales[g * TILE] = bits;
    }
  }
}

// The nearest level: how many boundaries lie below.
template <int BITS>
TKV_FN int nearest_level(float x, threadgroup const float* boundaries) {
  int code = 0;
  TKV_UNROLL
  for (int bit = BITS - 1; bit >= 0; bit--) {
    code += x > boundaries[code + (1 << bit) - 1] ? 1 << bit : 0;
  }
  return code;
}

// The scale to store for a group of size `n`.
template <int RULE>
TKV_FN float fitted_scale(float energy, float with_levels, float of_levels, float n) {
  if (energy == 0.0f) {
    return 0.0f;
  }
  if (RULE == RULE_RAW) {
    return sqrt(energy / n);
  }
  if (RULE == RULE_MATCHED) {
    return sqrt(energy / of_levels);
  }
  return RULE == RULE_LEAST_SQUARES ? with_levels / of_levels : energy / with_levels;
}

// What centred keys are centred by: mu of the KV head, the table, and where the rows begin.
struct Anchors {
  const device float* mu;
  const device uint* table;
  int half_dims;
  int row;    // of the sequence, that of the side's first new token
  int start;  // the sequence's first row
  int bare;   // keys from there on that have no anchor
};

template <typename T, int BITS, int GROUP, int DIM, int WIDTH, int RULE, bool CENTRED>
TKV_FN void quantize_turbo(const device T* x, threadgroup float* row, threadgroup uchar* codes,
                           threadgroup ushort* scales, threadgroup const float* levels,
                           const device uint* constants, Anchors anchors, int lane) {
  constexpr int N = ceil_div(WIDTH, LANES);
  const float factor = 1.0f / sqrt(float(WIDTH));
  for (int first = 0; first < DIM; first += WIDTH) {
    float y[N];
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      y[j] = lane + j * LANES < WIDTH ? float(x[first + lane + j * LANES]) : 0.0f;
      if (CENTRED && lane + j * LANES < WIDTH &&
          has_anchor(anchors.row, anchors.start, anchors.bare)) {
        const device uint* words =
            anchors.table + anchor_block(anchors.row, anchors.start) * (DIM / 2);
        y[j] -= anchor_value(anchors.mu, words, anchors.half_dims, first + lane + j * LANES);
      }
    }
    rotate<WIDTH>(y, constants, row + first, lane);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    TKV_UNROLL
    for (int j = 0; j < N; j++) {
      if (lane + j * LANES < WIDTH) {
        row[first + lane + j * LANES] = y[j] * factor;
      }
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  for (int first = 0; first < DIM; first += GROUP) {
    const int size = DIM - first < GROUP ? DIM - first : GROUP;
    float energy = 0.0f;
    for (int i = lane; i < size; i += LANES) {
      energy += row[first + i] * row[first + i];
    }
    energy = simd_sum(energy);
    const float raw = sqrt(energy / float(size));
    float with_levels = 0.0f;
    float of_levels = 0.0f;
    for (int i = lane; i < size; i += LANES) {
      const float value = row[first + i];
      const int code = nearest_level<BITS>(raw > 0.0f ? value / raw : value * 0.0f, levels + MAX_LEVELS);
      codes[first + i] = uchar(code);
      with_levels += value * levels[code];
      of_levels += levels[code] * levels[code];
    }
    with_levels = simd_sum(with_levels);
    of_levels = simd_sum(of_levels);
    if (lane == 0) {
      scales[first / GROUP * TILE] = scale_bits(fitted_scale<RULE>(energy, with_levels, of_levels, float(size)));
    }
  }
}

// Reads codes back: staged ones, or raw rows where they lie. Tokens that are not new are zero.
template <typename T, int BITS, int DIM>
TKV_FN uint code_of(const device T* rows, threadgroup const uchar* codes, int token, int dim,
                    int first, int end) {
  if (token < first || token >= end) {
    return 0;
  }
  if (BITS == 16) {
    return ((const device ushort*)rows)[size_t(token - first) * DIM + dim];
  }
  if (BITS == 32) {
    return ((const device uint*)rows)[size_t(token - first) * DIM + dim];
  }
  return codes[token * DIM + dim];
}

TKV_FN uint shifted(uint bits, int shift) {
  return shift >= 0 ? bits << shift : bits >> -shift;
}

// `count` bits of a token's K row from bit `from` on.
template <typename T, int BITS, int DIM>
TKV_FN uint row_bits(const device T* rows, threadgroup const uchar* codes, int token, int from,
                     int count, int first, int end) {
  uint bits = 0;
  for (int dim = from / BITS; dim < DIM && dim * BITS < from + count; dim++) {
    bits |= shifted(code_of<T, BITS, DIM>(rows, codes, token, dim, first, end), dim * BITS - from);
  }
  return count == 32 ? bits : bits & ((1u << count) - 1u);
}

struct Word {
  uint bits;  // of the new tokens
  int kept;   // how many low bits belong to the old tail's tokens
};

TKV_FN int kept_bits(int n_old, int first_token, int bits_per_token) {
  const int bits = (n_old - first_token) * bits_per_token;
  return bits < 0 ? 0 : (bits > 32 ? 32 : bits);
}

// Word `i` of K's columns. `first`, `end`: the new tokens in this tile.
template <typename T, int BITS, int DIM>
TKV_FN Word key_word(const device T* rows, threadgroup const uchar* codes, int i, int first, int end) {
  constexpr int BYTES = DIM * BITS / 8;
  constexpr int FULL = BYTES / 16;
  int per_token = 4;        // words, then bytes, of a token's column
  int from = i / 128 * 128; // bit of the row where the column begins
  int at = i % 128;
  bool narrow = false;
  if (i >= FULL * 128) {
    from = FULL * 128;
    at = i - FULL * 128;
    if ((BYTES & 8) && at < 64) {
      per_token = 2;
    } else {
      at -= BYTES & 8 ? 64 : 0;
      from += BYTES & 8 ? 64 : 0;
      if ((BYTES & 4) && at < 32) {
        per_token = 1;
      } else {
        narrow = true;
        at -= BYTES & 4 ? 32 : 0;
        from += BYTES & 4 ? 32 : 0;
        per_token = 2;
        if (!((BYTES & 2) && at < 16)) {
          at -= BYTES & 2 ? 16 : 0;
          from += BYTES & 2 ? 16 : 0;
          per_token = 1;
        }
      }
    }
  }
  Word word;
  if (!narrow) {
    const int token = at / per_token;
    word.bits = row_bits<T, BITS, DIM>(rows, codes, token, from + at % per_token * 32, 32, first, end);
    word.kept = kept_bits(first, token, 32);
    return word;
  }
  const int count = 8 * per_token;
  const int token = at * (32 / count);
  word.bits = 0;
  for (int p = 0; p < 32 / count; p++) {
    word.bits |= row_bits<T, BITS, DIM>(rows, codes, token + p, from, count, first, end) << (p * count);
  }
  word.kept = kept_bits(first, token, count);
  return word;
}

// Word `i` of V's columns.
template <typename T, int BITS, int DIM>
TKV_FN Word value_word(const device T* rows, threadgroup const uchar* codes, int i, int first, int end) {
  const int quad = i % DIM / 4;
  const int from = (i / DIM * 4 + i % 4) * 32;  // bit of the quad's stream
  Word word;
  word.bits = 0;
  for (int e = from / BITS; e < 4 * TILE && e * BITS < from + 32; e++) {
    const uint code = code_of<T, BITS, DIM>(rows, codes, e / 4, quad * 4 + e % 4, first, end);
    word.bits |= shifted(code, e * BITS - from);
  }
  const int kept = first * 4 * BITS - from;
  word.kept = kept < 0 ? 0 : (kept > 32 ? 32 : kept);
  return word;
}

template <typename T, int BITS, int GROUP, int DIM, int WIDTH, int RULE, int GROUPS, bool IS_K, bool CENTRED>
TKV_FN void pack_side(const device T* rows, const device uint* old, device uint* out,
                      const device uint* constants, threadgroup float* row_buffers,
                      threadgroup uchar* codes, threadgroup ushort* scales, threadgroup float* levels,
                      Anchors anchors, int first, int end, int simd_group, int lane) {
  const int thread_index = simd_group * LANES + lane;
  if (WIDTH != 0) {
    for (int i = thread_index; i < 2 * MAX_LEVELS; i += GROUPS * LANES) {
      levels[i] = as_type<float>(constants[TABLE_LEVELS + i]);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (BITS <= 8) {
    for (int token = first + simd_group; token < end; token += GROUPS) {
      const device T* x = rows + size_t(token - first) * DIM;
      if (WIDTH == 0) {
        quantize_bytes<T, DIM>(x, codes + token * DIM, scales + token, lane);
      } else {
        constexpr int W = WIDTH == 0 ? 32 : WIDTH;
        constexpr int G = GROUP == 0 ? 32 : GROUP;
        constexpr int B = BITS > 6 ? 6 : BITS;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        Anchors here = anchors;
        here.row += token - first;
        quantize_turbo<T, B, G, DIM, W, RULE, CENTRED>(x, row_buffers + simd_group * DIM,
                                                       codes + token * DIM, scales + token, levels,
                                                       constants, here, lane);
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  constexpr int CODE_WORDS = code_words(BITS, DIM);
  for (int i = thread_index; i < side_words(BITS, GROUP, DIM); i += GROUPS * LANES) {
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

template <typename T, int KB, int KG, int KD, int KW, int K_RULE, int VB, int VG, int VD, int VW, int V_RULE, bool CENTRED>
TKV_FN void pack(const device T* keys, const device T* values, const device uint* tail,
                 const device int* params, const device uint* k_constants,
                 const device uint* v_constants, const device float* mu, const device uint* table,
                 const device int* starts, device uint* packed, threadgroup float* row_buffers,
                 threadgroup uchar* codes, threadgroup ushort* scales, threadgroup float* levels,
                 uint3 group, uint simd, uint lane) {
  constexpr int GROUPS = pack_groups(larger(KD, VD));
  constexpr int K_WORDS = side_words(KB, KG, KD);
  constexpr int TILE_WORDS = K_WORDS + side_words(VB, VG, VD);
  const int n_new = params[P_NEW];
  const int n_old = params[P_OLD];
  const int tile = int(group.x);
  const size_t head = group.y;
  // the new tokens in this tile are first to end
  const int first = n_old <= tile * TILE ? 0 : (n_old - tile * TILE < TILE ? n_old - tile * TILE : TILE);
  const int left = n_old + n_new - tile * TILE;
  const int end = left < TILE ? left : TILE;
  const int skipped = tile * TILE + first - n_old > 0 ? tile * TILE + first - n_old : 0;
  const size_t row = head * n_new + size_t(skipped);
  const device uint* old = tail + (head * params[P_OLD_STRIDE] + tile) * TILE_WORDS;
  device uint* out = packed + (head * params[P_TILES] + tile) * TILE_WORDS;
  Anchors anchors;
  anchors.mu = mu + head % size_t(CENTRED ? params[P_HEADS] : 1) * KD;
  anchors.table = table;
  anchors.half_dims = params[P_HALF];
  anchors.row = params[P_FIRST] + skipped;
  anchors.bare = params[P_BARE];
  anchors.start = CENTRED && params[P_STARTS] != 0 ? starts[head / params[P_HEADS]] : 0;
  if (group.z == 0) {
    pack_side<T, KB, KG, KD, KW, K_RULE, GROUPS, true, CENTRED>(
        keys + row * KD, old, out, k_constants, row_buffers, codes, scales, levels, anchors, first,
        end, int(simd), int(lane));
  } else {
    pack_side<T, VB, VG, VD, VW, V_RULE, GROUPS, false, false>(
        values + row * VD, old + K_WORDS, out + K_WORDS, v_constants, row_buffers, codes, scales,
        levels, anchors, first, end, int(simd), int(lane));
  }
}
