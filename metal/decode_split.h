// What a threadgroup of decode.metal works on: a KV head, some of its query rows, and a split of
// its tiles. Rows and tiles of all heads are counted in 32 bits, elements and words in 64.

struct Split {
  int head;       // KV head, of all sequences'
  int row0;       // first query row of the KV head
  int n_rows;     // valid query rows
  int first_row;  // of all heads' query rows
  int padding;    // rows before the sequence's first token
  int begin;      // tiles
  int end;
  int from;                 // rows before the first that is read
  int to;                   // rows before the first that is not read any more
  int body_tiles;           // of the head; where READS_PROTECTED, tiles of first tokens
  int body_first;           // tile 0 of the head in the buffer that is read first
  int tail_first;           // tile `body_tiles` of the head in the tail's buffer, less body_tiles
  int tail_tile;            // tile `body_tiles` as a tile of the sequence, less body_tiles
  const device uint* body;  // tile `body_first`, and `tail_first` + `body_tiles`
  const device uint* tail;
};

// Where the tiles of a step lie in their sequence.
struct Place {
  int tile;     // the first one's number
  int padding;  // rows before position 0, where `tile` counts from
  int from;     // rows before the first that is read
  int to;       // rows before the first that is not read any more
  int n_seen;   // offset in DecodeMemory's N_SEEN
};

// The query rows of a threadgroup, and no tiles.
template <typename C>
TKV_FN Split query_rows_of(DecodeInputs<typename C::T> inputs, uint3 group) {
  const device DecodeParams& params = *inputs.params;
  Split split;
  split.head = int(group.x);
  split.row0 = int(group.z) * C::ROWS;
  split.n_rows = smaller(params.n_rows - split.row0, C::ROWS);
  split.first_row = split.head * params.n_rows + split.row0;
  split.padding =
      params.has_left_padding != 0 ? inputs.left_padding[split.head / params.n_kv_heads] : 0;
  return split;
}

// Takes part `index` of `n` of `n_tiles` tiles from `first` on; parts have nearly the same length,
// in units of `unit` tiles, but for the last one, which is `n_spared` tiles shorter.
template <typename C>
TKV_FN void take_part(thread Split& split, int first, int n_tiles, int index, int n, int n_spared) {
  constexpr int UNIT = C::READS == READS_PROTECTED ? C::STEP : 1;
  const int n_units = ceil_div(n_tiles + n_spared, UNIT);
  const int length = C::WHOLE ? n_units : int(uint(n_units) / uint(n));
  const int n_longer = C::WHOLE ? 0 : n_units - length * n;
  const int begin = index * length + smaller(index, n_longer);
  const int end = (begin + length + (index < n_longer ? 1 : 0)) * UNIT;
  split.begin = first + begin * UNIT;
  split.end = first + (C::READS == READS_ALL ? end : smaller(end, n_tiles));
}

// First tokens of a sequence that are stored apart.
TKV_FN int n_first_tokens(const device DecodeParams& params, int padding) {
  return larger(smaller(params.n_sunk - padding, params.first_tiles * TILE), 0);
}

// Rows of a head's sequence before the first that the tail holds.
template <typename T>
TKV_FN int body_end(DecodeInputs<T> inputs, int head) {
  const device DecodeParams& params = *inputs.params;
  return params.body_end < 0 ? inputs.body_ends[head / params.n_kv_heads] : params.body_end;
}

// Part `index` of `n` of body and tail. Tiles of which no row is read are skipped.
template <typename C>
TKV_FN void take_all(thread Split& split, DecodeInputs<typename C::T> inputs, int index, int n,
                     int n_spared) {
  const device DecodeParams& params = *inputs.params;
  const int n_tokens = params.n_tokens;
  split.from = split.padding;
  if (C::READS == READS_REST) {
    split.from += n_first_tokens(params, split.padding);
  }
  split.to = n_tokens;
  split.body_tiles = params.body_tiles;
  split.body_first = split.head * params.body_stride;
  split.tail_first = split.head * params.tail_stride - params.body_tiles;
  split.tail_tile = 0;
  split.body = inputs.body + size_t(uint(split.body_first)) * C::TILE_WORDS;
  split.tail = inputs.tail + size_t(uint(split.head * params.tail_stride)) * C::TILE_WORDS;
  const int first = smaller(split.from, n_tokens) / TILE;
  take_part<C>(split, first, ceil_div(n_tokens, TILE) - first, index, n, n_spared);
}

// The rows that are not protected.
template <typename C>
TKV_FN void take_body(thread Split& split, DecodeInputs<typename C::T> inputs, int index) {
  const device DecodeParams& params = *inputs.params;
  if (C::READS == READS_REST) {
    take_all<C>(split, inputs, index, params.body_splits, params.spared_tiles);
    return;
  }
  split.from = split.padding + n_first_tokens(params, split.padding);
  split.to = body_end(inputs, split.head);
  split.body_tiles = 0;
  split.body_first = split.head * params.body_stride;
  split.body = inputs.body + size_t(uint(split.body_first)) * C::TILE_WORDS;
  const int first = split.from / TILE;
  take_part<C>(split, first, larger(ceil_div(split.to, TILE) - first, 0), index, params.body_splits,
               params.spared_tiles);
}

// The first tokens, in whole steps, then the tail from its first row on that is read. A tail of the
// body's layout counts as empty: `tail_start` is n_tokens.
template <typename C>
TKV_FN void take_protected(thread Split& split, DecodeInputs<typename C::T> inputs, int index) {
  const device DecodeParams& params = *inputs.params;
  const int n_first = n_first_tokens(params, split.padding);
  const int n_tokens = params.n_tokens;
  split.from = larger(body_end(inputs, split.head), split.padding + n_first);
  split.to = n_tokens;
  const int start = params.tail_start;
  const int skipped = smaller(larger(split.from - start, 0), n_tokens - start) / TILE;
  split.body_tiles = ceil_div(n_first, TILE * C::STEP) * C::STEP;
  split.body_first = split.head * params.first_stride;
  split.tail_first = split.head * params.tail_stride + skipped - split.body_tiles;
  split.tail_tile = start / TILE + skipped - split.body_tiles;
  split.body = inputs.first_tokens + size_t(uint(split.body_first)) * C::TILE_WORDS;
  split.tail =
      inputs.tail + size_t(uint(split.head * params.tail_stride + skipped)) * C::TILE_WORDS;
  const int n_tiles = split.body_tiles + ceil_div(n_tokens - start, TILE) - skipped;
  take_part<C>(split, 0, n_tiles, index, params.n_splits - params.protected_split, 0);
}

// Where the tiles from `t` on of a step lie.
template <typename C>
TKV_FN Place place_of(Split split, int t, const device DecodeParams& params) {
  Place place;
  place.tile = t;
  place.padding = split.padding;
  place.from = split.from;
  place.to = split.to;
  place.n_seen = 0;
  if (C::READS == READS_PROTECTED) {
    place.tile = t + split.tail_tile;
    if (t < split.body_tiles) {
      place.tile = t;
      place.padding = 0;
      place.from = 0;
      place.to = n_first_tokens(params, split.padding);
      place.n_seen = C::PADDED_ROWS;
    }
  }
  return place;
}

// The words of tile `tile`; past the split's end those of its last tile, which are then unused.
// Counting from the head's pointers is faster, from the buffers' takes fewer registers.
template <typename C>
TKV_FN const device uint* tile_at(DecodeInputs<typename C::T> inputs, Split split, int tile) {
  const int at = tile < split.end ? tile : split.end - 1;
  if (C::READS == READS_BODY) {
    return C::PREFETCH ? split.body + size_t(uint(at)) * C::TILE_WORDS
                       : inputs.body + size_t(uint(at + split.body_first)) * C::TILE_WORDS;
  }
  const bool in_body = at < split.body_tiles;
  if (C::READS == READS_PROTECTED) {  // the last step of first tokens may be half empty
    const int first = smaller(at, inputs.params->first_tiles - 1);
    return (in_body ? inputs.first_tokens : inputs.tail) +
           size_t(uint(in_body ? first + split.body_first : at + split.tail_first)) * C::TILE_WORDS;
  }
  if (C::PREFETCH) {
    return (in_body ? split.body : split.tail) +
           size_t(uint(in_body ? at : at - split.body_tiles)) * C::TILE_WORDS;
  }
  return (in_body ? inputs.body : inputs.tail) +
         size_t(uint(at + (in_body ? split.body_first : split.tail_first))) * C::TILE_WORDS;
}
