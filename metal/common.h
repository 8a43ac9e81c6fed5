// Shared by all kernels: macros, the tile layout (mlx_turbokv/quant/layout.py), unpacking of codes.
// The sources are written in Metal; for NVRTC, compat/cuda.h precedes this text and defines the
// same words. Files are concatenated in the order of kernels/assemble.py.

#ifndef TKV_PRELUDE
#define TKV_FN inline __attribute__((always_inline))
#define TKV_CONST_FN inline constexpr
#define TKV_SHARED(type, name, count) threadgroup type name[count]
#define TKV_SHARED_ALIGNED TKV_SHARED
#define TKV_UNROLL _Pragma("clang loop unroll(full)")

#define fast_exp2(x) metal::fast::exp2(x)
#define fast_log2(x) metal::fast::log2(x)

// Byte offsets into threadgroup memory from `shared`, which is aligned to the size of the largest
// LUT.
TKV_FN uint shared_base(threadgroup const float4*) {
  return 0;
}
template <typename T>
TKV_FN T shared_load(threadgroup const float4* shared, uint offset) {
  return *(threadgroup const T*)((threadgroup const uchar*)shared + offset);
}

// The int8 codes of a word plus BIAS as half2: bytes 0 and 2, then 1 and 3. A byte with its sign
// bit flipped, as the low mantissa bits of 1024, gives 1152 plus the code.
TKV_FN void biased_pairs(thread half2* pairs, uint word) {
  pairs[0] = as_type<half2>((word & 0x00ff00ffu) ^ 0x64806480u);
  pairs[1] = as_type<half2>(((word >> 8) & 0x00ff00ffu) ^ 0x64806480u);
}

// The int8 codes of a word.
TKV_FN float4 signed_bytes(uint word) {
  half2 pairs[2];
  biased_pairs(pairs, word);
  return float4(float(pairs[0].x) - 1152.0f, float(pairs[1].x) - 1152.0f,
                float(pairs[0].y) - 1152.0f, float(pairs[1].y) - 1152.0f);
}
#endif

constant constexpr int TILE = 32;
constant constexpr int LANES = 32;
constant constexpr float BIAS = 1152.0f;  // of biased_pairs

// Offsets in the constant tables of K or V, in 32-bit words (kernels/tables.py writes them): sign
// bits of the rotation, sign bits of the dense Hadamard matrix by rows and by columns (two words
// each), the codebook's levels, the boundaries between them, and the LUT entries of lut.h.
constant constexpr int TABLE_HADAMARD_ROWS = 4;
constant constexpr int TABLE_HADAMARD_COLUMNS = 76;
constant constexpr int TABLE_LEVELS = 148;
constant constexpr int TABLE_BOUNDARIES = 212;
constant constexpr int TABLE_LUT = 276;
constant constexpr int MAX_LEVELS = 64;

TKV_CONST_FN int ceil_div(int a, int b) {
  return (a + b - 1) / b;
}
TKV_CONST_FN int larger(int a, int b) {
  return a > b ? a : b;
}
TKV_CONST_FN int smaller(int a, int b) {
  return a < b ? a : b;
}

// Values of K or V in a packed tile. BITS: of a code (2 to 6 turbo, 8 q8_0 and turbo8, 16 or 32
// unquantised). // GROUP: values to a scale; 0 where unquantised. WIDTH: of the rotation; 0 where
// there is none.
template <int BITS_, int GROUP_, int DIM_, int WIDTH_>
struct Tensor {
  static constant constexpr int BITS = BITS_;
  static constant constexpr int GROUP = GROUP_;
  static constant constexpr int DIM = DIM_;
  static constant constexpr int WIDTH = WIDTH_;
  static_assert((BITS >= 2 && BITS <= 6) || BITS == 8 || BITS == 16 || BITS == 32,
                "bits of a code");
  static_assert(DIM >= 4 && DIM <= 512 && DIM % 4 == 0, "head dim");
  static_assert((GROUP == 0) == (BITS > 8), "unquantised values have no scale");
  static_assert(WIDTH == 0 || DIM % WIDTH == 0, "rotations cover the head");
  static constant constexpr int GROUPS = GROUP == 0 ? 0 : ceil_div(DIM, larger(GROUP, 1));
  static constant constexpr int CODE_WORDS = BITS * DIM;  // of a tile; its scales follow
  static constant constexpr int WORDS = CODE_WORDS + 16 * GROUPS;
};

// An unquantised value from its bits. RAW: 0 half, 1 bfloat, 2 float.
template <int RAW>
TKV_FN float raw_value(uint bits) {
  if (RAW == 0) {
    return float(as_type<half>(ushort(bits & 0xffffu)));
  }
  return as_type<float>(RAW == 1 ? bits << 16 : bits);
}

// Whether a type is half, and its largest number.
constant constexpr float FP16_MAX = 65504.0f;
template <typename T>
struct IsHalf {
  enum { value = 0 };
};
template <>
struct IsHalf<half> {
  enum { value = 1 };
};

// The half in the low 16 bits.
TKV_FN float half_bits(uint bits) {
  return float(as_type<half>(ushort(bits & 0xffffu)));
}

TKV_FN float component(float4 v, int i) {
  return i == 0 ? v.x : (i == 1 ? v.y : (i == 2 ? v.z : v.w));
}

// The bits of vec4 `vec4` (four neighbouring codes) of a bitstream; higher bits are undefined.
template <int BITS>
TKV_FN uint4 vec4_bits(thread const uint* words, int vec4) {
  if (BITS == 8) {
    return uint4(words[vec4], 0, 0, 0);
  }
  if (BITS == 16) {
    return uint4(words[2 * vec4], words[2 * vec4 + 1], 0, 0);
  }
  if (BITS == 32) {
    return uint4(words[4 * vec4], words[4 * vec4 + 1], words[4 * vec4 + 2], words[4 * vec4 + 3]);
  }
  const int bit = vec4 * 4 * BITS;
  const int word = bit >> 5;
  const int shift = bit & 31;
  uint low = words[word] >> shift;
  if (shift + 4 * BITS > 32) {
    low |= words[word + 1] << (32 - shift);
  }
  return uint4(low, 0, 0, 0);
}

// Four values without their scale. `table`: the levels; for 2 bits the 16 pairs of levels, so one
// read gives two values.
template <int BITS, int RAW>
TKV_FN float4 vec4_values(uint4 bits, threadgroup const float* table) {
  if (BITS == 8) {
    return signed_bytes(bits.x);
  }
  if (BITS == 16) {
    return float4(raw_value<RAW>(bits.x), raw_value<RAW>(bits.x >> 16), raw_value<RAW>(bits.y),
                  raw_value<RAW>(bits.y >> 16));
  }
  if (BITS == 32) {
    return float4(raw_value<RAW>(bits.x), raw_value<RAW>(bits.y), raw_value<RAW>(bits.z),
                  raw_value<RAW>(bits.w));
  }
  if (BITS == 2) {
    threadgroup const float2* pairs = (threadgroup const float2*)table;
    const float2 low = pairs[bits.x & 15u];
    const float2 high = pairs[(bits.x >> 4) & 15u];
    return float4(low.x, low.y, high.x, high.y);
  }
  const uint mask = (1u << (BITS & 31)) - 1u;
  return float4(table[bits.x & mask], table[(bits.x >> BITS) & mask],
                table[(bits.x >> (2 * BITS)) & mask], table[(bits.x >> (3 * BITS)) & mask]);
}

// Copies the levels to threadgroup memory in the layout that vec4_values reads.
template <int BITS>
TKV_FN void load_levels(threadgroup float* table, const device uint* constants, int thread_index) {
  if (BITS > 6 || thread_index >= (BITS == 2 ? 32 : (1 << (BITS & 31)))) {
    return;
  }
  int level = thread_index;
  if (BITS == 2) {
    level = (thread_index & 1) ? (thread_index >> 3) : ((thread_index >> 1) & 3);
  }
  table[thread_index] = as_type<float>(constants[TABLE_LEVELS + level]);
}

// Loads the first BYTES bytes of a token's row from its columns, which are 16, 8, 4, 2, 1 bytes
// wide.
template <int BYTES>
TKV_FN void load_row(thread uint* words, const device uint* columns, int token) {
  TKV_UNROLL
  for (int c = 0; c < BYTES / 16; c++) {
    const uint4 v = *((const device uint4*)(columns + c * 128) + token);
    words[4 * c] = v.x;
    words[4 * c + 1] = v.y;
    words[4 * c + 2] = v.z;
    words[4 * c + 3] = v.w;
  }
  int word = BYTES / 16 * 4;
  const device uint* rest = columns + BYTES / 16 * 128;
  if (BYTES & 8) {
    const uint2 v = *((const device uint2*)rest + token);
    words[word] = v.x;
    words[word + 1] = v.y;
    word += 2;
    rest += 64;
  }
  if (BYTES & 4) {
    words[word] = rest[token];
    word += 1;
    rest += 32;
  }
  if (BYTES & 3) {
    uint last = 0;
    if (BYTES & 2) {
      last = *((const device ushort*)rest + token);
      rest += 16;
    }
    if (BYTES & 1) {
      last |= uint(*((const device uchar*)rest + token)) << ((BYTES & 2) ? 16 : 0);
    }
    words[word] = last;
  }
}

// Word `word` of a token's row.
template <int BYTES>
TKV_FN uint row_word(const device uint* columns, int token, int word) {
  constexpr int FULL = BYTES / 16;
  if (word < 4 * FULL) {
    return columns[word / 4 * 128 + token * 4 + word % 4];
  }
  const device uint* rest = columns + FULL * 128;
  word -= 4 * FULL;
  if (BYTES & 8) {
    if (word < 2) {
      return rest[token * 2 + word];
    }
    rest += 64;
    word -= 2;
  }
  if (BYTES & 4) {
    if (word == 0) {
      return rest[token];
    }
    rest += 32;
    word -= 1;
  }
  uint last = 0;
  if (word == 0) {
    if (BYTES & 2) {
      last = ((const device ushort*)rest)[token];
      rest += 16;
    }
    if (BYTES & 1) {
      last |= uint(((const device uchar*)rest)[token]) << ((BYTES & 2) ? 16 : 0);
    }
  }
  return last;
}
