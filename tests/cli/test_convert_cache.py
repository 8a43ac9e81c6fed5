"""Prompt cache files converted between mlx-lm's and packed ones."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
from chat_models import write_chat_folder
from command_calls import call
from mlx.utils import tree_flatten
from mlx_lm import stream_generate
from mlx_lm.models.cache import KVCache, load_prompt_cache, save_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_caches

from mlx_turbokv import TurboKVCache
from mlx_turbokv.loading import models

PROMPT = "the quick brown fox jumps over the lazy dog"


@pytest.fixture(scope="module", params=["llama", "gemma3_text", "qwen3_next"])
def folder(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param)
    return str(write_chat_folder(path, request.param, head_dim=32))


def mlx_lm_file(folder, file, bits=None):
    """What mlx_lm.cache_prompt writes; its caches, before they were quantised."""
    loaded = models.load(folder)
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], continue_final_message=True
    )
    caches = mlx_lm_caches(loaded.model)
    mx.eval(loaded.model(mx.array([prompt]), cache=caches))
    held = [c.to_quantized(32, bits) if bits and type(c) is KVCache else c for c in caches]
    save_prompt_cache(str(file), held, {"model": folder, "tokenizer_config": "{}"})
    return caches


def rows(cache):
    return [np.array(x[:, :, : cache.offset]) for x in cache.keys_and_values()]


@pytest.mark.parametrize("bits", [None, 8])
def test_there_and_back(folder, tmp_path, bits):
    theirs, ours, back = (tmp_path / f"{n}.safetensors" for n in ("theirs", "ours", "back"))
    caches = mlx_lm_file(folder, theirs, bits)
    formats = ("-ctk", "q8_0", "-ctv", "turbo6")
    result = call("convert_cache", theirs, ours, "--model", folder, *formats)
    assert result.status == 0, result.err
    assert re.search(r"\d+ tokens, .* q8_0/turbo6 \(\d x q8_0/turbo6 layers\)", result.out)
    packed = load_prompt_cache(str(ours))
    result = call("convert_cache", ours, back, "--model", folder)
    assert result.status == 0, result.err
    growing = 0
    for first, middle, last in zip(caches, packed, load_prompt_cache(str(back)), strict=True):
        if type(first) is not KVCache:  # windows and recurrent states are the same in all
            assert type(first) is type(middle) is type(last)
            for (_, a), (_, b) in zip(tree_flatten(first.state), tree_flatten(last.state)):
                assert a is b or np.array_equal(np.array(a), np.array(b))
            continue
        growing += 1
        assert type(middle) is TurboKVCache and type(last) is KVCache
        assert last.offset == middle.offset == first.offset
        for a, b, c in zip(rows(first), rows(middle), rows(last)):
            assert np.array_equal(b, c)
            assert 0 < np.linalg.norm(a - c) < 0.04 * np.linalg.norm(a)
    assert growing
    generated = call("generate", "--model", folder, "-p", " and", "-m", 6,
                     "--prompt-cache-file", ours)  # fmt: skip
    assert generated.status == 0 and "holds a prompt of" in generated.err


WITHOUT_US = "import sys; from mlx_lm.generate import main; main()"


@pytest.mark.slow
def test_mlx_lm_reads_a_converted_file_without_this_package(tmp_path):
    """And fails on a packed one as docs/python-api.md says."""
    folder = str(write_chat_folder(tmp_path / "m", "llama", head_dim=32))
    ours, back = tmp_path / "ours.safetensors", tmp_path / "back.safetensors"
    made = call("cache_prompt", "--model", folder, "--prompt", PROMPT, "--prompt-cache-file", ours)
    assert made.status == 0
    assert call("convert_cache", ours, back, "--model", folder).status == 0

    def generate(file, model=folder):
        return subprocess.run(
            [sys.executable, "-c", WITHOUT_US, "--model", model, "--prompt-cache-file", file,
             "--prompt", " jumps", "-m", "8"],
            capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
        )  # fmt: skip

    assert "KeyError: 'TurboKVCache'" in generate(ours, "m").stderr
    code = (
        "import sys, mlx_turbokv.cache; from mlx_lm.models.cache import load_prompt_cache; "
        "print({type(c).__name__ for c in load_prompt_cache(sys.argv[1])})"
    )
    run = subprocess.run([sys.executable, "-c", code, ours], capture_output=True, text=True)
    assert run.stdout == "{'TurboKVCache'}\n", run.stderr
    loaded = models.load(folder)
    suffix = loaded.tokenizer.encode(" jumps\n[a]", add_special_tokens=False)
    parts = stream_generate(
        loaded.model, loaded.tokenizer, suffix, max_tokens=8,
        prompt_cache=load_prompt_cache(str(back)),
    )  # fmt: skip
    expected = "".join(part.text for part in parts)
    assert generate(back).stdout.split("=" * 10 + "\n")[1] == expected + "\n"


def test_what_cannot_be_converted_is_one_sentence(tmp_path):
    folder = str(write_chat_folder(tmp_path / "m", "llama", head_dim=32))
    theirs, ours = tmp_path / "t.safetensors", tmp_path / "o.safetensors"
    mlx_lm_file(folder, theirs)
    model = ("--model", folder)
    assert "give two files" in call("convert_cache", theirs, theirs, *model).error()
    assert ".safetensors" in call("convert_cache", theirs, "x.bin", *model).error()
    assert "absent" in call("convert_cache", tmp_path / "absent", ours, *model).error()
    assert call("convert_cache", theirs, ours, *model).status == 0
    before = ours.read_bytes()
    said = call("convert_cache", ours, theirs, *model, "-ctv", "turbo4").error()
    assert "--cache-type-v has no effect" in said and "dequantised" in said
    ours.write_bytes(before[:-5])
    assert str(ours) in call("convert_cache", ours, theirs, *model).error()
    window = tmp_path / "w.safetensors"
    made = call("cache_prompt", *model, "--prompt", PROMPT, "--prompt-cache-file", window,
                "--max-kv-size", 16)  # fmt: skip
    assert made.status == 0
    assert "cannot be converted" in call("convert_cache", window, theirs, *model).error()
