"""What `attach` and the other public functions say of values that they do not accept."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import shared_model

import mlx_turbokv
from mlx_turbokv import (
    InputError,
    TurboKVCache,
    TurboRotatingKVCache,
    attach,
    detach,
    load_policy,
    make_prompt_cache,
)
from mlx_turbokv.checked import INTEGER, checked
from mlx_turbokv.policy import Uniform
from mlx_turbokv.policy.files import write_layer_list
from mlx_turbokv.policy.protection import DEFAULT_PROTECTION, UNPROTECTED

WRONG = {
    int: st.integers(), float: st.floats(), bytes: st.binary(), bool: st.booleans(),
    str: st.text(), list: st.lists(st.integers()), dict: st.just({"a": 1}),
    object: st.builds(object), type: st.just(int), tuple: st.just(("f16", "f16")),
}  # fmt: skip
# the kinds that an argument accepts
ACCEPTED: dict[str, set[type]] = {
    "k": {str}, "v": {str}, "policy": {str}, "backend": {str}, "centre": {bool, str},
    "tokenizer": set(), "compress_sliding": {bool}, "max_kv_size": {int}, "handles": {bool},
    "sink": {int}, "recent": {int},
}  # fmt: skip


def wrong(name: str) -> st.SearchStrategy:
    """Values of every kind that an argument does not accept."""
    return st.one_of([values for kind, values in WRONG.items() if kind not in ACCEPTED[name]])


@pytest.mark.parametrize("function", [attach, make_prompt_cache])
@pytest.mark.parametrize("name", ACCEPTED)
@given(data=st.data())
def test_a_value_of_another_kind_is_refused_by_its_argument(function, name, data) -> None:
    value = data.draw(wrong(name))
    with pytest.raises(InputError, match=rf"^{name} .* is not accepted: give .*\.$") as error:
        function(shared_model("llama"), **{name: value})
    assert repr(value)[:60] in str(error.value)


@pytest.mark.parametrize("function", [attach, make_prompt_cache])
def test_every_argument_has_a_kind(function) -> None:
    assert set(inspect.signature(function).parameters) == {"model", *ACCEPTED}
    with pytest.raises(TypeError, match="other"):

        @checked(first=INTEGER)
        def without(first, other):
            pass


@pytest.mark.parametrize("function", [attach, make_prompt_cache])
def test_python_says_which_arguments_there_are(function) -> None:
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\).*'nothing'"):
        function(shared_model("llama"), nothing=5)


@pytest.mark.parametrize("value", [64.0, 64.5, "64", True, np.float32(64)])
def test_max_kv_size_is_a_whole_number(value: Any) -> None:
    with pytest.raises(InputError, match="max_kv_size .* give a whole number"):
        attach(shared_model("llama"), max_kv_size=value)


@pytest.mark.parametrize("given", [{}, {"k": "f16", "v": "f16"}])
@pytest.mark.parametrize("name", ["", "gpu"])
def test_a_back_end_is_checked_whatever_the_formats(given: dict, name: str) -> None:
    with pytest.raises(InputError, match=f"back-?end '{name}'.*reference"):
        make_prompt_cache(shared_model("llama"), **given, backend=name)


@pytest.mark.parametrize("value", ["", ".", "..", "/", "keys/..", "a\0b", Path(".")])
def test_a_file_of_mean_keys_has_a_name(value: Any) -> None:
    with pytest.raises(InputError, match="is not the name of a file of mean keys") as error:
        make_prompt_cache(shared_model("llama"), centre=value)
    assert repr(str(value)) in str(error.value)


@pytest.mark.parametrize("function", [attach, make_prompt_cache])
@pytest.mark.parametrize("formats", [("f16", "f16"), ("q8_0", "q8_0"), ("f16", "q8_0")])
@pytest.mark.parametrize("given", [{"sink": 32}, {"recent": 64}, {"sink": 0, "recent": 32}])
def test_protected_tokens_are_refused_where_no_format_is_turbo(function, formats, given) -> None:
    name, n = next((name, n) for name, n in given.items() if n)
    with pytest.raises(InputError, match=f"{name} {n} has no effect where no .* is turbo"):
        function(shared_model("llama"), *formats, **given)
    if formats == ("f16", "q8_0"):
        for other in ({}, {"sink": 0, "recent": 0}):
            caches = make_prompt_cache(shared_model("llama"), *formats, **other)
            assert {c.protection for c in caches} == {UNPROTECTED}
    caches = make_prompt_cache(shared_model("llama"), "f16", "turbo3", sink=32, recent=128)
    assert {c.protection for c in caches} == {DEFAULT_PROTECTION}


def test_what_is_refused_is_not_attached() -> None:
    model = shared_model("llama")
    with pytest.raises(InputError):
        attach(model, "f16", "f16", sink=32)
    assert "make_cache" not in vars(model)


@pytest.mark.parametrize("given", [5, None, "model", (1, 2)])
def test_only_a_model_is_detached(given: Any) -> None:
    with pytest.raises(InputError, match="is not accepted as a model"):
        detach(given)


@pytest.mark.parametrize("name", ["name", "k", "v"])
@given(data=st.data())
def test_load_policy_names_its_argument(name: str, data) -> None:
    value = data.draw(st.one_of([x for kind, x in WRONG.items() if kind is not str]))
    with pytest.raises(InputError, match=f"^{name} .* is not accepted: give"):
        load_policy(**{"name": "uniform"} | {name: value})


@pytest.mark.parametrize("given", [{"k": ""}, {"v": ""}])
def test_an_empty_name_is_no_default(given: dict[str, str]) -> None:
    with pytest.raises(InputError, match="Unknown KV format ''"):
        load_policy("uniform", **given)


CACHES: list[tuple[Any, dict[str, Any], dict[str, set[type]]]] = [
    (
        TurboKVCache,
        {"k_format": "turbo4", "v_format": "turbo3"},
        {"k_format": {str}, "v_format": {str}, "backend": {str}, "centre": set(), "sink": {int},
         "recent": {int}},
    ),
    (
        TurboRotatingKVCache,
        {"k_format": "turbo4", "v_format": "turbo3", "max_size": 64},
        {"k_format": {str}, "v_format": {str}, "max_size": {int}, "keep": {int}, "backend": {str}},
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("maker", "right", "name", "accepted"),
    [(maker, right, *item) for maker, right, names in CACHES for item in names.items()],
)
@given(data=st.data())
def test_caches_name_their_argument(maker, right, name, accepted, data) -> None:
    value = data.draw(st.one_of([x for kind, x in WRONG.items() if kind not in accepted]))
    with pytest.raises(InputError, match=f"{name} .* is not accepted: give"):
        maker(**right | {name: value})


def test_the_documents_names_are_there() -> None:
    assert all(hasattr(mlx_turbokv, name) for name in mlx_turbokv.__all__)


@pytest.mark.parametrize("name", ["k", "v"])
def test_a_format_beside_a_policy_that_leaves_none_open_is_refused(name, tmp_path) -> None:
    model, file = shared_model("llama"), tmp_path / "p.json"
    write_layer_list(file, [("turbo4", "turbo3")] * 3)
    for policy in (Uniform("turbo4", "turbo3"), file, str(file), "compact"):
        assert make_prompt_cache(model, policy=policy)
        with pytest.raises(InputError, match="has no effect beside|cannot be given beside"):
            make_prompt_cache(model, policy=policy, **{name: "q8_0"})
    assert make_prompt_cache(model, policy="la-v7", k="q8_0", v="turbo3")
