// Four neighbouring codes to two half2, without their scale: int8 by their bits, turbo codes by a
// table of levels in threadgroup memory, several to an entry so that one read gives several. Lanes
// that read different entries of one bank wait for each other, so a table has several copies, and a
// lane reads its own.

// copies of a table whose entries are four codes of turbo2, and words that they take
constant constexpr int QUAD_COPIES = 8;
constant constexpr int QUAD_WORDS = 4096;

// The largest power of two up to 32 that goes into n, at least 1.
TKV_CONST_FN int power_within(int n) {
  return n >= 32 ? 32 : (n >= 16 ? 16 : (n >= 8 ? 8 : (n >= 4 ? 4 : (n >= 2 ? 2 : 1))));
}
// Codes that index a table together; `copies`: from lookup_copies.
TKV_CONST_FN int lookup_codes(int bits, int copies) {
  return bits == 6 ? 1 : (bits == 2 && copies == QUAD_COPIES ? 4 : 2);
}
// Words of an entry: a half2 for every two codes; at 6 bits each level twice.
TKV_CONST_FN int entry_words(int bits, int copies) {
  return lookup_codes(bits, copies) == 4 ? 2 : 1;
}
TKV_CONST_FN int lookup_entries(int bits, int copies) {
  return bits > 6 ? 0 : 1 << (lookup_codes(bits, copies) * bits);
}
// As many copies as lanes, or as `words` hold; of turbo2 fewer and longer, where words are many.
TKV_CONST_FN int lookup_copies(int bits, int words) {
  return bits > 6
             ? 1
             : (bits == 2 && words >= QUAD_WORDS ? QUAD_COPIES
                                                 : power_within(words / lookup_entries(bits, 1)));
}
TKV_CONST_FN int lookup_words(int bits, int copies) {
  return lookup_entries(bits, copies) * entry_words(bits, copies) * copies;
}
// of a power of two up to 128
TKV_CONST_FN int log2_of(int n) {
  return (n & 0xaa ? 1 : 0) + (n & 0xcc ? 2 : 0) + (n & 0xf0 ? 4 : 0);
}

// Word `i` of a table, from its entries of a half2 (kernels/tables.py).
template <int BITS, int COPIES>
TKV_FN uint lookup_word(const device uint* constants, int i) {
  const int entry = i / (COPIES * entry_words(BITS, COPIES));
  if (entry_words(BITS, COPIES) == 1) {
    return constants[TABLE_LOOKUP + entry];
  }
  return constants[TABLE_LOOKUP + (i % 2 == 0 ? entry % 16 : entry / 16)];
}

// words of a table that a thread writes at once, and how often
TKV_CONST_FN int lookup_at_once(int copies) {
  return copies < 4 ? 1 : 4;
}
TKV_CONST_FN int lookup_turns(int bits, int copies, int threads) {
  return (lookup_words(bits, copies) / lookup_at_once(copies) + threads - 1) / threads;
}

// What a thread needs to write its words of a table: two words of an entry a turn.
template <int BITS, int COPIES, int THREADS>
TKV_FN void fetch_lookup(thread uint* entries, const device uint* constants, int thread_index) {
  constexpr int AT_ONCE = lookup_at_once(COPIES);
  TKV_UNROLL
  for (int turn = 0; turn < lookup_turns(BITS, COPIES, THREADS); turn++) {
    const int word = (turn * THREADS + thread_index) * AT_ONCE;
    const int at = word < lookup_words(BITS, COPIES) ? word : 0;
    entries[2 * turn] = lookup_word<BITS, COPIES>(constants, at);
    entries[2 * turn + 1] = AT_ONCE == 1 ? 0u : lookup_word<BITS, COPIES>(constants, at + 1);
  }
}

// Writes them to threadgroup memory.
template <int BITS, int COPIES, int THREADS>
TKV_FN void store_lookup(threadgroup uint* table, thread const uint* entries, int thread_index) {
  constexpr int AT_ONCE = lookup_at_once(COPIES);
  TKV_UNROLL
  for (int turn = 0; turn < lookup_turns(BITS, COPIES, THREADS); turn++) {
    const int i = turn * THREADS + thread_index;
    if (i < lookup_words(BITS, COPIES) / AT_ONCE) {
      if (AT_ONCE == 4) {
        const uint word = entries[2 * turn];
        const uint other = entries[2 * turn + 1];
        ((threadgroup uint4*)table)[i] = uint4(word, other, word, other);
      } else {
        table[i] = entries[2 * turn];
      }
    }
  }
}

// Where dim `d` of a quad lies in its two half2, counted in halves: int8 codes come as dims 0, 2
// and 1, 3.
TKV_CONST_FN int half_place(int bits, int d) {
  return bits == 8 ? (d & 1) * 2 + d / 2 : d;
}

// Where the lane's copy of the first entry lies; `first`: the table's first word. A table begins at
// a multiple of its own size, so that an entry's place is its codes' bits beside these.
template <int BITS, int COPIES>
TKV_FN uint own_copy(threadgroup const float4* shared, int first, int lane) {
  return shared_place(shared) + uint(first + lane % COPIES * entry_words(BITS, COPIES)) * 4u;
}

// The words of the entry that the codes from bit `first` on name.
template <int BITS, int COPIES, typename Entry>
TKV_FN Entry looked_up(threadgroup const float4* shared, uint bits, int first, uint own) {
  constexpr int SHIFT =
      log2_of(4 * entry_words(BITS, COPIES) * COPIES);  // bytes of an entry with its copies
  constexpr uint MASK = ((1u << (lookup_codes(BITS, COPIES) * (BITS & 7))) - 1u) << SHIFT;
  const uint at = first < SHIFT ? bits << (SHIFT - first) : bits >> (first - SHIFT);
  return shared_entry<Entry>(shared, (at & MASK) | own);
}

// `bits`: the quad's, from quad_bits; those above are garbage. `own`: from own_copy.
template <int BITS, int COPIES>
TKV_FN void quad_halves(thread half2* pairs, uint bits, threadgroup const float4* shared,
                        uint own) {
  if (BITS == 8) {
    signed_pairs(pairs, bits);
  } else if (lookup_codes(BITS, COPIES) == 4) {
    const uint2 levels = looked_up<BITS, COPIES, uint2>(shared, bits, 0, own);
    pairs[0] = as_type<half2>(levels.x);
    pairs[1] = as_type<half2>(levels.y);
  } else {
    TKV_UNROLL
    for (int i = 0; i < 2; i++) {
      if (BITS == 6) {
        const uint low = looked_up<BITS, COPIES, uint>(shared, bits, 12 * i, own);
        const uint high = looked_up<BITS, COPIES, uint>(shared, bits, 12 * i + 6, own);
        pairs[i] = as_type<half2>((low & 0xffffu) | (high & 0xffff0000u));
      } else {
        pairs[i] = as_type<half2>(looked_up<BITS, COPIES, uint>(shared, bits, 2 * BITS * i, own));
      }
    }
  }
}
