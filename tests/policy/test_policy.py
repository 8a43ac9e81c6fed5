"""Policies over KV-layer ordinals."""

from __future__ import annotations

import json
import os
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_turbokv.cli.options import policy_from
from mlx_turbokv.errors import InputError
from mlx_turbokv.policy import (
    Boundary,
    LastN,
    LayerList,
    Policy,
    Uniform,
    bits_per_value,
    from_environment,
    layer_adaptive,
    load_policy,
    parse_boundary,
)
from mlx_turbokv.policy.files import read_layer_list, write_layer_list
from mlx_turbokv.policy.presets import MODES
from mlx_turbokv.policy.settings import DEFAULT, PAIRS
from mlx_turbokv.quant.formats import FORMAT_NAMES, KVFormat

FORMATS = st.sampled_from(FORMAT_NAMES)
LAYERS = st.integers(1, 130)


def names(policy: Policy, n_layers: int) -> list[str]:
    return [f"{k}/{v}" for k, v in policy.formats(n_layers)]


def v_names(policy: Policy, n_layers: int) -> list[str]:
    return [str(v) for _, v in policy.formats(n_layers)]


def v_bits(policy: Policy, n_layers: int, head_dim: int = 128) -> float:
    dims = [head_dim] * n_layers
    return bits_per_value(policy.formats(n_layers), dims, dims, [8] * n_layers)[1]


# From the method's published table: KV layers -> V bits per value of 2+2 q8_0 / turbo2.
TWO_PLUS_TWO = {
    10: (4.675, 4.900),
    16: (3.719, 4.000),
    24: (3.188, 3.500),
    28: (3.036, 3.357),
    32: (2.922, 3.250),
    40: (2.763, 3.100),
    64: (2.523, 2.875),
    80: (2.444, 2.800),
}


@pytest.mark.parametrize("n_layers", TWO_PLUS_TWO)
def test_boundary_v_budget_is_the_published_one(n_layers: int) -> None:
    norm_a_head, norm_a_block = TWO_PLUS_TWO[n_layers]
    assert v_bits(load_policy("la-v7"), n_layers) == pytest.approx(norm_a_head, abs=6e-4)
    with_blocks = load_policy("la-v7", v="turbo2:32")
    assert v_bits(with_blocks, n_layers) == pytest.approx(norm_a_block, abs=6e-4)


@given(n_layers=st.integers(4, 200), first=st.integers(0, 2), last=st.integers(0, 2))
def test_boundary_budget_is_the_weighted_mean(n_layers: int, first: int, last: int) -> None:
    policy = Boundary("q8_0", "turbo2", first, last, boundary_v="q8_0")
    n = first + last
    assert v_bits(policy, n_layers) == pytest.approx((n * 8.5 + (n_layers - n) * 2.125) / n_layers)


@pytest.mark.parametrize("n_layers", range(4, 60))
def test_boundary_v_is_cheaper_than_turbo3_from_26_layers_up(n_layers: int) -> None:
    cheaper = v_bits(load_policy("la-v7"), n_layers) < v_bits(Uniform("q8_0", "turbo3"), n_layers)
    assert cheaper == (n_layers >= 26)


@given(k=FORMATS, v=FORMATS, n_layers=LAYERS)
def test_every_policy_gives_one_pair_a_layer(k: str, v: str, n_layers: int) -> None:
    policies = [Uniform(k, v), *(layer_adaptive(mode, k, v) for mode in MODES)]
    if n_layers >= 5:
        policies += [Boundary(k, v, 2, 3, "f16", "q8_0"), LastN(k, v, 5, None, "turbo6")]
    for policy in policies:
        formats = policy.formats(n_layers)
        assert len(formats) == n_layers
        assert all(isinstance(f, KVFormat) for pair in formats for f in pair)


@given(n_layers=st.integers(9, 130), data=st.data())
def test_a_pipeline_rank_takes_its_slice_of_the_whole_model(n_layers: int, data) -> None:
    cut = data.draw(st.integers(1, n_layers - 1))
    whole = load_policy("la-v7").formats(n_layers)
    first_rank, second_rank = whole[:cut], whole[cut:]
    v = [str(pair[1]) for pair in [*first_rank, *second_rank]]
    assert v == ["q8_0"] * 2 + ["turbo2"] * (n_layers - 4) + ["q8_0"] * 2


MODE_TABLE = {
    0: ["turbo6/turbo3"] * 20,
    1: ["q8_0/q8_0"] * 4 + ["turbo6/turbo3"] * 12 + ["q8_0/q8_0"] * 4,
    2: ["turbo6/turbo3"] * 12 + ["q8_0/q8_0"] * 8,
    5: ["turbo6/turbo4"] * 2 + ["turbo6/turbo3"] * 16 + ["turbo6/turbo4"] * 2,
    6: ["turbo6/turbo3"] * 12 + ["turbo6/turbo4"] * 8,
    7: ["turbo6/q8_0"] * 2 + ["turbo6/turbo3"] * 16 + ["turbo6/q8_0"] * 2,
    10: ["turbo6/q8_0"] * 4 + ["turbo6/turbo3"] * 12 + ["turbo6/q8_0"] * 4,
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_protect_the_layers_they_name(mode: int) -> None:
    assert names(layer_adaptive(mode, "turbo6", "turbo3"), 20) == MODE_TABLE[mode]
    assert names(load_policy(f"mode-{mode}", "turbo6", "turbo3"), 20) == MODE_TABLE[mode]


def test_presets_are_modes_over_q8_0_and_turbo2() -> None:
    assert names(load_policy("la-v5"), 6) == (
        ["q8_0/turbo4"] * 2 + ["q8_0/turbo2"] * 2 + ["q8_0/turbo4"] * 2
    )
    assert names(load_policy("la-v6"), 9) == ["q8_0/turbo2"] + ["q8_0/turbo4"] * 8
    assert load_policy("boundary-v") == load_policy("LA-V7")


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_a_preset_on_few_layers_protects_all_and_says_so(n_layers: int) -> None:
    policy = load_policy("la-v7")
    assert v_names(policy, n_layers) == ["q8_0"] * n_layers
    (note,) = policy.notes(n_layers)
    assert "la-v7" in note and f"has {n_layers}" in note
    assert policy.notes(4) == []


def test_an_explicit_boundary_larger_than_the_model_is_refused() -> None:
    assert v_names(parse_boundary("2,3"), 5) == ["q8_0"] * 5
    with pytest.raises(InputError, match="40,40.*30 KV layers"):
        parse_boundary("40,40").formats(30)
    with pytest.raises(InputError, match="Last 9.*8 KV layers"):
        load_policy("last:9").formats(8)


def test_boundary_text_sets_the_boundary_formats() -> None:
    assert names(parse_boundary("1, 1"), 3) == ["q8_0/q8_0", "q8_0/turbo2", "q8_0/q8_0"]
    assert names(parse_boundary("1,0:f16", "turbo4", "turbo3"), 2) == [
        "turbo4/f16",
        "turbo4/turbo3",
    ]
    assert names(load_policy("last:1:f16/q8_0", "turbo4"), 2) == ["turbo4/turbo2", "f16/q8_0"]
    assert parse_boundary("2,2:f16") == load_policy("boundary:2,2:f16")


@pytest.mark.parametrize("text", ["", "2", "2,", "a,b", "-1,2", "2,2:", "2,2:q8_0/", "2,2,2"])
def test_other_boundary_texts_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_boundary(text)


@pytest.mark.parametrize("name", ["la-v8", "", "mode-3", "mode-x", "boundary", "uniforms"])
def test_unknown_policies_are_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(InputError, match=r"accepted are [^.]*\."):
        load_policy(name)


@pytest.mark.parametrize("mode", ["3", "x", "7.0", "-1"])
def test_unknown_modes_are_refused(mode: str) -> None:
    with pytest.raises(InputError, match="0, 1, 2, 5, 6, 7, 10"):
        layer_adaptive(mode)
    with pytest.raises(InputError, match="TURBO_LAYER_ADAPTIVE"):
        from_environment(environ={"TURBO_LAYER_ADAPTIVE": mode})


@given(pairs=st.lists(st.tuples(FORMATS, FORMATS), min_size=1, max_size=40))
def test_policy_files_keep_every_layer(tmp_path_factory, pairs: list) -> None:
    path = tmp_path_factory.mktemp("policies") / "mine.json"
    write_layer_list(path, pairs, model="a model")
    policy = load_policy(path)
    assert names(policy, len(pairs)) == [f"{k}/{v}" for k, v in pairs]
    assert policy.name == "mine"
    assert json.loads(path.read_text())["model"] == "a model"
    with pytest.raises(InputError, match=f"lists {len(pairs)} KV layers"):
        policy.formats(len(pairs) + 1)


def test_a_failed_write_leaves_the_old_policy_file_whole(tmp_path, monkeypatch) -> None:
    path = tmp_path / "mine.json"
    write_layer_list(path, [("q8_0", "turbo2")])
    before = path.read_bytes()

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(InputError, match="No space left"):
        write_layer_list(path, [("f16", "f16")])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "not JSON"),
        ("[]", "is not a JSON object"),
        ("{}", "names no version"),
        ("[" * 100_000, "is not JSON"),
        ('{"version": true, "layers": [{"k": "f16", "v": "f16"}]}', "version True"),
        ('{"version": 2, "layers": []}', "version 2"),
        ('{"version": 1}', "has no list named 'layers'.*accepted"),
        ('{"version": 1, "layers": []}', r"'layers' is \[\]; a list with an object .*accepted"),
        ('{"version": 1, "layers": {"k": 1}}', r"'layers' is \{'k': 1\}; a list .*accepted"),
        ('{"version": 1, "layers": ["f16"]}', "layer 0: 'f16' is not accepted: give an object"),
        ('{"version": 1, "layers": [{"k": "q8_0"}]}', "layer 0 has no 'v': an object .*accepted"),
        ('{"version": 1, "layers": [{"k": 4, "v": "x"}]}', "layer 0: k 4 .* give the name of a KV"),
        ('{"version": 1, "layers": [{"k": "f16", "v": null}]}', "layer 0: v None .* give the name"),
        ('{"version": 1, "layers": [{"k": "q8_0", "v": "turbo9"}]}', "turbo9"),
    ],
)
def test_damaged_policy_files_are_refused(tmp_path, text: str, said: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_layer_list(path)


@pytest.mark.parametrize("name", ["boundary:2", "boundary: 2", "LAST:x", "last:2:f16/f16/f16"])
def test_a_policy_with_other_parameters_says_what_it_takes(name: str) -> None:
    kind = name.lower().partition(":")[0]
    with pytest.raises(InputError, match=f"'{name}' is not accepted: {kind} takes") as error:
        load_policy(f" {name}\n")
    example = re.search(r"such as (\S+), .*such as (\S+) \(V\) or (\S+) \(", str(error.value))
    assert example and all(load_policy(x) for x in example.groups())
    assert "nearest" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "near"), [("boundry:2", "boundary:A,B"), ("lst:", "last:N"), ("lst:3", "last:3")]
)
def test_the_nearest_policy_is_one_that_can_be_typed(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"the nearest is {near};"):
        load_policy(name)


@pytest.mark.parametrize(("name", "near"), [("turbo7", "turbo8"), ("turbo8:32", "turbo8")])
def test_the_nearest_format_to_a_turbo_format_is_one(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"the nearest is {near};"):
        KVFormat.parse(name)


def test_a_missing_policy_file_or_formats_beside_one_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="No such file"):
        load_policy(tmp_path / "none.json")
    write_layer_list(tmp_path / "mine.json", [("q8_0", "turbo2")])
    with pytest.raises(InputError, match="cannot be given beside it"):
        load_policy(tmp_path / "mine.json", v="turbo3")


def test_layer_list_takes_names() -> None:
    assert names(LayerList((("q8_0", "turbo2"),)), 1) == ["q8_0/turbo2"]


Q8, TURBO3 = KVFormat.parse("q8_0"), KVFormat.parse("turbo3")
SEVEN = {"TURBO_LAYER_ADAPTIVE": "7"}


@pytest.mark.parametrize(
    ("options", "environ", "expected"),
    [
        ({}, {}, ["/".join(PAIRS[DEFAULT])] * 6),
        ({"cache_type_v": TURBO3}, {}, [f"{PAIRS[DEFAULT][0]}/turbo3"] * 6),
        ({"cache_type_k": TURBO3, "cache_type_v": Q8}, {}, ["turbo3/q8_0"] * 6),
        ({"cache_type_k": TURBO3}, {}, [f"turbo3/{PAIRS[DEFAULT][1]}"] * 6),
        (
            {"policy": "la-v7", "cache_type_k": TURBO3},
            {},
            ["turbo3/q8_0"] * 2 + ["turbo3/turbo2"] * 2 + ["turbo3/q8_0"] * 2,
        ),
        ({}, {"TURBO_LAYER_ADAPTIVE": "0"}, ["q8_0/turbo2"] * 6),
        (
            {"cache_type_v": TURBO3},
            SEVEN,
            ["q8_0/q8_0"] * 2 + ["q8_0/turbo3"] * 2 + ["q8_0/q8_0"] * 2,
        ),
        ({"policy": "uniform"}, SEVEN, ["q8_0/turbo2"] * 6),
        ({"layer_adaptive": "0", "cache_type_v": TURBO3}, SEVEN, ["q8_0/turbo3"] * 6),
        ({"boundary": "0,1"}, SEVEN, ["q8_0/turbo2"] * 5 + ["q8_0/q8_0"]),
    ],
)
def test_cache_options_in_order_of_precedence(options, environ, expected) -> None:
    assert names(policy_from(**options, environ=environ), 6) == expected


def test_two_options_that_name_a_policy_are_refused() -> None:
    with pytest.raises(InputError, match="--policy and --boundary"):
        policy_from(policy="la-v7", boundary="2,2", environ={})
    with pytest.raises(InputError, match="--boundary and --layer-adaptive"):
        policy_from(boundary="2,2", layer_adaptive="7", environ={})
