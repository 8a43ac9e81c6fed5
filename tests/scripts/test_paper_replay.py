"""The paper's tables and claims: verdicts against differences made by hand, and records."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import paper_claims as claims
import paper_keys
import paper_replay
import paper_roles as roles
import pytest
from characters import loaded
from command_calls import call
from few_windows import interval_of
from pages import paper
from tiny_models import tiny_model

from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate import statistics
from mlx_turbokv.evaluate.text import load_text

ROOT = Path(__file__).resolve().parents[2]
NOISE = np.array([-0.01, 0.02, 0.0, 0.01, -0.02, 0.015, -0.005, 0.01])
COMMON = 3 + np.arange(8) / 5  # what windows share must not widen the interval


def _rows(**nll):
    return {
        role: {"nll_by_window": list(values), "kld_by_window": list(values)}
        for role, values in nll.items()
    }


@pytest.mark.parametrize(
    ("gain", "expected"), [(0.1, claims.HOLDS), (-0.1, claims.FAILS), (0.001, claims.OPEN)]
)
def test_a_claim_is_judged_from_paired_windows(gain, expected):
    results = _rows(low=COMMON, high=COMMON + gain + NOISE)
    found = claims.judge(claims.Claim("", "low", "high"), results)
    assert found["verdict"] == expected
    assert found["difference"] == pytest.approx(gain + NOISE.mean())
    assert found["interval"][1] - found["interval"][0] < 0.03


def test_few_windows_have_students_interval():
    values = np.array([0.1, 0.2, 0.3, 0.6])
    low, high = interval_of(values)
    reach = 3.182 * values.std(ddof=1) / 2
    assert (low, high) == pytest.approx((0.3 - reach, 0.3 + reach))
    boot = statistics.bootstrap_interval(values)
    assert boot is not None and low < boot[0] < boot[1] < high
    eight = np.tile(values, 2)
    assert interval_of(eight) == statistics.bootstrap_interval(eight)
    assert interval_of(values[:1]) is None
    few = _rows(turbo2=values + 3, **{"la-v7": [3.0] * 4})
    many = _rows(turbo2=COMMON + 0.2, **{"la-v7": COMMON})
    assert claims.dilution(few, many)["interval"] == pytest.approx((0.1 - reach, 0.1 + reach))


def test_losses_over_the_references_are_judged_alike():
    results = _rows(low=COMMON, high=COMMON + 0.1 + NOISE)
    own = claims.judge(claims.Claim("", "low", "high"), results)
    for row in results.values():
        row["delta_nll_by_window"] = list(np.array(row.pop("nll_by_window")) - 2)
    over = claims.judge(claims.Claim("", "low", "high"), results)
    assert over["difference"] == pytest.approx(own["difference"])
    assert over["interval"] == pytest.approx(own["interval"])


def test_a_claim_about_what_was_not_measured_is_left_open():
    assert claims.judge(claims.CLAIMS[0], {})["verdict"] == claims.MISSING
    one = _rows(low=[1.0], high=[2.0])
    assert claims.judge(claims.Claim("", "low", "high"), one)["verdict"] == claims.OPEN


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((0.031, 0.049), "holds"), ((0.051, 0.2), "does not hold"), ((-0.1, 0.02), "does not hold"),
     ((0.02, 0.04), "cannot tell"), ((0.04, 0.06), "cannot tell"), (None, "cannot tell")],
)  # fmt: skip
def test_a_range_is_held_left_or_crossed(interval, expected):
    assert claims.verdict(interval, 0.03, 0.05) == expected


def test_costs_are_in_percent_of_perplexity():
    results = _rows(q8=COMMON, turbo2=COMMON + np.log(1.04) + NOISE / 10)
    found = claims.perplexity_cost(results, "turbo2", *claims.TURBO2_COST)
    assert found["difference"] == pytest.approx(0.04, abs=1e-3) and found["verdict"] == "holds"
    assert claims.perplexity_cost(results, "turbo2", *claims.WITHIN)["verdict"] == "does not hold"
    near = _rows(q8=COMMON, **{"la-v7": COMMON + 0.002 + NOISE / 20})
    assert claims.perplexity_cost(near, "la-v7", *claims.WITHIN)["verdict"] == "holds"


def test_the_share_of_the_gap():
    results = _rows(turbo2=COMMON + 0.2, turbo3=COMMON, **{"la-v7": COMMON + 0.08})
    found = claims.gap_closed(results)
    assert found["share"] == pytest.approx(0.6)
    assert found["interval"] == pytest.approx((0.6, 0.6))
    unclear = _rows(turbo2=COMMON + NOISE, turbo3=COMMON, **{"la-v7": COMMON})
    assert claims.gap_closed(unclear)["interval"] is None


def test_dilution_compares_gains_at_two_contexts():
    short = _rows(turbo2=COMMON + 0.2 + NOISE, **{"la-v7": COMMON})
    long = _rows(turbo2=COMMON + 0.1 + NOISE, **{"la-v7": COMMON})
    assert claims.dilution(short, long)["verdict"] == claims.HOLDS
    assert claims.dilution(long, short)["verdict"] == claims.FAILS


def test_the_gain_of_boundary_keys_over_middle_ones_grows():
    results = _rows(**{
        "K 3, middle": COMMON + 0.1, "K 3, boundary": COMMON,
        "K 2, middle": COMMON + 0.4 + NOISE, "K 2, boundary": COMMON,
    })  # fmt: skip
    found = claims.growth(results, 3, 2)
    assert found["difference"] == pytest.approx(0.3 + NOISE.mean())
    assert found["verdict"] == claims.HOLDS
    assert claims.growth(results, 4, 3)["verdict"] == claims.MISSING


def test_every_length_is_judged_and_compared_with_the_shortest():
    results = _rows(turbo2=COMMON + 0.2, **{"la-v7": COMMON, "4+4": COMMON - 0.1})
    found = claims.judged({2048: results, 512: results, 8192: results}, None, None)
    wheres = dict.fromkeys(entry["where"] for entry in found)
    assert list(wheres) == ["512", "2,048", "8,192", "512 to 2,048", "512 to 8,192"]


@pytest.mark.parametrize("group", ["", ":32"])
def test_roles_are_found_again_in_a_record(group):
    names = roles.config_names(group) | roles.k_names(group)
    rows = [{"config": n, "role": r} for r, n in names.items()]
    rows.append({"config": "some/folder/raw-2-2.json", "role": "raw 2+2"})
    rows.append({"config": roles.raw_names(group)["raw 4+4"], "role": "raw 4+4"})
    found = roles.roles_of(rows)
    same = {"swapped": "K 3"}  # one configuration
    assert {role: row["role"] for role, row in found.items()} == {
        role: same.get(role, role) for role in [*names, "raw 2+2", "raw 4+4"]
    }


def test_raw_indices_of_a_hybrid_miss_most_boundary_layers():
    """Layers 1, 3, 5 of 6 have a cache: by raw index, 2+2 protects the first and the last."""
    found = roles.choices(tiny_model("qwen3_next"), "")
    raw = found[roles.raw_names("")["raw 2+2"]].policy.formats(3)
    assert [str(v) for _, v in raw] == ["q8_0", "turbo2", "q8_0"]
    assert not set(roles.choices(tiny_model("llama"), "")) & set(roles.raw_names("").values())


def test_keys_are_kept_in_four_middle_layers():
    model = tiny_model("llama", num_hidden_layers=10)
    policy = roles.choices(model, "")[roles.k_names("")["K 2, middle"]].policy
    formats = [(str(k), str(v)) for k, v in policy.formats(10)]
    assert [k for k, _ in formats] == ["turbo2"] * 3 + ["q8_0"] * 4 + ["turbo2"] * 3
    assert {v for _, v in formats} == {"q8_0"}


def test_figures_of_keys_are_those_of_plain_attention():
    mx.random.seed(3)
    n_heads, n, head_dim = 2, 24, 64
    keys = mx.random.normal((n_heads, n, head_dim)) * 3
    queries = mx.random.normal((2 * n_heads, n, head_dim))
    found = paper_keys._of_layer(keys, queries, "")
    k, q = np.array(keys, np.float64), np.array(queries, np.float64)
    assert found["norm"] == pytest.approx(np.linalg.norm(k, axis=-1).mean(), rel=1e-5)
    assert abs(found["kurtosis"]) < 0.3  # Gaussian keys stay Gaussian
    assert found[4] > found[3] > found[2] > 0.8
    from mlx_turbokv.quant.formats import as_format
    from mlx_turbokv.quant.quantize import quantize, values
    from mlx_turbokv.quant.rotate import rotate

    fmt = as_format("turbo2")
    packed = values(*quantize(keys, fmt), fmt, head_dim, mx.float32)
    packed = np.array(rotate(packed, head_dim, inverse=True), np.float64)
    cosines = []
    for head in range(2 * n_heads):
        for at in range(n // 2, n):
            own, other = (x[head // 2, : at + 1] @ q[head, at] for x in (k, packed))
            cosines.append(own @ other / np.linalg.norm(own) / np.linalg.norm(other))
    assert found[2] == pytest.approx(np.mean(cosines), abs=1e-5)


def test_gaps_are_those_of_the_first_and_last_two_layers():
    cosines = {"2": [[0.8, 0.9], [0.9, 0.9], [1.0, 1.0], [0.9, 0.9], [0.8, 0.7]]}
    found = paper_keys.gaps({"cosines": cosines})
    assert found[2] == pytest.approx([0.85 - 1.0, 0.85 - 1.0])
    assert paper_keys.gaps({"cosines": {"2": [[None]] * 5}}) == {}


@pytest.mark.parametrize(("edge", "expected"), [
    ([0.8, 0.6], claims.HOLDS),  # below 0.9, and more so
    ([0.99, 0.95], claims.FAILS),  # above 0.9: the distance shrinks alone
    ([0.7, 0.8], claims.FAILS),  # below 0.9, and less so
])  # fmt: skip
def test_scores_of_boundary_layers_must_suffer_more_than_middle_ones(edge, expected):
    keys = {"cosines": {
        str(bits): [[at] * 3, [at] * 3, [0.9] * 3, [at] * 3, [at] * 3]
        for bits, at in zip((3, 2), edge)
    }}  # fmt: skip
    found = {c["claim"][-len("turbo2 against turbo3") :]: c["verdict"]
             for c in claims.judged({}, None, keys)}  # fmt: skip
    assert found == {"turbo3 against turbo4": claims.MISSING, "turbo2 against turbo3": expected}


@pytest.fixture
def quick(monkeypatch):
    """Few windows of few tokens, of a hybrid with 8 KV layers."""
    model = tiny_model("qwen3_next", head_dim=64, num_hidden_layers=16)
    monkeypatch.setattr("mlx_turbokv.loading.models.load", lambda *a, **k: loaded(model))
    monkeypatch.setattr(paper_keys, "WINDOWS", (2, 32))


def _arguments(path: Path, *more: object) -> list[object]:
    return ["--text", "sample", "--backend", "reference", "--json", path, "--chunks", 2,
            "-c", 32, *more]  # fmt: skip


@pytest.mark.slow
def test_a_hybrid_is_measured_at_several_lengths_and_a_record_continued(quick, tmp_path):
    path = tmp_path / "paper.json"
    stopped = call(paper_replay.command, *_arguments(path, "--time-limit", "1e-6"))
    assert stopped.status == 0 and not path.exists()
    first = call(paper_replay.command, *_arguments(path))
    assert first.status == 0, first.err
    record = json.loads(path.read_text())
    rows = record["tables"]["32"]["rows"]
    assert all(row["protected"] is None and row["keys"] == "–" for row in rows)
    assert not any("mean" in row["centred"] or "bias" in row["centred"] for row in rows)
    second = call(paper_replay.command, *_arguments(path, "-c", 48))
    assert second.status == 0, second.err
    both = json.loads(path.read_text())
    assert both["tables"]["32"] == record["tables"]["32"] and both["keys"] == record["keys"]
    assert len(record["keys"]["norms"]) == 8 and both["tables"]["48"]["n_windows"] == 2

    tables = {n: rows for n, (_, rows) in roles.tables_of(both).items()}
    found = {(c["where"], c["claim"]): c for c in claims.judged(tables, None, both["keys"])}
    for claim in (*claims.CLAIMS, *claims.HYBRID_CLAIMS, *claims.K_CLAIMS):
        for where in ("32", "48"):
            assert found[where, claim.text]["verdict"] != claims.MISSING
    assert all(entry["verdict"] != claims.MISSING for entry in found.values())
    printed = call(paper_replay.command, "--from", path)
    assert printed.status == 0 and printed.out == second.out
    texts = "## Quality at 512 tokens", "| la-v7 |", "raw layer indices", "32 to 48"
    for text in (*texts, "## At 8,192 tokens", "tiny at 48: PPL", "## Keys by layer"):
        assert text in printed.out, text


def test_lengths_beyond_the_model_are_left_out(capsys):
    model = loaded(tiny_model("llama"))  # made for 4,096 tokens
    assert paper_replay.fitting_lengths((512, 4096, 8192), model) == [512, 4096]
    assert "Left out windows of 8,192" in capsys.readouterr().err


def test_a_record_of_another_group_is_refused(quick, tmp_path):
    path = tmp_path / "paper.json"
    model = loaded(tiny_model("llama", head_dim=64, num_hidden_layers=8))
    text = load_text("sample")
    options = [64], 2, ":32", "reference", 0.0
    paper_replay.measure(model, text, path, *options)
    path.write_text(json.dumps(paper_replay.start_record(
        path, model, text, "reference", paper_replay.WHAT, group=":32")))  # fmt: skip
    with pytest.raises(InputError, match="another group"):
        paper_replay.measure(model, text, path, [64], 2, "", "reference", 0.0)


def test_models_stand_side_by_side():
    records = {"one": "paper/short", "two": "paper/long"}
    models = []
    for label, name in records.items():
        models.append(paper.Measured(label))
        models[-1].add(json.loads((ROOT / f"benchmarks/{name}.json").read_text()))
    lines = paper.claims_table(models).splitlines()
    assert "one: difference, nats (95 %)" in lines[4] and "two: difference" in lines[4]
    at = {where: [x for x in lines if f"| {where} |" in x] for where in ("512", "2,048")}
    # each was measured at one length
    assert all(x.endswith("| – | – | – |") for x in at["512"])
    assert all("| – | – | – | +" in x or "| – | – | – | -" in x for x in at["2,048"])
    assert paper.report(models).count("## At 8,192 tokens, 2 windows") == 1


def test_newer_records_stand_for_older_ones_of_the_same_lengths(monkeypatch):
    names = list(roles.config_names("").values())

    def record(n_ctx: int, count: int, windows: int = 2, **more: object) -> dict:
        rows = [{"config": name} for name in names[:count]]
        return {"tables": {str(n_ctx): {"n_windows": windows, "rows": rows}}, **more}

    found = {"old": record(512, 3), "other": record(2048, 3), "new": record(512, 3)}
    monkeypatch.setattr(paper, "there", lambda name: True)
    monkeypatch.setattr(paper, "read", found.__getitem__)
    assert list(paper.records_of(("old", "other", "new"))) == ["other", "new"]
    # one of fewer configurations or windows does not, and its figures of keys are shown
    for less in (record(512, 1), record(512, 4, windows=1)):
        found["new"] = less
        assert list(paper.records_of(("old", "other", "new"))) == ["old", "other"]
    found["new"] = record(512, 1, keys={})
    assert list(paper.records_of(("old", "other", "new"))) == ["old", "other", "new"]
    found["newest"] = record(512, 3, keys={})
    assert list(paper.records_of(("old", "other", "new", "newest"))) == ["other", "newest"]
    about = {"text": {"name": "t"}, "device": "d", "backend": "b", "model": {"dtype": "float32"}}
    model = paper.Measured("m")
    for name in ("old", "new"):
        model.add(found[name] | about)
    assert len(model.results(512)) == 3 and len(model.about) == 1


def test_one_source_must_be_named():
    error = call(paper_replay.command).error()
    assert "either" in error


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--from", "x.json", "--keys-only"], "--keys-only has no effect with --from"),
        (["--from", "x.json", "-c", 512], "--ctx-size has no effect with --from"),
        (["--json", "x.json", "--keys-only", "--chunks", 2], "--chunks has no effect with"),
    ],
)
def test_options_that_would_change_nothing_are_refused(args, said):
    assert said in call(paper_replay.command, *args).error()
