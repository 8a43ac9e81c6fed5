"""BatchTurboKVCache against mlx-lm's BatchKVCache and a plain NumPy model of packed rows."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from exact_rows import exact_rows
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlx_lm.models.cache import (
    BatchKVCache,
    KVCache,
    load_prompt_cache,
    save_prompt_cache,
)

from mlx_turbokv.cache import TurboKVCache
from mlx_turbokv.cache.batch import BatchTurboKVCache
from mlx_turbokv.errors import InputError
from mlx_turbokv.kernels.reference import pack
from mlx_turbokv.quant.layout import KVLayout
from mlx_turbokv.quant.tiles import tiles_to_rows

N_HEADS, K_DIM, V_DIM = 2, 64, 16  # widths of exact_rows
# rows read back in a product of another shape: float32 sums in another order, of values up to 5
READ_ATOL = 1e-5
FORMATS = [("q8_0", "turbo2"), ("turbo3", "turbo6:32"), ("f16", "turbo4"), ("turbo5", "q8_0")]


def tokens(rng: np.random.Generator, batch: int, n: int) -> tuple[mx.array, mx.array]:
    return tuple(exact_rows(rng, batch, N_HEADS, n, d) for d in (K_DIM, V_DIM))


def rows_of(tiles: mx.array, layout: KVLayout, n: int) -> np.ndarray:
    """Packed rows as bytes; [B, H, n, bytes]."""
    parts = [np.array(part)[:, :, :n] for part in tiles_to_rows(tiles, layout)]
    return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=-1)


def held_rows(cache: TurboKVCache | BatchTurboKVCache) -> np.ndarray:
    """All packed rows of a cache that is not empty."""
    body = [rows_of(cache.body, cache.layout, cache.n_body)] if cache.n_body else []
    tail = [rows_of(cache.tail, cache.layout, cache.n_tail)] if cache.n_tail else []
    return np.concatenate(body + tail, axis=2)


def packed_alone(keys: mx.array, values: mx.array, layout: KVLayout) -> np.ndarray:
    """The packed rows of new tokens, by themselves."""
    return rows_of(pack(keys, values, layout), layout, keys.shape[2])


@dataclass
class Batch:
    """One batch in three forms: ours, mlx-lm's, and each sequence's packed rows in NumPy."""

    packed: BatchTurboKVCache
    plain: BatchKVCache
    rows: list[np.ndarray | None] = field(default_factory=list)

    def update(self, rng: np.random.Generator, n: int, right: list[int] | None = None) -> None:
        keys, values = tokens(rng, len(self.rows), n)
        right = right or [0] * len(self.rows)
        for cache in (self.packed, self.plain):
            cache.prepare(lengths=[n - p for p in right], right_padding=right)
            cache.update_and_fetch(keys, values)
            cache.finalize()
        new = packed_alone(keys, values, self.packed.layout)
        self.rows = [
            row[:, : n - p] if old is None else np.concatenate([old, row[:, : n - p]], axis=1)
            for old, row, p in zip(self.rows, new, right)
        ]

    def check(self) -> None:
        ours, theirs = self.packed, self.plain
        assert ours.size() == theirs.size()
        assert ours.left_padding.tolist() == theirs.left_padding.tolist()
        assert ours.offset.tolist() == theirs.offset.tolist()
        if ours.empty():
            return
        for n in (1, 3):
            mask = ours.make_mask(n, return_array=True)
            expected = np.array(theirs.make_mask(n))
            if mask is None:
                assert n == 1 and expected.all()
            else:
                assert (np.broadcast_to(np.array(mask), expected.shape) == expected).all()
        held, padding = held_rows(ours), ours.left_padding.tolist()
        for at, (start, row) in enumerate(zip(padding, self.rows)):
            wanted = 0 if row is None else row.shape[1]
            assert ours.size() - max(start, 0) == wanted
            if wanted:
                np.testing.assert_array_equal(held[at, :, start:], row)


class BatchMachine(RuleBasedStateMachine):
    """Random operations; every form of the batch must agree after each."""

    @initialize(
        seed=st.integers(0, 2**16), formats=st.sampled_from(FORMATS), size=st.integers(1, 3)
    )
    def start(self, seed: int, formats: tuple[str, str], size: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.formats = formats
        self.batch = self.fresh(size)

    def fresh(self, size: int) -> Batch:
        packed = BatchTurboKVCache(*self.formats, [0] * size, backend="reference")
        return Batch(packed, BatchKVCache([0] * size), [None] * size)

    @rule(n=st.sampled_from([1, 2, 31, 32, 33, 70, 257]))
    def update(self, n: int) -> None:
        self.batch.update(self.rng, n)

    @rule(n=st.integers(2, 70), data=st.data())
    def update_with_right_padding(self, n: int, data: st.DataObject) -> None:
        size = len(self.batch.rows)
        right = data.draw(st.lists(st.integers(0, n - 1), min_size=size, max_size=size))
        right[data.draw(st.integers(0, size - 1))] = 0
        self.batch.update(self.rng, n, right)

    @precondition(lambda self: all(r is not None for r in self.batch.rows))
    @rule(n=st.integers(0, 40))
    def trim(self, n: int) -> None:
        n = min(n, min(r.shape[1] for r in self.batch.rows) - 1)
        assert self.batch.packed.trim(n) == n == self.batch.plain.trim(n)
        self.batch.rows = [row[:, : row.shape[1] - n] for row in self.batch.rows]

    @rule(data=st.data())
    def filter(self, data: st.DataObject) -> None:
        size = len(self.batch.rows)
        keep = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
        as_array = data.draw(st.booleans())
        self.batch.packed.filter(mx.array(keep) if as_array else keep)
        self.batch.plain.filter(keep)
        self.batch.rows = [self.batch.rows[i] for i in keep]

    @precondition(lambda self: len(self.batch.rows) < 5)
    @rule(size=st.integers(1, 2), n=st.sampled_from([0, 1, 32, 45, 300]), first=st.booleans())
    def extend(self, size: int, n: int, first: bool) -> None:
        other = self.fresh(size)
        if n:
            other.update(self.rng, n)
        a, b = (other, self.batch) if first else (self.batch, other)
        a.packed.extend(b.packed)
        a.plain.extend(b.plain)
        self.batch = Batch(a.packed, a.plain, a.rows + b.rows)

    @rule()
    def extract_and_merge(self) -> None:
        singles = [self.batch.packed.extract(i) for i in range(len(self.batch.rows))]
        for single, row in zip(singles, self.batch.rows):
            assert type(single) is TurboKVCache
            assert single.offset == (0 if row is None else row.shape[1])
            if row is not None:
                np.testing.assert_array_equal(held_rows(single)[0], row)
        plain = []
        for i, row in enumerate(self.batch.rows):
            plain.append(KVCache() if row is None else self.batch.plain.extract(i))
        self.batch = Batch(TurboKVCache.merge(singles), KVCache.merge(plain), self.batch.rows)

    @rule()
    def deepcopy(self) -> None:
        before = self.batch
        self.batch = copy.deepcopy(before)
        before.update(self.rng, 3)

    @precondition(lambda self: not self.batch.packed.empty())
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            name = str(Path(folder) / "cache.safetensors")
            save_prompt_cache(name, [self.batch.packed])
            (loaded,) = load_prompt_cache(name)
            mx.eval(loaded.body, loaded.tail)
        assert type(loaded) is BatchTurboKVCache
        self.batch.packed = loaded

    @invariant()
    def all_forms_agree(self) -> None:
        if hasattr(self, "batch"):
            self.batch.check()


BatchMachine.TestCase.settings = settings(
    max_examples=25,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestBatchOperations = BatchMachine.TestCase


def filled(n: int, formats: tuple[str, str] = FORMATS[0], seed: int = 0) -> TurboKVCache:
    cache = TurboKVCache(*formats, backend="reference")
    cache.update_and_fetch(*tokens(np.random.default_rng(seed), 1, n))
    return cache


def test_values_of_a_merged_batch_are_those_of_its_sequences() -> None:
    singles = [filled(n, seed=n) for n in (5, 64, 300)]
    merged = TurboKVCache.merge(singles)
    held = held_rows(merged)
    for i, single in enumerate(singles):
        start = 300 - single.offset
        np.testing.assert_array_equal(held[i, :, start:], held_rows(single)[0])
        for batch, alone in zip(merged.keys_and_values(), single.keys_and_values()):
            np.testing.assert_allclose(
                np.array(batch)[i, :, start:], np.array(alone)[0], rtol=0, atol=READ_ATOL
            )
            assert not np.array(batch)[i, :, :start].any()


def test_merge_of_empty_caches_is_empty_and_takes_padding() -> None:
    empty = [TurboKVCache("q8_0", "turbo2") for _ in range(2)]
    batch = TurboKVCache.merge(empty)
    assert batch.empty() and batch.nbytes == 0 and batch.batch_size == 2
    batch.prepare(left_padding=[2, 0])
    assert batch.offset.tolist() == [-2, 0]
    batch.update_and_fetch(*tokens(np.random.default_rng(0), 2, 4))
    assert batch.offset.tolist() == [2, 4]
    with pytest.raises(ValueError, match="left padding"):
        batch.prepare(left_padding=[1, 1])


def test_caches_of_different_formats_are_no_batch() -> None:
    with pytest.raises(ValueError, match="q8_0/turbo2.*turbo3/turbo6:32|turbo3.*q8_0"):
        TurboKVCache.merge([filled(3), filled(3, FORMATS[1])])
    batch = TurboKVCache.merge([filled(3)])
    with pytest.raises(ValueError, match="different formats"):
        batch.extend(TurboKVCache.merge([filled(3, FORMATS[1])]))


def test_keys_for_another_number_of_sequences_are_refused() -> None:
    batch = BatchTurboKVCache("q8_0", "turbo2", [0, 0])
    with pytest.raises(ValueError, match="2 sequences"):
        batch.update_and_fetch(*tokens(np.random.default_rng(0), 3, 4))


def test_trim_takes_off_everything_and_the_batch_goes_on() -> None:
    batch = TurboKVCache.merge([filled(40), filled(50)])
    assert batch.trim(100) == 50
    assert batch.size() == 0 and batch.offset.tolist() == [-10, 0]
    rng = np.random.default_rng(0)
    batch.update_and_fetch(*tokens(rng, 2, 12))
    assert batch.offset.tolist() == [2, 12]


def test_bytes_are_those_of_the_packed_rows() -> None:
    batch = TurboKVCache.merge([filled(1000), filled(1024)])
    layout = batch.layout
    per_token = 2 * N_HEADS * (layout.k_row_bytes + layout.v_row_bytes)
    assert batch.nbytes == 1024 * per_token


def test_extracted_caches_hold_on_to_no_batch() -> None:
    """A prompt cache that keeps one of many sequences must not keep all their bytes."""
    batch = TurboKVCache.merge([filled(2000 + i, seed=i) for i in range(8)])
    mx.eval(batch.state)
    whole = batch.nbytes
    single = batch.extract(0)
    mx.synchronize()
    before = mx.get_active_memory()
    del batch
    assert before - mx.get_active_memory() >= 0.9 * whole
    assert single.offset == 2000


def test_state_of_another_version_or_class_is_refused() -> None:
    batch = TurboKVCache.merge([filled(3)])
    with pytest.raises(InputError, match="version 7"):
        BatchTurboKVCache.from_state([7, *batch.state[1:]])
    with pytest.raises(InputError, match="version 7"):
        BatchTurboKVCache.from_state([7, "of another length"])
    with pytest.raises(InputError, match="not the state"):
        BatchTurboKVCache.from_state(filled(3).state)
    with pytest.raises(InputError, match="not the state"):
        TurboKVCache.from_state(batch.state)


def test_announced_right_padding_survives_a_copy_and_a_file(tmp_path: Path) -> None:
    batch = BatchTurboKVCache("q8_0", "turbo2", [0, 0])
    batch.prepare(lengths=[2, 4], right_padding=[2, 0])
    batch.update_and_fetch(*tokens(np.random.default_rng(0), 2, 4))
    name = str(tmp_path / "cache.safetensors")
    save_prompt_cache(name, [batch])
    (loaded,) = load_prompt_cache(name)
    for cache in (batch, copy.deepcopy(batch), loaded):
        cache.finalize()
        assert cache.left_padding.tolist() == [2, 0]
        np.testing.assert_array_equal(held_rows(cache), held_rows(batch))


def test_pipeline_models_may_replace_the_newest_array() -> None:
    batch = TurboKVCache.merge([filled(40), filled(64)])
    before = held_rows(batch)
    batch.keys = mx.depends(batch.keys, [mx.zeros(1)])
    np.testing.assert_array_equal(held_rows(batch), before)


def test_a_saved_batch_is_loaded_where_only_the_cache_was_imported(tmp_path: Path) -> None:
    name = str(tmp_path / "cache.safetensors")
    save_prompt_cache(name, [TurboKVCache.merge([filled(40), filled(5)])])
    script = (
        "import sys, mlx_turbokv.cache.single; from mlx_lm.models.cache import load_prompt_cache;"
        "print(load_prompt_cache(sys.argv[1])[0].offset.tolist())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, name], capture_output=True, text=True, check=True
    )
    assert ran.stdout == "[40, 5]\n"
