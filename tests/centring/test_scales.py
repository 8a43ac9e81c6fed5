"""Scales of pairs of dims, and caches whose keys have them, against plain arithmetic."""

import copy
import json
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from centred_model import HEAD_DIM as MODEL_DIM
from centred_model import centred_model
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

from mlx_turbokv.cache import TurboKVCache, make_prompt_cache
from mlx_turbokv.centring.calibration import SINK_TOKENS, calibrate_keys
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.references import References, load_references, save_references
from mlx_turbokv.centring.rope import RopeFrequencies
from mlx_turbokv.centring.scales import EXPONENT, MOST, PairScales, check_scales
from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate.divergence import Reference
from mlx_turbokv.model.caches import own_caches

DIM, HEADS, N_HEADS = 64, 2, 6
# float32 products and sums in another order, of rows near 1
ROWS_ATOL, ATTENTION_ATOL = 2e-6, 1e-4
# a scale by energies about anchors' mean lengths, and by those about the anchors themselves
SCALES_RTOL = 0.03
TOKENS = np.array([(7 * i * i + 3 * i + 1) % 89 for i in range(150)], np.int32)
ROPES = {
    "split": RopeFrequencies.from_arguments(DIM, DIM, False, 1e4),
    "traditional": RopeFrequencies.from_arguments(DIM, DIM, True, 1e4),
    "partial": RopeFrequencies.from_arguments(DIM, 16, False, 1e4),
}


def a_centre(seed: int = 0, rope: str = "split", scaled: bool = True) -> Centre:
    rng = np.random.default_rng(seed)
    mu = mx.array(rng.standard_normal((HEADS, DIM)).astype(np.float32) * 3)
    scales = np.exp(rng.standard_normal((HEADS, DIM // 2)) / 2).astype(np.float32)
    scales = PairScales(mx.array(scales), ROPES[rope])
    return Centre(mu, ROPES[rope], "test", 1, True, scales if scaled else None)


def tokens(n: int, seed: int = 0, batch: int = 1) -> tuple[mx.array, mx.array]:
    shape = 2, batch, HEADS, n, DIM
    k, v = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return mx.array(k), mx.array(v)


def rows_of(held) -> list[np.ndarray]:
    return [np.array(rows) for rows in held.keys_and_values(mx.float32)]


def a_cache(centre: Centre, sink: int = 0, recent: int = 0) -> TurboKVCache:
    return TurboKVCache("turbo4", "turbo3", "reference", centre, sink, recent)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("protected", [(0, 0), (32, 64)])
def test_rows_are_those_of_scaled_keys(rope, protected):
    """As a cache without scales stores them, if it is given the products."""
    centre = a_centre(rope=rope)
    first, second = ROPES[rope].pairs()
    of_dims = np.empty((HEADS, 1, DIM), np.float32)
    of_dims[:, 0, first] = of_dims[:, 0, second] = np.array(centre.scales.of_pairs)
    plain = Centre(centre.mu, centre.rope, "test", 1, True)
    held, products = a_cache(centre, *protected), a_cache(plain, *protected)
    for seed, n in enumerate((300, 1, 7, 40)):
        k, v = tokens(n, seed)
        held.update_and_fetch(k, v)
        products.update_and_fetch(k * mx.array(of_dims), v)
    expected = rows_of(products)
    found = rows_of(held)
    np.testing.assert_allclose(found[0], expected[0] / of_dims, atol=ROWS_ATOL, rtol=1e-5)
    np.testing.assert_array_equal(found[1], expected[1])


@pytest.mark.parametrize("n_queries", [1, 5, 20])
@pytest.mark.parametrize("protected", [(0, 0), (0, 32), (32, 64)])
def test_attention_reads_keys_as_they_were(n_queries, protected):
    held, n = a_cache(a_centre(), *protected), 320
    k, v = tokens(n)
    held.update_and_fetch(k[:, :, :-n_queries], v[:, :, :-n_queries])
    before = rows_of(held)
    keys, values = held.update_and_fetch(k[:, :, -n_queries:], v[:, :, -n_queries:])
    q = mx.random.normal((1, N_HEADS, n_queries, DIM), key=mx.random.key(3))
    got = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.125, mask="causal")
    k_read, v_read = rows_of(held)
    if protected[1] and n_queries > 8:  # new rows are read as the model made them
        last = np.array(k[:, :, -n_queries:]), np.array(v[:, :, -n_queries:])
        k_read, v_read = (np.concatenate(x, axis=2) for x in zip(before, last))
    k_read, v_read = (np.repeat(x[0].astype(np.float64), 3, 0) for x in (k_read, v_read))
    scores = np.einsum("hqd,hkd->hqk", np.array(q[0], np.float64), k_read) / 8
    hidden = np.arange(n)[None] > np.arange(n - n_queries, n)[:, None]
    scores[:, hidden] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v_read
    assert np.abs(np.array(got[0]) - expected).max() < ATTENTION_ATOL


def test_batches_copies_and_files_keep_the_scales(tmp_path):
    centre, other = a_centre(), a_centre(1)
    caches = [a_cache(centre, 32, 32) for _ in range(2)]
    for i, held in enumerate(caches):
        held.update_and_fetch(*tokens(60 + 90 * i, i))
    batch = TurboKVCache.merge(caches)
    for i, held in enumerate(caches):
        for a, b in zip(rows_of(batch.extract(i)), rows_of(held)):
            np.testing.assert_allclose(a, b, atol=ROWS_ATOL, rtol=1e-5)
    assert copy.deepcopy(caches[0]).centre is centre
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, [caches[1]])
    (loaded,) = load_prompt_cache(file)
    assert loaded.centre == centre
    assert mx.array_equal(loaded.centre.scales.of_pairs, centre.scales.of_pairs).item()
    more = tokens(50, 7)
    for a, b in zip(
        *(rows_of(held) for held in (loaded, caches[1]) if held.update_and_fetch(*more))
    ):
        np.testing.assert_array_equal(a, b)
    scaled_otherwise = Centre(centre.mu, centre.rope, "test", 1, True, other.scales)
    unscaled = Centre(centre.mu, centre.rope, "test", 1, True)
    assert len({centre, scaled_otherwise, unscaled}) == 3
    caches[1].centre = scaled_otherwise
    with pytest.raises(ValueError, match="centred differently"):
        TurboKVCache.merge(caches)


BAD = {
    "zero": mx.zeros((HEADS, DIM // 2)),
    "negative": -mx.ones((HEADS, DIM // 2)),
    "nan": mx.full((HEADS, DIM // 2), float("nan")),
    "infinite": mx.full((HEADS, DIM // 2), float("inf")),
    "too large": mx.full((HEADS, DIM // 2), 2 * MOST),
    "integers": mx.ones((HEADS, DIM // 2), mx.int32),
    "other pairs": mx.ones((HEADS, DIM)),
    "other heads": mx.ones((HEADS + 1, DIM // 2)),
    "flat": mx.ones((DIM,)),
    "a number": 1.0,
}


@pytest.mark.parametrize("scales", BAD.values(), ids=BAD)
def test_wrong_scales_of_a_state_are_refused(scales):
    held = a_cache(a_centre())
    held.update_and_fetch(*tokens(40))
    state = held.state
    state[3] = [*state[3][:7], scales]
    with pytest.raises(InputError, match="not the state of a TurboKVCache"):
        TurboKVCache.from_state(state)


energies = st.lists(st.floats(0, 1e6), min_size=DIM, max_size=DIM).map(lambda x: np.array([x]))


@given(energies, energies, st.sampled_from(sorted(ROPES)))
def test_any_energies_give_scales_that_are_accepted(queries, keys, rope):
    found = PairScales.from_energies(queries, keys, ROPES[rope]).of_pairs
    check_scales(found, "they")
    assert abs(np.log(np.array(found, np.float64)).mean()) < 1e-5


@cache
def model():
    return centred_model()


@cache
def references() -> References:
    return calibrate_keys(model(), np.stack([TOKENS[:120], TOKENS[25:145]]), scale=True)


def test_calibrated_scales_weigh_what_anchors_leave_with_the_queries():
    found = references()
    assert sorted(found.scales) == [0, 1, 2]
    attention, layer = model().layers[0].self_attn, model().layers[0]
    energies = np.zeros((2, 2, MODEL_DIM))  # of queries and keys
    for window in (TOKENS[:120], TOKENS[25:145]):
        x = layer.input_layernorm(model().model.embed_tokens(mx.array(window)))[None]
        q = attention.q_proj(x).reshape(1, len(window), attention.n_heads, -1).swapaxes(1, 2)
        k = attention.k_proj(x).reshape(1, len(window), 2, -1).swapaxes(1, 2)
        (cache,) = make_prompt_cache(model(), "turbo4", "f16", centre=found)[:1]
        centre = Centre(found.means[0], cache.centre.rope, "test")
        left = np.array(attention.rope(k) - centre.rows(0, len(window)), np.float64)
        squares = np.array(attention.rope(q), np.float64).reshape(2, -1, len(window), MODEL_DIM)
        energies[0] += np.square(squares[:, :, SINK_TOKENS:]).mean(axis=(1, 2))
        energies[1] += np.square(left[0, :, SINK_TOKENS:]).mean(axis=1)
    half = MODEL_DIM // 2
    pairs = energies[..., :half] + energies[..., half:]
    expected = (pairs[0] / pairs[1]) ** EXPONENT
    expected /= np.exp(np.log(expected).mean(axis=-1, keepdims=True))
    np.testing.assert_allclose(np.array(found.scales[0]), expected, rtol=SCALES_RTOL)


def test_scales_undo_what_makes_some_pairs_loud():
    """A model that says the same, with a few pairs of keys louder and of queries quieter."""
    loud = centred_model()
    for layer in loud.layers:
        attention, pairs = layer.self_attn, np.ones(MODEL_DIM // 2, np.float32)
        pairs[[1, 6]] = 12
        k = mx.array(np.tile(np.concatenate([pairs, pairs]), attention.n_kv_heads))
        q = mx.array(np.tile(np.concatenate([pairs, pairs]), attention.n_heads))
        attention.k_proj.weight = attention.k_proj.weight * k[:, None]
        attention.k_proj.bias = attention.k_proj.bias * k
        attention.q_proj.weight = attention.q_proj.weight / q[:, None]
        if "bias" in attention.q_proj:
            attention.q_proj.bias = attention.q_proj.bias / q
    tokens = mx.array(TOKENS)[None]
    exact = loud(tokens, cache=own_caches(loud))[0]
    np.testing.assert_allclose(exact, model()(tokens, cache=own_caches(model()))[0], atol=2e-3)
    windows = np.stack([TOKENS[:120], TOKENS[25:145]])
    klds = []
    for scale in (False, True):
        centre = calibrate_keys(loud, windows, scale=scale)
        assert bool(centre.scales) is scale
        options = {"backend": "reference", "centre": centre, "sink": 0, "recent": 0}
        held = make_prompt_cache(loud, "turbo3", "f16", **options)
        reference = Reference(exact, mx.zeros((len(TOKENS),), mx.int32))
        klds.append(reference.kld(loud(tokens, cache=held)[0]).mean())
    assert klds[1] < 0.7 * klds[0]


def test_files_have_version_2_where_there_are_scales(tmp_path):
    found = references()
    save_references(tmp_path / "p", found)
    loaded = load_references(tmp_path / "p", model())
    assert json.loads((tmp_path / "p.keys.json").read_text())["version"] == 2
    assert loaded.scales.keys() == found.scales.keys()
    assert all(mx.array_equal(loaded.scales[i], x).item() for i, x in found.scales.items())
    some = {0: found.scales[0]}
    save_references(tmp_path / "q", References(found.means, frozenset(), found.model, {}, some))
    centre = load_references(tmp_path / "q", model())
    held = make_prompt_cache(model(), "turbo4", "f16", backend="reference", centre=centre)
    assert [c.centre.scales is None for c in held] == [False, True, True]
    save_references(tmp_path / "r", References(found.means, frozenset(), found.model))
    assert json.loads((tmp_path / "r.keys.json").read_text())["version"] == 1
    assert load_references(tmp_path / "r", model()).scales == {}
    name = json.loads((tmp_path / "p.keys.json").read_text()) | {"version": 1}
    (tmp_path / "p.keys.json").write_text(json.dumps(name))
    with pytest.raises(InputError, match="has other layers"):
        load_references(tmp_path / "p", model())


@pytest.mark.parametrize("scales", [x for x in BAD.values() if isinstance(x, mx.array)])
def test_references_whose_scales_are_wrong_are_refused(tmp_path, scales):
    found = references()
    scales = {**found.scales, 1: scales}
    save_references(tmp_path / "p", References(found.means, frozenset(), found.model, {}, scales))
    with pytest.raises(InputError, match="the scales of layer 1"):
        load_references(tmp_path / "p", model())
