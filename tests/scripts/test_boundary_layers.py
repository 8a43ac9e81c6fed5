"""Boundary layers by ordinal and by raw index: which layers a choice protects, and the page."""

from __future__ import annotations

import json
import re

import boundary_layers
import numpy as np
import pytest
from characters import loaded
from command_calls import call
from pages import gemma
from tiny_models import tiny_model

from mlx_turbokv.errors import InputError
from mlx_turbokv.kernels.backend import select_backend


@pytest.fixture(scope="module")
def model():
    """Layers 2 and 5 of 6 grow, the others have windows."""
    return tiny_model(
        "gemma3_text", num_hidden_layers=6, sliding_window_pattern=3, sliding_window=32,
        head_dim=64, vocab_size=96,
    )  # fmt: skip


def test_choices_name_raw_layers_and_count_the_packed_ones(model):
    layers = boundary_layers.Layers(model)
    assert (layers.all, layers.growing, layers.window) == ([0, 1, 2, 3, 4, 5], [2, 5], 32)
    wanted = boundary_layers.subsets(layers)
    protected = {
        packs: [x["protected"] for x in wanted.values() if x["packs_windows"] == packs]
        for packs in (False, True)
    }
    assert protected[False] == [[], [2], [5], [2, 5]]
    assert [0, 5] in protected[True] and [0, 1, 4, 5] in protected[True]
    assert [2, 5] in protected[True] and [] in protected[True]
    made = boundary_layers.choices(layers, wanted)
    for name, choice in made.items():
        n = 6 if choice.packs_windows else 2
        v = [str(v) for _, v in choice.policy.formats(n)]
        indices = layers.all if choice.packs_windows else layers.growing
        assert v == ["q8_0" if i in wanted[name]["protected"] else "turbo2:32" for i in indices]


def test_a_model_without_windows_or_with_many_growing_layers_is_refused():
    with pytest.raises(InputError, match="accepted are"):
        boundary_layers.Layers(tiny_model("llama"))


def test_a_record_is_continued_and_drawn(model, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_turbokv.loading.models.load", lambda *a, **k: loaded(model))
    path = tmp_path / "record.json"
    arguments = ["--text", "sample", "-c", 64, "--chunks", 2, "--json", path]
    stopped = call(boundary_layers.command, *arguments, "--time-limit", "0.0001")
    assert stopped.status == 0
    result = call(boundary_layers.command, *arguments)
    assert result.status == 0, result.err
    record = json.loads(path.read_text())
    rows = record["tables"]["64"]["rows"]
    assert record["backend"] == select_backend("auto").name  # what was chosen
    assert [row["config"] for row in rows] == ["f16/f16", *record["choices"]]
    kld = {row["config"]: row["kld"]["mean"] for row in rows}
    assert kld["growing packed, protected 2,5"] < kld["growing packed, protected none"]
    assert kld["growing packed, protected none"] < kld["all packed, protected none"]
    assert kld["all packed, protected 0,1,2,3,4,5"] < kld["all packed, protected 0,1,4,5"]
    assert {row["protected"] for row in rows} == {None}
    bits = {row["config"]: row["v_bits"] for row in rows}
    assert bits["growing packed, protected 2"] == pytest.approx((8.5 + 2.5) / 2)
    assert bits["all packed, protected 0,5"] == pytest.approx((2 * 8.5 + 4 * 2.5) / 6)
    call(boundary_layers.command, *arguments)
    assert json.loads(path.read_text()) == record

    text = gemma.boundaries(record)
    assert "2, 5 grow with the context" in text and "windows of 32 tokens" in text
    lines = ["1+1 by raw index (0, 5)", "2+2 by raw index (0, 1, 4, 5)", "all that grow (2, 5)",
             "2+2 by raw index (5)", "2+2 by ordinal (2, 5)", "all"]  # fmt: skip
    for line in lines:
        assert f"| {line} |" in text
    assert len(re.findall(r"2 windows of 64 tokens:", text)) == 2
    means = {row["config"]: np.mean(row["kld_by_window"]) for row in rows}
    own, other = (means[f"growing packed, protected {i}"] for i in (5, 2))
    assert f"the one that raw indices name, than with 2: {own - other:+.5f}" in text


def test_bits_of_what_is_kept_count_a_window_once():
    layers = {"all": [0, 1, 2, 3], "growing": [1, 3], "window": 100}
    assert gemma._bits_at([0, 3], layers, False, 1000) == pytest.approx((8.5 + 2.5) / 2)
    found = gemma._bits_at([0, 3], layers, True, 1000)
    assert found == pytest.approx((1000 * 11 + 100 * 11) / 2200)
    assert gemma._bits_at([0, 2], layers, True, 1000) == pytest.approx((2000 * 2.5 + 1700) / 2200)
