"""How many windows a calibration needs, from the measurements of a finished one.

    python scripts/calibration_windows.py FOLDER --json benchmarks/calibration_windows.json

FOLDER is what `calibrate` wrote. Policies are assigned from some of its windows, drawn at random,
and judged on the others: their predicted KLD there over that of the best assignment for those
others. No model is run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
from record import record  # noqa: E402

from mlx_turbokv.cli.output import write_json  # noqa: E402
from mlx_turbokv.evaluate.calibrate import Budget, solve  # noqa: E402
from mlx_turbokv.evaluate.sensitivity import Sensitivity, all_changes  # noqa: E402
from mlx_turbokv.model.shapes import KVShape  # noqa: E402

BITS = (5.75, 4.75, 4.25, 3.75, 3.25)
DRAWS = 20
SEED = 1


def read(folder: Path, made: dict) -> Sensitivity:
    """The sensitivities of every window."""
    base = [tuple(pair) for pair in made["sensitivity"]["base"]]
    runs: dict[str, dict[int, list[float]]] = {}
    lines = (folder / "measurements.jsonl").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        run = json.loads(line)
        runs.setdefault(run["run"], {})[run["windows"][0]] = run["kld"]
    changes = all_changes(base, made["calibration"]["formats"])
    kld = {c: np.concatenate([x for _, x in sorted(runs[c.key].items())]) for c in changes}
    return Sensitivity(base, np.zeros(made["calibration"]["n_windows"]), kld)


def taken(found: Sensitivity, windows: np.ndarray) -> Sensitivity:
    """The same, of some of the windows."""
    kld = {change: values[windows] for change, values in found.kld.items()}
    return Sensitivity(found.base, found.base_kld[windows], kld)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--json")
    given = parser.parse_args()
    made = json.loads((given.folder / "calibration.json").read_text(encoding="utf-8"))
    formats = made["calibration"]["formats"]
    found = read(given.folder, made)
    n, shape = len(found.base_kld), KVShape(given.kv_heads, given.head_dim, given.head_dim)
    shapes = [shape] * len(found.base)
    n_values = sum(s.n_values for s in shapes)
    budgets = [Budget(str(bits), int(bits * n_values / 8)) for bits in BITS]
    rng, rows = np.random.default_rng(SEED), []
    for n_taken in (1, 2, 4, n // 2):
        excess = []
        for _ in range(DRAWS):
            order = rng.permutation(n)
            some, others = taken(found, order[:n_taken]), taken(found, order[n_taken:])
            pairs = zip(
                solve(some, shapes, formats, budgets), solve(others, shapes, formats, budgets)
            )
            excess.append(
                [others.predicted(a.pairs).mean() / b.predicted.mean() - 1 for a, b in pairs]
            )
        rows.append(
            {"windows": n_taken, "draws": DRAWS, "bits": list(BITS),
             "mean_excess": np.mean(excess, axis=0).tolist(), "max_excess": float(np.max(excess))}
        )  # fmt: skip
        print(
            n_taken,
            " ".join(f"{x:.1%}" for x in rows[-1]["mean_excess"]),
            f"max {np.max(excess):.1%}",
        )
    if given.json:
        about = {"measured": {k: made[k] for k in ("model", "calibration", "environment")}}
        write_json(given.json, record(rows=rows, **about))


if __name__ == "__main__":
    main()
