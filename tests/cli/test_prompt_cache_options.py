"""Cache options beside a prompt cache file: honoured, equal to what it holds, or refused."""

from __future__ import annotations

from unittest import mock

import mlx.core as mx
import pytest
from chat_models import write_chat_folder
from command_calls import call
from mlx_lm.models.cache import load_prompt_cache

from mlx_turbokv import make_prompt_cache
from mlx_turbokv.cache import files
from mlx_turbokv.cache.base import PackedCache
from mlx_turbokv.cache.summary import leaves
from mlx_turbokv.centring.references import References, save_references
from mlx_turbokv.loading import models
from mlx_turbokv.model.fingerprint import fingerprint
from mlx_turbokv.policy.files import write_layer_list

N_LAYERS, HEAD_DIM = 3, 32
FORMATS = ("-ctk", "turbo4", "-ctv", "turbo3")


@pytest.fixture(scope="module", autouse=True)
def remembered(tmp_path_factory):
    """Keys that are measured at first use are remembered here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TURBOKV_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    return str(write_chat_folder(path, "llama", head_dim=HEAD_DIM))


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    path = tmp_path_factory.mktemp("sliding") / "tiny"
    return str(write_chat_folder(path, "gemma3_text", head_dim=HEAD_DIM))


@pytest.fixture(scope="module")
def keys(folder, tmp_path_factory):
    """Two files of key references of the model, by name."""
    model, found = models.load(folder).model, {}
    heads = model.args.num_key_value_heads
    for seed, name in enumerate(("one", "two")):
        path = tmp_path_factory.mktemp("keys") / name
        means = {
            i: mx.random.normal((heads, HEAD_DIM), key=mx.random.key(10 * seed + i))
            for i in range(N_LAYERS)
        }
        save_references(path, References(means, frozenset(), fingerprint(model)))
        found[name] = path
    return found


def made(folder, file, *options):
    """A prompt cache file of these options."""
    args = ("--prompt", "the quick", "--prompt-cache-file", file, *options)
    result = call("cache_prompt", "--model", folder, *args)
    assert result.status == 0, result.err
    return file


def going_on(folder, file, *options):
    args = ("-p", "a", "-m", 2, "--prompt-cache-file", file, *options)
    return call("generate", "--model", folder, *args)


def test_the_references_of_a_file_are_accepted_and_others_refused(folder, keys, tmp_path):
    file = made(folder, tmp_path / "c.safetensors", *FORMATS, "--keys", keys["one"])
    same = going_on(folder, file, "--keys", keys["one"])
    assert same.status == 0 and "keys centred by calibrated mean" in same.out, same.err
    assert going_on(folder, file).status == 0
    with mock.patch("mlx_turbokv.cli.streaming.turn") as turn:
        sentence = going_on(folder, file, "--keys", keys["two"]).error()
    assert str(file) in sentence and str(keys["two"]) in sentence and not turn.called


def test_references_are_refused_where_a_file_has_none(folder, keys, tmp_path):
    whole = made(folder, tmp_path / "whole.safetensors", *FORMATS, "--no-centre")
    assert str(keys["one"]) in going_on(folder, whole, "--keys", keys["one"]).error()
    q8 = made(folder, tmp_path / "q8.safetensors", "-ctk", "q8_0", "-ctv", "turbo3")
    assert "no effect" in going_on(folder, q8, "--keys", keys["one"]).error()


def test_references_beside_a_policy_file_are_compared_too(folder, keys, tmp_path):
    policy, file = tmp_path / "p.json", tmp_path / "c.safetensors"
    write_layer_list(policy, [("turbo4", "turbo3")] * N_LAYERS)
    made(folder, file, "--policy", policy, "--keys", keys["one"])
    assert going_on(folder, file, "--policy", policy).status == 0
    for end in ("safetensors", "json"):
        beside = tmp_path / f"p.keys.{end}"
        beside.write_bytes(keys["two"].with_name(f"two.keys.{end}").read_bytes())
    assert "p.keys.json" in going_on(folder, file, "--policy", policy).error()
    assert going_on(folder, file, "--policy", policy, "--keys", keys["one"]).status == 0


def test_chat_refuses_references_of_others_and_goes_on(folder, keys, tmp_path):
    file = made(folder, tmp_path / "c.safetensors", *FORMATS, "--keys", keys["one"])
    with mock.patch("builtins.input", side_effect=[f"/load {file}", "q"]):
        result = call("chat", "--model", folder, "--keys", keys["two"])
    assert result.status == 0 and "Loaded" not in result.out
    assert str(keys["two"]) in result.err


def test_windows_of_a_file_stay_as_they_are(sliding, tmp_path):
    plain = made(sliding, tmp_path / "plain.safetensors")
    sentence = going_on(sliding, plain, "--compress-sliding").error()
    assert "--compress-sliding" in sentence and str(plain) in sentence
    packed = made(sliding, tmp_path / "packed.safetensors", "--compress-sliding")
    assert going_on(sliding, packed, "--compress-sliding").status == 0


def test_the_back_end_reaches_every_packed_layer_of_a_file(sliding, tmp_path):
    """Also a window that new caches of the same options would not pack."""
    file = made(sliding, tmp_path / "c.safetensors", "--compress-sliding")
    model, held = models.load(sliding).model, load_prompt_cache(str(file))
    packed = [cache for cache in leaves(held) if isinstance(cache, PackedCache)]
    for cache in packed:
        cache._backend_name = "another"
    files.work_as(held, make_prompt_cache(model, backend="reference"))
    assert len(packed) == len(held)
    assert {cache._backend_name for cache in packed} == {"reference"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (("-ctk", "turbo5"), "turbo5"),
        (("--policy", "compact"), "turbo3/turbo2"),
        (("--sink", "64"), "64 first"),
        (("--recent", "0"), "0 newest"),
        (("--no-centre",), "--no-centre has no effect"),
        (("--max-kv-size", "64"), "--max-kv-size"),
        (("--keys", "two"), "two"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "mlx_lm.generate"])
def test_what_a_file_contradicts_is_refused(folder, keys, tmp_path, command, options, word):
    file = made(folder, tmp_path / "c.safetensors", "--keys", keys["one"])
    options = [keys.get(x, x) for x in options]
    if command == "generate":
        result = going_on(folder, file, *options)
    else:
        rest = ("--model", folder, "--prompt", "a", "-m", 2, "--prompt-cache-file", file)
        own = () if options[0] != "--max-kv-size" else options
        options = () if own else options
        result = call("run", *options, "--", command, *rest, *own)
    sentence = result.error()
    assert word in sentence and str(file) in sentence


def test_the_environments_policy_is_asked_for_as_an_options_is(folder, tmp_path, monkeypatch):
    file = made(folder, tmp_path / "c.safetensors", "--no-centre")
    monkeypatch.setenv("TURBO_LAYER_ADAPTIVE", "7")
    said = going_on(folder, file).error()
    assert "q8_0" in said and "TURBO_LAYER_ADAPTIVE" in said
    monkeypatch.setenv("TURBO_LAYER_ADAPTIVE", "")
    assert going_on(folder, file).status == 0


def test_convert_cache_packs_no_windows_of_a_packed_file(sliding, tmp_path):
    file = made(sliding, tmp_path / "c.safetensors")
    args = (file, tmp_path / "d.safetensors", "--model", sliding, "--compress-sliding")
    assert "--compress-sliding has no effect" in call("convert_cache", *args).error()
