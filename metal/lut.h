// Four neighbouring codes to two half2, without their scale: int8 codes by bit operations, turbo
// codes by a lookup table (LUT) in threadgroup memory, whose entries cover several codes. Lanes
// that read different entries of one bank wait for each other, so the LUT has several copies, and
// each lane reads one of them.

// copies of a LUT whose entries are four codes of turbo2, and its words
constant constexpr int LUT4_COPIES = 8;
constant constexpr int LUT4_WORDS = 4096;

// The largest power of two that is at most n, from 1 to 32.
TKV_CONST_FN int power_of_two_within(int n) {
  return n >= 32 ? 32 : (n >= 16 ? 16 : (n >= 8 ? 8 : (n >= 4 ? 4 : (n >= 2 ? 2 : 1))));
}
// Codes that index an entry. `copies`: from lut_copies.
TKV_CONST_FN int lut_codes(int bits, int copies) {
  return bits == 6 ? 1 : (bits == 2 && copies == LUT4_COPIES ? 4 : 2);
}
// Words of an entry: a half2 for two codes; for 6 bits one level, twice.
TKV_CONST_FN int lut_entry_words(int bits, int copies) {
  return lut_codes(bits, copies) == 4 ? 2 : 1;
}
TKV_CONST_FN int lut_entries(int bits, int copies) {
  return bits > 6 ? 0 : 1 << (lut_codes(bits, copies) * bits);
}
// Copies: one for each lane, or as many as fit `words`. turbo2 gets longer entries where they fit.
TKV_CONST_FN int lut_copies(int bits, int words) {
  return bits > 6 ? 1
                  : (bits == 2 && words >= LUT4_WORDS
                         ? LUT4_COPIES
                         : power_of_two_within(words / lut_entries(bits, 1)));
}
TKV_CONST_FN int lut_words(int bits, int copies) {
  return lut_entries(bits, copies) * lut_entry_words(bits, copies) * copies;
}
// n: a power of two up to 128.
TKV_CONST_FN int log2_of(int n) {
  return (n & 0xaa ? 1 : 0) + (n & 0xcc ? 2 : 0) + (n & 0xf0 ? 4 : 0);
}

// Word `i` of a LUT, from the entries that kernels/tables.py writes.
template <int BITS, int COPIES>
TKV_FN uint lut_word(const device uint* constants, int i) {
  const int entry = i / (COPIES * lut_entry_words(BITS, COPIES));
  if (lut_entry_words(BITS, COPIES) == 1) {
    return constants[TABLE_LUT + entry];
  }
  return constants[TABLE_LUT + (i % 2 == 0 ? entry % 16 : entry / 16)];
}

// Words of a LUT that a thread writes at once, and how many such writes it does.
TKV_CONST_FN int lut_words_at_once(int copies) {
  return copies < 4 ? 1 : 4;
}
TKV_CONST_FN int lut_writes(int bits, int copies, int threads) {
  return (lut_words(bits, copies) / lut_words_at_once(copies) + threads - 1) / threads;
}

// Loads the entries that a thread will write: two words for each write.
template <int BITS, int COPIES, int THREADS>
TKV_FN void fetch_lut(thread uint* entries, const device uint* constants, int thread_index) {
  constexpr int AT_ONCE = lut_words_at_once(COPIES);
  TKV_UNROLL
  for (int write = 0; write < lut_writes(BITS, COPIES, THREADS); write++) {
    const int word = (write * THREADS + thread_index) * AT_ONCE;
    const int at = word < lut_words(BITS, COPIES) ? word : 0;
    entries[2 * write] = lut_word<BITS, COPIES>(constants, at);
    entries[2 * write + 1] = AT_ONCE == 1 ? 0u : lut_word<BITS, COPIES>(constants, at + 1);
  }
}

// Writes them to threadgroup memory, to all copies.
template <int BITS, int COPIES, int THREADS>
TKV_FN void store_lut(threadgroup uint* table, thread const uint* entries, int thread_index) {
  constexpr int AT_ONCE = lut_words_at_once(COPIES);
  TKV_UNROLL
  for (int write = 0; write < lut_writes(BITS, COPIES, THREADS); write++) {
    const int i = write * THREADS + thread_index;
    if (i < lut_words(BITS, COPIES) / AT_ONCE) {
      if (AT_ONCE == 4) {
        const uint word = entries[2 * write];
        const uint other = entries[2 * write + 1];
        ((threadgroup uint4*)table)[i] = uint4(word, other, word, other);
      } else {
        table[i] = entries[2 * write];
      }
    }
  }
}

// The index of dim `d` of a vec4 in its two half2: int8 codes are in the order 0, 2, 1, 3.
TKV_CONST_FN int half_index(int bits, int d) {
  return bits == 8 && (d == 1 || d == 2) ? 3 - d : d;
}

// Byte offset of the first entry in the lane's copy. `first`: the LUT's first word. A LUT is
// aligned to its size, so an entry's offset is this OR the shifted codes.
template <int BITS, int COPIES>
TKV_FN uint lane_copy(threadgroup const float4* shared, int first, int lane) {
  return shared_base(shared) + uint(first + lane % COPIES * lut_entry_words(BITS, COPIES)) * 4u;
}

// The entry of the codes from bit `first` on.
template <int BITS, int COPIES, typename Entry>
TKV_FN Entry lut_entry(threadgroup const float4* shared, uint bits, int first, uint copy) {
  // bytes of all copies of an entry
  constexpr int SHIFT = log2_of(4 * lut_entry_words(BITS, COPIES) * COPIES);
  constexpr uint MASK = ((1u << (lut_codes(BITS, COPIES) * (BITS & 7))) - 1u) << SHIFT;
  const uint at = first < SHIFT ? bits << (SHIFT - first) : bits >> (first - SHIFT);
  return shared_load<Entry>(shared, (at & MASK) | copy);
}

// The two half2 of a vec4. `bits`: from vec4_bits. `copy`: from lane_copy. int8 codes are BIAS too
// large.
template <int BITS, int COPIES>
TKV_FN void biased_halves(thread half2* pairs, uint bits, threadgroup const float4* shared,
                          uint copy) {
  if (BITS == 8) {
    biased_pairs(pairs, bits);
  } else if (lut_codes(BITS, COPIES) == 4) {
    const uint2 levels = lut_entry<BITS, COPIES, uint2>(shared, bits, 0, copy);
    pairs[0] = as_type<half2>(levels.x);
    pairs[1] = as_type<half2>(levels.y);
  } else {
    TKV_UNROLL
    for (int i = 0; i < 2; i++) {
      if (BITS == 6) {
        const uint low = lut_entry<BITS, COPIES, uint>(shared, bits, 12 * i, copy);
        const uint high = lut_entry<BITS, COPIES, uint>(shared, bits, 12 * i + 6, copy);
        pairs[i] = as_type<half2>((low & 0xffffu) | (high & 0xffff0000u));
      } else {
        pairs[i] = as_type<half2>(lut_entry<BITS, COPIES, uint>(shared, bits, 2 * BITS * i, copy));
      }
    }
  }
}

// The same, exact for int8 codes too.
template <int BITS, int COPIES>
TKV_FN void vec4_halves(thread half2* pairs, uint bits, threadgroup const float4* shared,
                        uint copy) {
  biased_halves<BITS, COPIES>(pairs, bits, shared, copy);
  if (BITS == 8) {
    const half2 bias = as_type<half2>(0x64806480u);
    pairs[0] = pairs[0] - bias;
    pairs[1] = pairs[1] - bias;
  }
}
