"""Which group scale K and V store: measured KLD of the four candidates.

Each rule is tried on K alone (V in f16) and on V alone (K in f16), for turbo2, turbo3 and turbo4,
over the same windows, with the NumPy simulation of the tests in the place of the cache: the
package has the winner built in. Writes benchmarks/group_scale.json.

    python scripts/group_scale.py --text FILE --chunks 8
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import click  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from mlx_lm.models.cache import make_prompt_cache  # noqa: E402
from simulation import SCALE_RULES, SimulatedCache  # noqa: E402

from mlx_turbokv.evaluate import statistics  # noqa: E402
from mlx_turbokv.evaluate.divergence import Reference  # noqa: E402
from mlx_turbokv.evaluate.record import command_line, environment  # noqa: E402
from mlx_turbokv.evaluate.text import load_text  # noqa: E402
from mlx_turbokv.evaluate.windows import cut_windows, scored_logits  # noqa: E402
from mlx_turbokv.loading.models import load  # noqa: E402  (finds OpenBLAS before MLX is imported)

FORMATS = ("turbo2", "turbo3", "turbo4")


def candidates() -> list[dict]:
    """Every side, format and rule, in the order of the table."""
    return [
        {"side": side, "format": fmt, "rule": rule}
        for side in ("k", "v")
        for fmt in FORMATS
        for rule in SCALE_RULES
    ]


def simulated_caches(n_layers: int, side: str, format: str, rule: str) -> list[SimulatedCache]:
    """Caches that quantise one side and leave the other alone."""
    k, v = (format, "f16") if side == "k" else ("f16", format)
    return [SimulatedCache(k, v, rule, rule) for _ in range(n_layers)]


def summarise(rows: list[dict], kld: list[list[np.ndarray]]) -> list[dict]:
    """Adds each row's KLD, and its paired distance from the best rule of its side and format."""
    means = [np.array([np.mean(w) for w in windows]) for windows in kld]
    out = []
    for row, window_means in zip(rows, means):
        rivals = [
            m
            for r, m in zip(rows, means)
            if (r["side"], r["format"]) == (row["side"], row["format"])
        ]
        best = min(rivals, key=np.mean)
        out.append(
            row
            | {
                "kld": statistics.mean_and_error(window_means),
                "above_best": statistics.mean_and_error(window_means - best),
                "kld_by_window": [float(m) for m in window_means],
            }
        )
    return out


RUINED = 0.5  # nats of KLD


def winners(rows: list[dict]) -> dict:
    """For each side, the rule with the lowest KLD relative to the best, averaged over formats.

    A format that ruins the model under every rule has no vote.
    """
    chosen = {}
    for side in ("k", "v"):
        excess = {}
        for rule in SCALE_RULES:
            ratios = []
            for fmt in FORMATS:
                group = [r for r in rows if r["side"] == side and r["format"] == fmt]
                best = min(r["kld"]["mean"] for r in group)
                if best > RUINED:
                    continue
                ratios += [r["kld"]["mean"] / best for r in group if r["rule"] == rule]
            excess[rule] = float(np.mean(ratios))
        chosen[side] = {"rule": min(excess, key=excess.get), "mean_ratio_to_best": excess}
    return chosen


def print_table(rows: list[dict]) -> None:
    """KLD per side and format, one column a rule, on standard output."""
    print(f"{'':12}" + "".join(f"{rule:>22}" for rule in SCALE_RULES))
    for side in ("k", "v"):
        for fmt in FORMATS:
            cells = [r for r in rows if r["side"] == side and r["format"] == fmt]
            print(
                f"{side} {fmt:10}"
                + "".join(f"{r['kld']['mean']:>13.5f} ±{r['kld']['se']:.5f}" for r in cells)
            )


@click.command()
@click.option("--model", default=None, help="Hub id, folder or .gguf; default: the small model.")
@click.option("--text", default="wikitext-2", help="A text file, 'sample' or 'wikitext-2'.")
@click.option("-c", "--ctx-size", default=512, show_default=True)
@click.option("--chunks", default=8, show_default=True)
@click.option("--json", "json_path", default=str(ROOT / "benchmarks/group_scale.json"))
def main(model, text, ctx_size, chunks, json_path):
    loaded = load(model)
    source = load_text(text)
    windows = cut_windows(loaded.tokenizer, source.text, ctx_size, chunks)
    rows = candidates()
    kld = [[] for _ in rows]
    n_layers = len(make_prompt_cache(loaded.model))
    record = {
        "what": "KLD of the group-scale rules, one side quantised, the other in f16",
        "model": loaded.name,
        "text": {"name": source.name, "sha256": source.sha256},
        "n_ctx": ctx_size,
        "environment": environment(),
        "command": f"python {command_line()}",
    }
    for i, window in enumerate(windows):
        targets = mx.array(window[ctx_size // 2 + 1 :])
        reference = Reference(
            scored_logits(loaded.model, window, make_prompt_cache(loaded.model)), targets
        )
        for j, row in enumerate(rows):
            caches = simulated_caches(n_layers, **row)
            kld[j].append(reference.compare(scored_logits(loaded.model, window, caches)).kld)
            print(f"\rwindow {i + 1}/{len(windows)}, {j + 1}/{len(rows)}", end="", file=sys.stderr)
        print(file=sys.stderr)
        table = summarise(rows, kld)
        record |= {"n_windows": i + 1, "choice": winners(table), "rows": table}
        Path(json_path).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print_table(record["rows"])
    for side, choice in record["choice"].items():
        print(f"{side}: {choice['rule']}")


if __name__ == "__main__":
    main()
