"""The defects of mutations.py in caches, attention and launchers."""

from __future__ import annotations

from defects import Defect, Tests, cases

AFTER: Tests = ("tests/cache/test_after_operations.py",), ""
KEPT: Tests = AFTER[0], "kept"
ROTATING: Tests = AFTER[0] + ("tests/cache/test_rotating_batch.py",), ""
WINDOWS: Tests = AFTER[0] + ("tests/cache/test_rotating_cache.py",), ""
CACHES: Tests = AFTER[0] + ("tests/cache/test_cache.py", "tests/cache/test_batch_cache.py"), ""
ATTENTION: Tests = ("tests/kernels/test_kernels.py", "tests/attention"), "not case_agrees"
CACHE = "mlx_turbokv/cache/"
KERNELS = "mlx_turbokv/kernels/"

OF_CALLERS = [
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
    Defect("newest rows in the body too", CACHE + "protected.py",
           "            tiles = tiles[:, :, : (stop - start) // TILE]\n", "",
           (("tests/cache/test_protected.py", "tests/cache/test_protected_operations.py"), "")),
    # attention and launchers
    Defect("chunks with protected tokens wait for nothing", "mlx_turbokv/attention/dispatch.py",
           "held or (packed.newest,)", "(packed.newest,)",
           (("tests/attention/test_pacing.py",), "")),
    Defect("no whole steps spared", KERNELS + "splits.py",
           "spared = ceil_div(n_protected, stride) * stride", "spared = n_protected",
           (("tests/kernels/test_protected_splits.py",), "")),
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
