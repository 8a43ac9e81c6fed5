"""Runs of two trees in turns become one record, and what does not belong together is refused."""

from __future__ import annotations

import copy
import json
import sys

import bench_prompts
import pytest

RUN = {
    "model": {"name": "m"}, "weights": "w", "prefill_step_size": 2048, "backend": "cuda",
    "environment": {"device": "a GPU", "mlx": "1"}, "command": "bench m --json now1.json",
    "protected": {"turbo4/turbo3": "32,128"},
    "rows": [
        {"kind": "prompt", "tokens": 8, "config": "turbo4/turbo3", "prompt_tps": {}},
        {"kind": "context", "tokens": 8, "config": "turbo4/turbo3"},
    ],
}  # fmt: skip
BEFORE = {key: value for key, value in RUN.items() if key != "protected"}


@pytest.fixture
def runs(tmp_path):
    """Writes runs of a tree as RUNS has them."""

    def write(tree: str, run: dict, *trials: list[float]):
        for number, found in enumerate(trials):
            run = copy.deepcopy(run)
            run["rows"][0]["prompt_tps"]["trials"] = found
            (tmp_path / f"{tree}{number}.json").write_text(json.dumps(run))
        return tmp_path

    return write


def test_trials_are_put_together_by_tree_configuration_and_length(runs, monkeypatch, capsys):
    runs("now", RUN, [1, 2, 9], [3])
    folder = runs("before", BEFORE, [4, 6])
    out = folder / "record.json"
    arguments = [str(folder), "--commit", "b", "--before", "a", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["bench_prompts.py", *arguments])
    assert bench_prompts.main() == 0
    record = json.loads(out.read_text())
    assert record["commit"] == "b" and record["device"] == "a GPU"
    assert record["runs"] == {"now": "bench m", "before": "bench m"}
    same = {"config": "turbo4/turbo3", "tokens": 8}
    assert record["rows"] == [
        {"tree": "now", "commit": "b", "protected": "32,128", "trials": [[1, 2, 9], [3]],
         "median": 2.5, **same},
        {"tree": "before", "commit": "a", "protected": None, "trials": [[4, 6]],
         "median": 5, **same},
    ]  # fmt: skip
    assert "8 turbo4/turbo3, before: 5 tok/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [({"environment": {"device": "another"}}, "before0.json has environment"), (None, "no before")],
)
def test_other_machines_and_missing_runs_are_refused(runs, change, said):
    folder = runs("now", RUN, [1])
    if change is not None:
        runs("before", BEFORE | change, [1])
    with pytest.raises(ValueError, match=said):
        bench_prompts.gather(folder, {"now": "b", "before": "a"})
