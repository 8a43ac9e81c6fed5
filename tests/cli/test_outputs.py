"""Outputs on disks that are full or read-only: said before the work, and nothing is lost after it.

Size limits of the process (RLIMIT_FSIZE) stand in for a full disk: they hold for root too.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from characters import loaded
from command_calls import call, nothing_loads, refused
from gguf_files import write_small_gguf
from model_folder import write_model_folder
from tiny_models import tiny_config, tiny_model

from mlx_turbokv import files
from mlx_turbokv.cli import output
from mlx_turbokv.evaluate.checkpoint import Journal

TEXT = " ".join(f"Sentence {i} says that {i} follows {i - 1}." for i in range(1, 90))


@contextlib.contextmanager
def full_disk(most_bytes: int = 0) -> Iterator[None]:
    """No file grows beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """A cache folder of the test's own."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def model(monkeypatch, tmp_path):
    """A tiny model in place of any, and a text."""
    config = tiny_config("llama", num_hidden_layers=4, head_dim=64)
    made = loaded(tiny_model("llama", num_hidden_layers=4, head_dim=64), config)
    monkeypatch.setattr("mlx_turbokv.loading.models.load", lambda *a, **k: made)
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    return str(text)


OUTPUTS = [
    ("perplexity", "--json", ()),
    ("needle", "--json", ()),
    ("needle", "--plot", ()),
    ("bench", "--json", ("--shape", "phi-4")),
    ("bench", "--plot", ("--shape", "phi-4")),
    ("calibrate", "--folder", ("--held-out", "none")),
    ("report", "--out", ()),
    ("doctor", "--json", ()),
    ("generate", "--prompt-cache-file", ()),
]  # fmt: skip


@pytest.mark.parametrize(("command", "option", "more"), OUTPUTS)
def test_an_output_is_checked_before_anything_is_loaded(command, option, more, tmp_path):
    text = (
        ("--text", "sample") if command in ("perplexity", "needle", "calibrate", "report") else ()
    )
    name = tmp_path / "out.safetensors"
    with full_disk():
        refused(command, *text, *more, option, name, words=["out.safetensors", "File too large"])
    assert list(tmp_path.iterdir()) == []
    refused(command, *text, *more, option, "/proc/out.safetensors", words=["/proc/out"])
    refused(command, *text, *more, option, "/dev/full/out.safetensors", words=["/dev/full/out"])
    (tmp_path / "file").touch()
    missing = tmp_path / "file" / "out.safetensors"
    refused(command, *text, *more, option, missing, words=["out.safetensors"])
    if option not in ("--folder", "--out"):
        refused(command, *text, *more, option, "", words=[])
        refused(command, *text, *more, option, "/dev/full", words=["/dev/full"])
        with nothing_loads():
            assert call(command, *text, *more, option, name).status is None
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


def _kept(sentence: str) -> Path:
    path = Path(sentence.split("kept in ")[1].removesuffix("."))
    assert path.is_file(), sentence
    return path


def _fails_after_the_run(model, tmp_path, command, *options):
    """The disk fails when the run has ended: what it printed, and its sentence."""
    folder = tmp_path / "full"
    folder.mkdir()
    real_replace = os.replace

    def replace(source, target):
        if str(target).startswith(str(folder)):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real_replace(source, target)

    with mock.patch.object(files.os, "replace", replace):
        result = call(command, *options)
    assert list(folder.iterdir()) == []
    return result.out, result.error(), result.err


QUICK = ("--config", "q8_0/turbo2")


def test_perplexity_keeps_a_record_that_cannot_be_written(model, tmp_path, own_cache):
    out, said, err = _fails_after_the_run(
        model, tmp_path, "perplexity", "--text", model, "-c", 64, "--chunks", 2, *QUICK,
        "--json", tmp_path / "full" / "p.json",
    )  # fmt: skip
    assert "q8_0/turbo2" in out and "No space left" in said
    assert json.loads(_kept(said).read_text())["n_windows"] == 2
    assert "p.json.partial cannot be written" in err and "stay in memory" in err
    assert own_cache in _kept(said).parents


def test_bench_and_needle_keep_records_and_plots(model, tmp_path):
    pytest.importorskip("matplotlib")
    small = ("-p", 8, "-g", 2, "-n", 1, *QUICK)
    folder = tmp_path / "full"
    out, said, err = _fails_after_the_run(
        model, tmp_path, "bench", *small, "--json", folder / "b.json"
    )
    assert "q8_0/turbo2" in out and "the run goes on" in err
    assert len(json.loads(_kept(said).read_text())["rows"]) == 1
    folder.rmdir()
    out, said, _ = _fails_after_the_run(
        model, tmp_path, "bench", *small, "--plot", folder / "b.png"
    )
    assert "q8_0/turbo2" in out and _kept(said).read_bytes()[1:4] == b"PNG"
    folder.rmdir()
    needle = ("--text", model, "-c", 800, "--depth", 0.5, "--needle", "password", *QUICK)
    out, said, _ = _fails_after_the_run(
        model, tmp_path, "needle", *needle, "--json", folder / "n.json"
    )
    assert "q8_0/turbo2" in out
    assert len(json.loads(_kept(said).read_text())["cases"]) == 1


def test_a_calibration_is_kept_whole(tmp_path, own_cache, monkeypatch):
    text = ("--text", small_texts(tmp_path), "--held-out", "none", "-c", 32, "--chunks", 2)
    options = (*text, "--budget", 5, "--formats", "turbo4,q8_0", "--keys", "--recent", 0)
    model = write_small_gguf(tmp_path)
    folder = tmp_path / "full"
    out, said, err = _fails_after_the_run(
        model, tmp_path, "calibrate", "--model", model, *options, "--folder", folder
    )
    kept = Path(said.split("kept in ")[1].removesuffix("."))
    names = {"bits-5.json", "bits-5.keys.json", "bits-5.keys.safetensors", "calibration.json"}
    assert {path.name for path in kept.iterdir()} == names and own_cache in kept.parents
    assert "bits-5" in out and "stay in memory" in err


def small_texts(folder: Path) -> Path:
    path = folder / "small.txt"
    path.write_text(TEXT.lower())
    return path


def test_a_result_is_printed_where_no_file_can_be_written(tmp_path, capsys, monkeypatch):
    with full_disk(), pytest.raises(output.NotWrittenError, match="printed above"):
        output.write_json(tmp_path / "a.json", {"what": "x", "n": 123})
    assert '"n": 123' in capsys.readouterr().err


def test_a_journal_goes_on_in_memory_and_catches_up(tmp_path, capsys):
    path = tmp_path / "run.partial"
    journal = Journal(path, {"n": 1})
    journal.add({"part": 0})
    with full_disk(path.stat().st_size + 5):
        journal.add({"part": 1})  # cut within its line
        journal.add({"part": 2})
    assert Journal(path, {"n": 1}).parts[:1] == [{"part": 0}]
    journal.add({"part": 3})
    assert [part["part"] for part in Journal(path, {"n": 1}).parts] == [0, 1, 2, 3]


@pytest.mark.parametrize("text", ["[]\n", '{"settings": 3}\n{}\n', "3\n", "\xff\n", "[" * 100_000])
def test_a_journal_of_something_else_is_refused_or_empty(tmp_path, text):
    path = tmp_path / "run.partial"
    path.write_bytes(text.encode("latin-1"))
    with contextlib.suppress(output.InputError):
        assert Journal(path, {"n": 1}).parts == []


def _program(*words: object, **options) -> subprocess.CompletedProcess:
    program = [sys.executable, "-m", "mlx_turbokv", *map(str, words)]
    return subprocess.run(program, stderr=subprocess.PIPE, timeout=120, **options)


def test_standard_output_on_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        for words in (["plan", "--kv-layers", "4"], ["plan", "--help"]):
            ended = _program(*words, stdout=full)
            said = ended.stderr.decode().splitlines()
            assert ended.returncode == 2 and len(said) == 1, said
            assert "No space left" in said[0]


def test_results_are_kept_where_standard_output_is_on_a_full_disk(own_cache, monkeypatch):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(output, "silence_stdout", lambda: None)
    with pytest.raises(output.NotWrittenError, match="Standard output") as error:
        output.print_result("a table", {"n": 5})
    assert json.loads(_kept(str(error.value)).read_text()) == {"n": 5}


def test_what_a_terminal_cannot_print_is_replaced():
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    ended = _program("plan", "--kv-layers", "4", env=environment, stdout=subprocess.PIPE)
    assert ended.returncode == 0, ended.stderr
    assert b"turbo3/turbo2" in ended.stdout


def test_a_prompt_cache_is_kept_where_its_file_cannot_be_written(tmp_path, own_cache):
    model = write_small_gguf(tmp_path)
    file = tmp_path / "full" / "c.safetensors"
    out, said, _ = _fails_after_the_run(
        model, tmp_path, "generate", "--model", model, "-p", "the", "-m", 4,
        "--prompt-cache-file", file,
    )  # fmt: skip
    assert "KV cache:" in out and "c.safetensors cannot be written" in said
    again = call("generate", "--model", model, "-p", "a", "--prompt-cache-file", _kept(said))
    assert again.status == 0, again.err


@pytest.mark.parametrize("words", [["plan", "--kv-layers", "4"], ["--help"], ["plan", "--help"]])
def test_a_reader_that_closes_the_pipe_ends_a_command_with_141(words):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        ended = _program(*words, stdout=closed)
    assert ended.returncode == 141 and ended.stderr == b""


def _with_closed(descriptors: str, *words: str) -> subprocess.CompletedProcess:
    """A command whose standard streams are closed, as by the shell's >&-."""
    program = shlex.join([sys.executable, "-m", "mlx_turbokv", *words])
    return subprocess.run(
        ["sh", "-c", f"{program} {descriptors}"], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("words", [["plan", "--kv-layers", "4"], ["--help"], ["doctor"]])
def test_a_closed_standard_output_is_one_sentence(words):
    ended = _with_closed(">&-", *words)
    assert ended.returncode == 2 and ended.stdout == ""
    said = "Error: The output cannot be written: standard output is closed."
    assert ended.stderr.splitlines() == [said]


@pytest.mark.parametrize("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_a_model_is_read_where_other_streams_are_closed(closed, tmp_path, own_cache):
    folder = write_model_folder(tmp_path / "model", "llama")
    words = ("generate", "--model", str(folder), "-p", "a", "-m", "2", "--no-calibrate")
    ended = _with_closed(closed, *words)
    assert ended.returncode == 0, ended.stderr
    assert "KV cache:" in ended.stdout and "Error" not in ended.stderr
