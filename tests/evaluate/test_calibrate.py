"""Sensitivities, policies and the calibrate command, on tiny models."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gguf_files import small_model, write_gguf
from tiny_models import shared_model, tiny_model

from mlx_turbokv.cli.calibrate import command
from mlx_turbokv.cli.entry import run
from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate import calibrate as module
from mlx_turbokv.evaluate.calibrate import calibrate, row_sizes, shapes_of
from mlx_turbokv.evaluate.checkpoint import Journal
from mlx_turbokv.evaluate.configuration import layer_list, prepare
from mlx_turbokv.evaluate.perplexity import evaluate_windows
from mlx_turbokv.evaluate.record import weights_digest
from mlx_turbokv.evaluate.sensitivity import Change, all_changes, measure
from mlx_turbokv.loading import models
from mlx_turbokv.policy.files import read_layer_list, write_layer_list

KLD_TOLERANCE = 1e-7  # nats a position: the same sums in another order, in float32
FORMATS = ("q8_0", "turbo4", "turbo2")
F16 = ("f16", "f16")


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=3, head_dim=64)


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 60, (3, 48)).astype(np.int32)


def _kld(model, windows, pairs):
    configs = [prepare(model, "f16/f16"), prepare(model, layer_list(pairs, "x"))]
    return np.array(evaluate_windows(model, windows, configs).summary()[1]["kld_by_window"])


@pytest.mark.parametrize("base", [F16, ("turbo4", "turbo2")])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_one_slot_is_changed_at_a_time(model, windows, base, batch):
    base = [base] * 3
    changes = [Change(0, 0, "turbo3"), Change(2, 1, "q8_0")]
    found = measure(model, windows, base, changes, batch=batch)
    k_first, v_last = [*base], [*base]
    k_first[0] = ("turbo3", base[0][1])
    v_last[2] = (base[2][0], "q8_0")
    for change, pairs in zip(changes, (k_first, v_last)):
        assert change.applied(base) == pairs
        np.testing.assert_allclose(
            found.kld[change], _kld(model, windows, pairs), atol=KLD_TOLERANCE, rtol=1e-4
        )
    expected = _kld(model, windows, base)
    np.testing.assert_allclose(found.base_kld, expected, atol=KLD_TOLERANCE, rtol=1e-4)
    np.testing.assert_array_equal(found.predicted(base), found.base_kld)


def test_prediction_is_the_sum_of_what_changes_add(model, windows):
    found = measure(model, windows, [F16] * 3, all_changes([F16] * 3, FORMATS))
    pairs = [("turbo2", "q8_0"), ("f16", "turbo4"), F16]
    added = [Change(0, 0, "turbo2"), Change(0, 1, "q8_0"), Change(1, 1, "turbo4")]
    np.testing.assert_allclose(found.predicted(pairs), sum(found.kld[c] for c in added))
    assert found.table(("f16", *FORMATS)).shape == (3, 2, 4)
    assert (found.table(("f16",)) == 0).all() and np.isinf(found.table(("turbo5",))).all()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next"])
def test_policies_keep_their_budget(name):
    """Also where some layers are no KV layers, or have other shapes."""
    tiny = shared_model(name)
    windows = np.random.default_rng(1).integers(0, 60, (2, 24)).astype(np.int32)
    shapes = shapes_of(tiny)
    n_values = sum(s.n_values for s in shapes)
    found, assigned = calibrate(tiny, windows, ["q8_0/turbo3", "5", "99"], FORMATS)
    assert len(found.base) == len(shapes)
    for at in assigned:
        kinds = sorted({name for pair in at.pairs for name in pair})
        sizes = row_sizes(shapes, kinds)
        taken = sum(
            int(sizes[layer, part, kinds.index(fmt)])
            for layer, pair in enumerate(at.pairs)
            for part, fmt in enumerate(pair)
        )
        assert taken == at.n_bytes <= at.budget.n_bytes
        bits = prepare(tiny, layer_list(at.pairs, "x")).bits
        assert abs(8 * taken / n_values - bits) < 1e-9
    assert assigned[0].n_bytes <= row_sizes(shapes, ["q8_0", "turbo3"])[:, [0, 1], [0, 1]].sum()
    assert {f for pair in assigned[2].pairs for f in pair} == {"q8_0"}


def test_refining_starts_from_an_assignment_and_moves_one_step(model, windows):
    shapes = shapes_of(model)
    _, (start,) = calibrate(model, windows, ["5"], FORMATS)
    better = module.refine(model, windows, start, shapes, FORMATS)
    assert better.n_bytes <= start.budget.n_bytes
    for one, two in zip(start.pairs, better.pairs):
        for a, b in zip(one, two):
            assert abs(FORMATS.index(a) - FORMATS.index(b)) <= 1
    np.testing.assert_allclose(
        better.predicted.mean() - _kld(model, windows, start.pairs).mean(), 0, atol=1e-2
    )


def test_measurements_are_taken_from_records(model, windows, tmp_path):
    path, changes = tmp_path / "m.jsonl", all_changes([F16] * 3, FORMATS)
    whole = measure(model, windows, [F16] * 3, changes, batch=2)

    def stop(done, total, name):
        assert total == 2 * len(changes)
        if done == len(changes) + 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records = Journal(path, {})
        measure(model, windows, [F16] * 3, changes, batch=2, records=records, progress=stop)
    steps = []
    again = measure(
        model, windows, [F16] * 3, changes, batch=2, records=Journal(path, {}),
        progress=lambda done, total, name: steps.append(name),
    )  # fmt: skip
    assert steps.count("kept") == len(changes) + 4
    for change in changes:
        np.testing.assert_array_equal(again.kld[change], whole.kld[change])


def test_logits_that_are_no_numbers_are_an_error(windows):
    broken = tiny_model("llama", num_hidden_layers=1, head_dim=64)
    broken.model.norm.weight = broken.model.norm.weight * float("nan")
    with pytest.raises(InputError, match="not finite"):
        measure(broken, windows, [F16], all_changes([F16], FORMATS))


def test_a_model_without_kv_layers_is_refused():
    with pytest.raises(InputError, match="no KV layer"):
        calibrate(shared_model("mamba"), np.zeros((1, 8), np.int32))


def test_digests_differ_with_the_weights(model):
    other = tiny_model("llama", seed=1, num_hidden_layers=3, head_dim=64)
    same = tiny_model("llama", num_hidden_layers=3, head_dim=64)
    assert weights_digest(model) == weights_digest(same) != weights_digest(other)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    _, weights = small_model("llama")
    folder = tmp_path_factory.mktemp("calibrate")
    text = "the quick fox & the lazy dog " * 12
    (folder / "a.txt").write_text(text)
    (folder / "b.txt").write_text(text[::-1])
    return folder, str(write_gguf(folder / "small.gguf", "llama", weights))


@pytest.fixture
def call(capsys, small, tmp_path, monkeypatch):
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path / "cache"))
    folder, model = small

    def call(out, *args, text="a.txt", held_out="b.txt"):
        held_out = held_out if held_out == "none" else str(folder / held_out)
        given = ["--model", model, "--text", str(folder / text), "--held-out", held_out]
        given += ["-c", "32", "--chunks", "3", "--folder", str(out)]
        given += [] if held_out == "none" else ["--held-out-chunks", "2"]
        with pytest.raises(SystemExit) as ended:
            run(command, [*given, *map(str, args)])
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


BUDGETS = ("--budget", "la-v7", "--budget", "5", "--formats", "turbo2,turbo4,q8_0")


def test_the_command_from_measuring_to_policy_files(call, tmp_path):
    status, out, _ = call(tmp_path / "out", *BUDGETS)
    assert status == 0 and "held-out" in out and "bits-5.json" in out
    record = json.loads((tmp_path / "out/calibration.json").read_text())
    assert [at["policy"] for at in record["policies"]] == ["bits-la-v7.json", "bits-5.json"]
    assert [r["config"] for r in record["held_out"]["results"]] == [
        "f16/f16", "bits-la-v7.json", "bits-5.json", "la-v7",
    ]  # fmt: skip
    policy = tmp_path / "out/bits-5.json"
    document = json.loads(policy.read_text())
    assert len(read_layer_list(policy).pairs) == 2
    assert document["bits_per_value"] <= 5
    assert document["sensitivity"]["layers"][1]["v"]["turbo2"]["mean"] > 0
    assert document["held_out"]["kld_ratio_to"]["la-v7"]["mean"] > 0
    for key in ("predicted_kld", "measured_kld", "environment", "model", "calibration"):
        assert document[key]
    assert len(document["model"]["fingerprint"]) == 64


def test_an_interrupted_command_writes_the_same_bytes(call, tmp_path):
    assert call(tmp_path / "whole", *BUDGETS)[0] == 0
    (tmp_path / "cut").mkdir()
    lines = (tmp_path / "whole/measurements.jsonl").read_text().splitlines(keepends=True)
    # Killed in the middle of writing a line.
    (tmp_path / "cut/measurements.jsonl").write_text("".join(lines[:9]) + lines[9][:20])
    status, _, err = call(tmp_path / "cut", "--resume", *BUDGETS)
    assert status == 0 and "8 runs were measured before" in err
    for name in ("bits-la-v7.json", "bits-5.json", "measurements.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_another_budget_measures_no_sensitivity_again(call, tmp_path):
    assert call(tmp_path, *BUDGETS)[0] == 0
    before = (tmp_path / "measurements.jsonl").read_bytes()
    status, out, _ = call(tmp_path, "--budget", "6.5", *BUDGETS[4:], "--resume", held_out="none")
    assert status == 0 and "Not checked on held-out windows." in out
    assert (tmp_path / "measurements.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "bits-6.5.json").read_text())["held_out"] is None


def test_refining_and_another_base(call, tmp_path):
    status, out, _ = call(
        tmp_path, "--refine", 2, "--base", "turbo4/turbo4", *BUDGETS, "--output", "json"
    )
    record = json.loads(out)
    assert status == 0 and record["calibration"]["base"] == "turbo4/turbo4"
    assert all(at["bytes_a_token"] <= at["budget_bytes_a_token"] for at in record["policies"])


def test_means_of_keys_lie_beside_the_policies_and_are_what_was_measured(call, tmp_path, small):
    status, out, _ = call(tmp_path, "--keys", *BUDGETS, "--output", "json")
    assert status == 0
    measured = json.loads(out)["held_out"]["results"]
    policy = tmp_path / "bits-5.json"
    loaded = models.load(small[1])
    assert (
        prepare(loaded.model, str(policy)).centred == "keys centred by calibrated mean (2 layers)"
    )
    assert [r["centred"] for r in measured if r["config"] == "bits-5.json"] == [
        "keys centred by calibrated mean (2 layers)"
    ]
    plain = call(tmp_path / "plain", "--no-centre", *BUDGETS, "--output", "json")
    assert json.loads(plain[1])["calibration"]["keys"] == "not centred"
    status, _, err = call(tmp_path, *BUDGETS)
    assert status == 2 and "other settings (keys)" in err


def test_the_type_to_run_in(call, tmp_path):
    status, out, _ = call(
        tmp_path, "--dtype", "float16", *BUDGETS, "--output", "json", held_out="none"
    )
    assert status == 0 and json.loads(out)["model"]["dtype"] == "float16"


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--budget", "-1"], "Budget -1"),
        (["--budget", "nan"], "Budget nan"),
        (["--budget", "2"], "Budget 2 is too small"),
        (["--budget", "la-v9"], "la-v9"),
        (["--formats", "turbo7"], "turbo7"),
        (["--formats", ","], "No format"),
        (["--base", "q9/q9"], "q9"),
        (["--base", "mlx-kv4"], "mlx-kv4"),
        (["--compare", "q9/q9"], "q9"),
        (["--chunks", "0"], "--chunks"),
        (["--keys", "--no-centre"], "--no-centre"),
        (["--resume"], "no unfinished run"),
        (["--held-out", "a.txt", "--text", "a.txt"], "calibration text"),
    ],
)
def test_bad_input(call, tmp_path, small, arguments, word):
    arguments = [str(small[0] / a) if a.endswith(".txt") else a for a in arguments]
    status, out, err = call(tmp_path / "out", *arguments)
    assert (status, out) == (2, "")
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and word in errors[0] and "Traceback" not in err


def test_two_budgets_of_one_file_name_are_refused(call, tmp_path):
    files = [tmp_path / "a/x.json", tmp_path / "b/x.json"]
    for file in files:
        file.parent.mkdir()
        write_layer_list(file, [("q8_0", "q8_0")] * 2)
    status, _, err = call(tmp_path / "out", "--budget", files[0], "--budget", files[1])
    assert status == 2 and "bits-x.json a second time" in err


def test_other_settings_are_not_mixed_in(call, tmp_path):
    assert call(tmp_path, *BUDGETS)[0] == 0
    status, _, err = call(tmp_path, *BUDGETS, text="b.txt", held_out="a.txt")
    assert status == 2 and "other settings" in err and "--no-resume" in err
    assert call(tmp_path, *BUDGETS, "--no-resume", text="b.txt", held_out="none")[0] == 0
