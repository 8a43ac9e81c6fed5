"""How the decode kernel is cut for a GPU: the numbers that differ by back-end and chip."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import mlx.core as mx

from ..quant.layout import TILE
from . import chips

NARROW = 64  # dims of V that half a SIMD group takes of a tile (PARTS of metal/decode_config.h)


@dataclass(frozen=True)
class Tuning:
    """Numbers that metal/decode_config.h takes as template values, and how work is cut.

    Args:
        step: tiles of 32 tokens that a SIMD group handles at a time, for at most 4 query rows of
            at most 256 dims; 1 beyond.
        protected_step: the same of protected rows, no more than ``step``. They are few, so single
            tiles keep more SIMD groups at work, and take fewer registers beside the body's sums.
            Heads of at most 64 dims take ``step``, because half of a SIMD group has nothing to do
            where there is one tile.
        simd_groups: SIMD groups of a threadgroup.
        most_rows: query rows of a threadgroup.
        wide_head: widest head_dim with so many; twice as wide a head gets half of them.
        key_columns: dims of 4-bit and 8-bit keys in one pass of the inner loop.
        lut_words: most 32-bit words of the lookup table of K, twice those of V.
        prefetch: load K and V a tile ahead; otherwise threads that run meanwhile hide the latency.
        half2: sum products as half2 in short chains, which NVIDIA does at twice the rate of
            float32; Apple's ALUs take half operands in float32 sums at no cost.
        threadgroups_per_core: that run at once: the splits of the tokens fill all cores once.
        min_split_tiles: fewest tiles worth a split.
        whole_tiles: longest context that is not cut, so that one launch is enough.
        whole_rows: uncut, up to so many threadgroups take one query row each.
    """

    step: int
    protected_step: int
    simd_groups: int
    most_rows: int
    wide_head: int
    key_columns: int
    lut_words: int
    prefetch: bool
    half2: bool
    threadgroups_per_core: int
    min_split_tiles: int
    whole_tiles: int
    whole_rows: int

    def rows_at_once(self, n_rows: int, widest: int) -> int:
        """Query rows that one threadgroup takes: as many as registers hold, evenly cut."""
        most = max(1, self.most_rows // -(-widest // self.wide_head))
        return -(-n_rows // -(-n_rows // most))

    def tiles_at_once(
        self, rows: int, v_head_dim: int, centred_int8: bool, protected: bool = False
    ) -> int:
        """Tiles that a SIMD group handles at a time: where two do not fit registers, one.

        Args:
            centred_int8: whether keys are int8 and centred.
            protected: whether these are protected rows.
        """
        if rows > 4 or v_head_dim > 256 or centred_int8:
            return 1
        if protected and v_head_dim > NARROW:
            return min(self.step, self.protected_step)
        return self.step

    def n_splits(self, n_tiles: int, n_groups: int, n_cores: int) -> int:
        """Into how many splits the tokens of a head are cut: no more than run at once.

        A split alone needs no second kernel to join it with others, which few tokens do not repay.

        Args:
            n_groups: threadgroups of one split.
        """
        if n_tiles <= self.whole_tiles:
            return 1
        wave = n_cores * self.threadgroups_per_core
        return max(1, min(wave // n_groups, -(-n_tiles // self.min_split_tiles)))


# Measured on an H100 and an H200 (docs/results/kernels.md, kernels-protected.md).
CUDA = Tuning(
    step=2,
    protected_step=1,
    simd_groups=8,
    most_rows=8,
    wide_head=256,
    key_columns=64,
    lut_words=4096,
    prefetch=True,
    half2=True,
    threadgroups_per_core=2,
    min_split_tiles=4,
    whole_tiles=32,
    whole_rows=64,
)
# Chosen by registers, spills and instructions for M1 and M2 (docs/apple.md); never timed.
APPLE = Tuning(
    step=2,
    protected_step=1,
    simd_groups=4,
    most_rows=4,
    wide_head=128,
    key_columns=32,
    lut_words=1024,
    prefetch=False,
    half2=False,
    threadgroups_per_core=4,
    min_split_tiles=4,
    whole_tiles=32,
    whole_rows=32,
)
# cores of a chip that chips.py does not list: an M2's, an H100's
UNLISTED_CORES = {"metal": 10, "cuda": 132}


def built_in(backend: str) -> Tuning:
    """The tuning that the package has for a back-end."""
    return CUDA if backend == "cuda" else APPLE


@cache
def n_cores(backend: str) -> int:
    """GPU cores of this machine, as its chip was sold at most."""
    chip = chips.published(str(mx.device_info().get("device_name", "")))
    return UNLISTED_CORES[backend] if chip is None else chip.cores


def rows_and_splits(
    cut: Tuning, backend: str, n_rows: int, widest: int, n_groups: int, n_tokens: int,
    splits: int | None = None,
) -> tuple[int, int]:  # fmt: skip
    """Query rows of a threadgroup, and splits of a head's tokens, as a tuning cuts a launch.

    Args:
        n_rows: query rows a KV head.
        widest: the larger head_dim.
        n_groups: sequences times KV heads.
        splits: those asked for; None: as the tuning says.
    """
    rows = cut.rows_at_once(n_rows, widest)
    if splits is None:
        passes, n_tiles = -(-n_rows // rows), -(-n_tokens // TILE)
        splits = cut.n_splits(n_tiles, n_groups * passes, n_cores(backend))
    if splits == 1 and n_groups * n_rows <= cut.whole_rows:
        rows = 1
    return rows, splits
