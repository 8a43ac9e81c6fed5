"""Scored tokens of protected caches see what generation would: the protocol of the windows."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from tiny_models import tiny_model

from mlx_turbokv import TurboKVCache
from mlx_turbokv.evaluate.configuration import prepare
from mlx_turbokv.evaluate.first_piece import FirstPiece
from mlx_turbokv.evaluate.windows import batch_logits, first_scored, short_windows
from mlx_turbokv.policy.protection import STEP, Protection

N_CTX = 700


class Counting:
    """A model that notes how many tokens it is given at a time."""

    def __init__(self, model) -> None:
        self.model, self.lengths = model, []

    def __call__(self, tokens: mx.array, cache: list) -> mx.array:
        self.lengths.append(tokens.shape[1])
        return self.model(tokens, cache=cache)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=2)


@pytest.fixture(scope="module")
def windows() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 60, (2, N_CTX)).astype(np.int32)


@pytest.mark.parametrize(
    "name", ["f16/f16", "turbo4/turbo2+0,0", "turbo4/turbo2+32,0", "la-v7", "q8_0/q8_0"]
)
def test_rows_that_are_stored_before_they_are_read_take_one_piece(model, windows, name) -> None:
    counting = Counting(model)
    batch_logits(counting, windows, prepare(model, name, "reference").make_caches())
    assert counting.lengths == [first_scored(N_CTX), N_CTX - first_scored(N_CTX) - 1]


@pytest.mark.parametrize("n", [100, 2048, 32768])
def test_bits_are_those_of_all_rows(model, n: int) -> None:
    plain = prepare(model, "turbo4/turbo3+0,0", "reference")
    config = prepare(model, "turbo4/turbo3", "reference")
    fine = min(n, 160) if n > 256 else n
    for found, coarse in zip(config.bits_at(n), plain.bits_at(n)):
        assert found == pytest.approx((fine * 8.5 + (n - fine) * coarse) / n)
    for name in ("f16/f16", "q8_0/q8_0", "q8_0/f16+32,128"):
        assert prepare(model, name).protection == Protection()


@pytest.mark.parametrize(
    ("n_ctx", "protection"), [(700, (32, 128)), (1500, (64, 32)), (700, (96, 0))]
)
def test_the_rows_left_to_the_formats_are_those_of_a_cache(n_ctx, protection) -> None:
    """Averaged over what the scored tokens of a window read."""
    sink, recent = protection
    cache = TurboKVCache("turbo4", "turbo3", "reference", sink=sink, recent=recent)
    first, shares = first_scored(n_ctx), []

    def append(n: int) -> None:
        rows = mx.zeros((1, 1, n, 64))
        cache.update_and_fetch(rows, rows)

    append(first)
    for start in range(first, n_ctx - 1, STEP):
        shares.append(max(0, cache.segments.tail_start - sink) / start)
        append(min(STEP, n_ctx - 1 - start))
    wanted = sum(shares) / len(shares)
    if not recent:
        wanted = sum((n - sink) / n for n in range(first, n_ctx - 1, STEP)) / len(shares)
    assert Protection(*protection).share_left(first, n_ctx - 1) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("n_ctx", "configs", "said"),
    [
        (512, ["f16/f16", "q8_0/q8_0", "balanced", "la-v7"], "balanced"),
        (128, ["balanced", "turbo4/turbo3+0,0", "turbo3/turbo2"], "balanced, turbo3/turbo2"),
        (2048, ["balanced"], None),
        (512, ["balanced+0,0", "la-v7", "f16/f16"], None),
    ],
)
def test_windows_that_measure_mostly_protected_rows_are_told(model, n_ctx, configs, said) -> None:
    protected = {name: prepare(model, name, "reference").protection for name in configs}
    found = short_windows(protected, n_ctx)
    assert (found is None) == (said is None)
    if found is not None:
        assert f"Windows of {n_ctx} tokens" in found and found.endswith(
            "-c 2048 measures the formats."
        )
        assert f" in {said}: " in found


@pytest.mark.parametrize(
    ("n_ctx", "protection", "longer"),
    [(2048, (32, 1536), 8192), (1024, (32, 4096), 16384), (4096, (32, 2048), 8192)],
)
def test_the_windows_that_are_named_measure_the_formats(n_ctx, protection, longer) -> None:
    found = {"a": Protection(*protection), "b": Protection()}
    assert short_windows(found, n_ctx).endswith(f"in a: -c {longer} measures the formats.")
    assert short_windows(found, longer) is None and short_windows(found, longer // 2) is not None


def test_protected_caches_take_steps_of_32_tokens(model, windows) -> None:
    counting = Counting(model)
    config = prepare(model, "turbo4/turbo2+32,64", "reference")
    logits = batch_logits(counting, windows, config.make_caches())
    n = N_CTX - first_scored(N_CTX) - 1
    assert counting.lengths == [first_scored(N_CTX), *[32] * (n // 32), n % 32]
    assert logits.shape[:2] == (2, n)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_first_piece_is_computed_once_where_all_read_it_as_it_was_made(windows, kind) -> None:
    """A model with sliding windows, whose caches are of another kind, runs each time."""
    model = tiny_model(kind, num_hidden_layers=2)
    counting, first = Counting(model), first_scored(N_CTX)
    shared = FirstPiece(counting)
    names = ["f16/f16", "turbo4/turbo2+32,64", "f16/turbo3+0,32", "turbo4/turbo2+0,0"]
    names.append("q8_0/turbo6+0,64")
    for name in names:
        config = prepare(model, name, "reference")
        found = batch_logits(counting, windows, config.make_caches(), shared)
        alone = batch_logits(model, windows, config.make_caches())
        assert mx.array_equal(found, alone).item(), name
    assert counting.lengths.count(first) == (2 if kind == "llama" else len(names))


def test_the_figures_are_nearer_to_generations_than_to_those_of_one_piece(model, windows) -> None:
    """Token by token, as generation goes; what one piece would hide is most of the difference."""
    exact = model(mx.array(windows[:, :-1]))[:, first_scored(N_CTX) :]
    config = prepare(model, "turbo2/turbo2+32,64", "reference")
    in_steps = batch_logits(model, windows, config.make_caches())
    caches = config.make_caches()
    first = first_scored(N_CTX)
    model(mx.array(windows[:, :first]), cache=caches)
    one_piece = model(mx.array(windows[:, first:-1]), cache=caches)
    caches = config.make_caches()
    model(mx.array(windows[:, :first]), cache=caches)
    steps = [model(mx.array(windows[:, i : i + 1]), cache=caches) for i in range(first, N_CTX - 1)]
    one_by_one = mx.concatenate(steps, axis=1)

    def distance(a: mx.array, b: mx.array) -> float:
        return float(mx.abs(a - b).mean())

    assert distance(one_piece, exact) < 0.8 * distance(one_by_one, exact)
    assert abs(distance(in_steps, exact) / distance(one_by_one, exact) - 1) < 0.15
