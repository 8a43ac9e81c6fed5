"""BatchTurboRotatingKVCache against a plain NumPy model of windows, and BatchRotatingKVCache."""

from __future__ import annotations

import copy
import logging
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from mlx_lm.models.cache import BatchRotatingKVCache, load_prompt_cache, save_prompt_cache
from test_rotating_cache import (
    ATTENTION_TOLERANCE,
    EXACT,
    FORMATS,
    K_DIM,
    N_HEADS,
    SCALE,
    V_DIM,
    attention,
    dequantised,
    tokens,
)

from mlx_turbokv import InputError, TurboRotatingKVCache, log
from mlx_turbokv.cache.rotating import SLACK_TOKENS
from mlx_turbokv.cache.rotating_batch import BatchTurboRotatingKVCache
from mlx_turbokv.kernels import assemble
from mlx_turbokv.quant.layout import TILE

WINDOWS = (1, 16, 33, 70)
NOTHING = (np.zeros((N_HEADS, 0, K_DIM)), np.zeros((N_HEADS, 0, V_DIM)))


class BatchMachine(RuleBasedStateMachine):
    """Random operations. The model is each sequence's list of all its tokens; a token at position
    t sees those in (t - max_size, t], whatever the padding and the other sequences."""

    @initialize(
        seed=st.integers(0, 2**16),
        formats=st.sampled_from(EXACT),
        max_size=st.sampled_from(WINDOWS),
        size=st.integers(1, 3),
    )
    def start(self, seed: int, formats: tuple[str, str], max_size: int, size: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.formats, self.max_size = formats, max_size
        self.cache = self.fresh(size)
        self.rows = [NOTHING] * size
        self.last = 1

    def fresh(self, size: int) -> BatchTurboRotatingKVCache:
        return BatchTurboRotatingKVCache(
            *self.formats, self.max_size, [0] * size, backend="reference"
        )

    @rule(n=st.sampled_from([1, 1, 2, 31, 33, 70, 150]), repeat=st.booleans())
    def update(self, n: int, repeat: bool) -> None:
        for _ in range(30 if n == 1 and repeat else 1):
            self.cache, self.rows = self.step(self.cache, self.rows, [n] * len(self.rows), n)

    @rule(data=st.data(), n=st.integers(2, 90), cut=st.integers(1, 90))
    def update_with_right_padding(self, data: st.DataObject, n: int, cut: int) -> None:
        """A padded prompt, in pieces as mlx-lm's batches take it."""
        size = len(self.rows)
        lengths = data.draw(st.lists(st.integers(1, n), min_size=size, max_size=size))
        lengths[data.draw(st.integers(0, size - 1))] = n
        self.cache.prepare(lengths=lengths, right_padding=[n - length for length in lengths])
        for start in range(0, n, cut):
            width = min(cut, n - start)
            valid = [min(width, max(0, length - start)) for length in lengths]
            self.cache, self.rows = self.step(self.cache, self.rows, valid, width)
        self.cache.finalize()

    def step(self, cache: BatchTurboRotatingKVCache, rows: list, valid: list[int], n: int):
        """``n`` rows for every sequence, of which the first ``valid`` are tokens."""
        keys, values = tokens(self.rng, n, len(rows))
        mask = cache.make_mask(n)
        got = cache.update_and_fetch(keys, values)
        q = self.rng.standard_normal((len(rows), N_HEADS, n, K_DIM)).astype(np.float32)
        output = mx.fast.scaled_dot_product_attention(mx.array(q), *got, scale=SCALE, mask=mask)
        grown = []
        for i, (held, n_valid) in enumerate(zip(rows, valid)):
            new = dequantised(keys[i : i + 1], values[i : i + 1], self.formats)
            k, v = (np.concatenate([a, b[:, :n_valid]], 1) for a, b in zip(held, new))
            query = np.arange(k.shape[1] - n_valid, k.shape[1])[:, None]
            position = np.arange(k.shape[1])
            seen = (position <= query) & (position > query - self.max_size)
            if n_valid:
                expected = attention(q[i, :, :n_valid], k, v, seen)
                found = np.array(output)[i, :, :n_valid]
                np.testing.assert_allclose(found, expected, atol=ATTENTION_TOLERANCE)
            grown.append((k, v))
        self.last = n
        return cache, grown

    @precondition(lambda self: self.cache.is_trimmable())
    @rule(n=st.integers(0, 40))
    def trim(self, n: int) -> None:
        n = min(n, min(k.shape[1] for k, _ in self.rows))
        assert self.cache.trim(n) == n
        self.rows = [tuple(a[:, : a.shape[1] - n] for a in pair) for pair in self.rows]

    @rule(data=st.data())
    def filter(self, data: st.DataObject) -> None:
        size = len(self.rows)
        keep = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=size, unique=True))
        self.cache.filter(mx.array(keep) if data.draw(st.booleans()) else keep)
        self.rows = [self.rows[i] for i in keep]

    @precondition(lambda self: len(self.rows) < 5)
    @rule(size=st.integers(1, 2), n=st.sampled_from([0, 1, 32, 45, 200]), first=st.booleans())
    def extend(self, size: int, n: int, first: bool) -> None:
        other, rows = self.fresh(size), [NOTHING] * size
        for part in [n - n // 3, n // 3]:
            if part:
                other, rows = self.step(other, rows, [part] * size, part)
        if first:
            other.extend(self.cache)
            self.cache, self.rows = other, rows + self.rows
        else:
            self.cache.extend(other)
            self.rows = self.rows + rows

    @rule()
    def extract_and_merge(self) -> None:
        singles = [self.cache.extract(i) for i in range(len(self.rows))]
        for single, (keys, _) in zip(singles, self.rows):
            assert type(single) is TurboRotatingKVCache
            assert single.offset == keys.shape[1]
            assert single.size() == min(single.offset, self.max_size)
        self.cache = TurboRotatingKVCache.merge(singles)

    @rule()
    def one_token_alone(self) -> None:
        """A sequence taken out goes on as it would have alone."""
        single, (k, v) = self.cache.extract(0), self.rows[0]
        keys, values = tokens(self.rng, 1)
        mask = single.make_mask(1)
        got = single.update_and_fetch(keys, values)
        q = self.rng.standard_normal((1, N_HEADS, 1, K_DIM)).astype(np.float32)
        output = mx.fast.scaled_dot_product_attention(mx.array(q), *got, scale=SCALE, mask=mask)
        new = dequantised(keys, values, self.formats)
        k, v = np.concatenate([k, new[0]], 1), np.concatenate([v, new[1]], 1)
        seen = np.arange(k.shape[1]) >= k.shape[1] - self.max_size
        expected = attention(q[0], k, v, seen)
        np.testing.assert_allclose(np.array(output)[0], expected, atol=ATTENTION_TOLERANCE)

    @rule()
    def deepcopy(self) -> None:
        before = self.cache
        self.cache = copy.deepcopy(before)
        before.update_and_fetch(*tokens(self.rng, 3, len(self.rows)))

    @precondition(lambda self: not self.cache.empty())
    @rule()
    def save_and_load(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            name = str(Path(folder) / "cache.safetensors")
            save_prompt_cache(name, [self.cache])
            (loaded,) = load_prompt_cache(name)
            mx.eval(loaded.body, loaded.tail)
        assert type(loaded) is BatchTurboRotatingKVCache
        self.cache = loaded

    @invariant()
    def offsets_and_bytes(self) -> None:
        if not hasattr(self, "cache"):
            return
        cache = self.cache
        assert cache.offset.tolist() == [k.shape[1] for k, _ in self.rows]
        if cache.empty():
            return
        assert min(cache.left_padding.tolist()) >= 0
        row_bytes = cache.layout.k_row_bytes + cache.layout.v_row_bytes
        longest = max(self.last, 200)  # what the longest update of any sequence may have left
        most = self.max_size + SLACK_TOKENS + TILE + longest
        assert cache.nbytes <= len(self.rows) * N_HEADS * row_bytes * most


BatchMachine.TestCase.settings = settings(
    max_examples=30,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestBatchOfWindows = BatchMachine.TestCase


def filled(n: int, formats=FORMATS[0], max_size: int = 16, keep: int = 0) -> TurboRotatingKVCache:
    cache = TurboRotatingKVCache(*formats, max_size, keep, backend="reference")
    cache.update_and_fetch(*tokens(np.random.default_rng(n), n))
    return cache


def test_steady_decoding_holds_the_windows_and_little_more() -> None:
    batch = TurboRotatingKVCache.merge([filled(500), filled(3)])
    rng = np.random.default_rng(0)
    for _ in range(300):
        batch.update_and_fetch(*tokens(rng, 1, 2))
        row_bytes = batch.layout.k_row_bytes + batch.layout.v_row_bytes
        assert batch.nbytes <= 2 * N_HEADS * row_bytes * (16 + SLACK_TOKENS)
    assert batch.offset.tolist() == [800, 303]
    assert batch.left_padding.tolist() == [0, 0]


@pytest.mark.parametrize("n_tokens", [1, 4])
@pytest.mark.parametrize("lengths", [(3, 9), (40, 7), (200, 90)])
def test_masks_hide_what_mlx_lms_hide(lengths: tuple[int, int], n_tokens: int) -> None:
    """Their columns may be rotated, ours are in order: each query sees as many."""
    ours = TurboRotatingKVCache.merge([filled(n) for n in lengths])
    padding = [max(lengths) - n for n in lengths]
    theirs = BatchRotatingKVCache(16, padding)
    theirs.update_and_fetch(*tokens(np.random.default_rng(0), max(lengths), 2))
    for _ in range(20):
        mask, expected = ours.make_mask(n_tokens), np.array(theirs.make_mask(n_tokens))
        rows = tokens(np.random.default_rng(1), n_tokens, 2)
        shape = ours.update_and_fetch(*rows)[0].shape
        theirs.update_and_fetch(*rows)
        seen = np.ones((2, 1, n_tokens, shape[2]), bool) if mask is None else np.array(mask)
        assert seen.shape[-1] == shape[2]
        np.testing.assert_array_equal(
            np.broadcast_to(seen, (2, 1, n_tokens, shape[2])).sum(-1), expected.sum(-1)
        )


def test_a_batch_keeps_no_first_tokens_and_says_so(caplog) -> None:

    log._given.clear()
    with caplog.at_level(logging.WARNING, "mlx_turbokv"):
        batch = TurboRotatingKVCache.merge([filled(300, keep=4), filled(9, keep=4)])
        TurboRotatingKVCache.merge([filled(9, keep=4)])
    assert [r.message for r in caplog.records] == [
        "A batch keeps no first tokens: as in mlx-lm, they leave with the window."
    ]
    assert batch.offset.tolist() == [300, 9] and batch.extract(0).keep == 0


def test_caches_that_differ_are_no_batch() -> None:
    with pytest.raises(ValueError, match="different formats"):
        TurboRotatingKVCache.merge([filled(3), filled(3, FORMATS[1])])
    with pytest.raises(ValueError, match="different windows.*16, 20 tokens"):
        TurboRotatingKVCache.merge([filled(3), filled(3, max_size=20)])
    batch = TurboRotatingKVCache.merge([filled(3)])
    with pytest.raises(ValueError, match="different windows"):
        batch.extend(TurboRotatingKVCache.merge([filled(3, max_size=20)]))
    with pytest.raises(ValueError, match="2 sequences"):
        TurboRotatingKVCache.merge([filled(3), filled(4)]).update_and_fetch(
            *tokens(np.random.default_rng(0), 1, 3)
        )


def test_empty_caches_merge_and_take_padding() -> None:
    empty = [TurboRotatingKVCache("q8_0", "turbo2", 16) for _ in range(2)]
    batch = TurboRotatingKVCache.merge(empty)
    assert batch.empty() and batch.nbytes == 0 and batch.batch_size == 2
    batch.prepare(left_padding=[2, 0])
    assert batch.offset.tolist() == [-2, 0]
    batch.update_and_fetch(*tokens(np.random.default_rng(0), 4, 2))
    assert batch.offset.tolist() == [2, 4]
    with pytest.raises(ValueError, match="left padding"):
        batch.prepare(left_padding=[1, 1])
    assert TurboRotatingKVCache.merge(empty).extract(1).empty()


def test_tokens_that_are_gone_are_not_taken_back() -> None:
    batch = TurboRotatingKVCache.merge([filled(500), filled(500)])
    batch.update_and_fetch(*tokens(np.random.default_rng(0), 1, 2))
    assert not batch.is_trimmable()
    with pytest.raises(ValueError, match="100 tokens cannot be taken back"):
        batch.trim(100)
    assert batch.trim(3) == 3 and batch.offset.tolist() == [498, 498]


def test_extracted_caches_hold_on_to_no_batch() -> None:
    batch = TurboRotatingKVCache.merge([filled(2000 + i, max_size=4096) for i in range(8)])
    mx.eval(batch.state)
    whole = batch.nbytes
    single = batch.extract(0)
    mx.synchronize()
    before = mx.get_active_memory()
    del batch
    assert before - mx.get_active_memory() >= 0.9 * whole
    assert single.offset == 2000


def test_state_of_another_version_or_class_is_refused() -> None:
    batch = TurboRotatingKVCache.merge([filled(3)])
    with pytest.raises(InputError, match="version 7"):
        BatchTurboRotatingKVCache.from_state([7, *batch.state[1:]])
    with pytest.raises(InputError, match="version 7"):
        BatchTurboRotatingKVCache.from_state([7, "of another length"])
    for other in (filled(3).state, ["x", 2], []):
        with pytest.raises(InputError, match="not the state"):
            BatchTurboRotatingKVCache.from_state(other)
    with pytest.raises(InputError, match="not the state"):
        TurboRotatingKVCache.from_state(batch.state)


@pytest.mark.parametrize("lengths", [(9, 30), (60, 200)])
def test_decoding_reads_packed_rows_past_padding_and_hidden_rows(
    metal_host, monkeypatch, lengths: tuple[int, int]
) -> None:
    """By the decode kernel, without dequantising; the second batch has hidden rows as well."""
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    batches = []
    for backend in ("metal", "reference"):
        singles = []
        for n in lengths:
            cache = TurboRotatingKVCache("q8_0", "turbo4", 100, backend=backend)
            cache.update_and_fetch(*tokens(np.random.default_rng(n), n))
            singles.append(cache)
        batches.append(TurboRotatingKVCache.merge(singles))
    rng = np.random.default_rng(3)
    for _ in range(2):
        new, outputs = tokens(rng, 1, 2), []
        q = mx.array(rng.standard_normal((2, 2 * N_HEADS, 1, K_DIM)).astype(np.float32))
        for cache in batches:
            mask = cache.make_mask(1)
            assert (lengths[1] > 100) == (cache._n_hidden_next() > 0)
            got = cache.update_and_fetch(*new)
            metal_host.launches.clear()
            output = mx.fast.scaled_dot_product_attention(q, *got, scale=SCALE, mask=mask)
            outputs.append(np.array(output))
            if cache is batches[0]:
                assert ["decode_partial" in x.name for x in metal_host.launches] == [True]
        np.testing.assert_allclose(*outputs, rtol=0, atol=ATTENTION_TOLERANCE)
