"""Anchors, and caches whose keys are centred, against plain arithmetic."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from exact_rows import STEPS, exact_rows
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.models.rope_utils import initialize_rope

from mlx_turbokv.cache import TurboKVCache
from mlx_turbokv.cache.batch import BatchTurboKVCache
from mlx_turbokv.centring import centre as centre_module
from mlx_turbokv.centring.centre import BLOCK, Centre, RopeFrequencies, block_means
from mlx_turbokv.centring.rope import recorded_rope
from mlx_turbokv.errors import InputError
from mlx_turbokv.quant.layout import KVLayout

# the table of cosines and sines is half
TABLE_ATOL = 2**-11
# RoPE in float32, whose angles are rounded
ROPE_ATOL = 2e-4
HEAD_DIM = 64

VARIANTS = {
    "plain": dict(dims=64, base=10000.0, traditional=False),
    "traditional": dict(dims=64, base=10000.0, traditional=True),
    "partial": dict(dims=32, base=500.0, traditional=False),
    "partial traditional": dict(dims=16, base=500.0, traditional=True),
    "linear": dict(
        dims=64, base=10000.0, traditional=False, scaling_config={"type": "linear", "factor": 4.0}
    ),
    "llama3": dict(
        dims=64, base=500000.0, traditional=False, max_position_embeddings=4096,
        scaling_config={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 512},
    ),
    "yarn": dict(
        dims=64, base=10000.0, traditional=False, max_position_embeddings=4096,
        scaling_config={"rope_type": "yarn", "factor": 4.0, "mscale": 1.0,
                        "original_max_position_embeddings": 256},
    ),
    "longrope": dict(
        dims=64, base=10000.0, traditional=False, max_position_embeddings=4096,
        scaling_config={"rope_type": "longrope", "short_factor": [1.0] * 32,
                        "long_factor": [1.0 + i / 8 for i in range(32)],
                        "original_max_position_embeddings": 256},
    ),
    "proportional": dict(
        dims=64, base=10000.0, traditional=False,
        scaling_config={"rope_type": "proportional", "partial_rotary_factor": 0.5},
    ),
    "dynamic": dict(
        dims=64, base=10000.0, traditional=False, max_position_embeddings=4096,
        scaling_config={"rope_type": "dynamic", "factor": 2.0},
    ),
    "mrope": dict(
        dims=64, base=10000.0, traditional=False,
        scaling_config={"rope_type": "mrope", "mrope_section": [16, 8, 8]},
    ),
}  # fmt: skip


@pytest.fixture
def coarse_table(monkeypatch):
    """Cosines and sines on a grid: then anchors, and keys less their anchors, are exact, and so
    are the sums of their rotation on any machine (`exact_rows`)."""

    def coarse(rope, n_blocks):
        return (np.round(block_means(rope, n_blocks) * STEPS) / STEPS).astype(np.float16)

    centre_module._table.cache_clear()
    monkeypatch.setattr(centre_module, "block_means", coarse)
    yield
    centre_module._table.cache_clear()


def a_centre(seed=0, n_heads=2, norm=30.0, **rope) -> Centre:
    mu = np.random.default_rng(seed).standard_normal((n_heads, HEAD_DIM)) * norm / 8
    rope = RopeFrequencies.from_arguments(
        HEAD_DIM, rope.pop("dims", 64), rope.pop("traditional", False), 1e4
    )
    return Centre(mx.array((np.round(mu * 4) / 4).astype(np.float32)), rope, "test")


def tokens(n, seed=0, batch=1, centre=None, padding=(0,)):
    """Keys with a mean, at their own positions, and values."""
    k, v = exact_rows(np.random.default_rng(seed), 2, batch, 2, n, HEAD_DIM)
    if centre is not None:
        k = k + centre.rows(0, n, tuple(padding) if any(padding) else None)
    return k, v


def fill(cache, k, v, cuts):
    for start, stop in zip([0, *cuts], [*cuts, k.shape[2]]):
        cache.update_and_fetch(k[:, :, start:stop], v[:, :, start:stop])
    return cache


def rows_of(cache):
    return [mx.array(np.array(rows)) for rows in cache.keys_and_values(mx.float32)]


@pytest.mark.parametrize("name", VARIANTS)
def test_anchors_are_block_means_of_the_models_own_rope(name):
    rope = initialize_rope(**VARIANTS[name])
    mu = mx.array(np.random.default_rng(1).standard_normal((2, HEAD_DIM)).astype(np.float32))
    x = mx.broadcast_to(mu[None, :, None], (1, 2, 4 * BLOCK, HEAD_DIM))
    with recorded_rope() as calls:
        keys = rope(x, offset=96)
        frequencies = calls.frequencies_of(keys, 96)
    assert frequencies is not None and calls.frequencies_of(keys, 97) is None
    at_zero = rope(mu[None, :, None], offset=0)[0, :, 0]  # with RoPE's own factor, if it has one
    centre = Centre(at_zero, frequencies, "test")
    expected = keys.reshape(2, 4, BLOCK, HEAD_DIM).mean(axis=2)
    got = centre.anchors(96 // BLOCK, 4)
    worst = mx.abs(mx.swapaxes(got, 0, 1) - expected).max().item()
    assert worst < 2 * TABLE_ATOL * mx.abs(at_zero).max().item() + ROPE_ATOL


def test_a_slow_pair_is_taken_out_whole_and_a_fast_one_not_at_all():
    rope = RopeFrequencies(2, (1e-6, 2 * np.pi / BLOCK, 0.0, 0.0))
    means = block_means(rope, 3)
    cosines, sines = means[..., 0], means[..., 1]
    assert np.allclose(cosines[:, 0], 1.0, atol=TABLE_ATOL)
    assert np.allclose(means[:, 1], 0.0, atol=1e-6)
    assert np.array_equal(cosines[:, 2:], np.ones((3, 2))) and not sines[:, 2:].any()


def test_the_table_does_not_depend_on_its_length():
    rope = RopeFrequencies.from_arguments(64, 64, False, 1e4)
    assert np.array_equal(block_means(rope, 7), block_means(rope, 700)[:7])


@pytest.mark.parametrize("cuts", [[], [1], [31, 32, 33], [100, 101, 102, 256], list(range(1, 300))])
def test_prompts_cut_anywhere_give_the_same_rows(coarse_table, cuts):
    centre = a_centre()
    k, v = tokens(300, centre=centre)
    whole = fill(TurboKVCache("turbo4", "turbo3", "reference", centre), k, v, [])
    cut = fill(TurboKVCache("turbo4", "turbo3", "reference", centre), k, v, cuts)
    for a, b in zip(rows_of(whole), rows_of(cut)):
        assert mx.array_equal(a, b).item()


def test_centring_stores_what_varies():
    """A mean of norm 300 costs nothing: the error is that of keys without it."""
    centre = a_centre(norm=300.0)
    plain_keys, v = tokens(100)
    k = plain_keys + centre.rows(0, 100)
    centred = rows_of(fill(TurboKVCache("turbo4", "turbo3", "reference", centre), k, v, [50]))[0]
    without = rows_of(fill(TurboKVCache("turbo4", "turbo3", "reference"), plain_keys, v, [50]))[0]
    uncentred = rows_of(fill(TurboKVCache("turbo4", "turbo3", "reference"), k, v, [50]))[0]

    def error(rows, true):
        return mx.square(rows - true).mean().item()

    assert error(centred, k) == pytest.approx(error(without, plain_keys), rel=1e-3)
    assert error(uncentred, k) > 100 * error(centred, k)


def test_trim_crosses_blocks_and_appending_goes_on(coarse_table):
    centre = a_centre()
    k, v = tokens(400, centre=centre)
    cache = fill(TurboKVCache("turbo5", "turbo3", "reference", centre), k, v, [280])
    assert cache.trim(150) == 150
    fill(cache, k[:, :, 250:], v[:, :, 250:], [7])
    whole = fill(TurboKVCache("turbo5", "turbo3", "reference", centre), k, v, [])
    for a, b in zip(rows_of(whole), rows_of(cache)):
        assert mx.array_equal(a, b).item()


def test_copies_share_the_centre():
    centre = a_centre()
    cache = fill(TurboKVCache("turbo4", "turbo3", "reference", centre), *tokens(40), [])
    assert copy.deepcopy(cache).centre is centre


def test_saved_and_loaded_without_the_model(tmp_path):
    centre = a_centre(dims=32, traditional=True)
    k, v = tokens(333, centre=centre)
    cache = fill(TurboKVCache("turbo4", "turbo3", "reference", centre), k, v, [])
    file = str(tmp_path / "cache.safetensors")
    save_prompt_cache(file, [cache, TurboKVCache("q8_0", "turbo2", "reference")])
    loaded, other = load_prompt_cache(file)
    assert loaded.centre == centre and loaded.centre.source == "test" and other.centre is None
    k2, v2 = tokens(50, seed=1)
    for a, b in zip(rows_of(fill(cache, k2, v2, [])), rows_of(fill(loaded, k2, v2, []))):
        assert mx.array_equal(a, b).item()


def test_another_block_size_is_refused():
    cache = fill(TurboKVCache("turbo4", "turbo3", "reference", a_centre()), *tokens(5), [])
    state = cache.state
    state[3] = [2 * BLOCK, *state[3][1:]]
    with pytest.raises(InputError, match="centred in blocks of 64"):
        TurboKVCache.from_state(state)


def same_rows(a: mx.array, b: mx.array) -> bool:
    """The same codes and scales, rotated back in sums of another order."""
    return mx.allclose(a, b, rtol=1e-5, atol=1e-4).item()


def test_each_sequence_of_a_batch_has_its_own_positions(coarse_table):
    centre = a_centre()
    lengths, n = (40, 75, 3), 75
    singles = []
    for i, length in enumerate(lengths):
        k, v = tokens(length, seed=i, centre=centre)
        singles.append(fill(TurboKVCache("turbo4", "turbo3", "reference", centre), k, v, []))
    batch = TurboKVCache.merge(singles)
    assert batch.centre is centre
    k, v = tokens(20, seed=9, batch=3)
    fill(batch, k, v, [1, 2])
    fill_k = [fill(single, k[i : i + 1], v[i : i + 1], []) for i, single in enumerate(singles)]
    for i, single in enumerate(fill_k):
        got = [rows[i : i + 1, :, n - lengths[i] :] for rows in rows_of(batch)]
        for a, b in zip(got, rows_of(single)):
            assert same_rows(a, b)
    batch.filter([2, 0])
    for i, j in enumerate((2, 0)):
        for a, b in zip(rows_of(batch.extract(i)), rows_of(singles[j])):
            assert same_rows(a, b)


def test_right_padding_moves_and_keeps_its_positions(coarse_table):
    centre = a_centre()
    lengths, n = [50, 70], 70
    k, v = tokens(n, batch=2, centre=centre)
    batch = BatchTurboKVCache("turbo4", "turbo3", [0, 0], "reference", centre)
    batch.prepare(lengths=lengths, right_padding=[n - length for length in lengths])
    fill(batch, k, v, [33])
    batch.finalize()
    for i, length in enumerate(lengths):
        single = fill(
            TurboKVCache("turbo4", "turbo3", "reference", centre),
            k[i : i + 1, :, :length], v[i : i + 1, :, :length], [],
        )  # fmt: skip
        for a, b in zip(rows_of(batch.extract(i)), rows_of(single)):
            assert mx.array_equal(a, b).item()


def test_caches_centred_differently_are_not_merged():
    caches = [
        fill(TurboKVCache("turbo4", "turbo3", "reference", c), *tokens(5), [])
        for c in (a_centre(0), a_centre(1))
    ]
    with pytest.raises(ValueError, match="centred differently"):
        TurboKVCache.merge(caches)
    caches[1].centre = None
    with pytest.raises(ValueError, match="centred differently"):
        TurboKVCache.merge(caches)


def test_attention_adds_the_anchors_of_each_block():
    centre = a_centre()
    k, v = tokens(90, centre=centre)
    cache = TurboKVCache("turbo4", "f16", "reference", centre)
    keys, values = cache.update_and_fetch(k, v)
    q = mx.random.normal((1, 4, 5, HEAD_DIM), key=mx.random.key(3))
    got = mx.fast.scaled_dot_product_attention(q, keys, values, scale=0.125, mask="causal")
    k_read, v_read = (np.array(x, np.float64) for x in rows_of(cache))
    scores = np.einsum("hqd,hkd->hqk", np.array(q[0], np.float64), np.repeat(k_read[0], 2, 0)) / 8
    scores[:, np.arange(90)[None] > np.arange(85, 90)[:, None]] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ np.repeat(v_read[0], 2, 0)
    assert np.abs(np.array(got[0]) - expected).max() < 1e-4


def test_only_turbo_keys_are_centred():
    with pytest.raises(InputError, match="q8_0 cannot be centred"):
        TurboKVCache("q8_0", "turbo2", "reference", a_centre())
    with pytest.raises(ValueError, match="does not fit a head of 64"):
        Centre(mx.zeros((2, 32)), RopeFrequencies.none(64), "test")


def test_bytes_of_anchors_are_counted_and_few():
    centre = Centre(
        mx.zeros((8, 128)), RopeFrequencies.from_arguments(128, 128, False, 1e4), "test", 32
    )
    k = mx.zeros((1, 8, 8192, 128), mx.float16)
    cache = TurboKVCache("turbo4", "turbo3", "reference", centre)
    cache.update_and_fetch(k, k)
    plain = TurboKVCache("turbo4", "turbo3", "reference")
    plain.update_and_fetch(k, k)
    extra = cache.nbytes - plain.nbytes
    assert extra == 3 * centre.mu.nbytes + 8192 // BLOCK * 256 // 32
    bits = KVLayout(cache.k_format, cache.v_format, 128, 128).bits_per_value
    assert cache.nbytes < 1.03 * bits * 2 * k.size / 8
