"""TurboRotatingKVCache against a plain NumPy model of a window, and against RotatingKVCache."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from exact_rows import exact_rows
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from mlx_lm.models.cache import (
    RotatingKVCache,
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
)

from mlx_turbokv import InputError, TurboKVCache, TurboRotatingKVCache
from mlx_turbokv.attention.arrays import Hidden
from mlx_turbokv.attention.hook import with_hidden_columns
from mlx_turbokv.cache.rotating import SLACK_TOKENS, SPARE_TOKENS
from mlx_turbokv.kernels import assemble
from mlx_turbokv.quant.layout import TILE

N_HEADS, K_DIM, V_DIM = 2, 32, 16  # exact_rows are exact in V, the side that is rotated here
FORMATS = [("q8_0", "turbo2"), ("turbo3", "turbo6:32"), ("f16", "turbo4"), ("turbo5", "q8_0")]
# without a rotation, so that rows read back in another shape are the same bits
EXACT = [("q8_0", "q8_0"), ("f16", "q8_0"), ("q8_0", "f16")]
WINDOWS = [(1, 0), (5, 0), (16, 4), (33, 0), (64, 33), (100, 0), (150, 4)]
# attention in float32 against float64 over the same rows, of order 1; one row too many is 1e-2
ATTENTION_TOLERANCE = 1e-4
# what MLX may hold of a step's small arrays for a little longer; a row kept at each step is 48,000
STEP_BYTES = 4096
SCALE = 0.2


def tokens(rng: np.random.Generator, n: int, batch: int = 1) -> tuple[mx.array, mx.array]:
    return tuple(exact_rows(rng, batch, N_HEADS, n, d) for d in (K_DIM, V_DIM))


def dequantised(keys: mx.array, values: mx.array, formats: tuple[str, str]) -> list[np.ndarray]:
    """What tokens become by being stored; the formats' own tests say that it is right."""
    cache = TurboKVCache(*formats, backend="reference")
    return [np.array(x)[0].astype(np.float64) for x in cache.update_and_fetch(keys, values)]


def attention(queries, keys, values, seen) -> np.ndarray:
    """In float64; [H, L, D] queries over [H, n, D] rows of which each sees some."""
    scores = SCALE * queries.astype(np.float64) @ keys.swapaxes(-1, -2)
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


class WindowMachine(RuleBasedStateMachine):
    """Random operations. The model of the cache is the list of all tokens that it was given and
    that were not taken back: a token at position t sees those in (t - max_size, t]."""

    @initialize(
        seed=st.integers(0, 2**16),
        formats=st.sampled_from(EXACT),
        window=st.sampled_from(WINDOWS),
    )
    def start(self, seed: int, formats: tuple[str, str], window: tuple[int, int]) -> None:
        self.rng = np.random.default_rng(seed)
        self.formats = formats
        self.max_size, self.keep = window
        self.cache = TurboRotatingKVCache(*formats, *window, backend="reference")
        self.plain = RotatingKVCache(*window)
        self.keys, self.values = np.zeros((N_HEADS, 0, K_DIM)), np.zeros((N_HEADS, 0, V_DIM))
        self.furthest = 0
        self.trimmed_past_the_window = False

    @property
    def n(self) -> int:
        return self.keys.shape[1]

    @rule(n=st.sampled_from([1, 1, 1, 2, 7, 31, 32, 33, 64, 70, 257]), repeat=st.booleans())
    def update(self, n: int, repeat: bool) -> None:
        for _ in range(30 if n == 1 and repeat else 1):
            self.step(n)

    def step(self, n: int) -> None:
        keys, values = tokens(self.rng, n)
        before = self.n
        mask = self.cache.make_mask(n)
        self.check_mask(mask, n)
        got = self.cache.update_and_fetch(keys, values)
        self.plain.update_and_fetch(keys, values)
        new = dequantised(keys, values, self.formats)
        self.keys = np.concatenate([self.keys, new[0]], 1)
        self.values = np.concatenate([self.values, new[1]], 1)
        position = np.arange(self.n)
        query = np.arange(before, self.n)[:, None]
        seen = (position <= query) & (position > query - self.max_size)
        if n == 1 and self.n > self.max_size:
            seen = (position < self.keep) | (position >= self.n - self.max_size + self.keep)
        elif before > self.max_size - 1:
            # columns that mlx-lm's masks take for the window's first rows
            shift = before - (self.max_size - 1)
            kept = position < self.keep
            seen = np.where(kept, position + shift > query - self.max_size, seen)
            seen &= kept | (position >= shift + self.keep)
        q = self.rng.standard_normal((1, N_HEADS, n, K_DIM)).astype(np.float32)
        output = mx.fast.scaled_dot_product_attention(mx.array(q), *got, scale=SCALE, mask=mask)
        expected = attention(q[0], self.keys, self.values, seen)
        np.testing.assert_allclose(np.array(output)[0], expected, atol=ATTENTION_TOLERANCE)
        self.furthest = max(self.furthest, self.n)
        self.check(n)

    def check_mask(self, mask: mx.array | str | None, n: int) -> None:
        expected = self.plain.make_mask(n)
        if isinstance(expected, mx.array) and not self.trimmed_past_the_window:
            assert mx.array_equal(mask, expected).item()
        elif not isinstance(expected, mx.array):
            assert mask == expected

    def check(self, n: int) -> None:
        """Positions held, what of them is seen, and bytes."""
        cache = self.cache
        assert cache.offset == self.n
        assert cache.size() == min(self.n, self.max_size)
        assert not cache.empty()
        if not self.trimmed_past_the_window:
            assert cache.is_trimmable() == self.plain.is_trimmable()
        n_seen = min(self.n - n, self.max_size - 1) + n
        index = [*range(min(self.keep, n_seen)), *range(self.n - n_seen + self.keep, self.n)]
        index = index if self.n > n_seen else list(range(self.n))
        for got, held in zip(cache.keys_and_values(), (self.keys, self.values)):
            np.testing.assert_array_equal(np.array(got)[0].astype(np.float64), held[:, index])
        row_bytes = cache.layout.k_row_bytes + cache.layout.v_row_bytes
        spare = (TILE if self.keep else 0) + (TILE if self.trimmed_past_the_window else 0)
        most = self.max_size + SLACK_TOKENS + spare + (n if n > 1 else 0)
        assert cache.nbytes <= N_HEADS * row_bytes * most

    @precondition(lambda self: 0 < self.n and self.n < self.max_size)
    @rule(n=st.integers(0, 200))
    def trim(self, n: int) -> None:
        n = min(n, self.n)
        assert self.cache.is_trimmable()
        assert self.cache.trim(n) == n
        self.plain.trim(n)
        self.keys, self.values = self.keys[:, : self.n - n], self.values[:, : self.n - n]
        assert self.cache.offset == self.n

    @precondition(lambda self: self.n >= self.max_size)
    @rule(n=st.integers(0, SPARE_TOKENS), more=st.sampled_from([1, 3]))
    def take_back_after_the_window_has_moved(self, n: int, more: int) -> None:
        """What draft models need; mlx-lm's cache loses its order here and is left aside."""
        n = min(n, self.n, self.n - self.furthest + SPARE_TOKENS)
        assert self.cache.trim(n) == n
        self.keys, self.values = self.keys[:, : self.n - n], self.values[:, : self.n - n]
        self.rebuild_plain()
        self.trimmed_past_the_window = True
        self.step(more)

    def rebuild_plain(self) -> None:
        self.plain = RotatingKVCache(self.max_size, self.keep)
        if self.n:
            zeros = [mx.zeros((1, N_HEADS, self.n, d)) for d in (K_DIM, V_DIM)]
            self.plain.update_and_fetch(*zeros)

    @rule()
    def deepcopy(self) -> None:
        before = self.cache
        self.cache = copy.deepcopy(before)
        before.update_and_fetch(*tokens(self.rng, 3))

    @precondition(lambda self: not self.cache.empty())
    @rule(through_a_file=st.booleans())
    def save_and_load(self, through_a_file: bool) -> None:
        if not through_a_file:
            self.cache = TurboRotatingKVCache.from_state(self.cache.state)
            return
        with tempfile.TemporaryDirectory() as folder:
            name = str(Path(folder) / "cache.safetensors")
            save_prompt_cache(name, [self.cache])
            (loaded,) = load_prompt_cache(name)
            mx.eval(loaded.body, loaded.tail)
        assert type(loaded) is TurboRotatingKVCache
        self.cache = loaded

    @precondition(lambda self: self.keep == 0)
    @rule()
    def into_a_batch_and_out(self) -> None:
        self.cache = TurboRotatingKVCache.merge([self.cache]).extract(0)


WindowMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestWindowOperations = WindowMachine.TestCase


def filled(n: int, window: tuple[int, int] = (16, 0), formats=FORMATS[0], **options):
    cache = TurboRotatingKVCache(*formats, *window, **options)
    if n:
        cache.update_and_fetch(*tokens(np.random.default_rng(n), n))
    return cache


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("options", [{}, {"return_array": True}, {"window_size": 6}])
@pytest.mark.parametrize("n_before", [0, 5, 15, 16, 40])
def test_masks_are_mlx_lms(n: int, options: dict, n_before: int) -> None:
    ours, plain = filled(n_before), RotatingKVCache(16)
    for _ in range(n_before):
        plain.update_and_fetch(*tokens(np.random.default_rng(0), 1))
    a, b = ours.make_mask(n, **options), plain.make_mask(n, **options)
    assert type(a) is type(b)
    if not isinstance(a, mx.array):
        assert a == b
    elif n > 1:
        assert mx.array_equal(a, b).item()
    else:  # their columns are rotated, the newest token at _idx
        assert a.tolist() == mx.roll(b, -(plain._idx % 16) - 1).tolist()


def test_a_wider_window_than_the_caches_hides_nothing_that_is_held() -> None:
    """plamo3 asks for a mask of max_size + 1."""
    for n_before in (0, 3, 15, 16, 60):
        ours, plain = filled(n_before), RotatingKVCache(16)
        if n_before:
            plain.update_and_fetch(*tokens(np.random.default_rng(0), n_before))
        for n in (1, 2, 9):
            a, b = ours.make_mask(n, window_size=17), plain.make_mask(n, window_size=17)
            assert mx.array_equal(a, b).item() if isinstance(b, mx.array) else a == b


def test_hidden_columns_of_every_kind_of_mask() -> None:
    hidden = Hidden(2, 3)
    seen = [True, True, False, False, False, True, True]
    assert with_hidden_columns(None, hidden, 1, 7).tolist() == [seen]
    causal = with_hidden_columns("causal", hidden, 2, 7).tolist()
    assert causal == [[*seen[:6], False], seen]
    given = mx.array([[True, False, True, False]])
    both = [[True, False, False, False, False, True, False]]
    assert with_hidden_columns(given, hidden, 1, 7).tolist() == both
    added = with_hidden_columns(mx.array([1.0, 2.0, 3.0, 4.0]), hidden, 1, 7).tolist()
    assert added == [1.0, 2.0, -np.inf, -np.inf, -np.inf, 3.0, 4.0]


def test_a_long_decode_holds_the_window_and_little_more() -> None:
    """Bytes and MLX's own count, at each of 600 steps after a long prompt."""
    cache = TurboRotatingKVCache("q8_0", "turbo2", 128, backend="reference")
    rng = np.random.default_rng(0)
    cache.update_and_fetch(*tokens(rng, 2048))
    mx.eval(cache.state)
    new = [tokens(rng, 1) for _ in range(600)]
    mx.eval(new)
    warm = copy.deepcopy(cache)  # tables that are made once
    for keys, values in new[:100]:
        warm.update_and_fetch(keys, values)
        mx.eval(warm.state)
    del warm
    gc.collect()  # what other tests left
    most = []
    for keys, values in new:
        cache.update_and_fetch(keys, values)
        mx.eval(cache.state)
        row_bytes = N_HEADS * (cache.layout.k_row_bytes + cache.layout.v_row_bytes)
        assert cache.nbytes <= (128 + SLACK_TOKENS) * row_bytes
        most.append(mx.get_active_memory())
    assert max(most) - min(most[1:]) <= SLACK_TOKENS * row_bytes + STEP_BYTES
    assert cache.offset == 2648 and cache.size() == 128


def test_a_decode_step_writes_no_old_row() -> None:
    """Between flushes the body is the very array it was."""
    cache = filled(300, (128, 0))
    cache.update_and_fetch(*tokens(np.random.default_rng(0), 1))
    bodies = []
    for _ in range(200):
        cache.update_and_fetch(*tokens(np.random.default_rng(0), 1))
        if not bodies or cache.body is not bodies[-1]:
            bodies.append(cache.body)
    assert 3 <= len(bodies) <= 5


def test_trimming_past_the_window_is_refused_where_tokens_are_gone() -> None:
    cache = filled(500)
    assert not can_trim_prompt_cache([cache])
    cache.update_and_fetch(*tokens(np.random.default_rng(0), 1))
    with pytest.raises(ValueError, match="100 tokens cannot be taken back"):
        cache.trim(100)
    assert cache.trim(SPARE_TOKENS) == SPARE_TOKENS and cache.offset == 469


def test_windows_that_make_no_sense() -> None:
    for window in [(0, 0), (-1, 0), (4, 4), (4, -1)]:
        with pytest.raises(InputError, match=f"window of {window[0]} tokens that keeps"):
            TurboRotatingKVCache("q8_0", "turbo2", *window)


def test_state_of_another_version_or_class_is_refused() -> None:
    cache = filled(5)
    with pytest.raises(InputError, match="version 99"):
        TurboRotatingKVCache.from_state([99, *cache.state[1:]])
    for other in (cache.state[:4], TurboKVCache("q8_0", "turbo2").state, [], None):
        with pytest.raises(InputError, match="not the state of a TurboRotatingKVCache"):
            TurboRotatingKVCache.from_state(other)
    grown = TurboKVCache("q8_0", "turbo2", backend="reference")
    grown.update_and_fetch(*tokens(np.random.default_rng(0), 5))
    with pytest.raises(InputError, match="not the state"):
        TurboRotatingKVCache.from_state(grown.state)
    with pytest.raises(InputError, match="not the state"):
        TurboKVCache.from_state(cache.state)


def test_a_saved_window_is_loaded_where_only_the_cache_was_imported(tmp_path: Path) -> None:
    name = str(tmp_path / "cache.safetensors")
    cache = filled(400, (128, 4))
    cache.update_and_fetch(*tokens(np.random.default_rng(0), 1))
    save_prompt_cache(name, [cache, filled(0)])
    mx.savez(str(tmp_path / "rows.npz"), *(mx.array(np.array(x)) for x in cache.keys_and_values()))
    script = """
import sys, numpy as np, mlx_turbokv.cache.single, mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache
cache, empty = load_prompt_cache(sys.argv[1])
rows = mx.load(sys.argv[2])
for index, got in enumerate(cache.keys_and_values()):
    assert mx.array_equal(mx.array(np.array(got)), rows[f"arr_{index}"]).item()
print(cache.offset, cache.size(), cache.keep, empty.empty(), empty.max_size)
"""
    command = [sys.executable, "-c", script, name, str(tmp_path / "rows.npz")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.stdout == "401 128 4 True 16\n", result.stderr


def test_tokens_that_do_not_fit_are_refused_and_change_nothing() -> None:
    cache = filled(400)
    before = cache.nbytes, cache.n_hidden
    with pytest.raises(ValueError, match=r"\[TurboRotatingKVCache\].*do not continue a cache"):
        cache.update_and_fetch(*tokens(np.random.default_rng(0), 1, 2))
    assert (cache.nbytes, cache.n_hidden, cache.offset) == (*before, 400)


@pytest.mark.parametrize("window", [(33, 0), (40, 4)])
def test_kernels_give_what_the_reference_gives(metal_host, monkeypatch, window) -> None:
    """One token by the decode kernel from a first row on, several with a mask."""
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    caches = [filled(100, window, ("q8_0", "turbo4"), backend=b) for b in ("metal", "reference")]
    rng = np.random.default_rng(3)
    for n in (1, 1, 3, 12):
        mask = caches[0].make_mask(n)
        new, outputs = tokens(rng, n), []
        q = mx.array(rng.standard_normal((1, 2 * N_HEADS, n, K_DIM)).astype(np.float32))
        for cache in caches:
            got = cache.update_and_fetch(*new)
            output = mx.fast.scaled_dot_product_attention(q, *got, scale=SCALE, mask=mask)
            outputs.append(np.array(output))
        np.testing.assert_allclose(*outputs, rtol=0, atol=ATTENTION_TOLERANCE)
