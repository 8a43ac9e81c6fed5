"""Runs that have ended are extended by more windows; bits a value count the anchors."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from centred_model import centred_model
from click.testing import CliRunner
from tiny_models import tiny_model

from mlx_turbokv.cli.perplexity import command
from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate import perplexity
from mlx_turbokv.evaluate.checkpoint import Checkpoint
from mlx_turbokv.evaluate.configuration import prepare
from mlx_turbokv.evaluate.tables import perplexity_table
from mlx_turbokv.loading.models import Loaded


class Letters:
    """A tokenizer whose tokens are the characters' codes, modulo the vocabulary."""

    bos_token_id = None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [2 + ord(c) % 50 for c in text]


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """The command on a tiny model; returns its record, what it said, and windows measured."""
    model = tiny_model("llama", num_hidden_layers=2)
    loaded = Loaded(model, Letters(), "tiny", {}, 4096, "tiny")
    monkeypatch.setattr("mlx_turbokv.cli.perplexity.load_model", lambda args: loaded)
    measured = []
    measure = perplexity._measure_window
    monkeypatch.setattr(
        perplexity,
        "_measure_window",
        lambda model, window, configs: measured.append(1) or measure(model, window, configs),
    )

    def ask(chunks: int, *more: str, name: str = "run.json") -> tuple[dict, str, int]:
        measured.clear()
        path = tmp_path / name
        args = ["--text", "sample", "-c", "32", "--chunks", str(chunks), "--json", str(path)]
        args += ["--config", "q8_0/turbo2", "--backend", "reference", *more]
        result = CliRunner().invoke(command, args, catch_exceptions=False)
        assert result.exit_code == 0
        return json.loads(path.read_text()), result.stderr, len(measured)

    return ask


def test_a_run_that_has_ended_is_extended_by_more_windows(ask, tmp_path) -> None:
    _, said, n = ask(2)
    assert n == 2 and "finished before" not in said
    longer, said, n = ask(5)
    assert n == 3 and f"2 of 5 windows were finished before ({tmp_path / 'run.json'}" in said
    at_once, _, n = ask(5, name="other.json")
    assert n == 5
    assert longer["results"] == at_once["results"]
    assert longer["windows_kept_from_before"] == 2 and longer["n_windows"] == 5
    again, _, n = ask(5, "--resume")
    assert n == 0 and again["results"] == at_once["results"]
    assert {path.name for path in tmp_path.iterdir()} == {
        "run.json", "run.json.windows.gz", "other.json", "other.json.windows.gz",
    }  # fmt: skip


def test_fewer_windows_of_a_run_that_has_ended_are_kept(ask) -> None:
    ask(4)
    fewer, _, n = ask(2)
    assert n == 0 and fewer["n_windows"] == 2
    assert ask(4)[2] == 0


def test_other_settings_and_no_resume_measure_anew(ask) -> None:
    ask(2)
    assert ask(2, "--no-resume")[2] == 2
    assert ask(2, "--config", "q8_0/turbo3")[2] == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"no gzip", gzip.compress(b"{")[:-3], gzip.compress(b"{}\n[]"), gzip.compress(b"\xff")],
    ids=["empty", "no gzip", "cut", "no windows", "no text"],  # gzip writes the time
)
def test_a_damaged_file_of_windows_counts_as_none(tmp_path, content) -> None:
    (tmp_path / "x.json.windows.gz").write_bytes(content)
    path = tmp_path / "x.json.partial"
    assert Checkpoint(path, {"a": 1}).parts == []
    with pytest.raises(InputError, match="no unfinished run"):
        Checkpoint(path, {"a": 1}, resume=True)


def test_windows_that_cannot_be_kept_are_no_failure(tmp_path, caplog) -> None:
    path = tmp_path / "x.json.partial"
    checkpoint = Checkpoint(path, {"a": 1})
    Path(tmp_path / "x.json.windows.gz").mkdir()
    checkpoint.done(keep=True)
    assert "a run over more windows will measure all of them" in caplog.text


@pytest.mark.parametrize("n", [64, 512, 8192])
def test_bits_a_value_count_the_anchors(n: int) -> None:
    """3 layers of 2 heads of 32: three rows of 256 bytes each, and one table for all of them.

    A table has 4 bytes for each of 16 pairs of 256 blocks, which are enough for 8,192 tokens.
    """
    model = centred_model()
    k, v, both = prepare(model, "turbo4/turbo4+0,0", "reference").bits_at(n)
    anchors = 8 * (3 * 3 * 2 * 32 * 4 + 256 * 16 * 4) / (n * 3 * 2 * 32)
    stored = 4 + 16 / 32
    assert (k, v) == (pytest.approx(stored + anchors, rel=1e-3), stored)
    assert both == pytest.approx(stored + anchors / 2, rel=1e-3)
    assert prepare(model, "turbo4/turbo4+0,0", "reference", centre=False).bits_at(n)[0] == stored


def test_bits_a_value_are_those_of_resident_bytes() -> None:
    """A cache of 4,096 tokens, which has no spare rows."""
    model, n = centred_model(), 4096
    config = prepare(model, "turbo4/turbo3", "reference")
    caches = config.make_caches()
    rows = mx.array(np.random.default_rng(0).standard_normal((1, 2, n, 32)), mx.float32)
    for cache in caches:
        cache.update_and_fetch(rows, rows)
    resident = sum(cache.nbytes for cache in caches) * 8 / (2 * 3 * n * 2 * 32)
    assert config.bits_at(n)[2] == pytest.approx(resident, rel=0.02)


def test_large_biases_that_stay_are_told_below_the_table() -> None:
    model = centred_model()
    windows = np.random.default_rng(0).integers(0, 60, (1, 16)).astype(np.int32)
    record = {
        "model": {"name": "m"}, "text": {"name": "t", "sha256": "0"}, "n_windows": 1, "n_ctx": 16,
        "backend": "reference", "environment": dict.fromkeys(("mlx", "mlx_lm", "mlx_turbokv"), "1"),
    }  # fmt: skip
    record["environment"]["device"] = "CPU"
    for centre, told in ((False, True), (True, False)):
        names = ["f16/f16", "turbo4/turbo4"]
        configs = [prepare(model, name, "reference", centre=centre) for name in names]
        record["results"] = perplexity.evaluate_windows(model, windows, configs).summary()
        table = perplexity_table(record).render("text")
        assert ("Warning: turbo4/turbo4: The key projection has a large bias" in table) == told
        assert ("turbo4 keys then ruin what the model says" in table) == told
