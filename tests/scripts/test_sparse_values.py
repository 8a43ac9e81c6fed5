"""Shares of V that decode could skip, against loops in the order of the kernel."""

from __future__ import annotations

import mlx.core as mx  # noqa: E402
import numpy as np
import pytest
import sparse_values  # noqa: E402
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from sparse_values import UNITS, running_maximum, scores_of, skippable, tile_step  # noqa: E402
from tiny_models import tiny_model  # noqa: E402

from mlx_turbokv.kernels.assemble import metal_folder  # noqa: E402

TILE, SIMD_GROUPS = 32, 8


def largest(head: np.ndarray, tiles) -> float:
    return max((x for t in tiles for x in head[t * TILE : (t + 1) * TILE]), default=-np.inf)


def tiles_compared(kind: str, tile: int, n_tiles: int, splits: int, step: int) -> list[int]:
    """The tiles whose largest score the weights of ``tile`` are compared with."""
    if kind == "final":
        return list(range(n_tiles))
    n = 1 if kind == "one_split" else splits
    for y in range(n):
        begin, end = n_tiles * y // n, n_tiles * (y + 1) // n
        if not begin <= tile < end:
            continue
        if kind == "split":
            return list(range(begin, end))
        for simd in range(SIMD_GROUPS):
            met = []
            for t in range(begin + simd * step, end, SIMD_GROUPS * step):
                now = [i for i in range(t, t + step) if i < end]
                met += now
                if tile in now:
                    return met
    raise AssertionError(f"no SIMD group takes tile {tile}")


def share_by_loops(head_scores: np.ndarray, kind: str, unit: int, splits: int, step: int) -> float:
    """Of one KV head: [heads, tokens]."""
    n = head_scores.shape[1]
    n_tiles = -(-n // TILE)
    skipped = units = 0
    for first in range(0, n, unit):
        compared = tiles_compared(kind, first // TILE, n_tiles, splits, step)
        units += 1
        skipped += all(
            np.exp(head[i] - largest(head, compared)) < 1e-6
            for head in head_scores for i in range(first, min(first + unit, n))
        )  # fmt: skip
    return skipped / units


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 900),
    heads=st.sampled_from([(1, 1), (2, 3), (1, 5)]),
    splits=st.integers(1, 6),
    spread=st.sampled_from([2.0, 8.0, 30.0]),
    seed=st.integers(0, 2**31),
)
def test_shares_are_those_of_the_loops(n, heads, splits, spread, seed):
    rng = np.random.default_rng(seed)
    loud = np.repeat(rng.standard_normal((*heads, -(-n // 50))), 50, axis=-1)[..., :n]
    scores = spread * (loud + 0.3 * rng.standard_normal((*heads, n)))
    step = tile_step(heads[1])
    found = skippable(scores, splits, step, 1e-6)
    for kind, shares in found.items():
        for unit, share in zip(UNITS, shares.T):
            expected = [share_by_loops(head, kind, unit, splits, step) for head in scores]
            assert share == pytest.approx(expected, abs=1e-12), (kind, unit)


def test_even_weights_are_all_needed_and_one_loud_token_leaves_the_rest():
    scores = np.zeros((1, 2, 320))
    assert not any(shares.any() for shares in skippable(scores, 3, 2, 1e-6).values())
    scores[..., 64] = 20
    tiles = {
        kind: shares[0, UNITS.index(32)] for kind, shares in skippable(scores, 1, 1, 1e-6).items()
    }
    assert tiles["final"] == tiles["split"] == 0.9
    # SIMD group 2 meets the loud token in its first tile, and has no other but tile 10, which is not there
    assert tiles["running"] == tiles["one_split"] == 0


def test_a_simd_group_remembers_its_own_tiles_alone():
    maxima = np.zeros(20)
    maxima[1] = 5
    found = running_maximum(maxima, 1, 1)
    assert np.flatnonzero(found).tolist() == [1, 9, 17]


def test_the_order_is_that_of_the_kernel():
    text = "".join((metal_folder() / name).read_text() for name in ("decode.metal", "attention.h"))
    assert f"DECODE_GROUPS = {SIMD_GROUPS};" in text
    assert "const int first_own = begin + simd_group * STEP;" in text
    assert "constexpr int STRIDE = DECODE_GROUPS * STEP;" in text
    assert "for (int t = first_own; t < end; t += STRIDE)" in text
    assert "return rows <= 4 && v_dim <= 256 ? 2 : 1;" in text and [
        tile_step(g) for g in (4, 5)
    ] == [2, 1]


def test_scores_are_those_of_the_first_layers_queries_and_keys(monkeypatch):
    monkeypatch.setattr(sparse_values, "PREFILL_STEP", 16)
    model = tiny_model("llama")
    window = np.arange(40, dtype=np.int32) % 30 + 1
    found = [
        scores
        for layer, scores in scores_of(model, window, make_prompt_cache(model), [39, 20])
        if layer == 0
    ]
    assert sorted(x.shape[-1] for x in found) == [21, 40]

    block, x = model.layers[0], model.model.embed_tokens(mx.array(window)[None])
    attention, x = block.self_attn, block.input_layernorm(x)
    q, k = (
        np.array(attention.rope(y.reshape(1, 40, n, -1).transpose(0, 2, 1, 3))[0])
        for y, n in ((attention.q_proj(x), attention.n_heads), (attention.k_proj(x), attention.n_kv_heads))
    )  # fmt: skip
    for scores in found:
        n = scores.shape[-1]
        for h in range(attention.n_heads):
            expected = (
                k[h // (attention.n_heads // attention.n_kv_heads), :n]
                @ q[h, n - 1]
                * attention.scale
            )
            of_head = scores.reshape(attention.n_heads, n)[h]
            assert np.allclose(of_head, expected, rtol=1e-4, atol=1e-5)
