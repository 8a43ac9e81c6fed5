"""Policies that callers write, and what their constructors are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import shared_model

from mlx_turbokv import (
    Boundary,
    InputError,
    KVFormat,
    LastN,
    LayerList,
    Policy,
    Uniform,
    make_prompt_cache,
)
from mlx_turbokv.policy import Preset
from mlx_turbokv.quant.formats import FORMAT_NAMES

FORMATS = st.sampled_from(FORMAT_NAMES)
EITHER = st.one_of(FORMATS, FORMATS.map(KVFormat.parse))
WRONG = st.one_of(
    st.integers(), st.floats(), st.binary(), st.booleans(), st.lists(st.integers(), max_size=1),
    st.builds(object), st.dictionaries(st.text(), st.integers()),
)  # fmt: skip


def policy_with_pair(value: Any) -> Policy:
    class Mine(Policy):
        def pair(self, ordinal, n_layers):
            return value

    return Mine()


@given(k=EITHER, v=EITHER, as_list=st.booleans())
def test_a_pair_may_be_names_or_formats(k: Any, v: Any, as_list: bool) -> None:
    mine = policy_with_pair([k, v] if as_list else (k, v))
    assert mine.formats(3) == Uniform(k, v).formats(3)


def test_a_policy_of_ones_own_is_attached() -> None:
    class Mine(Policy):
        def pair(self, ordinal, n_layers):
            return ("q8_0" if ordinal == 0 else "turbo4"), "turbo3"

    caches = make_prompt_cache(shared_model("llama"), policy=Mine(), sink=64, recent=32)
    assert [str(c.k_format) for c in caches] == ["q8_0", *["turbo4"] * (len(caches) - 1)]
    assert {str(c.v_format) for c in caches} == {"turbo3"}
    assert {(c.protection.sink, c.protection.recent) for c in caches} == {(64, 32)}


def test_a_policy_with_a_constructor_of_its_own_keeps_it() -> None:
    @dataclass(frozen=True)
    class Mine(Policy):
        n: int

        def __init__(self, n):
            object.__setattr__(self, "n", n)

        def pair(self, ordinal, n_layers):
            return "turbo4", "turbo3" if ordinal < self.n else "turbo2"

    other = Mine(1).protecting(0, 64)
    assert (other.n, other.protection.sink, other.protection.recent) == (1, 0, 64)
    assert other.formats(2) == Mine(1).formats(2)


@given(value=WRONG | st.sampled_from(["turbo4", "q8", ("f16",), ("f16", "f16", "f16")]))
def test_what_is_no_pair_is_named(value: Any) -> None:
    with pytest.raises(InputError, match="Policy 'mine', KV layer 0.* is not accepted: give") as e:
        policy_with_pair(value).formats(2)
    assert repr(value)[:60] in str(e.value)


@given(value=WRONG, other=FORMATS, is_k=st.booleans())
def test_what_is_no_format_in_a_pair_is_named(value: Any, other: str, is_k: bool) -> None:
    name = "k" if is_k else "v"
    with pytest.raises(InputError, match=f"Policy 'mine', KV layer 0: {name} .* give") as error:
        policy_with_pair((value, other) if is_k else (other, value)).formats(2)
    assert repr(value)[:60] in str(error.value)


def test_an_unknown_name_in_a_pair_is_named() -> None:
    with pytest.raises(InputError, match="'mine', KV layer 0: Unknown KV format 'turbo9'"):
        policy_with_pair(("turbo9", "f16")).formats(1)


def test_a_policy_without_pair_is_refused() -> None:
    class Mine(Policy):
        pass

    with pytest.raises(InputError, match=r"'mine' has no pair\(ordinal, n_layers\): .*q8_0"):
        make_prompt_cache(shared_model("llama"), policy=Mine())
    with pytest.raises(InputError, match="'policy' has no pair"):
        Policy().formats(1)


ARGUMENTS: list[tuple[Any, dict[str, Any], set[str]]] = [
    (Uniform, {"k": "f16", "v": "f16"}, {"k", "v", "protection"}),
    (
        Boundary,
        {"k": "f16", "v": "f16", "first": 1, "last": 1},
        {"k", "v", "first", "last", "boundary_k", "boundary_v", "protection"},
    ),
    (LastN, {"k": "f16", "v": "f16", "n": 1}, {"k", "v", "n", "last_k", "last_v", "protection"}),
    (LayerList, {"pairs": [("f16", "f16")]}, {"pairs", "label", "path", "protection"}),
    (Preset, {"label": "x", "inner": Uniform()}, {"label", "inner", "protected", "protection"}),
    (KVFormat, {"kind": "f16", "bits": 16}, {"kind", "bits", "group"}),
]
COUNTS = {"first", "last", "n", "protected", "bits", "group"}


@pytest.mark.parametrize(
    ("maker", "right", "name"),
    [(m, r, name) for m, r, names in ARGUMENTS for name in sorted(names)],
)
@given(value=WRONG)
def test_values_of_another_kind_are_refused_by_their_argument(maker, right, name, value) -> None:
    if name in COUNTS and type(value) is int:
        value = float(value % 100)
    if name == "pairs" and value == []:
        value = 5
    with pytest.raises(InputError, match=name):
        maker(**right | {name: value})


@pytest.mark.parametrize("name", ["k", "v", "first", "last"])
def test_none_is_no_value_of_what_is_needed(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} None is not accepted"):
        Boundary(**{"k": "f16", "v": "f16", "first": 1, "last": 1} | {name: None})


@pytest.mark.parametrize(
    "given", [("f16", 8), ("q8_0", 16), ("turbo", 7), ("turbo", 8, 32), ("turbo", 4, 64), ("x", 4)]
)
def test_formats_that_do_not_exist_are_refused(given: tuple) -> None:
    with pytest.raises(InputError, match=r"KV format kind .*, bits .*, group .* KVFormat.parse"):
        KVFormat(*given)


@given(value=WRONG)
def test_the_name_of_a_format_is_a_string(value: Any) -> None:
    with pytest.raises(InputError, match="is not accepted: give the name of a KV format"):
        KVFormat.parse(value)
