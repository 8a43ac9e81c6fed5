"""What caches read after filter, extract, merge and trim: fixed cases, none left to chance."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from exact_rows import exact_rows
from mlx_lm.models.cache import BatchKVCache

from mlx_turbokv import TurboKVCache, TurboRotatingKVCache
from mlx_turbokv.cache.rotating import SPARE_TOKENS
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.kernels import assemble
from mlx_turbokv.kernels.packed import PaddedCausal
from mlx_turbokv.quant.layout import TILE

N_HEADS, DIM = 2, 64
PAIR = ("turbo4", "turbo6")
SCALE = 0.2
# float32 sums in another order; an output off by one token of dozens is off by 1e-2
ATOL = 1e-4
ROWS_ATOL = 1e-5


def tokens(seed: int, n: int, batch: int = 1) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    return tuple(exact_rows(rng, batch, N_HEADS, n, DIM) for _ in "kv")


def centre() -> Centre:
    mu = mx.random.normal((N_HEADS, DIM), key=mx.random.key(1)) * 4
    return Centre(mu, RopeFrequencies.from_arguments(DIM, DIM, False, 1e4), "test")


def single(n: int, centred: Centre | None = None, backend: str = "reference") -> TurboKVCache:
    cache = TurboKVCache(*PAIR, backend=backend, centre=centred)
    cache.update_and_fetch(*tokens(n, n))
    return cache


def window(n: int, max_size: int, keep: int = 0) -> TurboRotatingKVCache:
    cache = TurboRotatingKVCache(*PAIR, max_size, keep, backend="reference")
    cache.update_and_fetch(*tokens(n, n))
    return cache


def step(cache, keys: mx.array, values: mx.array) -> np.ndarray:
    """Attention of new tokens, whose queries are their keys, by the cache and its own mask."""
    mask = cache.make_mask(keys.shape[2], return_array=False, window_size=None)
    k, v = cache.update_and_fetch(keys, values)
    output = mx.fast.scaled_dot_product_attention(keys, k, v, scale=SCALE, mask=mask)
    return np.array(output)


def rows(cache) -> list[np.ndarray]:
    return [np.array(x) for x in cache.keys_and_values()]


def same_rows(cache, other, n: int) -> None:
    """Whether the newest rows are equal, and there are ``n``; rotations round in any order."""
    for a, b in zip(rows(cache), rows(other)):
        assert a.shape[2] == n
        np.testing.assert_allclose(a, b[:, :, -n:], rtol=0, atol=ROWS_ATOL)


@pytest.mark.parametrize("backend", ["reference", pytest.param("metal", marks=pytest.mark.slow)])
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kept", [[0, 1], [1, 0], [2, 0], [1]])
@pytest.mark.parametrize("n_new", [1, 3])
def test_sequences_begin_where_they_did_after_a_filter(
    metal_host, monkeypatch, backend: str, centred: bool, kept: list[int], n_new: int
) -> None:
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    lengths, centres = (37, 70, 105), centre() if centred else None
    alone = [single(n, centres) for n in lengths]
    batch = TurboKVCache.merge([single(n, centres, backend) for n in lengths])
    first = tokens(1, 1, 3)
    before = step(batch, *first)  # what was worked out for three sequences is not for two
    outputs = [step(cache, *(x[i : i + 1] for x in first)) for i, cache in enumerate(alone)]
    np.testing.assert_allclose(before, np.concatenate(outputs), rtol=0, atol=ATOL)
    assert batch.offset.tolist() == [n + 1 for n in lengths]
    batch.filter(kept)
    longest = max(lengths[i] for i in kept)
    assert batch.left_padding.tolist() == [longest - lengths[i] for i in kept]
    assert batch.offset.tolist() == [lengths[i] + 1 for i in kept]
    for seed in (2, 3):
        new = tokens(seed, n_new, len(kept))
        output = step(batch, *new)
        expected = [step(alone[i], *(x[at : at + 1] for x in new)) for at, i in enumerate(kept)]
        np.testing.assert_allclose(output, np.concatenate(expected), rtol=0, atol=ATOL)


@pytest.mark.parametrize("n_new", [1, 2, 9])
@pytest.mark.parametrize("size", [1, 4, 30, 200])
@pytest.mark.parametrize("lengths", [(9, 40), (40, 9), (3, 3)])
def test_a_batchs_window_masks_are_mlx_lms(lengths, size: int, n_new: int) -> None:
    batch = TurboKVCache.merge([single(n) for n in lengths])
    plain = BatchKVCache([max(lengths) - n for n in lengths])
    plain.update_and_fetch(*tokens(0, max(lengths), 2))
    got = batch.make_mask(n_new, window_size=size, return_array=True)
    want = np.array(plain.make_mask(n_new, window_size=size))
    assert not isinstance(got, PaddedCausal)  # kernels would hide the padding alone
    if got is None:
        assert n_new == 1 and want.all()
        return
    np.testing.assert_array_equal(np.broadcast_to(np.array(got), want.shape), want)


@pytest.mark.parametrize("size", [4, 30])
def test_a_window_hides_what_is_older_from_a_padded_batch(metal_host, monkeypatch, size) -> None:
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    lengths = (9, 40)
    batch = TurboKVCache.merge([single(n, backend="metal") for n in lengths])
    keys, values = tokens(1, 1, 2)
    mask = batch.make_mask(1, window_size=size)
    k, v = batch.update_and_fetch(keys, values)
    output = mx.fast.scaled_dot_product_attention(keys, k, v, scale=SCALE, mask=mask)
    for i, n in enumerate(lengths):
        cache = single(n)
        k, v = cache.update_and_fetch(keys[i : i + 1], values[i : i + 1])
        k, v = (mx.array(np.array(x))[:, :, -min(size, n + 1) :] for x in (k, v))
        expected = mx.fast.scaled_dot_product_attention(keys[i : i + 1], k, v, scale=SCALE)
        # rows are read as half
        np.testing.assert_allclose(
            np.array(output)[i : i + 1], np.array(expected), rtol=0, atol=ATOL
        )


@pytest.mark.parametrize("lengths", [(30, 25), (25, 30), (30, 9), (150, 140), (200, 17), (9, 15)])
def test_what_is_taken_out_of_a_rotating_batch_sees_its_window(lengths) -> None:
    """Rows that the window has passed stay hidden, counted from each sequence's own first row."""
    batch = TurboRotatingKVCache.merge([window(n, 16) for n in lengths])
    for i, n in enumerate(lengths):
        alone, taken = window(n, 16), batch.extract(i)
        assert taken.offset == n
        same_rows(taken, alone, min(n, 16))
        new = tokens(7, 1)
        np.testing.assert_allclose(step(taken, *new), step(alone, *new), rtol=0, atol=ATOL)
    new = tokens(8, 1, 2)  # with rows hidden by an update
    step(batch, *new)
    for i, n in enumerate(lengths):
        alone, taken = window(n, 16), batch.extract(i)
        step(alone, *(x[i : i + 1] for x in new))
        assert taken.offset == n + 1
        same_rows(taken, alone, min(n + 1, 16))


@pytest.mark.parametrize("lengths", [(30, 25), (25, 30), (30, 9), (150, 140), (200, 17)])
def test_a_rotating_batch_of_fewer_hides_what_each_window_has_passed(lengths) -> None:
    """Rows that leave at the front with padding are no longer counted as hidden."""
    for i, n in enumerate(lengths):
        batch = TurboRotatingKVCache.merge([window(n, 16) for n in lengths])
        batch.filter([i])
        same_rows(batch, window(n, 16), min(n, 16))
        same_rows(batch.extract(0), window(n, 16), min(n, 16))


@pytest.mark.parametrize("lengths", [(10, 300), (300, 300), (17, 40), (300, 4)])
@pytest.mark.parametrize("keep", [1, 4, 15])
def test_kept_tokens_leave_a_batch_with_the_window(lengths, keep: int) -> None:
    """A token sees the last 16, whatever the cache that it came from had kept."""
    caches = [window(n, 16, keep) for n in lengths]
    for cache in caches:  # tokens one by one, until tiles between kept ones and window are gone
        for i in range(40):
            cache.update_and_fetch(*tokens(1000 + i, 1))
    assert any(cache.n_dropped for cache in caches) or max(lengths) < 100
    batch = TurboRotatingKVCache.merge(caches)
    assert batch.offset.tolist() == [n + 40 for n in lengths]
    bare = [window(n, 16) for n in lengths]
    for cache in bare:
        for i in range(40):
            cache.update_and_fetch(*tokens(1000 + i, 1))
    for seed in (1, 2):
        new = tokens(seed, 1, 2)
        expected = [step(cache, *(x[i : i + 1] for x in new)) for i, cache in enumerate(bare)]
        np.testing.assert_allclose(step(batch, *new), np.concatenate(expected), rtol=0, atol=ATOL)
    for i, cache in enumerate(bare):
        same_rows(batch.extract(i), cache, 16)


@pytest.mark.parametrize("keep", [1, 4, 15])
def test_what_a_batch_takes_back_never_reaches_the_kept_tokens(keep: int) -> None:
    """As many tokens as it allows: the window before them is whole."""
    k, v = tokens(0, 340)
    cache = TurboRotatingKVCache(*PAIR, 16, keep, backend="reference")
    for start, stop in ((0, 300), *((i, i + 1) for i in range(300, 340))):
        cache.update_and_fetch(k[:, :, start:stop], v[:, :, start:stop])
    assert cache.n_dropped
    batch = TurboRotatingKVCache.merge([cache, cache])
    n = batch.n_rows - 15
    with pytest.raises(ValueError, match="cannot be taken back"):
        batch.trim(n + 1)
    assert batch.trim(n) == n and batch.offset.tolist() == [340 - n] * 2
    bare = TurboRotatingKVCache(*PAIR, 16, backend="reference")
    bare.update_and_fetch(k[:, :, : 340 - n], v[:, :, : 340 - n])
    new = tokens(5, 1)
    expected = step(bare, *new)
    output = step(batch, *(mx.repeat(x, 2, axis=0) for x in new))
    for found in output:
        np.testing.assert_allclose(found, expected[0], rtol=0, atol=ATOL)


@pytest.mark.parametrize("keep", [1, 4, 15])
def test_a_window_takes_back_as_many_tokens_as_leave_it_whole(keep: int) -> None:
    """Rows between the kept tokens and the next tile are gone, though they are held."""
    k, v = tokens(0, 340)
    cache = TurboRotatingKVCache(*PAIR, 16, keep, backend="reference")
    for start, stop in ((0, 300), *((i, i + 1) for i in range(300, 340))):
        cache.update_and_fetch(k[:, :, start:stop], v[:, :, start:stop])
    assert cache.n_dropped
    n = cache.n_rows - (TILE - keep) - 15  # the last 15, the kept ones among them
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.trim(n + 1)
    assert cache.trim(n) == n and cache.offset == 340 - n
    few = TurboRotatingKVCache(*PAIR, 16, keep, backend="reference")
    few.update_and_fetch(k[:, :, : 340 - n], v[:, :, : 340 - n])
    for seed in (5, 6, 7):
        new = tokens(seed, 1)
        np.testing.assert_allclose(step(cache, *new), step(few, *new), rtol=0, atol=ATOL)


def test_positions_go_on_where_a_window_of_one_is_taken_back_whole() -> None:
    k, v = tokens(0, 340)
    cache = TurboRotatingKVCache(*PAIR, 1, backend="reference")
    for start, stop in ((0, 300), *((i, i + 1) for i in range(300, 340))):
        cache.update_and_fetch(k[:, :, start:stop], v[:, :, start:stop])
    n = cache.n_rows
    assert cache.n_dropped and cache.trim(n) == n and cache.offset == 340 - n
    new = tokens(5, 1)
    alone = TurboRotatingKVCache(*PAIR, 1, backend="reference")
    np.testing.assert_allclose(step(cache, *new), step(alone, *new), rtol=0, atol=ATOL)
    assert cache.offset == 341 - n


def remaining(cache, n: int, kept: mx.array, new: tuple, kind) -> None:
    """A trimmed cache reads, and goes on, as one that never had more."""
    few = kind()
    few.update_and_fetch(*kept)
    same_rows(cache, few, n)
    np.testing.assert_allclose(step(cache, *new), step(few, *new), rtol=0, atol=ATOL)
    same_rows(cache, few, n + new[0].shape[2])


LEFT = [599, 576, 575, 545, 544, 543, 512, 320, 300, 288, 287, 257, 256, 33, 32, 31, 1]


@pytest.mark.parametrize("n_left", LEFT)
@pytest.mark.parametrize("n_new", [1, 40, 300])
def test_trimming_into_the_body_leaves_the_rest(n_left: int, n_new: int) -> None:
    k, v = tokens(0, 600)
    cache = TurboKVCache(*PAIR, backend="reference")
    cache.update_and_fetch(k[:, :, :550], v[:, :, :550])
    cache.update_and_fetch(k[:, :, 550:], v[:, :, 550:])
    assert cache.n_body > 500 and cache.n_tail > 0
    assert cache.trim(600 - n_left) == 600 - n_left and cache.offset == n_left
    kept = k[:, :, :n_left], v[:, :, :n_left]
    remaining(cache, n_left, kept, tokens(9, n_new), lambda: TurboKVCache(*PAIR))


@pytest.mark.parametrize("n_left", [127, 97, 96, 95, 64, 33, 32, 31, 1])
def test_trimming_a_batch_into_the_body_leaves_the_rest(n_left: int) -> None:
    k, v = tokens(0, 130, 2)
    batch = TurboKVCache.merge([TurboKVCache(*PAIR, backend="reference") for _ in range(2)])
    batch.update_and_fetch(k[:, :, :100], v[:, :, :100])
    batch.filter([0, 1])
    batch = TurboKVCache.merge([batch.extract(i) for i in range(2)])  # whole tiles are a body now
    assert batch.n_body == 96
    batch.update_and_fetch(k[:, :, 100:], v[:, :, 100:])
    batch.trim(130 - n_left)
    kept = k[:, :, :n_left], v[:, :, :n_left]

    def fresh():
        return TurboKVCache.merge([TurboKVCache(*PAIR, backend="reference") for _ in range(2)])

    remaining(batch, n_left, kept, tokens(9, 5, 2), fresh)


@pytest.mark.parametrize("n_taken", [1, 8, 31, SPARE_TOKENS])
@pytest.mark.parametrize("n", [96, 110, 127, 128, 129, 160])
def test_a_window_that_is_taken_back_into_its_body_is_whole(n: int, n_taken: int) -> None:
    cache, k, v = TurboRotatingKVCache(*PAIR, 40, backend="reference"), *tokens(0, 200)
    for i in range(0, n, 8):
        cache.update_and_fetch(k[:, :, i : min(n, i + 8)], v[:, :, i : min(n, i + 8)])
    cache.trim(n_taken)
    left = n - n_taken
    assert cache.offset == left
    few = TurboRotatingKVCache(*PAIR, 40, backend="reference")
    few.update_and_fetch(k[:, :, :left], v[:, :, :left])
    new = tokens(9, 3)
    np.testing.assert_allclose(step(cache, *new), step(few, *new), rtol=0, atol=ATOL)
    same_rows(cache, few, 39 + 3)
