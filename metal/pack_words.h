// Assembles the words of a tile for pack.metal from the codes of its new tokens.

// A code: of a staged row, or of an unquantised row in device memory. Zero for tokens that are not
// new.
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
  int kept;   // number of low bits that belong to the old tail's tokens
};

TKV_FN int kept_bits(int n_kept, int first_token, int bits_per_token) {
  const int bits = (n_kept - first_token) * bits_per_token;
  return bits < 0 ? 0 : (bits > 32 ? 32 : bits);
}

// Word `i` of K's columns. `first`, `end`: the new tokens of this tile.
template <typename T, int BITS, int DIM>
TKV_FN Word key_word(const device T* rows, threadgroup const uchar* codes, int i, int first,
                     int end) {
  constexpr int BYTES = DIM * BITS / 8;
  constexpr int FULL = BYTES / 16;
  int per_token = 4;         // words, then bytes, of a token's column
  int from = i / 128 * 128;  // bit of the row where the column begins
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
    word.bits =
        row_bits<T, BITS, DIM>(rows, codes, token, from + at % per_token * 32, 32, first, end);
    word.kept = kept_bits(first, token, 32);
    return word;
  }
  const int count = 8 * per_token;
  const int token = at * (32 / count);
  word.bits = 0;
  for (int p = 0; p < 32 / count; p++) {
    word.bits |= row_bits<T, BITS, DIM>(rows, codes, token + p, from, count, first, end)
                 << (p * count);
  }
  word.kept = kept_bits(first, token, count);
  return word;
}

// Word `i` of V's columns.
template <typename T, int BITS, int DIM>
TKV_FN Word value_word(const device T* rows, threadgroup const uchar* codes, int i, int first,
                       int end) {
  const int vec4 = i % DIM / 4;
  const int from = (i / DIM * 4 + i % 4) * 32;  // bit of the vec4's stream
  Word word;
  word.bits = 0;
  for (int e = from / BITS; e < 4 * TILE && e * BITS < from + 32; e++) {
    const uint code = code_of<T, BITS, DIM>(rows, codes, e / 4, vec4 * 4 + e % 4, first, end);
    word.bits |= shifted(code, e * BITS - from);
  }
  const int kept = first * 4 * BITS - from;
  word.kept = kept < 0 ? 0 : (kept > 32 ? 32 : kept);
  return word;
}
