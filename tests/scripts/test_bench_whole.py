"""The script of whole models: tiny shapes of the same kinds of layers, records, and their page."""

from __future__ import annotations

import json

import bench_whole
import pytest
from command_calls import call, refused
from pages import models

from mlx_turbokv.evaluate import benchmark
from mlx_turbokv.loading.config import build_model
from mlx_turbokv.loading.known_shapes import known_config
from mlx_turbokv.model.kv_layers import kv_layers


@pytest.mark.parametrize(
    ("name", "n_kv_layers", "n_layers"), [("Qwen3.5-27B", 16, 64), ("Qwen3-30B-A3B", 48, 48)]
)
def test_the_whole_shape_is_built_without_computing_its_weights(name, n_kv_layers, n_layers):
    config = bench_whole.shape(name, tiny=False)
    assert config == known_config(name)
    model = build_model(config)
    inner = getattr(model, "language_model", model)
    kinds = [type(cache).__name__ for cache in inner.make_cache()] if n_kv_layers < n_layers else []
    assert len(model.layers) == n_layers
    assert kinds.count("KVCache") == (n_kv_layers if kinds else 0)


@pytest.mark.parametrize(("name", "n_kv_layers"), [("Qwen3.5-27B", 2), ("Qwen3-30B-A3B", 8)])
@pytest.mark.parametrize("bits", [4, 16])
def test_a_tiny_shape_has_the_same_kinds_of_layers(name, n_kv_layers, bits):
    model, about, vocabulary = bench_whole.drawn_model(name, True, bits)
    assert len(kv_layers(model).layers) == n_kv_layers and len(model.layers) == 8
    assert about["model"]["source"] == name and f"{bits} bits" in about["weights"]
    assert vocabulary == 256 and 0 < about["weight_bytes"] < 16 << 20


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bench_whole, "TINY_CONTEXTS", (64, 96))
    monkeypatch.setattr(bench_whole, "TINY_PROMPTS", (8, 16))


@pytest.mark.parametrize("name", list(bench_whole.RECORDS))
def test_a_record_has_every_point_is_continued_and_drawn(name, quick, tmp_path, monkeypatch):
    path = tmp_path / "benchmarks" / f"{bench_whole.RECORDS[name]}.json"
    path.parent.mkdir()
    arguments = [name, "--tiny", "--backend", "reference", "--json", path]
    result = call(bench_whole.command, *arguments)
    assert result.status == 0, result.err
    record = json.loads(path.read_text())
    points = [(row["kind"], row["tokens"], row["config"]) for row in record["rows"]]
    kinds = [("context", 64), ("context", 96), ("prompt", 8), ("prompt", 16)]
    assert points == [(*kind, config) for kind in kinds for config in bench_whole.CONFIGS]
    assert not any("error" in row for row in record["rows"])
    # each row is printed when it is measured
    assert f"context 64 la-v7: decode {record['rows'][2]['generation_tps']['median']:,.1f}" in (
        result.err
    )
    again = call(bench_whole.command, *arguments)
    assert again.status == 0 and json.loads(path.read_text())["rows"] == record["rows"]

    monkeypatch.setattr(models, "ROOT", tmp_path)
    monkeypatch.setattr(models, "read", lambda _: record)
    page = models.whole_models()
    assert f"## {name}, tiny" in page and page.count("## ") == 1
    lines = ["decode tok/s after 64 tokens", "prefill tok/s, 16 tokens",
             "peak above weights, decode after 96 tokens", "KV bytes after 96 tokens"]  # fmt: skip
    for line in lines:
        assert f"| {line} |" in page
    assert ("token by token" in page) == (name == "Qwen3.5-27B")
    assert "Not measured" not in page
    # where the first configuration fails, the others have no ratio
    for row in record["rows"]:
        if row["config"] == "f16/f16":
            row["error"] = "out of memory"
        row |= {key: None for key in row if key.endswith("of_first")}
    assert "×)" not in models.whole_models()


def test_a_configuration_that_fails_takes_no_rows_of_others_with_it(quick, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    arguments = ["Qwen3-30B-A3B", "--tiny", "--backend", "reference", "--json", path]
    for kind in (benchmark._Contexts, benchmark._Prompts):

        def failing(self, trial, say, sound=kind.warm_up):
            if broken and trial.config.name == "balanced":
                raise RuntimeError("refused")
            sound(self, trial, say)

        monkeypatch.setattr(kind, "warm_up", failing)
    for broken in (True, False):
        assert call(bench_whole.command, *arguments).status == 0
        rows = json.loads(path.read_text())["rows"]
        assert len(rows) == 4 * len(bench_whole.CONFIGS)
        failed = [row["config"] for row in rows if "error" in row]
        assert failed == (["balanced"] * 4 if broken else [])


def test_no_prompt_is_begun_that_would_not_end_in_time(quick, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    monkeypatch.setattr(bench_whole, "TINY_PROMPTS", (8, 10**9))
    result = call(bench_whole.command, "Qwen3-30B-A3B", "--tiny", "--backend", "reference",
                  "--time-limit", "100", "--json", path)  # fmt: skip
    record = json.loads(path.read_text())
    assert result.status == 0 and record["not_measured"] == ["prompt 1,000,000,000"]
    assert len(record["rows"]) == 3 * len(bench_whole.CONFIGS)
    assert "prompt 1,000,000,000" in models._whole_model(record)


def test_the_time_of_a_prompt_follows_from_the_longest_before_it():
    rows = [
        {"kind": "prompt", "tokens": n, "prompt_tps": {"median": 100.0}, "config": config}
        for n in (512, 1024) for config in ("a", "b")
    ]  # fmt: skip
    rows += [{"kind": "context", "tokens": 8192}, {"kind": "prompt", "tokens": 2048, "error": ""}]
    found = bench_whole.seconds_of_prompt(rows, 4096, 2)
    assert found == pytest.approx(bench_whole.MARGIN * 2 * 2 * 40.96)
    assert bench_whole.seconds_of_prompt([], 4096, 2) == 0


def test_a_tiny_shape_writes_no_record_of_the_whole_one():
    refused(bench_whole.command, "Qwen3.5-27B", "--tiny", words=["--json"])
