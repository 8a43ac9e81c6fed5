"""The generate command: what it prints, the prompt cache file, and bad input."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys

import click
import mlx.core as mx
import numpy as np
import pytest
from gguf_files import small_model, write_small_gguf
from mlx_lm import generate as mlx_lm_generate
from mlx_lm.generate import setup_arg_parser
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

from mlx_turbokv.cli import group
from mlx_turbokv.cli.entry import run
from mlx_turbokv.cli.generate import command
from mlx_turbokv.errors import InputError
from mlx_turbokv.loading import models
from mlx_turbokv.policy.settings import DEFAULT, PAIRS


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model with random weights, which never stops by itself for long."""
    return str(write_small_gguf(tmp_path_factory.mktemp("cli")))


@pytest.fixture
def call(capsys, small):
    def call(*args, model=small):
        given = ["--model", model, *map(str, args)] if model else [*map(str, args)]
        with pytest.raises(SystemExit) as ended:
            run(command, given)
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return call


def _answer(out: str) -> str:
    return out.split("==========\n")[1].removesuffix("\n")


def _bad(result, *words):
    status, out, err = result
    assert status == 2
    assert out == ""
    error = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(error) == 1 and "Traceback" not in err
    for word in words:
        assert word in error[0]


def test_closing_lines(call):
    status, out, err = call("-p", "the", "-m", 5, "--no-calibrate")
    assert status == 0
    lines = out.split("==========\n")[2].splitlines()
    assert re.fullmatch(r"Prompt: 1 tokens, [\d.]+ tokens-per-sec", lines[0])
    assert re.fullmatch(r"Generation: \d tokens, [\d.]+ tokens-per-sec", lines[1])
    assert re.fullmatch(r"Peak memory: [\d.]+ GB", lines[2])
    assert re.fullmatch(
        r"KV cache: \d tokens, [\d.]+ MiB, [\d.]+% of f16 \([\d.]+ MiB\), [\d.]+ MiB resident, "
        rf"[\d.]+ bits per value, {DEFAULT} \(2 x {'/'.join(PAIRS[DEFAULT])} layers\), "
        r"\d tokens protected, keys not centred, \w+ back-end",
        lines[3],
    )


def test_f16_text_is_mlx_lm_s(call, small):
    loaded = models.load(small)
    want = mlx_lm_generate(loaded.model, loaded.tokenizer, "the", max_tokens=12)
    status, out, _ = call("-p", "the", "-m", 12, "-ctk", "f16", "-ctv", "f16")
    assert (status, _answer(out)) == (0, want)


def test_counted_bytes_and_bits(call):
    pair = ("-ctk", "turbo4", "-ctv", "turbo3", "--no-calibrate")
    _, out, _ = call("-p", "the", "-m", 5, *pair, "--sink", 0, "--recent", 0)
    tokens = int(re.search(r"KV cache: (\d+) tokens", out).group(1))
    # 2 layers of 2 heads of 16 dimensions for K and for V, 16 bits each.
    f16 = tokens * 2 * 2 * 32 * 2
    assert f"{f16 * 4.5 / 16 / 2**20:.4f} MiB, 28.1% of f16 ({f16 / 2**20:.4f} MiB)" in out
    # A scale of 16 bits for every 16 values beside 4 and 3 bits.
    assert "4.50 bits per value, turbo4/turbo3+0,0 (2 x turbo4/turbo3 layers), 0 tokens" in out
    _, out, _ = call("-p", "the", "-m", 5, *pair)  # all of them are protected
    said = f"turbo4/turbo3 (2 x turbo4/turbo3 layers), {tokens} tokens protected"
    assert f"9.00 bits per value, {said}" in out
    _, out, _ = call("-p", "the", "-m", 5, *pair, "--max-kv-size", 64)  # a window protects none
    assert "4.50 bits per value" in out and "layers), 0 tokens protected" in out
    _, out, _ = call("-p", "the", "-m", 5, "-ctk", "q8_0", "-ctv", "f16")
    assert "protected" not in out


def test_not_verbose_prints_the_text_alone(call):
    _, out, _ = call("-p", "the", "-m", 6)
    assert call("-p", "the", "-m", 6, "--verbose", "False")[1] == _answer(out) + "\n"


def test_prompt_from_standard_input(call, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"the")))
    assert _answer(call("-p", "-", "-m", 6)[1]) == _answer(call("-p", "the", "-m", 6)[1])


def test_seed_repeats_the_sampling(call):
    texts = {_answer(call("-p", "the", "-m", 12, "--temp", 2, "--seed", 3)[1]) for _ in range(2)}
    assert len(texts) == 1


def test_extra_end_token_stops(call):
    text = _answer(call("-p", "the", "-m", 12)[1])
    stopped = _answer(call("-p", "the", "-m", 12, "--extra-eos-token", text[2])[1])
    assert stopped == text[: text.index(text[2])]


def test_speculative_decoding_gives_the_same_text(call, small):
    plain = _answer(call("-p", "the", "-m", 10, "-ctk", "q8_0", "-ctv", "q8_0")[1])
    _, out, _ = call("-p", "the", "-m", 10, "-ctk", "q8_0", "-ctv", "q8_0", "--draft-model", small)
    assert _answer(out) == plain
    assert "2 x q8_0/q8_0 layers" in out


@pytest.mark.parametrize("formats", [("f16", "f16"), ("q8_0", "turbo2")])
def test_prompt_cache_file_goes_on_where_it_stopped(call, tmp_path, formats):
    file = tmp_path / "cache.safetensors"
    # with protected tokens the text would depend on where the prompt was cut
    options = ("-ctk", formats[0], "-ctv", formats[1], "--sink", 0, "--recent", 0)
    first = _answer(call("-p", "the", "-m", 6, "--prompt-cache-file", file, *options)[1])
    status, out, _ = call("-p", "cat", "-m", 6, "--prompt-cache-file", file)
    whole = _answer(call("-p", f"the{first}cat", "-m", 6, *options)[1])
    assert (status, _answer(out)) == (0, whole)
    assert "as in cache.safetensors" in out
    assert [p.name for p in tmp_path.iterdir()] == [file.name]


def test_a_conversation_goes_on_with_the_chat_template(call, tmp_path):
    file = tmp_path / "chat.safetensors"
    common = ("-m", 6, "--prompt-cache-file", file, "-ctk", "q8_0", "-ctv", "q8_0")
    status, first, err = call("-p", "Name a fruit.", *common, model=None)
    assert status == 0, err
    status, out, err = call("-p", "Another?", *common, model=None)
    assert status == 0, err
    n_prompt, n_held = (
        int(re.search(pattern, out).group(1)) for pattern in (r"Prompt: (\d+)", r"cache: (\d+)")
    )
    assert n_prompt < 20 < n_held  # the first turn was not read again


@pytest.fixture
def saved(call, tmp_path):
    file = tmp_path / "cache.safetensors"
    assert call("-p", "the", "-m", 3, "--prompt-cache-file", file)[0] == 0
    return file


def test_truncated_prompt_cache(call, saved):
    data = saved.read_bytes()
    for size in (0, 4, 100, len(data) // 2, len(data) - 1):
        saved.write_bytes(data[:size])
        _bad(call("-p", "a", "--prompt-cache-file", saved), str(saved))


def test_foreign_prompt_caches(call, saved):
    saved.write_bytes(b"not a cache at all, but long enough to have a header")
    _bad(call("-p", "a", "--prompt-cache-file", saved), "not a prompt cache")
    mx.save_safetensors(str(saved), {"x": mx.zeros((2, 2))})
    _bad(call("-p", "a", "--prompt-cache-file", saved), str(saved))
    save_prompt_cache(str(saved), make_prompt_cache(small_model("llama")[0]))
    _bad(call("-p", "a", "--prompt-cache-file", saved), str(saved))


def test_mismatched_prompt_caches(call, saved, tmp_path):
    _bad(call("-p", "a", "--prompt-cache-file", saved, "-ctv", "turbo2"), "/turbo2")
    other = str(write_small_gguf(tmp_path, "qwen2"))
    _bad(call("-p", "a", "--prompt-cache-file", saved, model=other), "belongs to the model")


def test_prompt_cache_file_that_cannot_be_written(call, tmp_path):
    _bad(call("--prompt-cache-file", tmp_path / "no" / "c.safetensors"), "cannot be written")
    _bad(call("--prompt-cache-file", tmp_path / "c.bin"), ".safetensors")


def test_context_above_the_limit_is_a_warning(call, small, tmp_path):
    path = write_small_gguf(tmp_path, context=4)
    status, _, err = call("-p", "the", "-m", 8, model=str(path))
    assert status == 0
    assert re.search(r"Warning: .* beyond the 4 positions", err)


def test_more_than_the_memory_is_a_warning(call, monkeypatch):
    assert "expected to take" not in call("-p", "the", "-m", 4)[2]
    monkeypatch.setattr("mlx_turbokv.loading.memory.default_limit", lambda: 200_000)
    status, _, err = call("-p", "the", "-m", 4)
    assert status == 0
    assert re.search(r"Warning: 5 tokens are expected to take .* there are 0.20 MB", err)


def test_max_kv_size_bounds_the_cache_and_not_the_text(call, tmp_path):
    _, out, _ = call("-p", "the", "-m", 400, "--max-kv-size", 64, "--policy", "la-v7")
    assert "tokens, 64 of them kept, " in out
    pattern = r"KV cache: (\d+) tokens, .* of f16 \(([\d.]+) MiB\), ([\d.]+) MiB resident"
    tokens, f16, resident = map(float, re.search(pattern, out).groups())
    assert tokens > 300
    a_token = 2 * 2 * 32 * 2 / 2**20  # in f16: 2 layers, 2 heads, 32 values of K and V
    assert f16 == pytest.approx(64 * a_token, abs=1e-4) and resident < 200 * a_token
    file = tmp_path / "c.safetensors"
    options = ("-m", 3, "--prompt-cache-file", file)
    assert call("-p", "the", "--max-kv-size", 64, *options)[0] == 0
    assert call("-p", "cat", "--max-kv-size", 64, *options)[0] == 0
    _bad(call("-p", "cat", *options), "a window of 64 tokens", "--max-kv-size")


def test_a_draft_model_is_refused_beyond_a_window(call, small):
    policy = ("--policy", "la-v7")  # keys of windows are not centred
    draft = ("--draft-model", small, "--max-kv-size", 16, *policy)
    _bad(call("-p", "the", "-m", 30, *draft), "beyond a window of 16 tokens")
    plain = _answer(call("-p", "the", "-m", 5, *policy)[1])
    assert _answer(call("-p", "the", "-m", 5, *draft)[1]) == plain


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (("-ctk", "q3"), "q3"),
        (("--policy", "la-v99"), "la-v99"),
        (("--boundary", "5,5"), "5"),
        (("--max-tokens", 0), "--max-tokens 0"),
        (("--top-p", 2), "2"),
        (("--bogus",), "--bogus"),
        (("--extra-eos-token", "<|none|>"), "<|none|>"),
        (("--chat-template-config", "[1"), "[1"),
        (("--chat-template-config", "[1]"), "[1]"),
        (("--prompt", ""), "prompt is empty"),
        (("--adapter-path", "/absent"), "/absent"),
        (("--draft-model", "/absent.gguf", "-p", "a"), "/absent.gguf"),
        (("--backend", "abacus"), "abacus"),
    ],
)
def test_bad_options(call, args, word):
    _bad(call(*args), word)


def test_options_have_the_defaults_of_mlx_lm(call):
    ours = command.make_context("generate", []).params
    theirs = vars(setup_arg_parser().parse_args([]))
    shared = ours.keys() & theirs.keys()
    assert len(shared) == 24 and {k: ours[k] for k in shared} == {k: theirs[k] for k in shared}
    status, out, _ = call("--help", model=None)
    assert status == 0 and "-m, --max-tokens INTEGER" in out and "[default: 100]" in out


def test_missing_and_nan_models(call, tmp_path):
    _bad(call(model="/absent.gguf"), "/absent.gguf")
    path = write_small_gguf(tmp_path, edit=lambda w: w["model.norm.weight"].put(0, np.nan))
    _bad(call(model=str(path)), "NaN", "model.norm.weight")


def _ending(error) -> int:
    @click.command()
    def failing() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run(failing, [])
    return ended.value.code


def test_statuses_of_other_endings(capsys):
    assert _ending(InputError("No.")) == 2
    assert _ending(KeyboardInterrupt()) == 130
    assert _ending(FileNotFoundError(2, "No such file", "x.txt")) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "Error: x.txt cannot be used (No such file)."
    with pytest.raises(ZeroDivisionError):  # a defect of ours keeps its traceback
        _ending(ZeroDivisionError())


def test_the_group_lists_its_commands_without_loading_mlx():
    code = (
        "import sys; from mlx_turbokv.cli import group; "
        "print('generate' in group.list_commands(None), 'mlx.core' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.split() == ["True", "False"]
    assert group.get_command(None, "entry") is None
    assert all(group.get_command(None, name).name == name for name in group.list_commands(None))


def test_fifos_and_devices_are_refused(call, tmp_path):
    fifo = tmp_path / "fifo.safetensors"
    os.mkfifo(fifo)
    link = tmp_path / "link.safetensors"
    link.symlink_to("/dev/zero")
    for path in (fifo, link):
        _bad(call("-p", "a", "--prompt-cache-file", path), str(path), "not a regular file")
    policy = tmp_path / "policy.json"
    os.mkfifo(policy)
    _bad(call("-p", "a", "--policy", policy), str(policy), "not a regular file")
    keys = tmp_path / "p.keys.json", tmp_path / "p.keys.safetensors"
    for path in keys:
        os.mkfifo(path)
    _bad(call("-p", "a", "-ctk", "turbo4", "--keys", keys[0]), str(keys[0]))
    gguf = tmp_path / "model.gguf"
    os.mkfifo(gguf)
    _bad(call("-p", "a", model=str(gguf)), str(gguf))
    _bad(call("-p", "a", "--draft-model", gguf), str(gguf))
    folder = tmp_path / "model"
    folder.mkdir()
    os.mkfifo(folder / "config.json")
    _bad(call("-p", "a", model=str(folder)), str(folder))
    (folder / "config.json").unlink()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    os.mkfifo(folder / "model.safetensors")
    _bad(call("-p", "a", model=str(folder)), str(folder))
    adapters = tmp_path / "adapters"
    adapters.mkdir()
    os.mkfifo(adapters / "adapter_config.json")
    _bad(call("-p", "a", "--adapter-path", adapters), str(adapters))


def test_a_link_to_a_prompt_cache_stays(call, saved, tmp_path):
    link = tmp_path / "link.safetensors"
    link.symlink_to(saved.name)
    saved.chmod(0o640)
    before = saved.read_bytes()
    assert call("-p", "a", "-m", 2, "--prompt-cache-file", link)[0] == 0
    assert link.is_symlink() and saved.read_bytes() != before
    assert saved.stat().st_mode & 0o777 == 0o640
