"""Conversations in prompt cache files: of models whose caches cannot be trimmed, and of mlx-lm."""

from __future__ import annotations

import json
import re

import mlx.core as mx
import pytest
from chat_models import DROPPED, answers_read_at_once, write_chat_folder
from command_calls import call
from mlx_lm import stream_generate
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache, save_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_caches
from safetensors_files import edit

from mlx_turbokv import make_prompt_cache
from mlx_turbokv.cache import files
from mlx_turbokv.cache.file_options import Asked
from mlx_turbokv.loading import models

HYBRIDS = ["qwen3_5", "qwen3_next", "lfm2", "gemma3_text"]
FORMATS = ("-ctk", "q8_0", "-ctv", "q8_0")
QUESTIONS = ["the quick brown fox jumps over the lazy dog", "and the cat?", "who else"]
N = 9


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Model folders by architecture, made when they are asked for."""
    made = {}

    def folder(name, **options):
        key = name, *sorted(options.items())
        if key not in made:
            path = tmp_path_factory.mktemp(name)
            made[key] = write_chat_folder(path, name, drops=True, **options)
        return made[key]

    return folder


def record(folder, file, question, *more):
    options = ("-m", N, *FORMATS, "--output", "json", *more)
    result = call(
        "generate", "--model", folder, "-p", question, "--prompt-cache-file", file, *options
    )
    assert result.status == 0, result.err
    return json.loads(result.out), result.err


@pytest.mark.parametrize("name", ["llama", *HYBRIDS])
def test_a_template_that_drops_earlier_thinking(folders, tmp_path, name):
    """Each turn goes on from the end of the last question, and nothing is read twice before it."""
    folder, file = folders(name), tmp_path / "c.safetensors"
    expected = answers_read_at_once(folder, QUESTIONS, N)
    n_stable = 0
    for question, (answer, n_prompt) in zip(QUESTIONS, expected):
        found, said = record(folder, file, question)
        assert found["text"] == answer and found["prompt_tokens"] == n_prompt
        assert found["prompt_tokens_read"] <= n_prompt - n_stable and "read from its" not in said
        n_stable = n_prompt - len("[a]")
    assert n_stable > 64  # the windows have moved on


@pytest.mark.parametrize("name", HYBRIDS)
def test_without_a_checkpoint_the_prompt_is_read_again_which_is_said(folders, tmp_path, name):
    folder, file = folders(name), tmp_path / "c.safetensors"
    expected = answers_read_at_once(folder, QUESTIONS[:2], N)
    record(folder, file, QUESTIONS[0], "--system-prompt", "be brief")
    # another system prompt: nothing that was read can stay
    found, said = record(folder, file, QUESTIONS[1], "--system-prompt", "be long")
    lines = [line for line in said.splitlines() if "read from its start" in line]
    assert len(lines) == 1 and f"({found['prompt_tokens']:,} tokens)" in lines[0]
    assert found["prompt_tokens_read"] == found["prompt_tokens"]
    assert found["kv_cache"]["pairs"].keys() == {"q8_0/q8_0"}
    assert found["prompt_tokens"] > expected[1][1]
    saved = files.load(
        file, folder.name, models.load(str(folder)).model,
        make_prompt_cache(models.load(str(folder)).model, "q8_0", "q8_0"), Asked(formats=True),
    )  # fmt: skip
    assert saved.checkpoint is not None and saved.checkpoint.n_tokens < len(saved.tokens)


@pytest.mark.parametrize("name", HYBRIDS)
def test_wrong_checkpoints_are_refused(folders, tmp_path, name):
    folder, file = folders(name), tmp_path / "c.safetensors"
    record(folder, file, QUESTIONS[0])

    def refused(change):
        before = file.read_bytes()
        edit(file, change)
        result = call("generate", "--model", folder, "-p", "a", "--prompt-cache-file", file)
        file.write_bytes(before)
        return result.error()

    for value in ("-1", "x", "99999", None):

        def change(arrays, metadata, value=value):
            metadata.pop("0.checkpoint")
            if value is not None:
                metadata["0.checkpoint"] = value

        assert "checkpoint" in refused(change)
    if name == "gemma3_text":  # a window says how many tokens it was given
        assert "tokens" in refused(lambda a, m: m.update({"0.checkpoint": "3"}))
    last = max(int(key.split(".")[1]) for key in _classes(file))
    classes = {"KVCache", "RotatingKVCache", "ArraysCache", "Path"} - {_classes(file)[f"1.{last}"]}
    for other in classes:
        refused(lambda a, m, other=other: m.update({f"1.{last}": other}))


def _classes(file):
    found = {}
    edit(file, lambda arrays, metadata: found.update(metadata))
    return {key: value for key, value in found.items() if key.startswith("1.")}


def mlx_lm_prompt(folder, file, bits=None, max_kv_size=None, text=QUESTIONS[0], **tokenizer_config):
    """What mlx_lm.cache_prompt writes, and its caches."""
    loaded = models.load(str(folder))
    prompt = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], continue_final_message=True
    )
    caches = mlx_lm_caches(loaded.model)
    if max_kv_size:
        caches = [RotatingKVCache(max_kv_size, keep=4) for _ in caches]
    mx.eval(loaded.model(mx.array([prompt]), cache=caches))
    if bits:
        caches = [c.to_quantized(32, bits) if type(c) is KVCache else c for c in caches]
    save_prompt_cache(
        str(file), caches, {"model": str(folder), "tokenizer_config": json.dumps(tokenizer_config)}
    )
    return loaded, prompt, caches


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next"])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_file_of_mlx_lms_is_packed_and_stays(folders, tmp_path, name, bits):
    """The answer is that of rows packed by hand and the same suffix, as mlx_lm.generate cuts it."""
    folder, file = folders(name, head_dim=32), tmp_path / "theirs.safetensors"
    loaded, prompt, caches = mlx_lm_prompt(folder, file, bits)
    before = file.read_bytes()
    found, said = record(folder, file, "\nwhy the fox?")
    packed = make_prompt_cache(loaded.model, "q8_0", "q8_0")
    growing = 0
    for at, held in enumerate(caches):
        if isinstance(held, QuantizedKVCache):
            rows = [mx.dequantize(*x, 32, bits) for x in (held.keys, held.values)]
        elif type(held) is KVCache:
            rows = [held.keys, held.values]
        else:
            packed[at] = held
            continue
        packed[at].update_and_fetch(*(x[:, :, : held.offset] for x in rows))
        growing += 1
    suffix = loaded.tokenizer.encode("\nwhy the fox?\n[a]", add_special_tokens=False)
    parts = stream_generate(
        loaded.model, loaded.tokenizer, suffix, max_tokens=N, prompt_cache=packed
    )
    assert found["text"] == "".join(part.text for part in parts)
    assert found["prompt_tokens_read"] == len(suffix)
    assert found["prompt_tokens"] == len(prompt) + len(suffix)
    assert found["kv_cache"]["pairs"] == {"q8_0/q8_0": growing}
    assert f"a prompt of {len(prompt)} tokens, which are packed in {growing} layers" in said
    assert file.read_bytes() == before


def test_files_of_mlx_lms_that_do_not_fit(folders, tmp_path):
    folder, file = folders("llama", head_dim=32), tmp_path / "theirs.safetensors"
    options = ("-m", 2, "--prompt-cache-file", file, "-p", "a")
    mlx_lm_prompt(folder, file)
    other = folders("llama", head_dim=16)
    assert "belongs to the model" in call("generate", "--model", other, *options).error()
    edit(file, lambda a, m: m.update({"0.model": str(other)}))
    assert "the model" in call("generate", "--model", other, *options).error()
    mlx_lm_prompt(folder, file)
    said = call("generate", "--model", folder, *options, "--system-prompt", "b").error()
    assert "system prompt" in said
    mlx_lm_prompt(folder, file, max_kv_size=64)
    assert "a window of 64" in call("generate", "--model", folder, *options).error()
    said = call("generate", "--model", folder, *options, "--max-kv-size", 64).error()
    assert "mlx_turbokv.cache_prompt" in said
    loaded, _, caches = mlx_lm_prompt(folder, file, bits=8)
    for broken in ({"bits": 7}, {"group_size": 48}, {"offset": 9999}, {"keys": caches[0].keys[:2]}):
        _, _, caches = mlx_lm_prompt(folder, file, bits=8)
        vars(caches[0]).update(broken)
        save_prompt_cache(str(file), caches, {"model": str(folder), "tokenizer_config": "{}"})
        assert str(file) in call("generate", "--model", folder, *options).error()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next"])
def test_cache_prompt_serves_any_number_of_questions(folders, tmp_path, name):
    folder, file = folders(name), tmp_path / "p.safetensors"
    common = ("--model", folder, "--prompt-cache-file", file, *FORMATS)
    result = call("cache_prompt", *common, "--prompt", "-", stdin=b"the fox")
    assert result.status == 0, result.err
    assert re.search(r"KV cache: 8 tokens, .*% of f16", result.out) and "Saved" in result.out
    before = file.read_bytes()
    for question in (" jumps?", "\nwhy"):
        found, said = record(folder, file, question)
        [(answer, n_prompt)] = answers_read_at_once(folder, ["the fox" + question], N)
        assert found["text"] == answer and found["prompt_tokens"] == n_prompt
        assert found["prompt_tokens_read"] == n_prompt - 8
        assert "p.safetensors holds a prompt of 8 tokens; the file stays as it is" in said
        assert file.read_bytes() == before


@pytest.mark.parametrize("maker", ["ours", "mlx-lm's"])
def test_the_end_token_of_a_prompt_ends_its_answers(folders, tmp_path, maker):
    """--eos-token goes into the file; mlx_lm.generate, which reads it there, is the oracle."""
    folder, file = folders("llama", head_dim=32), tmp_path / "p.safetensors"
    common = ("--model", folder, "--prompt-cache-file", file)
    made = ("cache_prompt", *common, "--prompt", "the fox")
    assert call(*made, *FORMATS).status == 0
    whole = record(folder, file, " jumps?")[0]["text"]
    token = next(c for c in whole[1:] if not c.islower())  # of one letter, as no merge has it
    if maker == "ours":
        assert call(*made, *FORMATS, "--eos-token", token).status == 0
    else:
        mlx_lm_prompt(folder, file, text="the fox", eos_token=token)
    found, _ = record(folder, file, " jumps?")
    assert found["text"] == whole[: whole.index(token)] and found["finish_reason"] == "stop"
    asked = ("--prompt", " jumps?", "-m", N)
    theirs = call("run", *FORMATS, "--", "mlx_lm.generate", *common, *asked)
    assert theirs.status == 0 and theirs.out.split("=" * 10)[1].strip() == found["text"].strip()


def test_the_end_token_of_a_prompt_goes_where_its_caches_go(folders, tmp_path, monkeypatch):
    """Into files of /save and convert_cache; a file without one brings the model's own back."""
    monkeypatch.chdir(tmp_path)
    folder = folders("llama", head_dim=32)
    made = ("cache_prompt", "--model", folder, "--prompt", "the fox", *FORMATS)
    assert call(*made, "--prompt-cache-file", "a.safetensors", "--eos-token", "q").status == 0
    assert call(*made, "--prompt-cache-file", "b.safetensors").status == 0
    typed = "/load a\nwhy\n/save c\n/load b\nwhy\n/save d\nq\n"
    assert call("chat", "--model", folder, "-m", N, stdin=typed.encode()).status == 0
    convert = ("convert_cache", "--model", folder)
    assert call(*convert, "a.safetensors", "e.safetensors").status == 0
    assert call(*convert, "e.safetensors", "f.safetensors").status == 0
    for name, expected in {"c": {"eos_token": "q"}, "d": {}, "e": {"eos_token": "q"}}.items():
        found = {}
        edit(tmp_path / f"{name}.safetensors", lambda a, m, found=found: found.update(m))
        assert json.loads(found["0.tokenizer_config"]) == expected, name
    edit(tmp_path / "f.safetensors", lambda a, m: found.update(m))
    assert json.loads(found["0.tokenizer_config"]) == {"eos_token": "q"}


def test_end_tokens_that_are_none(folders, tmp_path):
    folder, file = folders("llama"), tmp_path / "p.safetensors"
    made = ("cache_prompt", "--model", folder, "--prompt-cache-file", file, "--prompt", "the fox")
    for token in ("<|none|>", ""):
        assert f"--eos-token {token!r} is no token of" in call(*made, "--eos-token", token).error()
        assert not file.exists()
    assert call(*made, "--eos-token", "q").status == 0
    before = file.read_bytes()
    for config in ("{", "[]", '{"eos_token": 3}', '{"eos_token": "<|none|>"}'):
        edit(file, lambda a, m, config=config: m.update({"0.tokenizer_config": config}))
        said = call("generate", "--model", folder, "-p", "a", "--prompt-cache-file", file).error()
        assert str(file) in said and "token" in said
        file.write_bytes(before)


def test_cache_prompt_needs_a_prompt_and_a_file(folders, tmp_path):
    folder = folders("llama")
    file = tmp_path / "p.safetensors"
    assert (
        "--prompt" in call("cache_prompt", "--model", folder, "--prompt-cache-file", file).error()
    )
    assert "--prompt-cache-file" in call("cache_prompt", "--prompt", "a").error()
    options = ("cache_prompt", "--model", folder, "--prompt")
    assert "is empty" in call(*options, "", "--prompt-cache-file", file).error()
    assert ".safetensors" in call(*options, "a", "--prompt-cache-file", "x.bin").error()
    assert "-ctk turbo4" in call(*options, "a", "--prompt-cache-file", file, "--kv-bits", 4).error()


def test_the_json_of_generate_is_its_text_and_its_cache(folders, tmp_path):
    folder = folders("llama")
    common = ("generate", "--model", folder, "-p", QUESTIONS[0], "-m", N, "-ctk", "q8_0")
    text = call(*common).out.split("=" * 10 + "\n")[1]
    found = json.loads(call(*common, "--output", "json").out)
    assert found["text"] + "\n" == text and found["finish_reason"] in ("stop", "length")
    cache = found["kv_cache"]
    assert cache["tokens"] == found["prompt_tokens"] + found["generation_tokens"]
    assert cache["row_bytes"] == pytest.approx(
        cache["f16_bytes"] * cache["bits_per_value"] / 16, abs=1
    )
    assert cache["row_bytes"] <= cache["resident_bytes"]
    assert "--verbose has no effect" in call(*common, "--output", "json", "--verbose", "F").error()


def test_dropped_parts_are_dropped(folders):
    loaded = models.load(str(folders("llama")))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "thinking"}]
    text = loaded.tokenizer.apply_chat_template(
        [*messages, {"role": "user", "content": "b"}], tokenize=False
    )
    assert "thinking"[DROPPED:] in text and "thinking" not in text
