"""Packed caches that keep an indexer's keys, against those of mlx-vlm's qwen4_exp."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from q8_simulation import through_q8
from tiny_models import run_session
from tiny_vlm import tiny_language_model
from vision_models import Batches, Whole, greedy_answer, prompt

from mlx_turbokv import attach, make_prompt_cache
from mlx_turbokv.cache import IndexedTurboKVCache, PackedCache
from mlx_turbokv.errors import InputError

pytest.importorskip("mlx_vlm.models.qwen4_exp", reason="the extra vlm is not installed")
pytestmark = pytest.mark.slow

HEADS, HEAD_DIM, INDEX_DIM = 2, 64, 32
N = 8


def packed(**options: Any) -> IndexedTurboKVCache:
    from mlx_turbokv.cache.indexed_batch import IndexedTurboKVCache

    return IndexedTurboKVCache("q8_0", "q8_0", "reference", **options)


def own() -> Any:
    from mlx_vlm.models.qwen4_exp.language import QSAKVCache

    return QSAKVCache()


def feed(caches: list[Any], n: int, seed: int, batch: int = 1, mrope: bool = False) -> None:
    """The same n tokens for each cache, in the order in which the model writes them."""
    keys, values, index = (
        mx.random.normal(shape, key=mx.random.key(100 * seed + i))
        for i, shape in enumerate([(batch, HEADS, n, HEAD_DIM)] * 2 + [(batch, n, INDEX_DIM)])
    )
    for cache in caches:
        start = mx.array(cache.offset).reshape(-1, 1)
        positions = mx.broadcast_to(start + mx.arange(n)[None], (batch, n)).astype(mx.int32)
        if mrope:
            positions = mx.stack([positions, positions + 1, positions + 2])
        cache.update_indexer(index, positions)
        cache.update_and_fetch(keys, values)


def rows_of(cache: Any) -> list[mx.array]:
    """The indexer's keys and positions, and K and V in float32, as the model gets them."""
    n = cache.index_offset if hasattr(cache, "index_offset") else cache.offset
    if isinstance(cache, PackedCache):
        return [*cache.index_rows, *cache.keys_and_values(mx.float32)]
    held = getattr(cache, "kv_cache", cache)
    k, v = held.state[:2]
    return [
        cache.index_keys[:, :n],
        cache.index_position_ids[..., :n],
        through_q8(k),
        through_q8(v),
    ]


def assert_equal(got: Any, expected: Any) -> None:
    assert mx.array_equal(mx.array(got.offset), mx.array(expected.offset))
    padding = getattr(got, "left_padding", mx.zeros((1,), mx.int32))
    seen = mx.arange(got.size())[None] >= padding[:, None]
    for i, (a, b) in enumerate(zip(rows_of(got), rows_of(expected), strict=True)):
        assert a.shape == b.shape
        mask = seen if i == 1 else seen[..., None] if i == 0 else seen[:, None, :, None]
        assert mx.allclose(mx.where(mask, a, 0), mx.where(mask, b, 0), rtol=0, atol=2e-5)


def both(lengths: list[int], **options: Any) -> tuple[list[Any], list[Any]]:
    """Packed caches and mlx-vlm's of sequences of these lengths."""
    pairs = [(packed(), own()) for _ in lengths]
    for seed, (pair, n) in enumerate(zip(pairs, lengths)):
        for first in range(0, n, 19):
            feed(list(pair), min(19, n - first), 7 * seed + first, **options)
    ours, theirs = zip(*pairs)
    return list(ours), list(theirs)


@pytest.mark.parametrize("mrope", [False, True])
@pytest.mark.parametrize("n_trimmed", [0, 1, 33, 70])
def test_cuts_decode_and_trim_keep_what_the_models_own_cache_keeps(n_trimmed, mrope) -> None:
    (ours,), (theirs,) = both([60], mrope=mrope)
    for seed in range(10):
        feed([ours, theirs], 1, 200 + seed, mrope=mrope)
    assert_equal(ours, theirs)
    assert ours.trim(n_trimmed) == theirs.trim(n_trimmed) == n_trimmed
    assert ours.index_offset == ours.offset == 70 - n_trimmed
    feed([ours, theirs], 5, 300, mrope=mrope)
    assert_equal(ours, theirs)


def test_text_after_an_image_takes_its_positions_along() -> None:
    (ours,), (theirs,) = both([9], mrope=True)
    feed([ours, theirs], 3, 50)
    assert_equal(ours, theirs)
    assert ours.index_rows.positions.shape == (3, 1, 12)


def test_trim_and_copies_leave_nothing_of_whole_blocks() -> None:
    (cache,), _ = both([40])
    cache.index_block_keys, cache.index_block_ratio = mx.ones((1, 1, 10, INDEX_DIM)), 4
    other = copy.deepcopy(cache)
    feed([cache], 3, 9)
    assert other.index_offset == other.offset == 40 and other.index_block_ratio == 4
    other.trim(1)
    assert other.index_block_keys is None and other.index_block_ratio is None
    assert cache.index_block_ratio == 4


def test_bytes_are_those_of_both() -> None:
    (cache,), _ = both([40])
    rows = cache.body.nbytes + cache.tail.nbytes
    assert cache.nbytes == rows + 40 * (INDEX_DIM * 4 + 4)


@pytest.mark.parametrize("protected", [{}, {"sink": 32, "recent": 64}])
def test_a_saved_cache_goes_on(tmp_path: Path, protected) -> None:
    cache, path = packed(**protected), str(tmp_path / "cache.safetensors")
    for seed, n in enumerate([170, 1, 5]):
        feed([cache], n, seed, mrope=True)
    save_prompt_cache(path, [cache, packed(**protected)])
    loaded, empty = load_prompt_cache(path)
    assert type(loaded) is type(empty) is IndexedTurboKVCache and empty.empty()
    for seed in range(3):
        feed([cache, loaded], 1, 20 + seed, mrope=True)
    for got, expected in zip(rows_of(loaded), rows_of(cache), strict=True):
        assert mx.array_equal(got, expected)


def test_a_state_whose_indexer_has_other_rows_is_refused() -> None:
    (cache,), _ = both([40])
    *rows, keys, positions = cache.state
    floats, whole = positions.astype(mx.float32), keys.astype(mx.int32)
    pairs = [[keys[:, 1:], positions], [keys, positions[:, 1:]], [None, None], [keys, None]]
    for extra in [*pairs, [keys], [], [keys, floats], [whole, positions]]:
        with pytest.raises(InputError, match="not the state of a IndexedTurboKVCache.*indexer"):
            packed().state = [*rows, *extra]
    assert cache.offset == 40


@pytest.mark.parametrize("mrope", [False, True])
def test_batches_keep_what_mlx_vlms_keep(mrope) -> None:
    ours, theirs = both([40, 23, 71], mrope=mrope)
    batches = [type(caches[0]).merge(caches) for caches in (ours, theirs)]
    feed(batches, 1, 60, batch=3, mrope=mrope)
    assert_equal(*batches)
    for batch in batches:
        batch.filter(mx.array([1, 0]))
    assert_equal(*batches)
    assert batches[0].size() == 41
    more = both([90], mrope=mrope)
    for batch, (cache,) in zip(batches, more):
        batch.extend(type(cache).merge([cache]))
    feed(batches, 1, 61, batch=3, mrope=mrope)
    assert_equal(*batches)
    for batch in batches:
        batch.trim(2)
    for i in range(3):
        assert_equal(*[batch.extract(i) for batch in batches])


def test_right_padding_becomes_left_padding() -> None:
    batches = [cache.to_batch([0, 0]) for cache in (packed(), own())]
    for batch in batches:
        batch.prepare(lengths=[12, 5], right_padding=[0, 7])
    feed(batches, 12, 3, batch=2)
    for batch in batches:
        batch.finalize()
    assert_equal(*batches)
    feed(batches, 1, 4, batch=2)
    assert_equal(*batches)


def test_a_batch_joins_one_that_has_read_nothing() -> None:
    cache, batch = both([20])[0][0], packed().to_batch([0])
    batch.extend(IndexedTurboKVCache.merge([cache]))
    assert batch.offset.tolist() == [0, 20] and batch.index_rows.keys.shape == (2, 20, INDEX_DIM)
    assert mx.array_equal(batch.extract(1).index_rows.keys, cache.index_rows.keys)
    assert batch.extract(0).empty()


def test_padding_that_is_still_to_come_can_be_set() -> None:
    batch = IndexedTurboKVCache.merge(both([20, 4])[0])
    batch.offset = mx.array([15, -3])
    assert batch.left_padding.tolist() == [5, 23]
    batch.left_padding = mx.array([0, 16])
    assert batch.offset.tolist() == [20, 4]


def test_max_kv_size_is_refused() -> None:
    model = tiny_language_model("qwen4_exp")
    with pytest.raises(InputError, match="max_kv_size 64 cannot be used with a model whose index"):
        make_prompt_cache(model, "turbo4", "turbo3", max_kv_size=64)


def test_f16_layers_keep_mlx_vlms_cache() -> None:
    model = tiny_language_model("qwen4_exp")
    caches = make_prompt_cache(model, "f16", "f16")
    assert [type(x) for x in caches] == [type(x) for x in type(model).make_cache(model)]


@pytest.mark.parametrize("formats", [("q8_0", "q8_0"), ("turbo4", "turbo3")])
def test_logits_do_not_depend_on_how_a_prompt_is_cut(formats) -> None:
    model = tiny_language_model("qwen4_exp")
    run = partial(make_prompt_cache, model, *formats, sink=0, recent=0)
    whole, cut = (run_session(model, run(), cuts, 6) for cuts in ([37], [5, 1, 17, 14]))
    assert mx.allclose(whole, cut, rtol=0, atol=1e-3 * mx.std(whole).item())


# beyond its budget mlx-vlm's own batch of several lengths attends to all tokens
@pytest.mark.parametrize(("budget", "lengths"), [(8, [40, 40, 40]), (4096, [40, 23, 61])])
@pytest.mark.parametrize("later", [0, 3])
def test_a_batch_answers_as_each_prompt_alone(budget, lengths, later) -> None:
    model = tiny_language_model("qwen4_exp", indexer_budget=budget)
    prompts = [prompt(n, first) for n, first in zip(lengths, (1, 5, 2))]
    attach(model, "turbo4", "turbo3")
    alone = [greedy_answer(model, tokens, N) for tokens in prompts]
    assert Batches(Whole(model)).answers(prompts, N, later=later) == alone


def test_mlx_vlms_prefix_cache_keeps_packed_rows_and_the_indexers_keys() -> None:
    from mlx_vlm.apc import APCManager

    model, tokens, manager = tiny_language_model("qwen4_exp"), prompt(200, 1), APCManager()
    attach(model, "turbo4", "turbo3")
    expected = greedy_answer(model, tokens, N)
    for hits in range(2):
        batches = Batches(Whole(model), apc_manager=manager)
        assert batches.answers([tokens], N) == [expected]
        assert manager.stats.exact_hits == hits
    (entry, *_) = manager._exact_cache.values()
    held = entry.prompt_cache[1]
    assert type(held) is IndexedTurboKVCache and held.index_offset == held.offset == 199
