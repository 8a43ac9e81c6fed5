// What decode.metal and merge.metal agree on.

constant constexpr int DECODE_GROUPS = 8;
constant constexpr float LOWEST = -1e38f;
constant constexpr float LOG2_E = 1.44269504088896f;

// int32 parameters, in the order of kernels/decode.py.
constant constexpr int P_ROWS = 0;        // query rows of one KV head: GQA factor * queries
constant constexpr int P_QUERIES = 1;     // queries of one head
constant constexpr int P_HEADS = 2;       // KV heads
constant constexpr int P_CAUSAL = 3;      // query l sees tokens up to n - queries + l
constant constexpr int P_BODY_STRIDE = 4; // tiles of one head in the body's buffer
constant constexpr int P_BODY_TILES = 5;  // and those that are valid
constant constexpr int P_TAIL_STRIDE = 6;
constant constexpr int P_TOKENS = 7;      // valid tokens, body and tail
constant constexpr int P_SPLITS = 8;
constant constexpr int P_STARTS = 9;      // whether `starts` holds each sequence's first token
constant constexpr int P_SINKS = 10;      // whether `sinks` holds a logit per query head
constant constexpr int P_SCALE = 11;      // bits of the float
constant constexpr int P_HALF = 13;       // pairs of dims that lie apart, for anchors
constant constexpr int P_BARE = 14;       // first keys of a sequence that have no anchor
constant constexpr int P_ONE = 12;  // 1: makes a loop's count unknown, so that it stays rolled
