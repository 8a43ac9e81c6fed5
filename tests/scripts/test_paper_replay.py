"""The paper's tables and claims: verdicts against differences made by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from characters import loaded
from click.testing import CliRunner
from tiny_models import tiny_model

ROOT = Path(__file__).resolve().parents[2]

import paper_replay as paper  # noqa: E402

from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.policy import load_policy  # noqa: E402

pytestmark = pytest.mark.slow


def _rows(**nll):
    return {
        role: {"nll_by_window": list(values), "kld_by_window": list(values)}
        for role, values in nll.items()
    }


NOISE = np.array([-0.01, 0.02, 0.0, 0.01, -0.02, 0.015, -0.005, 0.01])
COMMON = 3 + np.arange(8) / 5  # what windows share must not widen the interval


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.1, paper.HOLDS), (-0.1, paper.FAILS), (0.001, paper.OPEN)]
)
def test_a_claim_is_judged_from_paired_windows(gain, expected):
    results = _rows(low=COMMON, high=COMMON + gain + NOISE)
    found = paper.judge(paper.Claim("", "low", "high"), results)
    assert found["verdict"] == expected
    assert found["difference"] == pytest.approx(gain + NOISE.mean())
    assert found["interval"][1] - found["interval"][0] < 0.03


def test_a_claim_about_what_was_not_measured_is_left_open():
    assert paper.judge(paper.CLAIMS[0], {})["verdict"] == paper.MISSING
    one = _rows(low=[1.0], high=[2.0])
    assert paper.judge(paper.Claim("", "low", "high"), one)["verdict"] == paper.OPEN


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.031, 0.049), "holds"), ((0.051, 0.2), "does not hold"), ((-0.1, 0.02), "does not hold"),
     ((0.02, 0.04), "cannot tell"), ((0.04, 0.06), "cannot tell"), (None, "cannot tell")],
)  # fmt: skip
def test_a_range_is_held_left_or_crossed(interval, expected):
    assert paper.verdict(interval, 0.03, 0.05) == expected


def test_the_cost_of_turbo2_is_in_percent_of_perplexity():
    found = paper.turbo2_cost(_rows(q8=COMMON, turbo2=COMMON + np.log(1.04) + NOISE / 10))
    assert found["difference"] == pytest.approx(0.04, abs=1e-3) and found["verdict"] == "holds"


def test_the_share_of_the_gap():
    results = _rows(turbo2=COMMON + 0.2, turbo3=COMMON, **{"la-v7": COMMON + 0.08})
    found = paper.gap_closed(results)
    assert found["share"] == pytest.approx(0.6)
    assert found["interval"] == pytest.approx((0.6, 0.6))
    unclear = _rows(turbo2=COMMON + NOISE, turbo3=COMMON, **{"la-v7": COMMON})
    assert paper.gap_closed(unclear)["interval"] is None


def test_dilution_compares_gains_at_two_contexts():
    short = _rows(turbo2=COMMON + 0.2 + NOISE, **{"la-v7": COMMON})
    long = _rows(turbo2=COMMON + 0.1 + NOISE, **{"la-v7": COMMON})
    assert paper.dilution(short, long)["verdict"] == paper.HOLDS
    assert paper.dilution(long, short)["verdict"] == paper.FAILS


@pytest.mark.parametrize("group", ["", ":32"])
def test_roles_are_found_again_in_a_record(group):
    names = paper.config_names(group)
    results = [{"config": n, "role": r} for r, n in names.items()]
    results.append({"config": "some/folder/raw-2-2.json", "role": "raw 2+2"})
    found = paper.roles_of({"results": results})
    assert {role: row["role"] for role, row in found.items()} == {
        role: role for role in [*names, "raw 2+2"]
    }


def test_raw_indices_of_a_hybrid_miss_most_boundary_layers(tmp_path):
    """Layers 1, 3, 5 of 6 have a cache: by raw index, 2+2 protects the first and the last."""
    model = tiny_model("qwen3_next")
    files = paper.raw_index_policies(model, tmp_path, "")
    assert [Path(f).name for f in files] == ["raw-2-2.json", "raw-4-4.json"]
    raw = load_policy(tmp_path / "raw-2-2.json").formats(3)
    assert [str(v) for _, v in raw] == ["q8_0", "turbo2", "q8_0"]
    assert paper.raw_index_policies(tiny_model("llama"), tmp_path, "") == []


def test_a_hybrid_is_measured_by_ordinal_and_by_raw_index(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"Line {i} of the text." for i in range(400)))
    model = tiny_model("qwen3_next", head_dim=64, num_hidden_layers=16)
    monkeypatch.setattr("mlx_turbokv.loading.models.load", lambda *a, **k: loaded(model))
    out = tmp_path / "paper"
    arguments = ["--out", str(out), "--text", str(text), "--chunks", "2", "--long-chunks", "0"]
    result = CliRunner().invoke(paper.command, arguments)
    assert result.exception is None, result.output
    short = str(out / "short.json")
    claims = paper.judged(json.loads(Path(short).read_text()), None, None)
    found = {c["claim"]: c for c in claims}
    for claim in (*paper.CLAIMS, *paper.HYBRID_CLAIMS):
        assert found[claim.text]["verdict"] != paper.MISSING
    assert "## Quality at 512 tokens" in result.output and "| la-v7 |" in result.output
    again = CliRunner().invoke(paper.command, ["--from", short, "--long", short])
    assert again.exception is None and "raw layer indices" in again.output
    assert "## At 8,192 tokens" in again.output and "shrinks with the context" in again.output


def test_one_source_must_be_named():
    error = CliRunner().invoke(paper.command, []).exception
    assert isinstance(error, InputError) and "either" in str(error)
