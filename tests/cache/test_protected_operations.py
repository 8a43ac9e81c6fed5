"""Random sequences of cache operations against a model of the three segments in NumPy."""

from __future__ import annotations

import os
from copy import deepcopy

import mlx.core as mx
import numpy as np
import pytest
from segment_model import ATOL, ModelCache, Tokens, tokens

from mlx_turbokv.cache import BatchTurboKVCache, TurboKVCache

pytestmark = pytest.mark.slow
N_SEQUENCES = int(os.environ.get("TURBOKV_RANDOM_SEQUENCES", "2000"))
N_SHARDS = 8
PAIRS = (("turbo4", "turbo2"), ("turbo3", "q8_0"), ("f16", "turbo2"), ("turbo4", "turbo3"))
PROTECTIONS = ((32, 128), (32, 64), (0, 32), (64, 96), (32, 0))
MOST_CACHES, MOST_SEQUENCES, MOST_ROWS = 4, 4, 700
FEW = 8  # new tokens that attention reads as they are stored


class Pair:
    """A cache and its model."""

    def __init__(self, cache, model: ModelCache) -> None:
        self.cache, self.model = cache, model

    @property
    def is_batch(self) -> bool:
        return isinstance(self.cache, BatchTurboKVCache)


class Run:
    """One sequence of operations."""

    def __init__(self, seed: int) -> None:
        self.rng = rng = np.random.default_rng(seed)
        self.pair = PAIRS[rng.integers(len(PAIRS))]
        self.sink, self.recent = PROTECTIONS[rng.integers(len(PROTECTIONS))]
        centred = self.pair[0].startswith("turbo") and bool(rng.integers(2))
        self.table: Tokens = tokens(self.pair, centred)
        self.held = [self.new()]
        self.done: list[str] = []

    def new(self) -> Pair:
        options = {"sink": self.sink, "recent": self.recent}
        cache = TurboKVCache(*self.pair, "reference", self.table.centre, **options)
        return Pair(cache, ModelCache(self.sink, self.recent))

    def ids(self, n: int, n_sequences: int) -> list[list[int]]:
        return self.rng.integers(len(self.table.k), size=(n_sequences, n)).tolist()

    def length(self) -> int:
        """Mostly steps of one token, some drafts and chunks."""
        kind = self.rng.random()
        return int(1 if kind < 0.3 else self.rng.integers(2, 12 if kind < 0.5 else 260))

    def go(self, n_operations: int) -> None:
        operations = ("update",) * 5 + ("trim",) * 2 + ("padded_update",) * 2
        operations += ("new_cache", "merge", "extend", "filter", "extract", "copy", "reload")
        for _ in range(n_operations):
            name = operations[self.rng.integers(len(operations))]
            at = int(self.rng.integers(len(self.held)))
            self.done.append(f"{name} {at}")
            getattr(self, name)(self.held[at])
        for held in self.held:
            self.check(held)

    def update(self, held: Pair) -> None:
        n = self.length()
        if held.model.n + n > MOST_ROWS:
            return
        ids = self.ids(n, len(held.model.sequences))
        before = held.model.copy()
        held.model.update(ids)
        new = self.table.rows(ids)
        got = held.cache.update_and_fetch(*new)
        if self.rng.random() > 0.2:
            return
        exact = n > FEW and self.recent > 0
        self.check_rows(got, before if exact else held.model, held.model, n if exact else 0)
        if exact:
            for x, y in zip(got, new):
                np.testing.assert_array_equal(np.array(x)[:, :, -n:], np.array(y))

    def padded_update(self, held: Pair) -> None:
        """A prompt in one or two chunks, each sequence's tokens padded at the right."""
        n, n_sequences = self.length(), len(held.model.sequences)
        if not held.is_batch or held.model.n + n > MOST_ROWS:
            return
        padding = self.rng.integers(0, n, size=n_sequences).tolist()
        padding[int(self.rng.integers(n_sequences))] = 0
        lengths = [n - p for p in padding]
        known = bool(self.rng.integers(2))
        held.cache.prepare(lengths=lengths if known else None, right_padding=padding)
        first, start = int(self.rng.integers(1, n + 1)), held.model.n
        for count in (first, n - first):
            if count and max(padding):
                before = held.model.n
                after = before + count
                ends = [after - p for p in padding]
                if known:
                    ends = [min(after, start + length) for length in lengths]
            elif count:
                ends = None
            if count:
                ids = self.ids(count, n_sequences)
                held.model.update(ids, ends)
                held.cache.update_and_fetch(*self.table.rows(ids))
        held.cache.finalize()
        if max(padding):
            held.model.cut(padding)

    def trim(self, held: Pair) -> None:
        n = int(self.rng.integers(0, self.rng.choice([4, 40, 300])))
        n = min(n, held.model.n)
        if any(held.model.n - n < padding for padding in held.model.padding):
            return
        assert held.cache.trim(n) == n
        held.model.trim(n)

    def merge(self, _: Pair) -> None:
        singles = [held for held in self.held if not held.is_batch]
        if not singles:
            return
        batch = TurboKVCache.merge([held.cache for held in singles])
        model = ModelCache.joined([(held.model, 0) for held in singles])
        self.held = [held for held in self.held if held.is_batch] + [Pair(batch, model)]

    def extend(self, held: Pair) -> None:
        for other in self.held:
            n = len(held.model.sequences) + len(other.model.sequences)
            if other is held or not (held.is_batch and other.is_batch) or n > MOST_SEQUENCES:
                continue
            if 0 in (held.model.n, other.model.n):
                continue
            held.cache.extend(other.cache)
            parts = [(p.model, i) for p in (held, other) for i in range(len(p.model.sequences))]
            held.model = ModelCache.joined(parts, max(held.model.n, other.model.n))
            self.held.remove(other)
            return

    def filter(self, held: Pair) -> None:
        if not held.is_batch:
            return
        n = len(held.model.sequences)
        kept = self.rng.permutation(n)[: self.rng.integers(1, n + 1)].tolist()
        held.cache.filter(kept)
        held.model.kept(kept)

    def extract(self, held: Pair) -> None:
        if not held.is_batch or len(self.held) >= MOST_CACHES:
            return
        i = int(self.rng.integers(len(held.model.sequences)))
        single = held.cache.extract(i)
        self.held.append(Pair(single, ModelCache.joined([(held.model, i)])))

    def copy(self, held: Pair) -> None:
        if len(self.held) < MOST_CACHES:
            self.held.append(Pair(deepcopy(held.cache), held.model.copy()))

    def reload(self, held: Pair) -> None:
        mx.eval(held.cache.state)
        held.cache = type(held.cache).from_state(list(held.cache.state))

    def check(self, held: Pair) -> None:
        model, cache = held.model, held.cache
        assert cache.n_rows == model.n
        if model.n == 0:
            return
        assert cache.segments.tail_start == model.tail_start or not self.recent
        if held.is_batch:
            assert cache.left_padding.tolist() == model.padding
            assert cache.offset.tolist() == [len(s.ids) for s in model.sequences]
        self.check_rows(cache.keys_and_values(), model, model, 0)

    def check_rows(self, got, model: ModelCache, after: ModelCache, n_new: int) -> None:
        """Each sequence's rows, but for the ``n_new`` newest, are the model's."""
        got = [np.array(x) for x in got]
        for b, (padding, wanted) in enumerate(zip(after.padding, model.rows(self.table))):
            for x, y in zip(got, wanted):
                assert x.shape[2] == after.n
                rows = x[b, :, padding : after.n - n_new]
                assert rows.shape == y.shape
                np.testing.assert_allclose(rows, y, rtol=0, atol=ATOL)

    def new_cache(self, _: Pair) -> None:
        if len(self.held) < MOST_CACHES:
            self.held.append(self.new())


def run(seed: int) -> None:
    sequence = Run(seed)
    try:
        sequence.go(12)
    except Exception as error:
        error.add_note(f"seed {seed}: {', '.join(sequence.done)}")
        raise


@pytest.mark.parametrize("shard", range(N_SHARDS))
def test_random_operations_keep_every_row_as_the_model_says(shard: int) -> None:
    for seed in range(shard, N_SEQUENCES, N_SHARDS):
        run(seed)
