// One instance of decode.metal: its types and formats, how the work is cut (kernels/tuning.py), the
// run-time parameters, and the layout of threadgroup memory.

template <typename T>
struct DecodeInputs {
  const device T* queries;         // [query head of all sequences][query][K's dim]
  const device uint* body;         // [KV head][tile][word]
  const device uint* tail;         // [KV head][tile][word]
  const device int* left_padding;  // [sequence]
  const device DecodeParams* params;
  const device uint* k_constants;  // tables of K and V (common.h)
  const device uint* v_constants;
  const device float* centre;  // of centred keys (anchor.h)
  const device uint* cos_sin_table;
  const device T* sinks;  // [query head of a sequence]
  // of protected rows (kernels/segments.py)
  const device uint* first_tokens;  // [KV head][tile][word]
  const device int* body_ends;      // [sequence], after the parameters: read where these have -1
};

// What a pass of the loop reads: body and tail of one layout; the same but for the first tokens;
// the body between the first tokens and the tail; or protected rows, which are the first tokens
// and, unless it is of the body's layout, the tail.
constant constexpr int READS_ALL = 0;
constant constexpr int READS_REST = 1;
constant constexpr int READS_BODY = 2;
constant constexpr int READS_PROTECTED = 3;

// Dims of K in one pass (a span) of the q.k loop: 32, or with `columns` 64 as many as fill whole
// columns. The whole row where that neither divides a scale group nor is divided by one, or where
// the row ends in a narrower column.
TKV_CONST_FN int span_columns(int bits, int columns) {
  return bits > 8 || columns == 32 ? 32 : (bits == 3 || bits == 5 ? 128 : 64);
}
TKV_CONST_FN bool divides_row(int span, int bits, int group, int dim) {
  return dim % span == 0 && (group == 0 || group % span == 0 || span % group == 0) &&
         (span * bits % 128 == 0 || dim * bits % 128 == 0);
}
TKV_CONST_FN int key_span(int bits, int group, int dim, int columns) {
  return divides_row(span_columns(bits, columns), bits, group, dim) ? span_columns(bits, columns)
                                                                    : dim;
}
// Tokens of V in one pass (a unit) of the p.v loop: those whose vec4s fill whole columns.
TKV_CONST_FN int unit_tokens(int bits, bool prefetch) {
  return bits > 6 ? 64 / bits : (bits % 2 != 0 || (bits == 2 && prefetch) ? 32 : 16);
}
// Query rows with padding, so that vector reads are whole.
TKV_CONST_FN int padded_rows(int rows) {
  return rows <= 2 ? rows : (rows + 3) / 4 * 4;
}

// dims, and tokens, whose products are summed in half precision
constant constexpr int CHAIN = 16;
constant constexpr int CHAIN_TOKENS = 8;

// K_, V_: Tensor. COLUMNS: of span_columns. LUT_KIB: most KiB of K's LUT. OUTPUT_PARTS_: PARTS of
// the pass that the output is shared with, or 1.
template <typename T_, typename K_, typename V_, int RAW_, int ROWS_, bool CENTRED_, bool WHOLE_,
          int STEP_, int SIMD_GROUPS_, int COLUMNS, int LUT_KIB, bool PREFETCH_, bool HALF2_,
          int READS_, int OUTPUT_PARTS_>
struct DecodeConfig {
  typedef T_ T;
  typedef K_ K;
  typedef V_ V;
  static constant constexpr int RAW = RAW_;                  // of unquantised rows (raw_value)
  static constant constexpr int ROWS = ROWS_;                // query rows of a threadgroup
  static constant constexpr bool CENTRED = CENTRED_;         // keys have anchors
  static constant constexpr bool WHOLE = WHOLE_;             // one split: `result` is the output
  static constant constexpr int STEP = STEP_;                // tiles of a SIMD group at a time
  static constant constexpr int SIMD_GROUPS = SIMD_GROUPS_;  // of a threadgroup
  static constant constexpr bool PREFETCH = PREFETCH_;       // load K and V before they are used
  static constant constexpr bool HALF2 = HALF2_;             // sums of half2 in short chains
  static constant constexpr int READS = READS_;
  static_assert(READS >= READS_ALL && READS <= READS_PROTECTED, "all, the body or protected rows");
  static_assert(RAW >= 0 && RAW <= 2, "unquantised rows are half, bfloat or float");
  static_assert(ROWS >= 1 && ROWS <= 16, "1 to 16 rows");
  static_assert(STEP == 1 || STEP == 2, "1 or 2 tiles");
  static_assert(SIMD_GROUPS == 4 || SIMD_GROUPS == 8, "4 or 8 SIMD groups");
  static_assert(COLUMNS == 32 || COLUMNS == 64, "spans of 32 or 64 dims");
  static_assert(LUT_KIB >= 4 && LUT_KIB <= 16, "LUTs of 4 to 16 KiB");

  static constant constexpr int PADDED_ROWS = padded_rows(ROWS);
  static constant constexpr int THREADS = SIMD_GROUPS * LANES;
  static constant constexpr int TILE_WORDS = K::WORDS + V::WORDS;
  static constant constexpr int STRIDE = SIMD_GROUPS * STEP;  // tiles of a step of all SIMD groups

  // q.k of half operands, but not in heads narrower than four chains, where too few rounding errors
  // average out, nor in float32 models.
  static constant constexpr bool K_IN_HALF = K::BITS <= 8 && K::DIM >= 4 * CHAIN && RAW != 2;
  // int8 keys are multiplied as half numbers that are BIAS too large, and the sums are corrected:
  // by a sum of the query for each scale group, none of which may lie in two rotation groups
  static constant constexpr bool K_BIASED = K_IN_HALF && !HALF2 && K::BITS == 8 &&
                                            K::GROUP == LANES &&
                                            (K::WIDTH % LANES == 0 || K::WIDTH == K::DIM);
  static constant constexpr int SPAN = key_span(K::BITS, K::GROUP, K::DIM, COLUMNS);
  static constant constexpr int SPANS = K::DIM / SPAN;
  static constant constexpr int SPAN_WORDS = ceil_div(SPAN * K::BITS, 32);  // of a token
  static constant constexpr int SPAN_SCALES = K::GROUP == 0 ? 1 : ceil_div(SPAN, K::GROUP);
  static constant constexpr bool ONE_SCALE = K::GROUPS <= 1;  // of a token, or none
  static constant constexpr bool WHOLE_COLUMNS = SPAN * K::BITS % 128 == 0;
  // a row whose columns are not whole and that is not loaded at once
  static constant constexpr bool BROKEN_ROW = !PREFETCH && !WHOLE_COLUMNS && SPANS == 1;
  // a column of the next span is loaded as soon as this span's has been used
  static constant constexpr bool PREFETCH_KEYS =
      PREFETCH && WHOLE_COLUMNS && SPAN * K::BITS * STEP <= 1024;

  // V's scales of the next step are loaded after p.v, not before: there registers are short beside
  // int8 keys
  static constant constexpr bool LATE_SCALES = PREFETCH && READS != READS_ALL && K::BITS > 6;

  // blocks of keys whose q.anchor a SIMD group computes at a time
  static constant constexpr int ANCHORS = 32 / SIMD_GROUPS;

  // p.v of half operands where the vec4s that all lanes handle at a time share one scale per token:
  // it is folded into the weights.
  static constant constexpr bool V_IN_HALF =
      V::BITS <= 6 && RAW != 2 && (V::GROUPS == 1 || V::GROUP == 4 * LANES);
  static constant constexpr int FOLDED = V_IN_HALF ? V::GROUPS : 1;   // scales per token
  static constant constexpr int VEC4S = ceil_div(V::DIM, 4 * LANES);  // of a lane
  // half a SIMD group per tile where heads are narrow
  static constant constexpr int PARTS = V::DIM <= 64 && STEP >= 2 ? 2 : 1;
  static constant constexpr int OUTPUT_PARTS = larger(PARTS, OUTPUT_PARTS_);
  static_assert(PARTS == OUTPUT_PARTS || !V_IN_HALF, "half values fill the lanes of their part");
  static constant constexpr int UNIT_TOKENS = unit_tokens(V::BITS, PREFETCH);
  static constant constexpr int UNITS = TILE / UNIT_TOKENS;
  static constant constexpr int UNIT_WORDS = UNIT_TOKENS * V::BITS / 8;  // of a vec4

  static constant constexpr int LUT_WORDS = 256 * LUT_KIB;
  // V's LUT is half as large unless K has none; both are smaller beside many queries.
  static constant constexpr bool WIDE = LUT_WORDS > 1024 && PADDED_ROWS*(K::DIM + V::DIM) > 1024;
  static constant constexpr int K_LUT_WORDS = WIDE ? 1024 : LUT_WORDS;
  static constant constexpr int V_LUT_WORDS =
      WIDE ? 1024 : (K::BITS > 6 && V::DIM <= 128 ? LUT_WORDS : LUT_WORDS / 2);
  static constant constexpr int K_COPIES = lut_copies(K::BITS, K_LUT_WORDS);
  static constant constexpr int V_COPIES = lut_copies(V::BITS, V_LUT_WORDS);
};

// Words of threadgroup memory for `n` dims of the queries.
template <typename C>
TKV_CONST_FN int query_words(int n) {
  return n * C::PADDED_ROWS / (C::K_IN_HALF ? 2 : 1);
}
// Words of a tile's weights.
template <typename C>
TKV_CONST_FN int weight_words() {
  return C::V_IN_HALF ? C::FOLDED * TILE * C::PADDED_ROWS / 2 : TILE * C::PADDED_ROWS;
}
TKV_CONST_FN int aligned(int words) {
  return (words + 3) / 4 * 4;
}

constant constexpr int HALF_LANES = LANES / 2;
constant constexpr int MAX_SCRATCH = 128;  // floats of a SIMD group's rotation
constant constexpr int MAX_JOINED = 4096;  // words of the SIMD groups' rows in the end

// Offsets in threadgroup memory in words. In the end the SIMD groups' rows (`JOINED`) overwrite all
// that is before `MAX_SCORES`.
template <typename C>
struct DecodeMemory {
  typedef typename C::K K;
  typedef typename C::V V;
  static constant constexpr int K_LUT_WORDS =
      C::K_IN_HALF ? lut_words(K::BITS, C::K_COPIES) : MAX_LEVELS;
  static constant constexpr int V_LUT_WORDS =
      C::V_IN_HALF ? lut_words(V::BITS, C::V_COPIES) : MAX_LEVELS;
  static constant constexpr int ANCHOR_WORDS = C::ANCHORS * C::PADDED_ROWS;  // of a SIMD group
  static constant constexpr int PAIR_WORDS = 8 * ceil_div(K::DIM / 2, 4) * C::PADDED_ROWS;
  // of a SIMD group; at first the rotation's scratch
  static constant constexpr int WEIGHT_WORDS = larger(C::STEP * weight_words<C>(), MAX_SCRATCH);
  static constant constexpr int ROWS_JOINED =  // query rows at a time
      MAX_JOINED / (C::SIMD_GROUPS * V::DIM) < 1 ? 1
                                                 : (MAX_JOINED / (C::SIMD_GROUPS * V::DIM) < C::ROWS
                                                        ? MAX_JOINED / (C::SIMD_GROUPS * V::DIM)
                                                        : C::ROWS);

  // the larger LUT first, so that each is aligned to its size
  static constant constexpr int K_LUT = K_LUT_WORDS < V_LUT_WORDS ? V_LUT_WORDS : 0;
  static constant constexpr int V_LUT = K_LUT == 0 ? K_LUT_WORDS : 0;
  static constant constexpr int ROW_SCALES = K_LUT_WORDS + V_LUT_WORDS;
  static constant constexpr int N_SEEN = aligned(ROW_SCALES + C::PADDED_ROWS);
  static constant constexpr int BIASES =  // of the tail's rows, then of the first tokens
      aligned(N_SEEN + C::PADDED_ROWS * (C::READS == READS_PROTECTED ? 2 : 1));
  static constant constexpr int QUERIES =
      aligned(BIASES + (C::K_BIASED ? K::GROUPS * C::PADDED_ROWS : 0));
  static constant constexpr int WEIGHTS = QUERIES + query_words<C>(K::DIM);
  static constant constexpr int PAIRS = WEIGHTS + C::SIMD_GROUPS * WEIGHT_WORDS;
  static constant constexpr int ANCHOR_SCORES = PAIRS + (C::CENTRED ? PAIR_WORDS : 0);
  static constant constexpr int LOOP_END =
      ANCHOR_SCORES + (C::CENTRED ? C::SIMD_GROUPS * ANCHOR_WORDS : 0);
  static constant constexpr int JOINED = 0;
  static constant constexpr int MAX_SCORES = larger(LOOP_END, C::SIMD_GROUPS* V::DIM* ROWS_JOINED);
  static constant constexpr int SUMS = MAX_SCORES + C::SIMD_GROUPS * C::PADDED_ROWS;
  static constant constexpr int END = aligned(SUMS + C::SIMD_GROUPS * C::PADDED_ROWS);
};

// Row `r` of RP contiguous values, by a read of four where RP allows.
template <int RP>
TKV_FN float row_value(threadgroup const float* at, int r) {
  return RP % 4 == 0 ? component(((threadgroup const float4*)at)[r / 4], r % 4) : at[r];
}
template <int RP>
TKV_FN uint row_value(threadgroup const uint* at, int r) {
  return as_type<uint>(row_value<RP>((threadgroup const float*)at, r));
}

// Loads N words: two, or four at a time.
template <int N>
TKV_FN void load_words(thread uint* words, threadgroup const uint* at) {
  if (N == 2) {
    const uint2 v = *(threadgroup const uint2*)at;
    words[0] = v.x;
    words[1] = v.y;
    return;
  }
  TKV_UNROLL
  for (int i = 0; i < N / 4; i++) {
    const uint4 v = ((threadgroup const uint4*)at)[i];
    words[4 * i] = v.x;
    words[4 * i + 1] = v.y;
    words[4 * i + 2] = v.z;
    words[4 * i + 3] = v.w;
  }
}

// Loads N halves, four at a time.
template <int N>
TKV_FN void load_halves(thread half* values, threadgroup const half* at) {
  TKV_UNROLL
  for (int i = 0; i < N / 4; i++) {
    const half4 v = ((threadgroup const half4*)at)[i];
    values[4 * i] = v.x;
    values[4 * i + 1] = v.y;
    values[4 * i + 2] = v.z;
    values[4 * i + 3] = v.w;
  }
}
