"""Entries of known content for a prompt cache folder.

python tests/helpers/disk_writer.py FOLDER FIRST: writes one conversation after another, each in
several growing versions, until it is killed; a line is printed when an entry has been written.
"""

from __future__ import annotations

import sys
from pathlib import Path

import mlx_turbokv  # noqa: F401 - before mlx.core, so that this process has the tests' BLAS

# isort: split
import mlx.core as mx
import numpy as np

from mlx_turbokv import TurboKVCache
from mlx_turbokv.serve.checkpoints import Entry
from mlx_turbokv.serve.disk import DiskCache
from mlx_turbokv.serve.identity import CacheKind

LENGTHS = (600, 900, 1300)


def kind(name: str = "model") -> CacheKind:
    fresh = [TurboKVCache("q8_0", "turbo3", backend="reference") for _ in range(2)]
    return CacheKind(name, fresh, None)


def tokens_of(seed: int, n: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, max(LENGTHS))[:n].astype(np.int64)


def entry_of(seed: int, n: int) -> Entry:
    """An entry whose K and V follow from its tokens."""
    tokens = tokens_of(seed, n)
    caches = kind().fresh
    for layer, cache in enumerate(caches):
        angles = mx.array(tokens % 97)[None, None, :, None] * mx.arange(1, 65)[None, None, None]
        keys = mx.cos(0.01 * angles + layer).astype(mx.float32)
        cache.update_and_fetch(keys, mx.sin(keys))
    return Entry(tokens, caches)


def same(a: Entry, b: Entry) -> bool:
    """Whether two entries hold the same bytes."""
    if not np.array_equal(a.tokens, b.tokens):
        return False
    states = zip(a.caches, b.caches)
    return all(
        mx.array_equal(x.body, y.body).item() and mx.array_equal(x.tail, y.tail).item()
        for x, y in states
    )


def main() -> None:
    disk = DiskCache(Path(sys.argv[1]), 1 << 30)
    seed = int(sys.argv[2])
    while True:
        for n in LENGTHS:
            disk.offer(kind(), entry_of(seed, n))
            disk.wait()
            print(seed, n, flush=True)
        seed += 1


if __name__ == "__main__":
    main()
