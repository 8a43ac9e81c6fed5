"""The calibrate command, on a tiny model."""

from __future__ import annotations

import json

import pytest
from gguf_files import small_model, write_gguf

from mlx_turbokv.cli.calibrate import command
from mlx_turbokv.cli.entry import run
from mlx_turbokv.evaluate.configuration import prepare
from mlx_turbokv.evaluate.tables import calibration_table
from mlx_turbokv.loading import models
from mlx_turbokv.policy import Protection
from mlx_turbokv.policy.files import read_layer_list, write_layer_list


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    _, weights = small_model("llama")
    folder = tmp_path_factory.mktemp("calibrate")
    text = "the quick fox & the lazy dog " * 24
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
        given += [] if "--recent" in args else ["--sink", "0", "--recent", "0"]
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


def test_protected_tokens_are_those_of_the_policies_and_of_what_is_compared(call, tmp_path):
    compared = ["--compare", "turbo3/turbo3", "--compare", "turbo3/turbo3+0,0"]
    options = [*BUDGETS, "-c", "256", "--recent", "32", "--output", "json", *compared]
    status, out, _ = call(tmp_path, "--base", "f16/f16+32,64", *options)
    record = json.loads(out)
    assert status == 0 and record["calibration"]["protected"] == "32,32"
    # the formats that la-v7 allows two layers are all q8_0
    results = {r["config"]: r["protected"] for r in record["held_out"]["results"]}
    assert results == {
        "f16/f16": None, "bits-la-v7.json": None, "bits-5.json": "32,32",
        "turbo3/turbo3+32,32": "32,32", "turbo3/turbo3+0,0": None,
    }  # fmt: skip
    assert read_layer_list(tmp_path / "bits-5.json").protection == Protection(32, 32)
    status, _, err = call(tmp_path, *options, "--sink", "0")
    assert status == 2 and "other settings" in err


def test_windows_whose_tokens_are_all_protected_are_refused(call, tmp_path):
    status, _, err = call(tmp_path, "--recent", "32")
    assert status == 2 and "All tokens of windows of 32 are protected" in err


def test_means_of_keys_lie_beside_the_policies_and_are_what_was_measured(call, tmp_path, small):
    status, out, _ = call(tmp_path, "--keys", *BUDGETS, "--output", "json")
    assert status == 0
    record = json.loads(out)
    assert "next to the policy files" in str(calibration_table(record).notes)
    measured = record["held_out"]["results"]
    policy = tmp_path / "bits-5.json"
    loaded = models.load(small[1])
    centred = "keys centred by calibrated mean and scales (2 layers)"
    assert prepare(loaded.model, str(policy)).centred == centred
    assert [r["centred"] for r in measured if r["config"] == "bits-5.json"] == [centred]
    plain = call(tmp_path / "plain", "--no-centre", *BUDGETS, "--output", "json")
    record = json.loads(plain[1])
    assert record["calibration"]["keys"] == "not centred"
    assert "next to the policy files" not in str(calibration_table(record).notes)
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
    assert not (tmp_path / "out/measurements.jsonl").exists()  # nothing was measured


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
