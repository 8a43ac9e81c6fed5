"""The defects of mutations.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

from kernel_cases import ALL_CASES
from segment_cases import CASES as SEGMENT_CASES

Tests = tuple[tuple[str, ...], str]


class Defect(NamedTuple):
    """A text of a file, what replaces it, and the tests that should notice.

    Args:
        tests: files or tests, and an expression for pytest's -k.
        equal: why the changed code is as right; empty for a defect.
    """

    what: str
    file: str
    old: str
    new: str
    tests: Tests
    equal: str = ""


def cases(*words: str, most: int = 6) -> Tests:
    """Kernel cases whose names have all of these words, those of few values first."""
    found = [c for c in ALL_CASES if all(w in f" {c} " for w in words)]
    if not found:
        raise ValueError(f"no case has {words}")
    found.sort(key=lambda c: sum(c.dims) * sum(c.tokens))
    test = "tests/kernels/test_kernels.py::test_case_agrees_with_float64"
    return tuple(f"{test}[{case}]" for case in found[:most]), ""


def protected(*words: str) -> Tests:
    """Cases of protected tokens whose names have all of these words."""
    found = [c for c in SEGMENT_CASES if all(w in f" {c} " for w in words)]
    if not found:
        raise ValueError(f"no case has {words}")
    test = "tests/kernels/test_protected_kernels.py::test_protected_case_agrees_with_float64"
    return tuple(f"{test}[{case}]" for case in found), ""


FAR: Tests = ("tests/kernels/test_far_offsets.py",), ""
AFTER: Tests = ("tests/cache/test_after_operations.py",), ""
KEPT: Tests = AFTER[0], "kept"
SIZES: Tests = ("tests/kernels/test_kernels.py",), "every_size or saturate or broken_values"
MEMORY: Tests = ("tests/kernels/test_shared_memory.py",), ""
ONE_TOKEN: Tests = ("tests/kernels/test_kernels.py",), "one_token"
BATCH = cases("(2, 3, 2)")
BELOW, CENTRED = cases(" below", most=12), cases("apart", "zero_queries")
LOUD, STARTS = cases("loud_values", most=9), cases(" starts ")
SINKS, CAUSAL = cases(" sinks "), cases(" causal ", "(64, 7")
STALE = cases(" stale ", most=12)
SPLIT = cases(" in 3 ", "(64, 7", most=8)
LONGEST = tuple(c for n in ("(8192", "(8224") for c in cases(n)[0]), ""
ROTATING: Tests = AFTER[0] + ("tests/cache/test_rotating_batch.py",), ""
WINDOWS: Tests = AFTER[0] + ("tests/cache/test_rotating_cache.py",), ""
CACHES: Tests = AFTER[0] + ("tests/cache/test_cache.py", "tests/cache/test_batch_cache.py"), ""
ATTENTION: Tests = ("tests/kernels/test_kernels.py", "tests/attention"), "not case_agrees"

DECODE, MERGE, ATTENTION_H = "metal/decode.metal", "metal/merge.metal", "metal/attention.h"
ANCHORS, QUERIES = "metal/decode_anchors.h", "metal/decode_queries.h"
VALUES, SOFTMAX = "metal/decode_values.h", "metal/decode_softmax.h"
PACK, QUANTIZE, WORDS = "metal/pack.metal", "metal/pack_quantize.h", "metal/pack_words.h"
DEQUANTIZE, CONFIG = "metal/dequantize.metal", "metal/decode_config.h"
TILES = "metal/decode_split.h"
JOIN = "metal/decode_join.h"
CACHE = "mlx_turbokv/cache/"
KERNELS = "mlx_turbokv/kernels/"

PLANTED = [
    # offsets
    Defect("32-bit offset of tiles", TILES,
           "size_t(uint(at + (in_body ? split.body_first : split.tail_first))) * C::TILE_WORDS",
           "uint(at + (in_body ? split.body_first : split.tail_first)) * C::TILE_WORDS", FAR),
    Defect("32-bit offset of new rows", PACK, "const size_t row = uint(head * n_new + skipped);",
           "const uint row = uint(head * n_new + skipped);", FAR),
    Defect("32-bit offset of packed tiles", PACK,
           "packed + size_t(uint(head * params[param_n_tiles] + tile)) * TILE_WORDS",
           "packed + uint(head * params[param_n_tiles] + tile) * TILE_WORDS", FAR),
    Defect("32-bit offset of the old tail", PACK,
           "tail + size_t(uint(head * params[param_old_stride] + tile)) * TILE_WORDS",
           "tail + uint(head * params[param_old_stride] + tile) * TILE_WORDS", FAR),
    Defect("32-bit offset of dequantised rows", DEQUANTIZE,
           "const size_t first = uint(row * params[param_n_tokens] + tile * TILE);",
           "const uint first = uint(row * params[param_n_tokens] + tile * TILE);", FAR),
    Defect("32-bit offset of tiles that are dequantised", DEQUANTIZE,
           "body + size_t(uint(head * params[param_body_stride] + tile)) * TILE_WORDS",
           "body + uint(head * params[param_body_stride] + tile) * TILE_WORDS", FAR),
    # softmax and sinks
    Defect("a lowest score that is not low", ATTENTION_H, "LOWEST = -1e38f", "LOWEST = -100.0f",
           BELOW),
    Defect("a largest score that begins at zero", JOIN, "float largest = LOWEST;",
           "float largest = 0.0f;", BELOW),
    Defect("a largest score of splits that begins at zero", MERGE, "float lane_top = LOWEST;",
           "float lane_top = 0.0f;", BELOW),
    Defect("a sink cut at 2^20", ATTENTION_H, "above < 120.0f ? above : 120.0f",
           "above < 20.0f ? above : 20.0f", cases("high_sinks")),
    Defect("a sink's weight relative to zero", ATTENTION_H, "* LOG2_E - max_score;",
           "* LOG2_E;", SINKS),
    Defect("a sink of another head", ATTENTION_H,
           "sinks[row / params.n_queries % n_heads]", "sinks[row % n_heads]",
           cases(" sinks ", "(64, 7", most=10)),
    Defect("a row without a key divided by zero", ATTENTION_H,
           "(total == 0.0f ? 0.0f : 1.0f / total)", "(1.0f / total)", STARTS),
    Defect("weights too large for half", SOFTMAX, "HEADROOM = 6.0f", "HEADROOM = 8.0f",
           cases("spiked")),
    Defect("weights that outgrow half", SOFTMAX, "MARGIN = 4.0f", "MARGIN = 6.0f",
           cases("spiked")),
    Defect("weights lost in half", SOFTMAX, "HEADROOM = 6.0f", "HEADROOM = -11.0f",
           cases("crowd")),
    Defect("a smallest scale of V that is not small", SOFTMAX, "LOWEST_SCALE = 5.96e-8f",
           "LOWEST_SCALE = 1.0f", cases("quiet")),
    Defect("output cut, not rounded, to bfloat16", ATTENTION_H,
           "out[part * WIDTH + i] = T(y[j] * factor);",
           "out[part * WIDTH + i] = T(as_type<float>(as_type<uint>(y[j] * factor) & 0xffff0000u));",
           ONE_TOKEN),
    Defect("first tokens read twice", TILES,
           "larger(inputs.body_ends[split.head / params.n_kv_heads], split.padding + n_first)",
           "inputs.body_ends[split.head / params.n_kv_heads]", protected("past the body")),
    Defect("first tokens read from the body too", TILES,
           "split.from = split.padding + n_first_tokens(params, split.padding);",
           "split.from = split.padding;", protected("three segments")),
    Defect("rows that the tail holds read from the body too", SOFTMAX,
           "C::READS == READS_BODY ? smaller(n_visible, split.to) : n_visible",
           "n_visible", protected("into the tail")),
    Defect("first tokens at the positions of their rows", TILES, "place.padding = 0;", "",
           protected("within the first", "True")),
    Defect("a causal query sees first tokens after it", SOFTMAX,
           "smaller(n_visible - split.padding, n_first)", "n_first",
           protected("all first ones", "causal", " 8 ")),
    Defect("half a SIMD group twice", DECODE, "C::PARTS < C::OUTPUT_PARTS && lane >= HALF_LANES",
           "false", protected(" 64 ", "True")),
    Defect("anchors of a step kept for the next", DECODE, "C::READS == READS_PROTECTED ? 1 : ", "",
           protected("a long tail", "True")),
    # masks and splits
    Defect("causal rows see all", SOFTMAX,
           "params.n_tokens - (params.causal != 0 ? n_queries - 1 - query : 0);",
           "params.n_tokens;", CAUSAL),
    Defect("causal rows counted from the group's first", SOFTMAX,
           "(split.row0 + thread_index) % n_queries", "thread_index % n_queries",
           cases(" causal ", ") 8 ", "(1, 1, 5)")),
    Defect("a largest score of hidden tokens", SOFTMAX, "seen && found > highest[r] ? found",
           "found > highest[r] ? found", cases("future")),
    Defect("padding is seen", DECODE, "uint(place.tile * TILE + lane - place.from)",
           "uint(place.tile * TILE + lane)", STARTS),
    Defect("the first sequence's padding for all", TILES,
           "inputs.left_padding[split.head / params.n_kv_heads] : 0;",
           "inputs.left_padding[0] : 0;",
           cases(" starts ", "(2, ", most=8)),
    Defect("splits that leave tiles out", TILES,
           "const int begin = index * length + smaller(index, n_longer);",
           "const int begin = index * length + n_longer;", SPLIT),
    Defect("a split too many is merged", MERGE,
           "s < n_splits ? fast_exp2(row_stats[2 * s] - top) : 0.0f",
           "fast_exp2(row_stats[2 * (s < n_splits ? s : first)] - top)", SPLIT),
    Defect("stale scales times zero", VALUES, "weight[r] > 0.0f ? weight[r] * scales[g] : 0.0f",
           "weight[r] * scales[g]", STALE),
    Defect("stale values times zero", VALUES, "seen ? half_bits(scales[t]) : 0.0f",
           "half_bits(scales[t])", STALE),
    # centred keys
    Defect("mu of the first head in decode", DECODE,
           "C::CENTRED ? split.head % params.n_kv_heads : 0", "0", BATCH),
    Defect("mu past the heads in decode", DECODE,
           "C::CENTRED ? split.head % params.n_kv_heads : 0", "split.head", BATCH),
    Defect("mu of the first head in pack", PACK,
           "head % (CENTRED ? params[param_n_kv_heads] : 1)", "0", BATCH),
    Defect("keys that are not scaled", QUANTIZE, "y[j] *= anchors.scales[dim];", ";", BATCH),
    Defect("queries that are not unscaled", QUERIES, "x[j] *= inverse[i];", ";", BATCH),
    Defect("queries that are not unscaled for anchors", ANCHORS,
           "const float factor = inverse[first];", "const float factor = 1.0f;", BATCH),
    Defect("mu of the first head in dequantize", DEQUANTIZE,
           "head % params[param_n_kv_heads], CENTRE_MU", "0, CENTRE_MU", BATCH),
    Defect("padding of the first sequence in pack", PACK,
           "left_padding[head / params[param_n_kv_heads]]", "left_padding[0]", BATCH),
    Defect("padding of another sequence in dequantize", DEQUANTIZE,
           "left_padding[row / n_selected]", "left_padding[row % n_selected]", BATCH),
    Defect("first keys centred in decode", DECODE,
           "place.padding + params.n_uncentred, lane", "place.padding, lane", BATCH),
    Defect("first keys centred in dequantize", DEQUANTIZE,
           "padding + params[param_n_uncentred] - tile * TILE", "padding - tile * TILE", CENTRED),
    Defect("one block for a tile of two", ANCHORS,
           "tile_blocks == 2 && lane >= padding % TILE ? 1 : 0", "0", BATCH),
    Defect("blocks past the table in decode", ANCHORS,
           "return block < 0 ? 0 : (block < last ? block : last);",
           "return block < 0 ? 0 : block;", LONGEST),
    Defect("blocks before the table in decode", ANCHORS,
           "return block < 0 ? 0 : (block < last ? block : last);",
           "return block < last ? block : last;", cases(" starts apart")),
    Defect("a block past the table in dequantize", DEQUANTIZE,
           "(block + b < last_block ? block + b : last_block)", "(block + b)", LONGEST),
    Defect("all new rows at the first one's position", PACK, "row_anchors.row += token - first;",
           "", BATCH),
    Defect("every tile at the first one's position", PACK,
           "anchors.row = params[param_first_row] + skipped;",
           "anchors.row = params[param_first_row];", BATCH),
    Defect("a table of the new rows alone", KERNELS + "pack.py",
           "*tables.anchor_inputs(centre, first + n_new, left_padding)",
           "*tables.anchor_inputs(centre, n_new, left_padding)", LONGEST),
    Defect("a query of zeros divided by zero", QUERIES, "largest > 0.0f ? 1.0f / largest : 0.0f",
           "1.0f / largest", cases("zero_queries")),
    # packing
    Defect("q8_0 scales rounded down", QUANTIZE, "exact > 0.5f ? (steps + 126) / 127 : 0",
           "exact > 0.5f ? steps / 127 : 0", SIZES),
    Defect("q8_0 scales of nothing", QUANTIZE, "exact > 0.5f ? (steps + 126) / 127 : 0",
           "(steps + 126) / 127", SIZES),
    Defect("scales that do not saturate", QUANTIZE, "half(scale > FP16_MAX ? FP16_MAX : scale)",
           "half(scale)", SIZES),
    Defect("halves that are read back infinite", QUANTIZE, "FP16_MOST_Q8 = 515.5f",
           "FP16_MOST_Q8 = 516.0f", SIZES),
    Defect("squares that overflow", QUANTIZE, "MOST_ROTATED = 1125899906842624.0f",
           "MOST_ROTATED = 1e30f", SIZES),
    Defect("a scale of zero over zero", QUANTIZE,
           "energy == 0.0f ? 0.0f : energy / levels_dot", "energy / levels_dot", SIZES),
    Defect("stale rows of the tail are kept", PACK,
           "old[i] & ((1u << word.kept) - 1u)", "old[i]", STALE),
    # memory
    Defect("more LUT copies than memory", CONFIG, "(K::DIM + V::DIM) > 1024;",
           "(K::DIM + V::DIM) > 16384;", MEMORY),
    Defect("less scratch memory for rotations", CONFIG, "MAX_SCRATCH = 128", "MAX_SCRATCH = 1",
           cases("(72, ", most=8), "only SIMD groups with a row rotate: 128 words each are there"),
    # caches
    Defect("padding as it was before a filter", CACHE + "padding.py",
           "        self._set_left_padding([n - common for n in self._left_padding])\n", "", AFTER),
    Defect("the array of the padding before a filter", CACHE + "padding.py",
           "        self._left_padding_array: mx.array | None = None\n",
           "        self.__dict__.setdefault('_left_padding_array', None)\n", AFTER),
    Defect("offsets as they were before a filter", CACHE + "batch.py",
           "        self._offset_at: tuple[int, mx.array] | None = None\n",
           "        self.__dict__.setdefault('_offset_at', None)\n", AFTER),
    Defect("sequences in their old order after a filter", CACHE + "padding.py",
           "rows = mx.array(indices)", "rows = mx.array(sorted(indices))", AFTER),
    Defect("a window mask that kernels take for causal", CACHE + "batch.py",
           "        if window_size is not None:\n            return mask\n", "", AFTER),
    Defect("a padded batch without its window", CACHE + "batch.py",
           "n, offset=size, window_size=window_size, left_padding=self.left_padding",
           "n, offset=size, left_padding=self.left_padding", AFTER),
    Defect("finalize that forgets the old padding", CACHE + "batch.py",
           "[a + b for a, b in zip(self._left_padding, padding)]", "padding", CACHES),
    Defect("nothing hidden in what a batch gives back", CACHE + "rotating_batch.py",
           "cache.n_hidden = max(0, self.n_hidden - self._left_padding[idx])", "cache.n_hidden = 0",
           AFTER),
    Defect("padding hidden in what a batch gives back", CACHE + "rotating_batch.py",
           "cache.n_hidden = max(0, self.n_hidden - self._left_padding[idx])",
           "cache.n_hidden = self.n_hidden", AFTER),
    Defect("dropped tokens forgotten by extract", CACHE + "rotating_batch.py",
           "            cache.n_dropped = self._n_dropped[idx]\n", "", AFTER),
    Defect("kept tokens next to the window", CACHE + "rotating_batch.py",
           "c.keep + c._n_unreachable() if c.n_dropped else 0", "0", KEPT),
    Defect("rows between kept tokens and window", CACHE + "rotating_batch.py",
           "c.keep + c._n_unreachable() if c.n_dropped else 0", "c.keep if c.n_dropped else 0",
           KEPT),
    Defect("skipped tokens not counted", CACHE + "rotating_batch.py",
           "[c.n_dropped + skip for c, skip in zip(caches, skipped)]",
           "[c.n_dropped for c in caches]", AFTER),
    Defect("padding counted as dropped tokens", CACHE + "rotating_batch.py",
           "tokens = [max(0, n - padding) for padding in self._left_padding]",
           "tokens = [n for padding in self._left_padding]", ROTATING),
    Defect("hidden rows as they were before a filter", CACHE + "rotating_batch.py",
           "min(max(0, hidden - (before - self.n_rows)), self.n_rows)", "min(hidden, self.n_rows)",
           ROTATING),
    Defect("padding past hidden rows", "mlx_turbokv/attention/hook.py",
           "left_padding = mask.left_padding + hidden.count", "left_padding = mask.left_padding",
           ROTATING),
    Defect("a tile too early after a trim", CACHE + "rows.py",
           "            first = self.n_body // TILE\n",
           "            first = self.n_body // TILE - 1\n", AFTER),
    Defect("a body of what was trimmed", CACHE + "rows.py",
           "self.n_body, self.n_tail = kept - kept % TILE, kept % TILE",
           "self.n_tail = kept % TILE", AFTER),
    Defect("a tail that is written twice", CACHE + "rows.py",
           "            self.tail, self.n_tail = empty_tiles(), 0\n", "", CACHES),
    Defect("no spare rows", CACHE + "rotating.py", "self.n_hidden - SPARE_TOKENS) // TILE",
           "self.n_hidden) // TILE", WINDOWS),
    Defect("rows beside kept tokens that stay in sight", CACHE + "rotating.py",
           "return self._kept_tiles * TILE - self.keep if self.n_dropped else 0", "return 0",
           (AFTER[0], "kept or whole")),
    Defect("tokens forgotten by a trim", CACHE + "rotating.py",
           "        self.n_dropped = n_dropped\n        self.n_hidden = min",
           "        self.n_hidden = min", (AFTER[0], "whole")),
    # attention and launchers
    Defect("the first heads' sinks for every slice", KERNELS + "heads.py", "sinks[heads]",
           "sinks[: count * gqa_factor]", ATTENTION),
    Defect("the first heads' mask for every slice", KERNELS + "heads.py",
           "own_mask = mask[..., heads, :, :]", "own_mask = mask[..., : count * gqa_factor, :, :]",
           ATTENTION),
    Defect("rows of padding are read by decode", "mlx_turbokv/attention/dispatch.py",
           "packed.left_padding is None or left_padding is not None", "True",
           (ATTENTION[0], "padding_that_is_not_hidden")),
    Defect("one query is causal", KERNELS + "decode_launch.py", "causal=causal and n_queries > 1",
           "causal=causal", cases(" causal ", ") 1 "), "the only query sees every token"),
    Defect("a sink's own type", KERNELS + "decode.py", "if sinks.dtype != queries.dtype:",
           "if False:", (ATTENTION[0], "sinks_of")),
]  # fmt: skip
