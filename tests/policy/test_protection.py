"""Protected tokens as policies, their files, options and names of configurations say them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import shared_model

from mlx_turbokv import InputError, LayerList, Uniform, load_policy, make_prompt_cache
from mlx_turbokv.cli.options import policy_from
from mlx_turbokv.cli.values import ProtectedType
from mlx_turbokv.evaluate.names import parse_policy
from mlx_turbokv.evaluate.notes import protection_notes
from mlx_turbokv.loading.known_shapes import KNOWN
from mlx_turbokv.loading.model_shape import shape_from_config
from mlx_turbokv.policy.files import read_layer_list, write_layer_list
from mlx_turbokv.policy.presets import MODES
from mlx_turbokv.policy.protection import (
    DEFAULT_PROTECTION,
    LEAVE_TOGETHER,
    STEP,
    UNPROTECTED,
    Protection,
)
from mlx_turbokv.policy.recommended import label
from mlx_turbokv.report.plan import make_plan

TILES = st.integers(0, 40).map(lambda n: STEP * n)
PAIRS = [("turbo4", "turbo3")] * 3


@pytest.mark.parametrize(
    "name", ["uniform", "q8_0/turbo2", "boundary:1,1", "last:2:f16", "turbo4/turbo3@boundary:1,0"]
)
def test_tokens_are_protected_by_default(name: str, tmp_path: Path) -> None:
    assert parse_policy(name).protection == DEFAULT_PROTECTION == Protection(32, 128)
    write_layer_list(tmp_path / "p.json", PAIRS)
    for found in (Uniform(), LayerList(tuple(PAIRS)), read_layer_list(tmp_path / "p.json")):
        assert found.protection == DEFAULT_PROTECTION


@pytest.mark.parametrize(
    "name",
    ["la-v5", "la-v6", "la-v7", "boundary-v", *(f"mode-{n}" for n in MODES), "la-v7:turbo4",
     "turbo4/turbo3@la-v7"],
)  # fmt: skip
def test_the_papers_presets_protect_what_is_asked_for(name: str) -> None:
    assert parse_policy(name).protection == Protection(0, 0)
    assert parse_policy(f"{name}+32,128").protection == DEFAULT_PROTECTION


@pytest.mark.parametrize("mode", MODES)
def test_the_environment_variable_selects_the_papers_semantics(mode: int) -> None:
    environ = {"TURBO_LAYER_ADAPTIVE": str(mode)}
    assert policy_from(environ=environ).protection == Protection(0, 0)
    assert policy_from(environ=environ, recent=128).protection == Protection(0, 128)


@pytest.mark.parametrize(
    ("k", "v", "protects"),
    [("turbo4", "turbo3", True), ("q8_0", "turbo2", True), ("turbo2", "f16", True),
     ("q8_0", "q8_0", False), ("f16", "q8_0", False), ("q8_0", "turbo8", False)],
)  # fmt: skip
def test_layers_protect_tokens_where_these_take_other_bits(k: str, v: str, protects: bool) -> None:
    for cache in make_prompt_cache(shared_model("llama"), k, v):
        assert cache.protection == (DEFAULT_PROTECTION if protects else UNPROTECTED)
    for cache in make_prompt_cache(shared_model("llama"), k, v, sink=0, recent=0):
        assert cache.protection == UNPROTECTED


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("turbo4/turbo3", "turbo4/turbo3"),
        ("turbo4/turbo3+32,128", "turbo4/turbo3"),
        ("turbo4/turbo3+0,0", "turbo4/turbo3+0,0"),
        ("la-v7", "la-v7"),
        ("la-v7+0,0", "la-v7"),
        ("la-v7+32,128", "la-v7+32,128"),
        ("mode-0", "q8_0/turbo2+0,0"),
    ],
)
def test_labels_say_what_is_not_the_default_of_their_kind(name: str, expected: str) -> None:
    assert label(parse_policy(name)) == expected
    assert parse_policy(expected) == parse_policy(name)


def test_notes_name_who_protects() -> None:
    found = {"f16/f16": None, "q8_0/q8_0": None, "a/turbo3": "32,128", "turbo4/b": "32,128"}
    first = "The first 32 and at least the newest 128 tokens take 8.5 bits a value in a/turbo3, "
    assert protection_notes(found) == [first + "turbo4/b."]
    assert protection_notes(found | {"la-v7": None, "mlx-kv4": None}) == [
        first + "turbo4/b.", "No tokens are protected in la-v7.",
    ]  # fmt: skip
    assert protection_notes({"turbo4/turbo3": None}) == ["No tokens are protected."]
    assert protection_notes({"f16/f16": None, "mlx-kv4:64": None}) == []


@pytest.mark.parametrize("name", ["uniform", "la-v7", "mode-2", "boundary:1,1", "last:2"])
@given(sink=TILES, recent=TILES)
def test_any_policy_can_protect(name: str, sink: int, recent: int) -> None:
    policy = load_policy(name)
    found = policy.protecting(sink, recent)
    assert found.protection == Protection(sink, recent)
    assert found.formats(8) == policy.formats(8) and found.name == policy.name
    assert found.protecting().protection == found.protection
    assert found.protecting(recent=0).protection == Protection(sink, 0)


@given(sink=TILES, recent=TILES)
def test_a_file_says_how_many(tmp_path_factory, sink: int, recent: int) -> None:
    path = tmp_path_factory.mktemp("policy") / "p.json"
    write_layer_list(path, PAIRS, Protection(sink, recent))
    assert json.loads(path.read_text())["sink"] == sink
    assert read_layer_list(path).protection == Protection(sink, recent)


def test_a_file_may_leave_it_open(tmp_path: Path) -> None:
    write_layer_list(tmp_path / "p.json", PAIRS)
    assert "recent" not in (tmp_path / "p.json").read_text()
    assert read_layer_list(tmp_path / "p.json") == LayerList(tuple(PAIRS), "p")


@pytest.mark.parametrize("value", [1, -32, "32", 32.0, True, [], 1 << 40, None])
@pytest.mark.parametrize("name", ["sink", "recent"])
def test_a_wrong_number_in_a_file_is_named(tmp_path: Path, name: str, value) -> None:
    path = tmp_path / "p.json"
    write_layer_list(path, PAIRS)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(InputError, match=f"p.json.*{name}.*multiple of 32"):
        read_layer_list(path)


def test_options_come_before_the_policys_file(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_layer_list(path, PAIRS, Protection(64, 256))
    for options, expected in (({}, (64, 256)), ({"sink": 0}, (0, 256)), ({"recent": 32}, (64, 32))):
        found = policy_from(policy=str(path), environ={}, **options)
        assert found.protection == Protection(*expected)
    assert policy_from(environ={}, policy="la-v7", sink=32).protection == Protection(32, 0)


@pytest.mark.parametrize("text", ["33", "-32", "many", "1.5", "", "nan"])
def test_an_option_of_no_tiles_is_named(text: str) -> None:
    with pytest.raises(InputError, match="multiple of 32"):
        ProtectedType().convert(text, None, None)


@pytest.mark.parametrize(
    ("name", "base", "expected"),
    [
        ("turbo4/turbo3+32,128", "turbo4/turbo3", (32, 128)),
        ("la-v7+0,64", "la-v7", (0, 64)),
        ("boundary:2,2:f16 + 32, 0", "boundary:2,2:f16", (32, 0)),
        ("q8_0/turbo2@last:2+64,64", "q8_0/turbo2@last:2", (64, 64)),
        ("la-v7:turbo4+32,32", "la-v7:turbo4", (32, 32)),
    ],
)
def test_configurations_may_name_it(name: str, base: str, expected) -> None:
    found = parse_policy(name)
    assert found.protection == Protection(*expected)
    assert found.formats(8) == parse_policy(base).formats(8)


@pytest.mark.parametrize("name", ["turbo4/turbo3+32", "la-v7+1,2", "la-v7+32,128,1", "+32,128"])
def test_configurations_that_name_it_wrongly_are_refused(name: str) -> None:
    with pytest.raises(InputError):
        parse_policy(name)


@given(sink=TILES, recent=TILES, n=st.integers(1, 5000))
def test_rows_that_are_stored(sink: int, recent: int, n: int) -> None:
    protection = Protection(sink, recent)
    coarse, fine = protection.rows_after(n)
    most_coarse, most_fine = protection.most_rows(n)
    assert n <= coarse + fine <= n + sink
    if recent:
        assert fine >= min(n, recent)
        assert fine <= sink + recent + LEAVE_TOGETHER and coarse % STEP == 0
    assert coarse <= most_coarse and fine <= most_fine
    more = protection.most_rows(n + 1)
    assert more[0] >= most_coarse and more[1] >= most_fine


def test_a_plan_counts_protected_rows() -> None:
    shape = shape_from_config(KNOWN["Llama-3.1-8B"], "Llama-3.1-8B")
    policies = [
        ("x", Uniform("turbo4", "turbo3").protecting(0, 0)),
        ("y", Uniform("turbo4", "turbo3")),
    ]
    plain, protected = make_plan(shape, policies, [100, 32768], memory_bytes=1 << 34).rows
    values = 32 * 8 * 2 * 128
    assert protected.bytes_at[100] == 100 * values * 8.5 / 8
    added = 160 * values * 8.5 / 8 - 128 * values * 3.625 / 8
    assert protected.bytes_at[32768] - plain.bytes_at[32768] == added
    assert protected.max_tokens < plain.max_tokens < protected.max_tokens + 600
