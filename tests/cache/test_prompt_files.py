"""Prompt cache files that nobody here wrote: of another model, or with values that are wrong."""

from __future__ import annotations

import resource
import struct
import time

import mlx.core as mx
import pytest
from gguf_files import small_model
from safetensors_files import edit, read_parts, write_parts
from tiny_models import tiny_model

from mlx_turbokv import InputError
from mlx_turbokv.cache import files
from mlx_turbokv.cache.factory import make_prompt_cache
from mlx_turbokv.cache.file_options import Asked

TOKENS = list(range(40))
OPTIONS = {"k": "turbo4", "v": "turbo2", "backend": "reference"}


def model(seed: int = 0, **overrides):
    return small_model("llama", seed, **overrides)[0]


def saved(path, net=None, name="m", **options):
    """A file of a cache that holds TOKENS."""
    net = net or model()
    caches = make_prompt_cache(net, **{**OPTIONS, **options})
    mx.eval(net(mx.array([TOKENS]), cache=caches))
    files.save(path, files.Saved(caches, TOKENS, []), name, net)
    return path


def load(path, net=None, same_formats=False, **options):
    net = net or model()
    fresh = make_prompt_cache(net, **{**OPTIONS, **options})
    return files.load(path, "m", net, fresh, Asked(formats=same_formats))


@pytest.fixture
def path(tmp_path):
    return saved(tmp_path / "c.safetensors")


def number(value: int):
    return "I32", [], struct.pack("<i", value)


def test_a_saved_file_is_read(path):
    assert load(path).tokens == TOKENS
    edit(path, lambda arrays, metadata: metadata.pop("0.fingerprint"))  # an earlier version's
    assert load(path).tokens == TOKENS


@pytest.mark.parametrize(
    "name", ["gemma3_text", "qwen3_next", "mamba2", "falcon_h1", "gpt_oss", "llama4"]
)
@pytest.mark.parametrize("sliding", [False, True])
def test_every_kind_of_cache_is_read_again(tmp_path, name, sliding):
    net = tiny_model(name)
    path = saved(tmp_path / "c.safetensors", net, k="q8_0", v="q8_0", compress_sliding=sliding)
    assert load(path, net, k="q8_0", v="q8_0", compress_sliding=sliding).tokens == TOKENS


def test_another_model_of_the_same_name_and_shape_is_refused(path):
    with pytest.raises(InputError, match="another model that is called 'm' too"):
        load(path, model(seed=1))


@pytest.mark.parametrize("keep_fingerprint", [False, True])
@pytest.mark.parametrize(
    "overrides",
    [{"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"head_dim": 32}],
    ids=lambda x: str(x),
)
@pytest.mark.parametrize("formats", [("turbo4", "turbo2"), ("f16", "f16")])
def test_a_model_of_other_heads_is_refused(tmp_path, overrides, keep_fingerprint, formats):
    path = saved(tmp_path / "c.safetensors", k=formats[0], v=formats[1])
    if not keep_fingerprint:
        edit(path, lambda arrays, metadata: metadata.pop("0.fingerprint"))
    with pytest.raises(InputError):
        load(path, model(**overrides), k=formats[0], v=formats[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a, m: a.update({"0.7": number(1000)}), "layer 0|not the state"),
        (lambda a, m: a.update({"1.7": number(7)}), "layer 1 does not fit: it holds 7 tokens"),
        (lambda a, m: m.update({"0.tokens": "[1, 2]"}), "it holds 40 tokens, and 2 are listed"),
        (lambda a, m: m.update({"0.tokens": "[-2]"}), "does not list the tokens"),
        (lambda a, m: m.update({"0.tokens": "[1, -1]"}), "does not list the tokens"),
        (lambda a, m: m.update({"0.checkpoint": "41"}), "checkpoint is none of its tokens"),
        (lambda a, m: m.update({"0.checkpoint": "x"}), "checkpoint is none of its tokens"),
        (lambda a, m: m.update({"1.2": "KVCache", "0.checkpoint": "3"}), "names 3 caches"),
        (lambda a, m: m.update({"0.tokens": '{"a": 1}'}), "does not list the tokens"),
        (lambda a, m: m.update({"0.tokens": "[" * 99999}), "nested too deeply"),
        (lambda a, m: m.update({"0.messages": '["hello"]'}), "does not list the messages"),
        (lambda a, m: m.update({"0.messages": '[{"role": 1}]'}), "does not list the messages"),
        (lambda a, m: m.pop("0.messages"), "does not list the messages"),
        (lambda a, m: m.update({"1.0": "KVCache"}), "not a prompt cache"),
        (lambda a, m: m.update({"1.0": "Path"}), "not a prompt cache"),
        (lambda a, m: m.update({"1.2": "KVCache"}), "names 3 caches and holds 2"),
        (lambda a, m: m.update({"0.maker": "me"}), "was not saved by"),
        (lambda a, m: m.update({"0.fingerprint": "0"}), "another model"),
        (lambda a, m: a.update({"x": number(0)}), "no part of a cache"),
        (lambda a, m: a.update({"0.30": number(0)}), "not a prompt cache"),
        (lambda a, m: a.update({"0." * 2000 + "0": number(0)}), "nested too deeply"),
        (lambda a, m: a.update({"0.1": ("I32", [9999], bytes(4 * 9999))}), "9,999 characters"),
    ],
)
def test_wrong_values_are_one_sentence(path, change, message):
    edit(path, change)
    with pytest.raises(InputError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def _seconds_and_bytes(path) -> tuple[float, int]:
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError):
        load(path)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return time.process_time() - start, 1024 * (after - before)


@pytest.mark.parametrize(
    "names",
    [
        ["50000000"],
        ["0.50000000"],
        ["0.3.50000000"],
        ["50000000.0"],
        [f"{i}.400000" for i in range(300)],
        [f"0.{i}.0.0" for i in range(300_000)],
    ],
    ids=["a layer", "a value", "a part", "a far layer", "many", "300,000"],
)
def test_names_that_ask_for_much_cost_little(path, names):
    """mlx-lm makes a list as long as the largest index says."""
    edit(path, lambda arrays, metadata: arrays.update({name: number(0) for name in names}))
    seconds, size = _seconds_and_bytes(path)
    assert seconds < 10 and size < 500e6


@pytest.mark.parametrize("key", ["0.{}", "1.{}", "2.{}.0", "{}", "{}.0"])
def test_metadata_that_asks_for_much_costs_little(path, key):
    edit(path, lambda arrays, metadata: metadata.update({key.format(50_000_000): "scalar"}))
    seconds, size = _seconds_and_bytes(path)
    assert seconds < 10 and size < 500e6


def test_a_file_longer_than_its_header_says_is_refused(path):
    content = path.read_bytes()
    for more in (b"\0", b" " * 32, content):
        path.write_bytes(content + more)
        with pytest.raises(InputError, match="damaged"):
            load(path)


def test_a_shape_that_is_not_its_bytes_is_refused(path):
    header, data = read_parts(path)
    name = next(name for name, x in header.items() if name != "__metadata__" and x["shape"])
    entry = header[name]
    begin, end = entry["data_offsets"]
    wrong = [
        {"shape": [1 << 40]},
        {"shape": [2 * n for n in entry["shape"]]},
        {"shape": [-1]},
        {"shape": ["1"]},
        {"shape": [0, 1 << 62]},
        {"shape": None},
        {"dtype": "F64"},
        {"dtype": ["F32"]},
        {"data_offsets": [begin, end + 4]},
        {"data_offsets": [begin + 4, end + 4]},
        {"data_offsets": [0, end - begin]},
        {"data_offsets": [end, begin]},
        {"data_offsets": [-4, 1]},
        {"data_offsets": "01"},
    ]
    for change in wrong:
        if change == {"data_offsets": [begin, end]}:
            continue
        write_parts(path, {**header, name: {**entry, **change}}, data)
        with pytest.raises(InputError, match="damaged"):
            load(path)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"a": 1}', '{"__metadata__": {"a": 1}}', "[" * 100_000,
     '{"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}, '
     '"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}'],
    ids=["empty", "list", "cut", "number", "metadata", "nested", "twice"],
)  # fmt: skip
def test_a_header_that_is_none_is_refused(path, text):
    write_parts(path, text, b"")
    with pytest.raises(InputError, match="damaged"):
        load(path)
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(InputError, match="damaged"):
        load(path)
