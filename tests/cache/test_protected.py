"""Protected tokens: what models see, states and files, sizes, and what is refused."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from segment_model import ATOL, ModelCache, tokens
from tiny_models import tiny_model

from mlx_turbokv import InputError, TurboKVCache, attach, make_prompt_cache
from mlx_turbokv.cache import BatchTurboKVCache
from mlx_turbokv.cache.summary import summarize
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.kernels import assemble
from mlx_turbokv.policy.protection import LEAVE_TOGETHER, Protection
from mlx_turbokv.quant.layout import TILE

PAIR = ("turbo4", "turbo2")
SINK, RECENT = 32, 64
PROTECTED = {"sink": SINK, "recent": RECENT}
OPTIONS = {"k": "turbo4", "v": "turbo3", "backend": "reference"}
HEADS, WIDE = 2, 64
# rows of many queries are half on their way through MLX's attention
THROUGH_KERNELS = 4e-3
OTHER_CODES = 5e-3


def rows(seed: int, n: int, batch: int = 1, dim: int = WIDE) -> tuple[mx.array, mx.array]:
    rng = np.random.default_rng(seed)
    k, v = (mx.array(rng.standard_normal((batch, HEADS, n, dim)).astype(np.float32)) for _ in "kv")
    return k, v


def centre_of_keys() -> Centre:
    mu = mx.random.normal((HEADS, WIDE), key=mx.random.key(1)) * 4
    rope = RopeFrequencies.from_arguments(WIDE, WIDE, False, 1e4)
    return Centre(mu, rope, "test", first_key_uncentred=True)


def single(n: int, centre: Centre | None = None, **options) -> TurboKVCache:
    cache = TurboKVCache(*PAIR, "reference", centre, **{**PROTECTED, **options})
    cache.update_and_fetch(*rows(n, n))
    return cache


def step(cache, keys: mx.array, values: mx.array) -> np.ndarray:
    """Attention of new tokens by the cache and its own mask."""
    mask = cache.make_mask(keys.shape[2], return_array=False, window_size=None)
    k, v = cache.update_and_fetch(keys, values)
    return np.array(mx.fast.scaled_dot_product_attention(keys, k, v, scale=0.2, mask=mask))


def held(cache) -> list[np.ndarray]:
    return [np.array(x) for x in cache.keys_and_values()]


@pytest.mark.parametrize("n_queries", range(1, 9))
@pytest.mark.parametrize("n", [20, 188, 191, 250])
def test_few_queries_read_all_segments_as_they_are_stored(n: int, n_queries: int) -> None:
    """Across the border where tiles leave, with an empty body, and with first tokens alone."""
    table = tokens(PAIR, False)
    model, ids = ModelCache(SINK, RECENT), np.random.default_rng(n).integers(250, size=n).tolist()
    cache = TurboKVCache(*PAIR, "reference", **PROTECTED)
    for part in (ids[:-n_queries], ids[-n_queries:]):
        model.update([part])
        queries = table.rows([part])[0]
        if part is ids:
            break
        output = step(cache, *table.rows([part]))
    (keys, values), length = model.rows(table)[0], len(ids)
    scores = np.array(queries, np.float64)[0] @ keys.swapaxes(-1, -2) * 0.2
    seen = np.arange(length) <= np.arange(length - n_queries, length)[:, None]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ values
    np.testing.assert_allclose(output[0], expected, rtol=0, atol=ATOL)


def test_a_chunk_is_read_as_the_model_made_it_and_older_rows_as_they_were_stored() -> None:
    cache = single(300)
    before, new = held(cache), rows(1, 200)
    got = [np.array(x) for x in cache.update_and_fetch(*new)]
    for x, old, fresh in zip(got, before, new):
        np.testing.assert_array_equal(x[:, :, :300], old)
        np.testing.assert_array_equal(x[:, :, 300:], np.array(fresh))


@pytest.mark.parametrize("recent", [0, 128])
def test_logits_of_a_prompt_are_those_without_a_cache(recent: int) -> None:
    model = tiny_model("llama")
    ids = mx.array(np.random.default_rng(0).integers(0, 50, size=(1, 400)))
    caches = make_prompt_cache(model, **OPTIONS, sink=0, recent=recent)
    error = np.abs(np.array(model(ids, cache=caches)) - np.array(model(ids))).max()
    assert (error < 1e-5) == (recent > 0)


def test_without_recent_tokens_the_cut_of_a_prompt_changes_nothing() -> None:
    whole = single(600, recent=0)
    parts = TurboKVCache(*PAIR, "reference", sink=SINK, recent=0)
    keys, values = rows(600, 600)
    for first, last in ((0, 7), (7, 8), (8, 300), (300, 600)):
        parts.update_and_fetch(keys[:, :, first:last], values[:, :, first:last])
    for x, y in zip(held(whole), held(parts)):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [(37, 150, 140), (300, 500, 301), (500, 20, 31)])
@pytest.mark.parametrize("n_new", [1, 3, 12])
def test_centred_sequences_of_a_batch_read_what_they_read_alone(lengths, n_new: int) -> None:
    """Positions of first tokens count from where each sequence begins.

    As long as no tiles leave: they leave a batch together.
    """
    centre = centre_of_keys()
    alone = [single(n, centre) for n in lengths]
    batch = TurboKVCache.merge([single(n, centre) for n in lengths])
    assert isinstance(batch, BatchTurboKVCache)
    for cache, x in zip(alone, (batch.extract(i) for i in range(3))):
        for a, b in zip(held(cache), held(x)):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    for seed in range(3):
        new = rows(seed, n_new, 3)
        output = step(batch, *new)
        expected = [step(cache, *(x[i : i + 1] for x in new)) for i, cache in enumerate(alone)]
        np.testing.assert_allclose(output, np.concatenate(expected), rtol=0, atol=1e-3)


def test_rows_of_a_sequence_that_is_coarse_to_its_end_stay_beside_a_finer_one() -> None:
    """One sequence was trimmed into its body; the other's rows there are still fine."""
    table = tokens(PAIR, False)
    rng = np.random.default_rng(3)
    pairs = []
    for n, n_trimmed in ((600, 100), (500, 0)):
        cache, model = TurboKVCache(*PAIR, "reference", **PROTECTED), ModelCache(SINK, RECENT)
        ids = rng.integers(len(table.k), size=(1, n)).tolist()
        cache.update_and_fetch(*table.rows(ids))
        model.update(ids)
        cache.trim(n_trimmed)
        model.trim(n_trimmed)
        pairs.append((cache, model))
    batch = TurboKVCache.merge([cache for cache, _ in pairs])
    model = ModelCache.joined([(model, 0) for _, model in pairs])
    n_bodies = set()
    for _ in range(150):
        ids = rng.integers(len(table.k), size=(2, 1)).tolist()
        batch.update_and_fetch(*table.rows(ids))
        model.update(ids)
        n_bodies.add((batch.n_body, batch.segments.tail_start))
        for b, wanted in enumerate(model.rows(table)):
            for x, y in zip(held(batch), wanted):
                np.testing.assert_allclose(x[b], y, rtol=0, atol=ATOL)
    assert (512, 416) in n_bodies  # the body goes on beyond what had left
    assert max(n_bodies) > (512, 512)


def test_a_step_writes_the_tail_alone_and_tiles_leave_together() -> None:
    cache = single(700)
    bodies, sinks = [], []
    for i in range(3 * LEAVE_TOGETHER):
        cache.update_and_fetch(*rows(i, 1))
        bodies.append(cache.body)
        sinks.append(cache.segments.sink)
        assert RECENT <= cache.n_tail < RECENT + LEAVE_TOGETHER + 1
    assert len({id(x) for x in bodies}) <= 4
    assert len({id(x) for x in sinks}) == 1


@pytest.mark.parametrize("n_new", [2048, 400, 320])
def test_new_rows_are_packed_without_a_copy_of_a_part(monkeypatch, n_new: int) -> None:
    cache = single(700, recent=160)
    given, pack = [], cache._pack_rows

    def noted(keys, values, *arguments, part):
        given.append((id(keys), id(values), keys.shape[2], part))
        return pack(keys, values, *arguments, part=part)

    monkeypatch.setattr(cache, "_pack_rows", noted)
    cache.update_and_fetch(*rows(1, n_new))
    n_coarse = cache.n_body - 700
    assert [part for *_, part in given] == [(0, n_coarse), (n_coarse, n_new)]
    assert given[0][:-1] == given[1][:-1] and given[0][2] == n_new
    assert cache.n_body == cache.body.shape[2] * TILE == cache.segments.tail_start
    assert cache.n_tail == n_new - n_coarse >= 160


@pytest.mark.parametrize("n", [5, 300])
@pytest.mark.parametrize("batch", [False, True])
def test_a_saved_cache_goes_on(tmp_path: Path, n: int, batch: bool) -> None:
    cache = TurboKVCache.merge([single(n), single(n + 7)]) if batch else single(n)
    save_prompt_cache(str(tmp_path / "cache.safetensors"), [cache])
    (loaded,) = load_prompt_cache(str(tmp_path / "cache.safetensors"))
    assert loaded.state[0] == 3 and loaded.protection == Protection(SINK, RECENT)
    for seed, length in enumerate((1, 100, 3)):
        new = rows(seed, length, 2 if batch else 1)
        np.testing.assert_array_equal(step(cache, *new), step(loaded, *new))


def test_files_of_unprotected_caches_are_of_the_old_version() -> None:
    cache = single(300, sink=0, recent=0)
    state = cache.state
    assert state[0] == 2 and len(state) == 11
    assert not TurboKVCache.from_state(state).protection


def test_an_empty_protected_cache_is_saved_too() -> None:
    loaded = TurboKVCache.from_state(TurboKVCache(*PAIR, "reference", **PROTECTED).state)
    assert loaded.empty() and loaded.protection == Protection(SINK, RECENT)
    loaded.update_and_fetch(*rows(0, 300))
    np.testing.assert_array_equal(held(loaded)[0], held(_from(rows(0, 300)))[0])


def _from(new: tuple[mx.array, mx.array]) -> TurboKVCache:
    cache = TurboKVCache(*PAIR, "reference", **PROTECTED)
    cache.update_and_fetch(*new)
    return cache


SINK_AT, RECENT_AT, TILES_AT, SUNK_AT, START_AT, END_AT = range(11, 17)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (SINK_AT, 33), (SINK_AT, -32), (SINK_AT, "32"), (SINK_AT, 64),
        (RECENT_AT, 1), (RECENT_AT, None), (RECENT_AT, 0),
        (TILES_AT, mx.zeros((1, HEADS, 1, 3), mx.uint32)), (TILES_AT, "x"),
        (TILES_AT, mx.zeros((2, HEADS, 1, 272), mx.uint32)),
        (SUNK_AT, -1), (SUNK_AT, 10_000), (SUNK_AT, None),
        (START_AT, 1), (START_AT, 100_000), (START_AT, -32), (START_AT, 32),
        (END_AT, mx.array([0, 0])), (END_AT, None), (END_AT, mx.array([10_000])),
        (END_AT, mx.array([3])), (END_AT, mx.array([1.0])),
    ],
)  # fmt: skip
def test_a_state_that_contradicts_itself_is_refused(at: int, value) -> None:
    cache, other = single(500), single(300)
    state = cache.state
    before = held(other)
    with pytest.raises(InputError, match="not the state of a TurboKVCache|not accepted"):
        other.state = [*state[:at], value, *state[at + 1 :]]
    np.testing.assert_array_equal(held(other)[0], before[0])


def test_a_state_cut_short_is_refused() -> None:
    state = single(500).state
    for n in range(1, len(state)):
        with pytest.raises(InputError):
            TurboKVCache.from_state(state[:n])


def test_caches_of_different_protection_are_no_batch() -> None:
    with pytest.raises(ValueError, match="different numbers of protected tokens"):
        TurboKVCache.merge([single(100), single(100, sink=64)])


@pytest.mark.parametrize("value", [1, -32, 33, 1.5, True, 1 << 30])
@pytest.mark.parametrize("name", ["sink", "recent"])
def test_numbers_that_are_no_tiles_are_refused(name: str, value) -> None:
    with pytest.raises(InputError, match=f"{name} {value}.*multiple of 32"):
        TurboKVCache(*PAIR, "reference", **{name: value})
    with pytest.raises(InputError, match=f"{name} {value}.*multiple of 32"):
        make_prompt_cache(tiny_model("llama"), **OPTIONS, **{name: value})


@pytest.mark.slow
@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("recent", [0, RECENT])
def test_kernels_and_the_reference_agree(recent, centred, metal_host, monkeypatch) -> None:
    """A prompt in pieces, tokens until rows leave the newest ones, a trim, and tokens after it."""
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    centre = centre_of_keys() if centred else None
    caches = [TurboKVCache(*PAIR, name, centre, SINK, recent) for name in ("metal", "reference")]
    n_seen = 0
    for n in (200, 100, 1, 8, 160, 5, -90, 1, 33):
        if n < 0:
            assert [cache.trim(-n) for cache in caches] == [-n, -n]
            continue
        new = rows(n_seen, n)
        got, want = (step(cache, *new) for cache in caches)
        np.testing.assert_allclose(got, want, rtol=0, atol=THROUGH_KERNELS)
        n_seen += n
    for x, y in zip(*map(held, caches)):  # a value between two codes may have either
        assert (np.abs(x - y) > THROUGH_KERNELS).mean() < OTHER_CODES


def test_new_values_beside_narrower_keys_stay_as_they_are(metal_host, monkeypatch) -> None:
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    keys, values = rows(3, 40)
    cache = TurboKVCache(*PAIR, "metal", **PROTECTED)
    cache.update_and_fetch(keys.astype(mx.bfloat16), values)
    k, v = cache.update_and_fetch(keys.astype(mx.bfloat16), values)
    assert (k.dtype, v.dtype) == (mx.bfloat16, mx.float32)
    assert np.array_equal(np.array(v)[:, :, 40:], np.array(values))
    got = mx.fast.scaled_dot_product_attention(keys, k, v, scale=0.2, mask="causal")
    want = mx.fast.scaled_dot_product_attention(
        keys, *(mx.array(np.array(x.astype(mx.float32))) for x in (k, v)), scale=0.2, mask="causal"
    )
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=0, atol=THROUGH_KERNELS)


def test_what_a_policy_says_counts_unless_an_argument_does() -> None:
    from mlx_turbokv import Uniform

    model, policy = tiny_model("llama"), Uniform(*PAIR).protecting(32, 128)
    for given, expected in (({}, (32, 128)), ({"sink": 0}, (0, 128)), ({"recent": 32}, (32, 32))):
        caches = make_prompt_cache(model, policy=policy, backend="reference", **given)
        assert {c.protection for c in caches} == {Protection(*expected)}
    attach(model, policy=policy, backend="reference", recent=64)
    assert {c.protection for c in model.make_cache()} == {Protection(32, 64)}


@pytest.mark.parametrize("n", [16, 191, 192, 1000, 4096])
@pytest.mark.parametrize("pair", [("turbo4", "turbo3"), ("q8_0", "turbo2"), ("q8_0", "q8_0")])
def test_bits_count_protected_rows(n: int, pair) -> None:
    cache = TurboKVCache(*pair, "reference", **PROTECTED)
    k, v = (mx.zeros((1, 1, n, WIDE)) for _ in "kv")
    cache.update_and_fetch(k, v)
    coarse, fine = Protection(**PROTECTED).rows_after(n)
    if pair == ("q8_0", "q8_0"):
        coarse, fine = n, 0
    found = summarize([cache]).bits_per_value
    formats = cache.k_format, cache.v_format
    bits = [[x.bits_per_value(WIDE) for x in (fmt, fmt.protected)] for fmt in formats]
    n_read = min(n, fine), n - min(n, fine)
    expected = sum(n_read[0] * b[1] + n_read[1] * b[0] for b in bits) / (2 * n)
    assert found == pytest.approx(expected)
    stored = sum(coarse * b[0] + fine * b[1] for b in bits) * WIDE / 8
    tile = 32 * 2 * WIDE * 17 / 16
    assert stored <= cache.nbytes <= stored + tile


def test_protection_costs_one_per_cent_at_32768_tokens() -> None:
    sizes = []
    for options in ({"sink": 32, "recent": 128}, {}):
        cache = TurboKVCache("turbo4", "turbo3", "reference", **options)
        for _ in range(16):
            cache.update_and_fetch(mx.zeros((1, 1, 2048, 128)), mx.zeros((1, 1, 2048, 128)))
            mx.eval(cache.state)
        sizes.append(cache.nbytes)
    assert sizes[1] < sizes[0] <= 1.01 * sizes[1]
