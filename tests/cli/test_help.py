"""Help in groups, and what is said of flags and formats that are another program's."""

from __future__ import annotations

import click
import pytest
from command_calls import COMMANDS, call, command_of, refused

from mlx_turbokv import KVFormat
from mlx_turbokv.errors import InputError
from mlx_turbokv.quant.formats import FORMAT_NAMES


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_one_group_of_the_help(name):
    text = call(name, "-h").out
    assert text == call(name, "--help").out
    command = command_of(name)
    for param in command.get_params(click.Context(command)):
        if isinstance(param, click.Option) and not param.hidden:
            shown = max(param.opts, key=len)
            lines = [line.split("  ")[1] for line in text.splitlines() if line[:3] == "  -"]
            assert sum(shown in line.replace(",", " ").split() for line in lines) == 1, shown
    assert "version" in call(name, "--version").out


def test_the_groups_of_generate():
    lines = call("generate", "-h").out.splitlines()
    groups = [line[:-1] for line in lines if line[-1:] == ":" and line[:1] != " "]
    assert groups == ["Model", "Prompt", "Sampling", "Cache", "Output", "Other"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--kv-bits", "4"], "give -ctk turbo4 -ctv turbo4 instead"),
        (["--kv-bits=8"], "give -ctk q8_0 -ctv q8_0 instead"),
        (["--kv-bits"], "give -ctk turbo4 -ctv turbo4 instead"),
        (["--kv-bits", "²"], "-ctk turbo4"),
        (["--kv-group-size", "32"], "turbo4:32"),
        (["--quantized-kv-start", "0"], "omit it"),
        (["--image", "a.png"], "mlx_turbokv run -- mlx_lm.generate --image"),
    ],
)
def test_flags_of_other_caches_are_answered_with_what_to_type(args, said):
    refused("generate", *args, words=[said, args[0].partition("=")[0]])


@pytest.mark.parametrize("command", ["perplexity", "needle", "bench"])
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--policy", "balanced"], "--policy is not an option here: give --config balanced"),
        (["--policy=la-v7"], "give --config la-v7"),
        (["-ctk", "turbo4"], "-ctk is not an option here: give --config K/V, such as"),
        (["--cache-type-v", "turbo3"], "--cache-type-v is not an option here: give --config K/V"),
        (["--boundary", "2,2"], "--boundary is not an option here: give --config boundary:2,2"),
        (["--layer-adaptive", "7"], "give --config mode-7"),
    ],
)
def test_evaluations_say_how_their_configurations_are_written(command, args, said):
    refused(command, *args, words=[said])


@pytest.mark.parametrize("option", ["-ctk", "-ctv", "--cache-type-k", "--policy", "--boundary"])
@pytest.mark.parametrize(("command", "said"), [
    ("perplexity", "give --config"), ("needle", "give --config"), ("bench", "give --config"),
    ("report", "give --config"), ("doctor", "omit it"),
    ("calibrate", "give --base or --compare"),
])  # fmt: skip
def test_cache_options_are_named_where_they_are_not_taken(command, option, said):
    """Not read as -c, or another short option, and what is left of them."""
    for args in ([option, "turbo4"], [f"{option}=turbo4"]):
        refused(command, *args, words=[f"{option} is not an option here: ", said])


@pytest.mark.parametrize("command", ["perplexity", "calibrate", "doctor"])
def test_a_format_that_follows_its_option_at_once_is_no_part_of_its_name(command):
    refused(command, "-ctkturbo4", words=["-ctk is not an option here: "])


def test_calibrate_takes_formats_as_a_list():
    refused("calibrate", "-ctk", "turbo4", words=["--formats turbo4"])
    refused("calibrate", "--policy", "la-v7", words=["--base or --compare la-v7"])
    refused("calibrate", "--config", "la-v7", words=["--base or --compare la-v7"])
    refused("calibrate", "--boundary", "2,2", words=["--base or --compare boundary:2,2."])
    refused("calibrate", "--layer-adaptive", "7", words=["--base or --compare mode-7."])
    result = call("calibrate", "--sink", "33", "--held-out", "none")
    assert "not an option" not in result.error()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--policy", "balanced+0,0"], "--sink 0 --recent 0"),
        (["--policy", "la-v7+32,128"], "--policy la-v7 --sink 32 --recent 128"),
        (["--policy", "turbo4/turbo3"], "-ctk turbo4 -ctv turbo3"),
        (["--policy", "balancd"], "the nearest is balanced"),
        (["--policy", "near_lossless"], "the nearest is near-lossless"),
        (["-ctk", "balanced"], "--policy balanced"),
        (["-ctv", "LA-V7"], "--policy la-v7"),
    ],
)
def test_names_in_the_place_of_others_are_answered_with_what_to_type(args, said):
    for command in ("generate", "serve", "plan"):
        refused(command, *args, words=[said, repr(args[1])])


def test_evaluations_name_mlx_lms_own_cache():
    refused("perplexity", "--kv-bits", "4", words=["--config turbo4/turbo4", "mlx-kv4:64"])


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("q4_0", "turbo4"), ("q4_1", "turbo4"), ("iq4_nl", "turbo4"), ("q5_1", "turbo5"),
        ("q6_k", "turbo6"), ("q2_k", "turbo2"), ("q3_k_m", "turbo3"), ("q8_1", "q8_0"),
        ("fp8", "q8_0"), ("fp8_e4m3", "q8_0"), ("int8", "q8_0"), ("int4", "turbo4"),
        ("bf16", "f16"), ("fp16", "f16"), ("f32", "f16"), ("4", "turbo4"), ("4bit", "turbo4"),
        ("4-bit", "turbo4"), ("tbq3_0", "turbo3"), ("turbo1", "turbo2"), ("turbo3:64", "turbo3"),
        ("tubro4", "turbo4"), ("Q4_0", "turbo4"),
    ],
)  # fmt: skip
def test_the_nearest_format_is_named(name, nearest):
    with pytest.raises(InputError, match=rf"the nearest is {nearest}; accepted are"):
        KVFormat.parse(name)
    assert nearest in FORMAT_NAMES
    refused("plan", "-ctk", name, words=[f"the nearest is {nearest};"])


@pytest.mark.parametrize("name", ["", "64", "x", "²", "q" * 5000, "mlx-kv8:48"])
def test_names_without_a_nearest_format(name):
    with pytest.raises(InputError, match="Unknown KV format") as error:
        KVFormat.parse(name)
    assert "nearest" not in str(error.value) and len(str(error.value)) < 300


PLACES = [
    ("perplexity", "--config"), ("needle", "--config"), ("bench", "--config"),
    ("report", "--config"), ("plan", "--config"), ("calibrate", "--base"),
    ("calibrate", "--budget"), ("calibrate", "--compare"), ("generate", "--policy"),
    ("chat", "--policy"), ("serve", "--policy"), ("plan", "--policy"),
]  # fmt: skip


@pytest.mark.parametrize(("command", "option"), PLACES)
@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("balancd", "balanced"),
        ("near_lossless", "near-lossless"),
        ("la-v77", "la-v7"),
        ("boundry:2,2", "boundary:2,2"),
        ("lst:8:f16", "last:8:f16"),
    ],
)
def test_the_nearest_policy_is_named_wherever_one_is_taken(command, option, name, nearest):
    refused(command, option, name, words=[repr(name), f"the nearest is {nearest}; accepted are"])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("balancd+32,128", "'balancd': the nearest is balanced;"),
        ("la-v77:turbo3", "the nearest is la-v7:turbo3;"),
        ("turbo4", "the nearest is turbo4/turbo4;"),
        ("q8_0:turbo3", "the nearest is q8_0/turbo3;"),
        ("q8_0/turbo3@la-v77", "the nearest is la-v7;"),
        ("turbo4/trubo3", "the nearest is turbo3;"),
        ("trubo4", "the nearest is turbo4/turbo4;"),
        ("turbo4:32", "the nearest is turbo4:32/turbo4:32;"),
        ("mode-3", "Unknown layer-adaptive mode '3'"),
        ("boundary:2,2:trubo4", "the nearest is turbo4;"),
    ],
)
def test_the_nearest_configuration_is_named(name, words):
    refused("perplexity", "--config", name, words=[words])


@pytest.mark.parametrize(
    ("args", "name"),
    [
        (("plan", "--config", "mlx-kv4"), "mlx-kv4"),
        (("calibrate", "--base", "llama-q4_0"), "llama-q4_0"),
        (("perplexity", "--config", "mlx-kv4:64+0,0"), "mlx-kv4:64+0,0"),
    ],
)
def test_caches_of_other_projects_are_not_unknown_where_they_are_not_accepted(args, name):
    said = refused(*args, words=[f"{name!r} is another project's cache", "accepted here are K/V"])
    assert "Unknown" not in said and "mlx-kvN" not in said


def test_a_format_that_is_given_as_a_policy_is_answered_with_its_options():
    refused("generate", "--policy", "turbo4", words=["(-ctk turbo4 -ctv turbo4)"])


@pytest.mark.parametrize("option", ["-ctk", "-ctv"])
def test_a_policy_that_is_mistyped_as_a_format_is_named(option):
    refused("generate", option, "balancd", words=["the nearest is balanced", "--policy balanced"])


@pytest.mark.parametrize("name", ["xyz", "xyz:3", "/", "", "a/b/c"])
def test_configurations_without_a_nearest_one(name):
    assert "nearest" not in refused("perplexity", "--config", name)
