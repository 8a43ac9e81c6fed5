// Loads K's columns and scales for decode_keys.h: a span ahead where spans are prefetched,
// otherwise when its dims are multiplied.

// K of a SIMD group's tiles, loaded ahead: the columns of a span where spans are prefetched, and
// the bits of the scales.
template <typename C>
struct Keys {
  uint words[C::STEP * C::SPAN_WORDS];
  uint scales[C::STEP * C::SPAN_SCALES];  // [group][tile]
};

// The tiles of a step.
template <typename C>
struct Tiles {
  const device uint* at[C::STEP];
};

// Loads column `c` of a span of a token's row in STEP tiles.
template <typename C>
TKV_FN void load_column(thread uint* words, thread const Tiles<C>& tiles, int span, int c,
                        int lane) {
  TKV_UNROLL
  for (int i = 0; i < C::STEP; i++) {
    const device uint* columns = tiles.at[i] + span * (C::SPAN * C::K::BITS);
    const uint4 v = ((const device uint4*)columns)[c * TILE + lane];
    words[i * C::SPAN_WORDS + 4 * c] = v.x;
    words[i * C::SPAN_WORDS + 4 * c + 1] = v.y;
    words[i * C::SPAN_WORDS + 4 * c + 2] = v.z;
    words[i * C::SPAN_WORDS + 4 * c + 3] = v.w;
  }
}

// Loads the bits of the scale of a span's group `g`.
template <typename C>
TKV_FN void load_key_scale(thread Keys<C>& keys, thread const Tiles<C>& tiles, int span, int g,
                           int lane) {
  typedef typename C::K K;
  if (K::GROUP == 0) {
    return;
  }
  const int group = span * C::SPAN / larger(K::GROUP, 1) + g;
  TKV_UNROLL
  for (int i = 0; i < C::STEP; i++) {
    keys.scales[g * C::STEP + i] =
        ((const device ushort*)(tiles.at[i] + K::CODE_WORDS))[group * TILE + lane];
  }
}

// Loads a span whose columns are not its own: the whole row, or word by word.
template <typename C>
TKV_FN void load_broken_span(thread uint* words, thread const Tiles<C>& tiles, int span, int lane) {
  TKV_UNROLL
  for (int i = 0; i < C::STEP; i++) {
    if (C::SPANS == 1) {
      load_row<C::SPAN * C::K::BITS / 8>(words + i * C::SPAN_WORDS, tiles.at[i], lane);
    } else {
      TKV_UNROLL
      for (int j = 0; j < C::SPAN_WORDS; j++) {
        const int word = span * C::SPAN_WORDS + j;
        words[i * C::SPAN_WORDS + j] = tiles.at[i][word / 4 * (4 * TILE) + word % 4 + lane * 4];
      }
    }
  }
}

// Loads what dims `begin` to `end` of a span that is not prefetched begin to need.
template <typename C>
TKV_FN void load_when_used(thread uint* words, thread const Tiles<C>& tiles, int span, int begin,
                           int end, int lane) {
  typedef typename C::K K;
  if (C::WHOLE_COLUMNS && !C::PREFETCH_KEYS) {
    TKV_UNROLL
    for (int c = ceil_div(begin * K::BITS, 128); 128 * c < end * K::BITS; c++) {
      load_column<C>(words, tiles, span, c, lane);
    }
  } else if (C::BROKEN_ROW) {
    TKV_UNROLL
    for (int j = ceil_div(begin * K::BITS, 32); 32 * j < end * K::BITS; j++) {
      TKV_UNROLL
      for (int i = 0; i < C::STEP; i++) {
        words[i * C::SPAN_WORDS + j] = row_word<K::DIM * K::BITS / 8>(tiles.at[i], lane, j);
      }
    }
  }
}

// Loads what key_scores expects of the first span.
template <typename C>
TKV_FN void load_keys(thread Keys<C>& keys, thread const Tiles<C>& tiles, int lane) {
  if (C::PREFETCH_KEYS) {
    TKV_UNROLL
    for (int c = 0; c < C::SPAN_WORDS / 4; c++) {
      load_column<C>(keys.words, tiles, 0, c, lane);
    }
  }
  TKV_UNROLL
  for (int g = 0; g < C::SPAN_SCALES; g++) {
    load_key_scale<C>(keys, tiles, 0, g, lane);
  }
}
