"""The record of a GPU's checks: what is whole, and that every gap and failure is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

import gpu_check  # noqa: E402
import gpu_check_record as script  # noqa: E402

from mlx_turbokv.doctor.variants import variant_set  # noqa: E402

ABOUT = {
    "commit": "abc1234",
    "date": "2026-01-02",
    "device": "a card",
    "mlx": "0.1",
    "backend": "cuda",
}
CLEAN = {
    "memcheck": "========= ERROR SUMMARY: 0 errors\n",
    "racecheck": "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
}


def write(folder: Path, name: str, record: dict, status: int = 0, log: str = "") -> None:
    (folder / f"{name}.json").write_text(json.dumps({**ABOUT, **record}))
    (folder / f"{name}.rc").write_text(f"{status}\n")
    (folder / f"{name}.log").write_text(log)


def doctor(passed: bool, *kernels: str) -> dict:
    failures = [{"kernels": list(kernels), "message": "it differs\nby much"}] if kernels else []
    command = "mlx_turbokv.doctor --quick --json doctor.json"
    variants = [{}] * len(variant_set("quick"))
    return {"command": command, "passed": passed, "variants": variants, "failures": failures}


@pytest.fixture
def folder(tmp_path):
    """What a run without a failure writes, in two shards of each kind."""
    cases = sorted(script.CASE_NAMES)
    for kind in ("cases", "memcheck", "racecheck"):
        for i in range(2):
            rows = [{"case": case, "decode_of_bound": 0.5, "failures": []} for case in cases[i::2]]
            command = f"scripts/gpu_check.py --shard {i}/2 --out {kind}{i}.json"
            shard = {"command": command, "kernels": rows, "not_run": [], "failures": []}
            write(tmp_path, f"{kind}{i}", shard, log=CLEAN.get(kind, ""))
    write(tmp_path, "model", {"command": "gpu_check", "model": {"pairs": []}, "failures": []})
    launches = {"tokens": 1, "shape": [1], "n_heads": 1, "rows": [], "most_added": 0}
    write(tmp_path, "launches", {"command": "launches", **launches})
    write(tmp_path, "doctor", doctor(True))
    write(tmp_path, "doctor_changed", doctor(False, "pack"), status=1)
    (tmp_path / "doctor_changed.txt").write_text("pack.metal: a word misspelled\n")
    return tmp_path


def change(folder: Path, name: str, **fields) -> None:
    record = json.loads((folder / f"{name}.json").read_text())
    (folder / f"{name}.json").write_text(json.dumps({**record, **fields}))


def test_a_whole_run_has_every_case_and_no_failure(folder) -> None:
    report, failures = script.gather(folder)
    assert failures == []
    assert report["device"] == "a card" and report["commit"] == "abc1234"
    kernels = report["kernels"]
    assert (kernels["cases"], kernels["processes"]) == (len(script.CASE_NAMES), 2)
    assert kernels["command"] == "scripts/gpu_check.py --shard i/2"
    for part in report["sanitizer"]:
        assert part["cases"] == len(script.CASE_NAMES) and part["not_run"] == []
        assert part["command"].startswith(
            f"compute-sanitizer --tool {part['tool']} python scripts/"
        )
    assert [row["named"] for row in report["doctor"]] == [[], ["pack"]]


@pytest.mark.parametrize("log", ["========= ERROR SUMMARY: 3 errors\n", "killed\n"])
def test_cases_count_only_where_the_sanitizer_found_nothing(folder, log) -> None:
    (folder / "memcheck1.log").write_text(log)
    report, failures = script.gather(folder)
    memcheck = report["sanitizer"][0]
    assert memcheck["cases"] + len(memcheck["not_run"]) == len(script.CASE_NAMES)
    assert 0 < memcheck["cases"] < len(script.CASE_NAMES)
    assert any("memcheck1" in failure for failure in failures)
    assert any(failure.startswith("memcheck: ") and "not run" in failure for failure in failures)


def test_a_case_left_out_and_one_that_failed_are_named(folder) -> None:
    rows = json.loads((folder / "cases0.json").read_text())["kernels"]
    change(folder, "cases0", kernels=rows[1:], failures=["q8_0: decode differs"])
    report, failures = script.gather(folder)
    assert report["kernels"]["not_run"] == [rows[0]["case"]]
    assert failures == ["q8_0: decode differs", "kernels: 1 cases not run"]


def test_what_disagrees_in_the_model_is_a_failure_and_its_figures_are_kept(folder) -> None:
    model = {"pairs": [{"pair": "q8_0/turbo2", "greedy": [{"forced": {"n_equal": 99}}]}]}
    change(folder, "model", model=model, failures=["q8_0/turbo2: the choices part"])
    report, failures = script.gather(folder)
    assert failures == ["q8_0/turbo2: the choices part"]
    assert report["model"] == {"command": "gpu_check", **model}


def test_a_case_of_another_checkout_is_a_failure(folder) -> None:
    rows = json.loads((folder / "cases0.json").read_text())["kernels"]
    change(folder, "cases0", kernels=[*rows, {"case": "an old one"}])
    assert "an old one: no case of this checkout" in script.gather(folder)[1]


@pytest.mark.parametrize("missing", ["model", "launches", "doctor", "doctor_changed"])
def test_a_part_that_did_not_run_is_named(folder, missing) -> None:
    (folder / f"{missing}.json").unlink()
    (failure,) = script.gather(folder)[1]
    assert failure.startswith(missing.split("_")[0]) and "not run" in failure


@pytest.mark.parametrize(
    ("name", "record", "status"),
    [
        ("doctor", doctor(False, "pack"), 1),
        ("doctor", doctor(True), 1),
        ("doctor_changed", doctor(True), 0),
        ("doctor_changed", doctor(False, "dequantize"), 1),
        ("doctor_changed", doctor(False, "pack"), 2),
    ],
)
def test_a_doctor_that_is_wrong_is_a_failure(folder, name, record, status) -> None:
    write(folder, name, record, status)
    (failure,) = script.gather(folder)[1]
    assert failure.startswith("doctor, ")


def test_parts_of_doctor_count_as_one_and_none_may_lack(folder) -> None:
    (folder / "doctor.json").unlink()
    n = len(variant_set())
    command = "doctor_part.py {}/2 --json {}.json"
    for i, variants in enumerate((n // 2, n - n // 2)):
        record = {**doctor(True), "variants": [{}] * variants, "command": command.format(i, i)}
        write(folder, f"doctor0.{i}", record)
    report, failures = script.gather(folder)
    assert failures == []
    row = report["doctor"][0]
    assert row["command"] == "doctor_part.py i/2"
    assert (row["processes"], row["variants"], row["passed"]) == (2, n, True)
    (folder / "doctor0.1.rc").unlink()  # it did not end
    (failure,) = script.gather(folder)[1]
    assert failure.startswith("doctor, nothing changed")
    write(folder, "doctor0.1", {**doctor(False, "pack"), "variants": [{}] * (n - n // 2)}, 1)
    assert script.gather(folder)[0]["doctor"][0]["named"] == ["pack"]
    (folder / "doctor0.1.json").unlink()
    (failure,) = script.gather(folder)[1]
    assert failure.startswith("doctor, nothing changed")


def test_parts_of_two_devices_are_no_record(folder) -> None:
    change(folder, "racecheck1", device="another card")
    with pytest.raises(ValueError, match="racecheck1 has device another card"):
        script.gather(folder)


def test_paths_are_left_out_of_commands_that_go_on(folder):
    command = "scripts/gpu_check.py --shard 0/2 --seconds 9 --without /a/x.json b.json --out c.json"
    change(folder, "cases0", command=command)
    report, _ = script.gather(folder)
    assert report["kernels"]["command"] == "scripts/gpu_check.py --shard i/2 --seconds 9"


def test_cases_of_other_records_are_left_out(folder):
    files = [folder / f"cases{i}.json" for i in range(2)]
    assert gpu_check.cases_of(files) == script.CASE_NAMES
    assert gpu_check.cases_of(files[:1]) < script.CASE_NAMES and gpu_check.cases_of([]) == set()
