"""Commands measure a model's keys at its first use, and remember them."""

from __future__ import annotations

import io
import sys

import pytest
from characters import loaded
from chat_models import write_chat_folder
from command_calls import call
from planted_mean import counted_runs, planted_model
from server_process import ask, running

from mlx_turbokv.cli.options import centre_from

FORMATS = ("-ctk", "turbo3", "-ctv", "f16", "--backend", "reference")
MEASURING = "Measuring the keys of {}, once"
CENTRED = "keys centred by calibrated mean and scales (3 layers)"


@pytest.fixture(autouse=True)
def remembered(tmp_path, monkeypatch):
    """The folder of remembered keys, of each test's own."""
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "keys"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(write_chat_folder(tmp_path_factory.mktemp("model") / "tiny", "llama", head_dim=32))


@pytest.fixture
def runs(monkeypatch):
    return counted_runs(monkeypatch)


@pytest.fixture
def model(monkeypatch):
    """A tiny model in place of any."""
    made = loaded(planted_model())
    monkeypatch.setattr("mlx_turbokv.loading.models.load", lambda *a, **k: made)


def generated(folder, *options):
    result = call("generate", "--model", folder, "-p", "the quick", "-m", 3, *options)
    assert result.status == 0, result.err
    return result


def test_generate_measures_once_and_says_so_in_its_closing_line(folder, runs):
    first, second = generated(folder, *FORMATS), generated(folder, *FORMATS)
    assert CENTRED in first.out and CENTRED in second.out
    assert MEASURING.format("tiny") in first.err and len(runs) == 1
    assert second.err == ""


def test_no_calibrate_measures_nothing(folder, runs, remembered):
    result = generated(folder, *FORMATS, "--no-calibrate")
    assert "keys not centred" in result.out and result.err == ""
    generated(folder, "-ctk", "q8_0", "-ctv", "turbo2", "--backend", "reference")
    generated(folder, *FORMATS, "--no-centre")
    generated(folder, *FORMATS, "--max-kv-size", 64)
    assert not runs and not remembered.exists()


def test_chat_measures_before_its_first_line(folder, runs, monkeypatch):
    for _ in range(2):
        monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
        assert call("chat", "--model", folder, *FORMATS).status == 0
    assert len(runs) == 1


def test_cache_prompt_and_generate_share_what_is_remembered(folder, runs, tmp_path):
    file = tmp_path / "p.safetensors"
    options = ("--model", folder, "--prompt-cache-file", file)
    result = call("cache_prompt", "--prompt", "the quick", *options, *FORMATS)
    assert CENTRED in result.out, result.err
    assert CENTRED in generated(folder, "--prompt-cache-file", file, *FORMATS).out
    assert len(runs) == 1


@pytest.mark.parametrize("options", [(), ("--no-calibrate",)])
def test_run_measures_what_mlx_lm_loads(options, folder, runs):
    words = ("mlx_lm.generate", "--model", folder, "--prompt", "the quick", "--max-tokens", 3)
    for _ in range(2):
        result = call("run", *FORMATS, *options, "--", *words)
        assert result.status == 0, result.err
        centred = "keys not centred" if options else CENTRED
        assert f"(3 x turbo3/f16 layers), {centred}, reference back-end" in result.err
    assert len(runs) == (not options)


def test_no_centre_is_refused_on_a_file_whose_keys_are_centred(folder, tmp_path):
    centred, plain = (tmp_path / f"{name}.safetensors" for name in ("centred", "plain"))
    generated(folder, *FORMATS, "--prompt-cache-file", centred)
    saved = centred.read_bytes()
    args = ("--model", folder, "-p", "a", "-m", 2, "--no-centre", "--prompt-cache-file")
    sentence = call("generate", *args, centred).error()
    assert "--no-centre has no effect" in sentence and centred.name in sentence
    assert centred.read_bytes() == saved
    generated(folder, *FORMATS, "--no-centre", "--prompt-cache-file", plain)
    assert "keys not centred" in call("generate", *args, plain).out


def test_serve_measures_once(folder, remembered):
    body = {"prompt": "the quick", "max_tokens": 2}
    times = []
    for _ in range(2):
        with running("--model", folder, *FORMATS) as (process, address):
            assert ask(address, "/v1/completions", body)[0] == 200
            said = "".join(process.said)
        assert f"KV cache turbo3/f16, {CENTRED}" in said
        times.append([path.stat().st_mtime_ns for path in sorted(remembered.iterdir())])
        assert (MEASURING.format("tiny") in said) == (len(times) == 1)
    assert times[0] == times[1] and len(times[0]) == 2


def test_evaluations_measure_once(model, runs, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    configs = ("--config", "turbo3/f16", "--config", "q8_0/turbo2", "--config", "turbo4/turbo3")
    result = call(
        "perplexity", "--text", text, "-c", 64, "--chunks", 2, *configs, "--backend", "reference"
    )
    assert f"turbo3/f16, turbo4/turbo3: {CENTRED}" in result.out, result.err
    result = call("bench", "-p", 16, "-g", 2, "-n", 1, *configs, "--backend", "reference")
    assert f"turbo3/f16, turbo4/turbo3: {CENTRED}" in result.out, result.err
    assert len(runs) == 1
    result = call(
        "needle", "-c", 500, "--depths", 1, "--needle", "number", *configs, "--no-calibrate",
        "--backend", "reference",
    )  # fmt: skip
    assert "keys centred" not in result.out and len(runs) == 1, result.err


def test_random_weights_are_not_measured(runs):
    result = call(
        "bench", "--shape", "gemma-3-270m", "-p", 4, "-g", 1, "-n", 1, "--config", "turbo4/f16",
        "--backend", "reference",
    )  # fmt: skip
    assert result.status in (0, 2) and not runs


def test_keys_of_the_name_auto_are_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("auto.keys.json", "auto.keys.safetensors"):
        (tmp_path / name).touch()
    assert centre_from("auto") == "./auto"
    assert centre_from() == "auto" and centre_from(no_calibrate=True) is True
