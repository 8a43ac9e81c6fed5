"""What commands say of input that is not UTF-8, of unknown names, and when interrupted."""

from __future__ import annotations

import importlib
import json
import os
import sys
from unittest import mock

import pytest
from characters import loaded
from command_calls import call, command_of, nothing_loads, refused
from gguf_files import write_small_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config, tiny_model

from mlx_turbokv import InputError, load_policy
from mlx_turbokv.cli.output import Progress
from mlx_turbokv.evaluate import configuration
from mlx_turbokv.evaluate.names import check_name
from mlx_turbokv.evaluate.text import load_text
from mlx_turbokv.policy.files import write_layer_list

BOM = b"\xef\xbb\xbf"
TEXT = " ".join(f"Sentence {i} says that {i} follows {i - 1}." for i in range(1, 90))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return str(write_small_gguf(tmp_path_factory.mktemp("small")))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A tiny model in place of any, and a text."""
    config = tiny_config("llama", num_hidden_layers=4, head_dim=64)
    made = loaded(tiny_model("llama", num_hidden_layers=4, head_dim=64), config)
    monkeypatch.setattr("mlx_turbokv.loading.models.load", lambda *a, **k: made)
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


@settings(max_examples=60, deadline=None)
@given(st.binary(min_size=1, max_size=12))
def test_bytes_on_standard_input_are_text_or_refused(data):
    try:
        data.decode()
        is_text = True
    except UnicodeDecodeError:
        is_text = False
    with nothing_loads():
        result = call("generate", "-p", "-", stdin=data)
    if is_text:
        assert result.status is None
    else:
        assert result.error() == "Standard input is not text in UTF-8."


def test_a_byte_order_mark_is_no_part_of_a_text(small, tmp_path):
    plain = call("generate", "--model", small, "-m", 5, "-p", "-", stdin=b"the")
    marked = call("generate", "--model", small, "-m", 5, "-p", "-", stdin=BOM + b"the")
    assert plain.status == marked.status == 0
    assert plain.out.split("=" * 10)[1] == marked.out.split("=" * 10)[1]
    assert "Prompt: 1 tokens" in marked.out
    file = tmp_path / "t.txt"
    file.write_bytes(BOM + b"the")
    assert load_text(str(file)).text == "the"
    policy = tmp_path / "p.json"
    write_layer_list(policy, [("q8_0", "turbo2")])
    policy.write_bytes(BOM + policy.read_bytes())
    assert load_policy(policy) == load_policy(policy) and len(load_policy(policy).formats(1)) == 1


def test_a_closed_standard_input_is_said():
    with mock.patch.object(sys, "stdin", None), nothing_loads():
        from mlx_turbokv.cli.conversation import prompt_text

        with pytest.raises(InputError, match="closed"):
            prompt_text("-")


def test_an_argument_that_is_not_utf_8_is_refused():
    assert "not text in UTF-8" in refused("generate", "-p", os.fsdecode(b"a\xff"))


@pytest.mark.parametrize("option", ["--top-k", "--min-tokens-to-keep"])
def test_numbers_of_tokens_are_below_the_vocabulary(small, option):
    model = ("--model", small, "-m", 3, "--temp", 1, "-p", "the")
    model += ("--min-p", 0.1) if option != "--top-k" else ()
    said = call("generate", *model, option, 10**6)
    assert said.out == "" and f"{option} 1000000" in said.error()
    n_tokens = int(said.error().split("which has ")[1].split()[0])
    assert call("generate", *model, option, n_tokens).status == 2
    assert call("generate", *model, option, n_tokens - 1).status == 0


def test_options_of_a_chat_template_where_there_is_none(small):
    said = call("generate", "--model", small, "-m", 3, "--system-prompt", "Be brief.")
    assert "--system-prompt has no effect" in said.error() and "no chat template" in said.error()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mlx-kv5:64", "mlx-kvN:GROUP"),
        ("mlx-kv8:48", "mlx-kvN:GROUP"),
        ("mlx-kv", "mlx-kvN:GROUP"),
        ("foo:64", "Unknown configuration 'foo:64'"),
        ("foo:turbo3", "Unknown configuration 'foo:turbo3'"),
        ("q8_0:turbo3", "Unknown configuration 'q8_0:turbo3'"),
        ("la-v7:64", "Unknown KV format '64'"),
    ],
)
def test_unknown_configurations_are_named_as_what_they_are(name, said):
    with pytest.raises(InputError) as error:
        check_name(name)
    assert said in str(error.value)


def test_without_a_network_calibrate_advises_its_own_option(monkeypatch):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", mock.Mock(side_effect=OSError("no")))
    said = call("calibrate").error()
    assert "--held-out FILE or --held-out none" in said and "--text" not in said
    assert "--text FILE or --text sample" in call("perplexity").error()


def _interrupted(command, *args, at):
    """Run a command that is interrupted where ``at`` is called for the second time."""
    calls = []
    module, name = at.rsplit(".", 1)
    real = getattr(importlib.import_module(module), name)

    def once(*a, **k):
        calls.append(None)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*a, **k)

    with mock.patch(at, once):
        result = call(command, *args)
    assert result.status == 130
    return result.err.splitlines()[-1]


def test_an_interrupted_run_says_how_it_goes_on(tiny, tmp_path):
    json_path = tmp_path / "b.json"
    bench = ("bench", "-p", 8, "-p", 12, "-g", 2, "-n", 1, "--config", "f16/f16")
    at = "mlx_turbokv.evaluate.benchmark.measure_point"
    goes_on = "Interrupted: the same command goes on"
    assert _interrupted(*bench, "--json", json_path, at=at).startswith(goes_on)
    assert call(*bench, "--json", json_path).status == 0
    assert "kept from" in call(*bench, "--json", json_path).err
    assert "nothing is kept without --json" in _interrupted(*bench, at=at)
    needle = ("needle", "--text", tiny, "-c", 800, "--depths", 2, "--config", "f16/f16")
    said = _interrupted(*needle, at="mlx_turbokv.evaluate.needle.ask")
    assert said == "Interrupted: the same command goes on where it stopped."
    assert call(*needle, "--resume").status == 0
    perplexity = ("perplexity", "--text", tiny, "-c", 64, "--chunks", 2, "--config", "q8_0/turbo2")
    with mock.patch.object(Progress, "__call__", side_effect=KeyboardInterrupt):
        assert call(*perplexity).err.splitlines()[-1].startswith(goes_on)


def test_perplexity_and_calibrate_say_that_short_windows_are_mostly_protected(tiny):
    said = "-c 2048 measures the formats"
    args = ("perplexity", "--text", tiny, "--chunks", 1, "-c", 64, "--config")
    short, plain = call(*args, "turbo4/turbo3"), call(*args, "turbo4/turbo3+0,0")
    assert short.status == plain.status == 0
    assert said in short.err and said not in plain.err
    with nothing_loads():
        held_out = ("calibrate", "--held-out", "none")
        assert said in call(*held_out).err and said in call(*held_out, "-c", 512).err
        for more in (("-c", 2048), ("--sink", 0, "--recent", 0)):
            result = call(*held_out, *more)
            assert result.status is None and said not in result.err


def test_a_record_that_is_not_whole_is_refused(tmp_path):
    for name in ("needle", "bench"):
        what = importlib.import_module(f"mlx_turbokv.cli.{name}").WHAT
        for more in ({}, {"summary": 3}, {"rows": [{}]}, {"configs": None}):
            (tmp_path / "r.json").write_text(json.dumps({"what": what, **more}))
            said = refused(name, "--from", tmp_path / "r.json")
            assert "is not a whole record" in said
        (tmp_path / "r.json").write_text("[" * 100_000)
        assert "not a JSON file" in refused(name, "--from", tmp_path / "r.json")


def test_help_names_the_environment_variable():
    for name in ("generate", "doctor", "serve", "perplexity"):
        assert "TURBOKV_BACKEND" in " ".join(call(command_of(name), "--help").out.split())


def test_auto_that_is_given_is_not_the_environments(monkeypatch, tiny):
    model = tiny_model("llama", num_hidden_layers=2, head_dim=64)
    monkeypatch.setenv("TURBOKV_BACKEND", "metal")  # which is missing here
    assert configuration.prepare(model, "q8_0/turbo2", "auto").backend == "reference"
    with pytest.raises(InputError, match="metal"):
        configuration.prepare(model, "q8_0/turbo2")


def test_what_a_record_of_needles_lacks_is_named(tiny, tmp_path):
    path = tmp_path / "r.json"
    args = ("needle", "--text", tiny, "-c", 800, "--depths", 1, "--config", "f16/f16")
    assert call(*args, "--json", path).status == 0
    record = json.loads(path.read_text())
    assert call("needle", "--from", path).status == 0
    for key in record:
        path.write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        result = call("needle", "--from", path)
        assert result.status == 0 or "is not a" in result.error()
    path.write_text(json.dumps(record | {"not_measured": "x"}))
    assert "is not a whole record" in refused("needle", "--from", path)
