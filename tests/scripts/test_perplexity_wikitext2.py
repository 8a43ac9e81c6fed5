"""The user's script: the paper's configurations over a short text, as the command measures them."""

from __future__ import annotations

import json

import perplexity_wikitext2 as script
import pytest
from characters import loaded
from click.testing import CliRunner
from tiny_models import tiny_model

from mlx_turbokv.cli import perplexity
from mlx_turbokv.evaluate.names import check_name


@pytest.fixture
def text(tmp_path, monkeypatch):
    """A short text, and a tiny model in place of the one that --model names."""
    path = tmp_path / "text.txt"
    path.write_text(" ".join(f"Line {i} of the text." for i in range(60)))
    model = loaded(tiny_model("llama", vocab_size=96))
    monkeypatch.setattr("mlx_turbokv.loading.models.load", lambda *a, **k: model)
    return str(path)


def invoked(command, *arguments: str):
    """Run a command; its output."""
    result = CliRunner().invoke(command, list(arguments))
    assert result.exception is None, result.output
    return result.stdout


def test_the_paper_s_configurations_and_an_own_pair_are_measured(text, tmp_path):
    out = tmp_path / "out.json"
    shown = invoked(script.command, "--text", text, "-c", "64", "--chunks", "2",
                    "--config", "turbo6/turbo5", "--json", str(out))  # fmt: skip
    record = json.loads(out.read_text())
    measured = [row["config"] for row in record["results"]]
    assert measured == [*script.CONFIGS, "turbo6/turbo5"]
    paper = {"f16/f16", "q8_0/q8_0", "la-v5", "la-v6", "la-v7", "mode-1", "mode-2", "mode-10"}
    assert paper <= set(measured)
    assert (record["n_ctx"], record["n_windows"]) == (64, 2)
    lines = [line.split("  ")[0] for line in shown.splitlines()]
    assert all(name in lines for name in measured)


def test_the_figures_are_those_of_the_command(text, tmp_path):
    results = []
    for name, command, extra in (
        ("script", script.command, ["--only"]), ("command", perplexity.command, []),
    ):  # fmt: skip
        path = tmp_path / f"{name}.json"
        invoked(command, "--text", text, "-c", "64", *extra, "--config", "la-v7",
                "--json", str(path))  # fmt: skip
        results.append(json.loads(path.read_text())["results"])
    assert results[0] == results[1]
    assert [row["config"] for row in results[0]] == ["f16/f16", "la-v7"]


def test_only_needs_a_configuration():
    assert "--only needs" in CliRunner().invoke(script.command, ["--only"]).output


def test_every_configuration_can_be_read():
    assert len(set(script.CONFIGS)) == len(script.CONFIGS)
    for name in script.CONFIGS:
        check_name(name)
