"""States whose values contradict each other are refused, and change nothing."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_turbokv import InputError, TurboKVCache
from mlx_turbokv.cache.batch import BatchTurboKVCache
from mlx_turbokv.cache.rotating import TurboRotatingKVCache
from mlx_turbokv.cache.rotating_batch import BatchTurboRotatingKVCache
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.rope import RopeFrequencies

BODY, TAIL, N_BODY, N_TAIL, K_DIM, V_DIM, DTYPE = range(4, 11)
HEADS, DIM = 2, 64
KINDS = ["single", "batch", "rotating", "rotating batch"]


def rows(batch: int, n: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    rng = np.random.default_rng(n)
    return mx.array(rng.normal(size=(batch, HEADS, n, DIM)).astype(np.float32)).astype(dtype)


def a_centre(dim: int = DIM, heads: int = HEADS) -> Centre:
    rope = RopeFrequencies.from_arguments(dim, dim, False, 10000.0)
    return Centre(mx.ones((heads, dim)), rope, "test")


def filled(kind: str, n: int = 300, k_format: str = "turbo3"):
    """A cache with rows in body and tail."""
    formats = k_format, "turbo2"
    if kind == "single":
        cache = TurboKVCache(*formats, "reference", a_centre())
    elif kind == "batch":
        cache = BatchTurboKVCache(*formats, [0, 3], "reference", a_centre())
    elif kind == "rotating":
        cache = TurboRotatingKVCache(*formats, 90, 4, "reference")
    else:
        cache = BatchTurboRotatingKVCache(*formats, 90, [0, 3], "reference")
    batch = 2 if "batch" in kind else 1
    for _ in range(2):  # a window moves on at the second
        cache.update_and_fetch(rows(batch, n), rows(batch, n))
    for _ in range(7):
        cache.update_and_fetch(rows(batch, 1), rows(batch, 1))
    assert cache.n_body and cache.n_tail
    return cache


def changed(state: list, at: int, value) -> list:
    value = value(state[at]) if callable(value) else value
    return [*state[:at], value, *state[at + 1 :]]


ALL_KINDS = [
    ("version as text", 0, "2"),
    ("version 2.0", 0, 2.0),
    ("no format", 1, "q9"),
    ("format of a number", 1, 3),
    ("another format", 1, "q8_0"),
    ("another format of V", 2, "turbo4"),
    ("centre of text", 3, "x"),
    ("no body", BODY, None),
    ("no tail", TAIL, None),
    ("body of floats", BODY, lambda x: x.astype(mx.float32)),
    ("tail of int32", TAIL, lambda x: x.view(mx.int32)),
    ("flat tail", TAIL, lambda x: x.reshape(-1)),
    ("tail of fewer words", TAIL, lambda x: x[..., 1:]),
    ("tail of more words", TAIL, lambda x: mx.concatenate([x, x], axis=-1)),
    ("tail of more heads", TAIL, lambda x: mx.concatenate([x, x], axis=1)),
    ("body of more sequences", BODY, lambda x: mx.concatenate([x, x], axis=0)),
    ("body without a head", BODY, lambda x: x[:, :0]),
    ("body too short", BODY, lambda x: x[:, :, 1:]),
    ("n_body no multiple of 32", N_BODY, lambda n: n - 1),
    ("n_body beyond its body", N_BODY, lambda n: n + 32),
    ("n_body negative", N_BODY, -32),
    ("n_body beyond 32 bits", N_BODY, 1 << 40),
    ("n_body of a float", N_BODY, lambda n: float(n)),
    ("n_tail beyond its tail", N_TAIL, 1000),
    ("n_tail negative", N_TAIL, -1),
    ("n_tail true", N_TAIL, True),
    ("n_tail of text", N_TAIL, "7"),
    ("k_head_dim 0", K_DIM, 0),
    ("k_head_dim of another model", K_DIM, 128),
    ("k_head_dim of no rotation", K_DIM, 60),
    ("huge k_head_dim", K_DIM, 1 << 62),
    ("huge v_head_dim", V_DIM, 1 << 30),
    ("v_head_dim of a float", V_DIM, 64.0),
    ("another dtype", DTYPE, "int8"),
    ("dtype of a number", DTYPE, 4),
    ("no dtype", DTYPE, ""),
]
OWN = [
    ("batch", "padding of one sequence more", 11, mx.array([0, 3, 1], mx.int32)),
    ("batch", "negative padding", 11, mx.array([0, -3], mx.int32)),
    ("batch", "padding of floats", 11, mx.array([0.0, 3.0])),
    ("batch", "padding of numbers", 11, 3),
    ("batch", "no padding", 11, None),
    ("batch", "right padding of one sequence", 12, mx.array([1], mx.int32)),
    ("rotating", "window of 0", 11, 0),
    ("rotating", "window of text", 11, "90"),
    ("rotating", "keeps the window", 12, 90),
    ("rotating", "keeps fewer than none", 12, -1),
    ("rotating", "hides more than there is", 13, 1000),
    ("rotating", "hides fewer than none", 13, -1),
    ("rotating", "dropped fewer than none", 14, -32),
    ("rotating", "dropped beyond 32 bits", 14, 1 << 31),
    ("rotating batch", "window of 0", 11, 0),
    ("rotating batch", "hides more than there is", 12, 1000),
    ("rotating batch", "padding of one sequence", 13, mx.array([0], mx.int32)),
    ("rotating batch", "dropped of one sequence", 14, mx.array([0], mx.int32)),
    ("rotating batch", "dropped fewer than none", 14, mx.array([0, -1], mx.int32)),
    ("rotating batch", "ends of three", 15, mx.array([1, 2, 3], mx.int32)),
]
CASES = [(kind, *case) for kind in KINDS for case in ALL_KINDS] + OWN


@pytest.mark.parametrize(
    ("kind", "at", "value"),
    [(kind, at, value) for kind, _, at, value in CASES],
    ids=[f"{kind}: {name}" for kind, name, *_ in CASES],
)
def test_a_state_that_contradicts_itself_is_refused(kind, at, value):
    cache = filled(kind)
    state, before = cache.state, dict(vars(cache))
    with pytest.raises(InputError, match="not the state of a"):
        cache.state = changed(state, at, value)
    assert vars(cache) == before
    with pytest.raises(InputError, match="not the state of a"):
        type(cache).from_state(changed(state, at, value))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_length_is_refused(kind):
    cache = filled(kind)
    state = cache.state
    for other in (state[:-1], [*state, 0], state[:4], [], None, 3, "state", {"a": 1}):
        with pytest.raises(InputError, match="not the state of a"):
            type(cache).from_state(other)


CENTRES = [
    ("another block", 0, 64),
    ("block of text", 0, "32"),
    ("mu of other heads", 1, mx.ones((HEADS + 1, DIM))),
    ("mu of another head_dim", 1, mx.ones((HEADS, 2 * DIM))),
    ("mu of NaN", 1, mx.full((HEADS, DIM), float("nan"))),
    ("mu of infinity", 1, mx.full((HEADS, DIM), float("inf"))),
    ("mu of integers", 1, mx.ones((HEADS, DIM), mx.int32)),
    ("flat mu", 1, mx.ones((HEADS * DIM,))),
    ("mu of text", 1, "mu"),
    ("more split pairs than pairs", 2, DIM // 2 + 1),
    ("negative split pairs", 2, -1),
    ("angles of NaN", 3, mx.full((DIM // 2,), float("nan"))),
    ("too few angles", 3, mx.ones((DIM // 2 - 1,))),
    ("no angles", 3, None),
    ("source of a number", 4, 3),
    ("shared by no layer", 5, 0),
    ("first key of a number", 6, 2),
]


@pytest.mark.parametrize(
    ("at", "value"), [x[1:] for x in CENTRES], ids=[name for name, *_ in CENTRES]
)
@pytest.mark.parametrize("kind", ["single", "batch"])
def test_a_centre_that_does_not_fit_is_refused(kind, at, value):
    cache = filled(kind)
    state = cache.state
    with pytest.raises(InputError, match="not the state of a"):
        type(cache).from_state(changed(state, 3, changed(state[3], at, value)))


def test_a_centre_of_keys_that_are_not_turbo_is_refused():
    state = TurboKVCache("q8_0", "turbo2").state
    with pytest.raises(InputError, match="keys in q8_0 cannot be centred"):
        TurboKVCache.from_state(changed(state, 3, a_centre().state))


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_state_is_taken(kind):
    cache = filled(kind)
    again = type(cache).from_state(cache.state)
    for a, b in zip(cache.keys_and_values(), again.keys_and_values()):
        assert mx.array_equal(a, b).item()
    assert again.n_rows == cache.n_rows and again.centre == cache.centre


def test_centres_that_differ_in_their_rope_alone_are_different():
    """Their digest tells them apart: a batch of both would add wrong anchors."""
    mu = mx.ones((HEADS, DIM))
    angles = RopeFrequencies.from_arguments(DIM, DIM, False, 10000.0)
    ropes = [
        angles,
        RopeFrequencies.from_arguments(DIM, DIM, True, 10000.0),
        RopeFrequencies.from_arguments(DIM, DIM, False, 5000.0),
        RopeFrequencies.from_arguments(DIM, DIM // 2, False, 10000.0),
        RopeFrequencies.from_arguments(DIM, DIM, False, 10000.0, 0.5),
        RopeFrequencies(angles.split_pairs, (*angles.angles[:-1], angles.angles[-1] * 1.0001)),
        RopeFrequencies.none(DIM),
    ]
    found = [Centre(mu, rope, "test") for rope in ropes]
    found.append(Centre(mu, angles, "test", first_key_uncentred=True))
    assert len({centre.digest for centre in found}) == len(set(found)) == len(found)
    assert Centre(mu, angles, "another source", 7) == found[0]
    caches = [TurboKVCache("turbo3", "turbo2", "reference", centre) for centre in found[:2]]
    with pytest.raises(ValueError, match="centred differently"):
        TurboKVCache.merge(caches)
