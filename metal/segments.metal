// Rows of three segments (mlx_turbokv/kernels/segments.py), and the rows after them that are not
// packed, as plain rows for MLX's own attention: turbo rows in the rotated basis, keys times their
// scales. A threadgroup writes one tile, K and V, of one of the wanted KV heads (the grid's y) of a
// sequence (its z), a segment at a time.

// int32 parameters, in the order of kernels/segment_rows.py. After them the first row of each
// sequence, then the end of the rows that it has in the body.
struct SegmentParams {
  int n_kv_heads;        // KV heads of the buffers
  int first_head;        // first KV head that is wanted
  int n_selected_heads;  // KV heads that are wanted
  int n_sequences;
  int sink_stride;  // tiles of one head in the sink's buffer
  int body_stride;
  int tail_stride;
  int n_sink;       // first tokens of a sequence that are stored apart
  int n_sunk;       // those among the first so many rows are
  int tail_start;   // the tail's first row, a multiple of 32
  int n_packed;     // rows that are packed
  int n_tokens;     // and those after them
  int split_pairs;  // as in anchor.h
  int n_uncentred;  // first keys of a sequence without an anchor
};
constant constexpr int SEGMENT_PARAMS = sizeof(SegmentParams) / sizeof(int);

// The formats of K or V: of the body, of protected rows, and of the tail.
template <typename Coarse_, typename Fine_, typename Tail_>
struct Formats {
  typedef Coarse_ Coarse;
  typedef Fine_ Fine;
  typedef Tail_ Tail;
  static_assert(Coarse::DIM == Fine::DIM && Coarse::WIDTH == Fine::WIDTH, "one basis");
};

// The rows of a tile of a sequence, counted from its first one.
struct TileRows {
  int first;  // in the sequence
  int n;
  int sink_start;
  int sink_end;    // first tokens that are stored apart lie in rows `sink_start` to `sink_end`
  int body_end;    // of the others those before this one lie in the body
  int packed_end;  // those before this one in the tail
};

TKV_FN int in_tile(int row, int n) {
  return row < 0 ? 0 : smaller(row, n);
}

// Writes the tile's rows that are not packed. `fresh`: the first of them. SCALED: keys that are
// multiplied by `scales`.
template <typename T, typename F, typename S, bool SCALED>
TKV_FN void write_fresh(const device F* fresh, device T* out, const device uint* constants,
                        const device float* scales, threadgroup float* scratch,
                        thread const TileRows& rows, int simd_group, int lane) {
  constexpr int W = S::WIDTH == 0 ? S::DIM : S::WIDTH;
  constexpr int N = ceil_div(W, LANES);
  const float factor = S::WIDTH == 0 ? 1.0f : 1.0f / sqrt(float(W));
  for (int row = rows.packed_end + simd_group; row < rows.n; row += DEQUANTIZE_THREADS / LANES) {
    const device F* in = fresh + size_t(row - rows.packed_end) * S::DIM;
    device T* to = out + size_t(row) * S::DIM;
    for (int part = 0; part < S::DIM; part += W) {
      float x[N];
      TKV_UNROLL
      for (int j = 0; j < N; j++) {
        const int i = lane + j * LANES;
        x[j] = i < W ? float(in[part + i]) : 0.0f;
        if (SCALED) {
          x[j] *= i < W ? scales[part + i] : 1.0f;
        }
      }
      if (S::WIDTH != 0) {
        constexpr int R = S::WIDTH == 0 ? 32 : S::WIDTH;
        rotate<R>(x, constants, scratch + simd_group * 128, lane);
      }
      TKV_UNROLL
      for (int j = 0; j < N; j++) {
        const int i = lane + j * LANES;
        if (i < W) {
          to[part + i] = T(read_back<T, S::BITS>(x[j] * factor));
        }
      }
    }
  }
}

// What a side of a tile is read from.
template <typename F>
struct SideInputs {
  const device uint* sink;  // tiles of the head
  const device uint* body;  // the tile
  const device uint* tail;  // the tile
  const device F* fresh;    // the tile's first row that is not packed
  const device uint* constants;
  const device float* scales;  // of keys
};

template <typename T, typename F, typename Side, int FINE_WORDS, int RAW, bool IS_K, bool CENTRED>
TKV_FN void restore_side(SideInputs<F> inputs, device T* out, threadgroup const float* levels,
                         threadgroup float* scratch, thread const TileAnchors& anchors,
                         thread const TileRows& rows, int simd_group, int lane) {
  typedef typename Side::Coarse Coarse;
  typedef typename Side::Fine Fine;
  typedef typename Side::Tail Tail;
  const int thread_index = simd_group * LANES + lane;
  const int sink_start = in_tile(rows.sink_start, rows.n);
  const int sink_end = larger(in_tile(rows.sink_end, rows.n), sink_start);
  if (sink_start == sink_end && rows.body_end >= TILE) {  // of the body alone
    write_tile<T, Coarse, RAW, IS_K, CENTRED>(out, inputs.body, levels, anchors, thread_index);
    return;
  }
  // first tokens are tokens of one tile of theirs, or of two
  for (int from = sink_start; from < sink_end;) {
    const int stored = from - rows.sink_start;
    const int shift = from - stored % TILE;
    const int to = smaller(sink_end, shift + TILE);
    write_rows<T, Fine, RAW, IS_K, CENTRED>(out, inputs.sink + stored / TILE * FINE_WORDS, levels,
                                            anchors, from, to, shift, thread_index);
    from = to;
  }
  // rows before the first tokens, then after them
  for (int part = 0; part < 2; part++) {
    const int begin = part == 0 ? 0 : sink_end;
    const int end = part == 0 ? smaller(sink_start, rows.packed_end) : rows.packed_end;
    write_rows<T, Coarse, RAW, IS_K, CENTRED>(out, inputs.body, levels, anchors, begin,
                                              smaller(end, rows.body_end), 0, thread_index);
    write_rows<T, Tail, RAW, IS_K, CENTRED>(out, inputs.tail, levels, anchors,
                                            larger(begin, rows.body_end), end, 0, thread_index);
  }
  write_fresh<T, F, Coarse, CENTRED>(inputs.fresh, out, inputs.constants, inputs.scales, scratch,
                                     rows, simd_group, lane);
}

TKV_CONST_FN int segments_floats(int k_dim, bool centred) {
  return 2 * MAX_LEVELS + anchor_floats(k_dim, centred) + SCRATCH_FLOATS;
}

// T, F: types of the rows written and of those that are not packed. K, V: formats of the body; PK,
// PV: of protected rows; TK, TV: of the tail, either of these. RAW: as in raw_value.
template <typename T, typename F, typename K, typename V, typename PK, typename PV, typename TK,
          typename TV, int RAW, bool CENTRED>
TKV_FN void read_segments(const device uint* sink, const device uint* body, const device uint* tail,
                          const device F* fresh_keys, const device F* fresh_values,
                          const device SegmentParams* all_params, const device uint* k_constants,
                          const device uint* v_constants, const device float* centre,
                          const device uint* cos_sin_table, device T* keys, device T* values,
                          threadgroup float4* shared, uint3 group, uint simd, uint lane) {
  constexpr int COARSE_WORDS = K::WORDS + V::WORDS;
  constexpr int FINE_WORDS = PK::WORDS + PV::WORDS;
  constexpr int TAIL_WORDS = TK::WORDS + TV::WORDS;
  const device SegmentParams& params = *all_params;
  threadgroup float* k_levels = (threadgroup float*)shared;
  threadgroup float* v_levels = k_levels + MAX_LEVELS;
  threadgroup float* anchor_values = v_levels + MAX_LEVELS;
  threadgroup float* scratch = anchor_values + anchor_floats(K::DIM, CENTRED);
  const int thread_index = int(simd) * LANES + int(lane);
  const int sequence = int(group.z);
  const int own_head = params.first_head + int(group.y);
  const int out_head = sequence * params.n_selected_heads + int(group.y);
  const int head = sequence * params.n_kv_heads + own_head;
  const device int* starts = (const device int*)all_params + SEGMENT_PARAMS;
  const int start = starts[sequence];
  const int body_end = starts[params.n_sequences + sequence];
  const int tile = int(group.x);
  TileRows rows;
  rows.first = tile * TILE;
  rows.n = smaller(params.n_tokens - rows.first, TILE);
  rows.sink_start = start - rows.first;
  rows.sink_end = smaller(start + params.n_sink, params.n_sunk) - rows.first;
  rows.body_end = larger(body_end, params.tail_start) - rows.first;
  rows.packed_end = in_tile(params.n_packed - rows.first, rows.n);
  // rows and tiles of all heads are counted in 32 bits, elements and words in 64
  const size_t first = uint(out_head * params.n_tokens + rows.first);
  const size_t fresh =
      uint(head * (params.n_tokens - params.n_packed) + larger(rows.first - params.n_packed, 0));
  const int tail_tile = larger(tile - params.tail_start / TILE, 0);
  SideInputs<F> inputs;
  inputs.sink = sink + size_t(uint(head * params.sink_stride)) * FINE_WORDS;
  inputs.body = body + size_t(uint(head * params.body_stride + tile)) * COARSE_WORDS;
  inputs.tail = tail + size_t(uint(head * params.tail_stride + tail_tile)) * TAIL_WORDS;
  inputs.scales = centre_row<K::DIM>(centre, CENTRED ? own_head : 0, CENTRE_SCALES);
  load_levels<K::BITS>(k_levels, k_constants, thread_index);
  load_levels<V::BITS>(v_levels, v_constants, thread_index);
  TileAnchors anchors = {k_levels, 0, TILE};
  if (CENTRED && rows.packed_end > 0) {
    const device float* mu = centre_row<K::DIM>(centre, own_head, CENTRE_MU);
    anchors = tile_anchors<K>(anchor_values, scratch, k_constants, mu, cos_sin_table,
                              params.split_pairs, params.n_uncentred, rows.first, start,
                              params.n_packed, int(simd), int(lane));
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);
  inputs.fresh = fresh_keys + fresh * K::DIM;
  inputs.constants = k_constants;
  restore_side<T, F, Formats<K, PK, TK>, FINE_WORDS, RAW, true, CENTRED>(
      inputs, keys + first * K::DIM, k_levels, scratch, anchors, rows, int(simd), int(lane));
  inputs.sink += PK::WORDS;
  inputs.body += K::WORDS;
  inputs.tail += TK::WORDS;
  inputs.fresh = fresh_values + fresh * V::DIM;
  inputs.constants = v_constants;
  restore_side<T, F, Formats<V, PV, TV>, FINE_WORDS, RAW, false, false>(
      inputs, values + first * V::DIM, v_levels, scratch, anchors, rows, int(simd), int(lane));
}
