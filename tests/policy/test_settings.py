"""Settings by name: wherever policies are accepted, and what they are there."""

from __future__ import annotations

import pytest
from command_calls import call
from gguf_files import write_small_gguf
from tiny_models import shared_model

from mlx_turbokv import InputError, attach, detach, load_policy, make_prompt_cache
from mlx_turbokv.cli.options import policy_from
from mlx_turbokv.evaluate.configuration import prepare
from mlx_turbokv.evaluate.names import parse_policy
from mlx_turbokv.policy.protection import DEFAULT_PROTECTION, Protection
from mlx_turbokv.policy.recommended import label, options
from mlx_turbokv.policy.settings import DEFAULT, PAIRS, SETTINGS
from mlx_turbokv.quant.formats import as_format


def test_what_the_settings_are() -> None:
    assert PAIRS == {
        "near-lossless": ("turbo5", "turbo4"),
        "balanced": ("turbo4", "turbo3"),
        "compact": ("turbo3", "turbo2"),
    }
    assert DEFAULT in SETTINGS


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_its_pair_with_protected_tokens(name: str) -> None:
    found, pair = load_policy(name.upper()), "/".join(PAIRS[name])
    assert found == parse_policy(name) == policy_from(policy=name, environ={})
    assert found.formats(3) == parse_policy(pair).formats(3)
    assert found.protection == DEFAULT_PROTECTION == prepare(shared_model("llama"), name).protection
    assert label(found) == name and options(found) == f"--policy {name}"


@pytest.mark.parametrize("name", SETTINGS)
def test_protected_tokens_of_a_setting_can_be_changed(name: str) -> None:
    found = policy_from(policy=name, sink=0, recent=0, environ={})
    assert found == parse_policy(f"{name}+0,0") and found.protection == Protection(0, 0)
    assert label(found) == f"{name}+0,0"
    assert options(found) == f"--policy {name} --sink 0 --recent 0"


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_attached_by_name(name: str) -> None:
    model = shared_model("llama")
    caches = make_prompt_cache(model, policy=name)
    assert {(str(c.k_format), str(c.v_format)) for c in caches} == {PAIRS[name]}
    assert {c.protection for c in caches} == {DEFAULT_PROTECTION}
    attach(model, policy=name)
    try:
        assert [str(c.k_format) for c in model.make_cache()] == [str(c.k_format) for c in caches]
    finally:
        detach(model)


@pytest.mark.parametrize("given", [{"k": "q8_0"}, {"v": "turbo2"}, {"k": "f16", "v": "f16"}])
def test_formats_beside_a_setting_are_refused(given: dict[str, str]) -> None:
    k, v = (str(x) for x in PAIRS["balanced"])
    with pytest.raises(InputError, match=f"'balanced' is K {k} and V {v}.*cannot be given beside"):
        load_policy("balanced", **given)


@pytest.mark.parametrize("given", [("balanced",), (None, "LA-V7")])
def test_a_policy_in_the_place_of_a_format_is_named(given: tuple) -> None:
    name = next(filter(None, given))
    with pytest.raises(InputError, match=f"'{name}' is a policy.*policy=\"{name.lower()}\""):
        attach(shared_model("llama"), *given)


def test_settings_are_named_where_policies_are() -> None:
    with pytest.raises(InputError, match="near-lossless, balanced, compact, uniform, la-v5"):
        load_policy("la-v9")
    with pytest.raises(InputError, match="a setting or a policy"):
        parse_policy("la-v9")
    assert all(name in call("generate", "--help").out for name in SETTINGS)


def test_a_plan_says_what_its_settings_are() -> None:
    out = call("plan", "--model", "phi-4", "-c", "4K").out
    assert ", ".join(f"{name} is {'/'.join(pair)}" for name, pair in PAIRS.items()) + "." in out


@pytest.mark.parametrize(
    ("k", "v"), [(None, None), ("q8_0", None), (None, "turbo2"), ("turbo5", "f16")]
)
def test_what_is_not_given_is_the_default_settings(k: str | None, v: str | None) -> None:
    expected = (k or PAIRS[DEFAULT][0], v or PAIRS[DEFAULT][1])
    for cache in make_prompt_cache(shared_model("llama"), k, v):
        assert (str(cache.k_format), str(cache.v_format)) == expected
        assert cache.protection == DEFAULT_PROTECTION
    found = policy_from(as_format(k) if k else None, as_format(v) if v else None, environ={})
    assert {f"{k}/{v}" for k, v in found.formats(3)} == {"/".join(expected)}
    assert (label(found) == DEFAULT) == (k is v is None)


def test_a_command_without_options_has_the_default_setting(tmp_path) -> None:
    model = str(write_small_gguf(tmp_path))
    out = call("generate", "--model", model, "-p", "the", "-m", 3, "--no-calibrate").out
    assert f"{DEFAULT} (2 x {'/'.join(PAIRS[DEFAULT])} layers)" in out
    out = call("generate", "--model", model, "-p", "the", "-m", 3, "--policy", "la-v7").out
    assert "la-v7 (2 x q8_0/q8_0 layers)" in out
