"""The table of one model: the figures of `perplexity`, and records that can be continued."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from characters import loaded
from command_calls import call
from tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]

import quality_table  # noqa: E402
import quality_windows  # noqa: E402
from pages import tables  # noqa: E402

from mlx_turbokv.centring import first_use  # noqa: E402
from mlx_turbokv.cli import perplexity  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.evaluate.names import check_name  # noqa: E402
from mlx_turbokv.evaluate.text import load_text  # noqa: E402

NAMES = ["f16/f16", "q8_0/turbo2+0,0", "q8_0/turbo3+32,64"]


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(first_use, "N_CTX", 64)
    return quality_windows.Measurement(
        loaded(tiny_model("llama", vocab_size=96, head_dim=64)), load_text("sample"), "reference"
    )


def measured(run, record: dict, n_ctx: int, chunks: int, names: list, **options) -> list[dict]:
    """The record's rows, after the names were measured; what was saved is the same."""
    saved = []
    quality_table.measure_length(
        run, record, n_ctx, chunks, [(name, None) for name in names],
        lambda found: saved.append(json.dumps(found)), options.get("deadline", 1e18),
    )  # fmt: skip
    assert not saved or json.loads(saved[-1]) == json.loads(json.dumps(record))
    return record["tables"].get(str(n_ctx), {}).get("rows", [])


@pytest.mark.parametrize(("size", "piece"), [(1, 512), (2, 64), (8, 96)])
def test_windows_side_by_side_have_the_figures_of_perplexity(size, piece, run, monkeypatch):
    monkeypatch.setattr(run, "batch_size", lambda: size)
    monkeypatch.setattr(quality_windows, "PIECE", piece)
    rows = measured(run, {"tables": {}}, 512, 3, NAMES[1:])
    alone = perplexity.measure(
        run.loaded, run.text, NAMES, 512, 3, "reference", None, False
    )["results"]  # fmt: skip
    assert [row["config"] for row in rows] == NAMES
    for row, expected in zip(rows, alone):
        assert row["bits"] == pytest.approx(expected["bits_per_value"], rel=1e-6)
        for name in ("kld_by_window",):
            np.testing.assert_allclose(row[name], expected[name], rtol=2e-3, atol=1e-7)
        for name in ("delta_nll", "kld", "same_top"):
            assert row[name]["mean"] == pytest.approx(expected[name]["mean"], rel=5e-3, abs=2e-6)
        assert row["ppl"]["ppl"] == pytest.approx(expected["ppl"]["ppl"], rel=1e-4)


def test_a_record_is_continued_with_what_it_lacks(run, monkeypatch):
    record = {"tables": {}}
    first = measured(run, record, 64, 2, NAMES[1:2])
    assert [row["config"] for row in first] == NAMES[:2]
    before = json.dumps(first)
    rows = measured(run, record, 64, 2, NAMES[1:])
    assert json.dumps(rows[:2]) == before and [row["config"] for row in rows] == NAMES
    with pytest.raises(InputError, match="2 windows of 64"):
        measured(run, record, 64, 3, [*NAMES, "la-v7+0,0"])
    with monkeypatch.context() as patch:  # not even the reference's predictions are computed
        patch.setattr(quality_table, "Windows", None)
        assert measured(run, record, 128, 2, NAMES, deadline=0) == []


def test_keys_are_centred_and_scaled_as_at_first_use(run):
    found = {}
    for keys in (None, quality_windows.MEAN, quality_windows.SCALES):
        config, used = run.prepared("turbo3/turbo3+0,0", keys)
        found[keys] = used, {centre.source for centre in config.centres}
    assert found["mean"] == ("mean", {"calibrated mean"})
    assert found[None] == found["mean and scales"]
    assert found[None] == ("mean and scales", {"calibrated mean and scales"})
    assert run.prepared("q8_0/turbo3+0,0", None)[1] == "–"


def test_the_bias_alone_centres_keys_where_it_is_asked_for():
    model = tiny_model("qwen2", num_hidden_layers=2)
    for layer in model.model.layers:
        layer.self_attn.k_proj.bias = 3 + mx.random.normal(layer.self_attn.k_proj.bias.shape)
    biased = quality_windows.Measurement(loaded(model), load_text("sample"), "reference")
    config, used = biased.prepared("turbo3/turbo3+0,0", "key bias")
    assert used == "key bias" and {c.source for c in config.centres} == {"key bias"}


def test_bytes_at_32k_are_those_of_the_bits(run):
    row = measured(run, {"tables": {}}, 64, 1, ["q8_0/q8_0+0,0"])[1]
    shape = run.loaded.model.args
    values = 2 * shape.num_hidden_layers * shape.num_key_value_heads * 64
    assert row["kv_bytes_32k"] == values * 32768 * 8.5 / 8


@pytest.mark.parametrize("n_ctx", [512, 2048, 8192])
def test_every_configuration_of_the_plan_can_be_read_and_says_its_protection(n_ctx, monkeypatch):
    monkeypatch.chdir(ROOT)
    rows = quality_table.plan(n_ctx)
    assert len(set(rows)) == len(rows)
    for name, _ in rows:
        check_name(name)
        assert name in quality_table.PEERS or "+" in name


def test_a_record_of_another_model_or_text_is_refused(run, tmp_path):
    path = tmp_path / "record.json"
    record = quality_table.start_record(path, run.loaded, run.text, "reference")
    path.write_text(json.dumps(record))
    again = quality_table.start_record(path, run.loaded, run.text, "reference")
    assert again == json.loads(json.dumps(record))
    path.write_text(json.dumps(record | {"text": {"name": "other"}}))
    with pytest.raises(InputError, match="another text"):
        quality_table.start_record(path, run.loaded, run.text, "reference")
    for content in ("{", "[]", json.dumps(record | {"what": "other"})):
        path.write_text(content)
        with pytest.raises(InputError, match="is not a"):
            quality_table.start_record(path, run.loaded, run.text, "reference")


def test_keys_are_asked_for_with_configurations_alone(tmp_path):
    found = call(quality_table.command, "--keys", "mean", "--json", tmp_path / "r.json")
    assert "--keys has no effect without --config" in found.error()


def test_rows_of_another_machine_than_the_records_are_counted(run):
    rows = measured(run, {"device": "a card", "tables": {}}, 64, 1, NAMES[1:2])
    assert all(row["device"] != "a card" and row["date"] for row in rows)
    (sentence,) = tables.elsewhere({"tables": {"64": {"rows": [{"config": "x"}, *rows[1:]]}}})
    assert rows[1]["device"] in sentence and sentence.endswith(": 1 at 64 tokens.")
    here = {"device": rows[0]["device"], "tables": {}}
    assert "device" not in measured(run, here, 64, 1, NAMES[1:2])[1]
    assert tables.elsewhere(here) == []
