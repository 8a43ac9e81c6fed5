#!/usr/bin/env python3
"""Replays the paper "Layer-Aware V Compression": its tables and claims, measured on a model.

    python scripts/paper_replay.py --out benchmarks/paper --text FILE --chunks 64
    python scripts/paper_replay.py --from short.json --long long.json --needle needle.json

The first form measures (an interrupted run continues); the second only prints. V's formats have a
scale per 32 values, the paper's 2.5 and 3.5 bits, unless --group head. On a hybrid model boundaries
by raw layer index, as the paper's code counts, are measured as well as those by KV layer.

A claim says that one configuration has a smaller loss than another. Windows are paired: each gives
one difference, and the 95 % interval of the mean is a bootstrap over windows. A claim holds if the
interval lies on its side, does not hold if it lies on the other, and else cannot be told.
"""

from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import click  # noqa: E402
import numpy as np  # noqa: E402
from pages import table  # noqa: E402

from mlx_turbokv.cli import bench, needle, options, perplexity  # noqa: E402
from mlx_turbokv.cli.entry import run  # noqa: E402
from mlx_turbokv.cli.output import print_status, read_json  # noqa: E402
from mlx_turbokv.cli.runs import load_model  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.evaluate.statistics import bootstrap_interval  # noqa: E402

PRINTED = ROOT / "benchmarks/paper/printed.json"
LONG_CTX = 2048
RAW = {"raw 2+2": ("raw-2-2.json", "la-v7"), "raw 4+4": ("raw-4-4.json", "mode-10")}
HOLDS, FAILS, OPEN, MISSING = "holds", "does not hold", "cannot tell", "not measured"
TURBO2_COST = (0.03, 0.05)  # "+3-5 % PPL" against q8_0/q8_0
SEED, SAMPLES = 20250101, 4000
# What names of one pair end in; records of before tokens could be protected lack it.
UNPROTECTED = "+0,0"


@dataclass(frozen=True)
class Claim:
    """``lower`` has a smaller loss than ``higher``, by the paper; ``text`` is what it says."""

    text: str
    lower: str
    higher: str


CLAIMS = (
    Claim("Boundary V (LA-V7) is better than uniform turbo2", "la-v7", "turbo2"),
    Claim("uniform turbo3 is better than Boundary V", "turbo3", "la-v7"),
    Claim("LA-V6 (the last 8 layers) is worse than LA-V7 (first 2 and last 2)", "la-v7", "la-v6"),
    Claim("LA-V7 (q8_0 boundaries) is better than LA-V5 (turbo4), on sensitive models",
          "la-v7", "la-v5"),
    Claim("f16 boundaries are no better than q8_0 ones (2+2)", "la-v7", "f16 2+2"),
    Claim("f16 boundaries are no better than q8_0 ones (4+4)", "4+4", "f16 4+4"),
    Claim("4+4 is better than 2+2 on pure attention", "4+4", "la-v7"),
    Claim("K is worth more bits than V: turbo3 for V costs less than turbo3 for K",
          "turbo3", "swapped"),
)  # fmt: skip
HYBRID_CLAIMS = (
    Claim("boundaries counted over KV layers beat raw layer indices (2+2)", "la-v7", "raw 2+2"),
    Claim("boundaries counted over KV layers beat raw layer indices (4+4)", "4+4", "raw 4+4"),
)


def config_names(group: str) -> dict[str, str]:
    """The configuration of each role, without protected tokens; ``group`` is "" or ":32"."""
    v2, v3 = f"turbo2{group}", f"turbo3{group}"
    names = {"q8": "q8_0/q8_0", "turbo3": f"q8_0/{v3}", "turbo2": f"q8_0/{v2}"}
    policies = {"la-v5": "la-v5", "la-v6": "la-v6", "la-v7": "la-v7", "4+4": "mode-10"}
    names["f16 2+2"] = f"q8_0/{v2}@boundary:2,2:f16"
    names["f16 4+4"] = f"q8_0/{v2}@boundary:4,4:f16"
    names["swapped"] = f"{v3}/q8_0"
    names = {role: name + UNPROTECTED for role, name in names.items()}
    for role, policy in policies.items():
        names[role] = f"q8_0/{v2}@{policy}" if group else policy
    return names


def roles_of(record: dict) -> dict[str, dict]:
    """A perplexity record's rows by role; policy files are known by name, whatever their folder."""
    names = [r["config"].removesuffix(UNPROTECTED) for r in record["results"]]
    names = [os.path.basename(name) if name.endswith(".json") else name for name in names]
    rows = dict(zip(names, record["results"]))
    group = ":32" if "q8_0/turbo2:32" in rows else ""
    wanted = {**config_names(group), **{role: file for role, (file, _) in RAW.items()}}
    bare = {role: name.removesuffix(UNPROTECTED) for role, name in wanted.items()}
    return {role: rows[name] for role, name in bare.items() if name in rows}


def raw_index_policies(model, folder: Path, group: str) -> list[str]:
    """Files of the boundary policies as raw layer indices give them; none for pure attention."""
    from mlx_turbokv.model.caches import own_caches
    from mlx_turbokv.model.kv_layers import kv_layers
    from mlx_turbokv.policy import Protection, load_policy
    from mlx_turbokv.policy.files import write_layer_list

    layers, n_caches = kv_layers(model).layers, len(own_caches(model))
    if len(layers) == n_caches:
        return []
    names = []
    for file, policy in RAW.values():
        raw = load_policy(policy, "q8_0", f"turbo2{group}").formats(n_caches)
        pairs = [raw[layer.index] for layer in layers]
        write_layer_list(folder / file, pairs, Protection(0, 0))
        names.append(os.path.relpath(folder / file))
    return names


def measure(loaded, text, folder: Path, n_ctx: int, chunks: int, group: str, backend: str) -> dict:
    """The record of one context length; kept if the folder has it with these settings."""
    from mlx_turbokv.evaluate.configuration import fitting

    names, reasons = fitting(loaded.model, ["f16/f16", *config_names(group).values()], backend)
    for reason in reasons:
        print_status(reason)
    names += raw_index_policies(loaded.model, folder, group)
    path = folder / f"{'short' if n_ctx < LONG_CTX else 'long'}.json"
    if path.is_file():
        found = read_json(str(path), perplexity.WHAT)
        same = found["n_ctx"] == n_ctx and found["text"]["sha256"] == text.sha256
        if same and [r["config"] for r in found["results"]] == names:
            print_status(f"Kept: {path}")
            return found
    return perplexity.measure(loaded, text, names, n_ctx, chunks, backend, str(path), None)


def measure_both(folder: Path, text, chunks, long_chunks, long_ctx, group, backend, **model):
    """The records of both context lengths; None for the long one without --long-chunks."""
    from mlx_turbokv.evaluate.text import load_text

    source, loaded = load_text(text), load_model(model)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ":32" if group == "32" else ""
    short = measure(loaded, source, folder, 512, chunks, suffix, backend)
    if not long_chunks:
        return short, None
    return short, measure(loaded, source, folder, long_ctx, long_chunks, suffix, backend)


def verdict(interval: tuple[float, float] | None, low: float = 0.0, high: float = math.inf) -> str:
    """Whether an interval lies within [low, high], outside of it, or across an end."""
    if interval is None:
        return OPEN
    if low < interval[0] and interval[1] < high:
        return HOLDS
    return FAILS if interval[1] < low or interval[0] > high else OPEN


def by_window(results: dict[str, dict], roles: tuple[str, ...], key: str = "nll"):
    """Values of the roles by window ("nll" or "kld"); None if a role was not measured."""
    if any(role not in results for role in roles):
        return None
    return [np.array(results[role][f"{key}_by_window"], np.float64) for role in roles]


def judge(claim: Claim, results: dict[str, dict], key: str = "nll") -> dict:
    """The verdict on a claim by loss ("nll") or by divergence from f16 ("kld")."""
    found = by_window(results, (claim.higher, claim.lower), key)
    if found is None:
        return {"verdict": MISSING}
    interval = bootstrap_interval(found[0] - found[1])
    difference = float((found[0] - found[1]).mean())
    return {"difference": difference, "interval": interval, "verdict": verdict(interval)}


def turbo2_cost(results: dict[str, dict]) -> dict:
    """What turbo2 adds to the perplexity of q8_0/q8_0, against the paper's 3 to 5 %."""
    found = by_window(results, ("turbo2", "q8"))
    if found is None:
        return {"verdict": MISSING}
    interval = bootstrap_interval(found[0] - found[1])
    interval = interval and tuple(math.expm1(x) for x in interval)
    difference = math.expm1(float((found[0] - found[1]).mean()))
    return {
        "difference": difference,
        "interval": interval,
        "verdict": verdict(interval, *TURBO2_COST),
    }


def gap_closed(results: dict[str, dict], role: str = "la-v7") -> dict | None:
    """Share of the way from turbo2 to turbo3 that a role goes, with a bootstrap interval.

    The interval is None where resampled windows do not agree that turbo3 is better.
    """
    found = by_window(results, ("turbo2", role, "turbo3"))
    if found is None:
        return None
    gap, gained = found[0] - found[2], found[0] - found[1]
    record = {"share": float(gained.mean() / gap.mean()), "interval": None}
    if gap.size > 1:
        draws = np.random.default_rng(SEED).integers(0, gap.size, (SAMPLES, gap.size))
        gaps, gains = gap[draws].mean(1), gained[draws].mean(1)
        if np.quantile(gaps, 0.025) > 0:
            low, high = np.quantile(gains / gaps, [0.025, 0.975])
            record["interval"] = float(low), float(high)
    return record


def dilution(short: dict[str, dict], long: dict[str, dict]) -> dict:
    """Whether Boundary V's gain over turbo2 is smaller at long context; windows are not paired."""
    pairs = [by_window(results, ("turbo2", "la-v7")) for results in (short, long)]
    if any(pair is None for pair in pairs):
        return {"verdict": MISSING}
    gains = [turbo2 - boundary for turbo2, boundary in pairs]
    difference = float(gains[0].mean() - gains[1].mean())
    if min(g.size for g in gains) < 2:
        return {"verdict": OPEN, "difference": difference}
    rng = np.random.default_rng(SEED)
    means = [g[rng.integers(0, g.size, (SAMPLES, g.size))].mean(1) for g in gains]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    interval = float(low), float(high)
    return {"difference": difference, "interval": interval, "verdict": verdict(interval)}


def retrieval(needle: dict, name: str) -> dict:
    """Whether a configuration impairs retrieval: what f16 finds is lost, or less probable."""
    row = next((r for r in needle["summary"] if r["config"] == name), None)
    if row is None:
        return {"verdict": MISSING}
    delta, of = row["delta_logp"], row["reference_found"]
    found = {"difference": delta["mean"], "interval": delta["interval"], "of": of}
    found |= {"lost": of - row["found_of_reference"], "verdict": verdict(delta["interval"])}
    return found


def judged(short: dict, long: dict | None, needle: dict | None) -> list[dict]:
    """Every claim with its verdicts; ``where`` is a window's tokens or another measurement."""
    places = [(f"{r['n_ctx']:,}", roles_of(r)) for r in (short, long) if r is not None]
    results = places[0][1]
    wanted = CLAIMS + (HYBRID_CLAIMS if any(role in results for role in RAW) else ())
    found = [
        {"claim": claim.text, "where": where, "unit": "nats", **judge(claim, rows),
         "by_kld": judge(claim, rows, "kld")}
        for where, rows in places for claim in wanted
    ]  # fmt: skip

    def add(text: str, where: str, unit: str, result: dict) -> None:
        found.append({"claim": text, "where": where, "unit": unit, **result})

    add("turbo2 for V costs 3 to 5 % of PPL", places[0][0], "PPL", turbo2_cost(results))
    if long is not None:
        text = "the gain of Boundary V over turbo2 shrinks with the context"
        add(text, "both", "nats", dilution(results, places[1][1]))
    if needle is not None:
        name = results["la-v7"]["config"] if "la-v7" in results else "la-v7"
        measured = {r["config"] for r in needle["summary"]}
        result = retrieval(needle, name if name in measured else "la-v7")
        add("Boundary V does not impair retrieval", "needle", "nats of the answer", result)
    return found


def difference_cell(entry: dict) -> str:
    """A claim's difference with its interval."""
    if entry.get("difference") is None:
        return "–"
    scale, spec, unit = (100, "+.2f", " %") if entry["unit"] == "PPL" else (1, "+.4f", "")
    text = f"{scale * entry['difference']:{spec}}{unit}"
    if entry.get("interval"):
        low, high = entry["interval"]
        text += f" ({scale * low:{spec}} to {scale * high:{spec}})"
    return text + (f"; {entry['lost']} of {entry['of']} lost" if "lost" in entry else "")


def claims_table(found: list[dict]) -> str:
    """Every claim with its difference and verdicts."""
    rows = [
        [e["claim"], e["where"], difference_cell(e), e["verdict"],
         e["by_kld"]["verdict"] if "by_kld" in e else "–"]
        for e in found
    ]  # fmt: skip
    header = ["the paper says", "tokens", "difference, nats (95 %)", "by loss", "by KLD from f16"]
    return "## Claims\n\n" + table(header, rows)


def _mean(row: dict, name: str, key: str, digits: int) -> str:
    error = row[name]["se"]
    text = f"{row[name][key]:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def _against(row: dict, baseline: dict) -> str:
    """PPL against a baseline in percent, paired over windows."""
    d = np.array(row["nll_by_window"]) - np.array(baseline["nll_by_window"])
    error = f" ± {100 * d.std(ddof=1) / np.sqrt(d.size):.2f}" if d.size > 1 else ""
    return f"{100 * np.expm1(d.mean()):+.2f}{error} %"


def quality_cells(results: dict[str, dict], role: str) -> list[str]:
    """PPL, PPL against uniform turbo2, and KLD of a role."""
    row, baseline = results.get(role), results.get("turbo2")
    if row is None:
        return ["–"] * 3
    against = "–" if baseline is None else _against(row, baseline)
    return [_mean(row, "ppl", "ppl", 3), against, _mean(row, "kld", "mean", 5)]


def bits_cells(results: dict[str, dict], role: str) -> list[str]:
    """Bits per value of V."""
    bits = results.get(role, {}).get("v_bits_per_value")
    return ["–" if bits is None else f"{bits:.2f}"]


def gap_cells(results: dict[str, dict], role: str) -> list[str]:
    """Share of the gap from turbo2 to turbo3 that a role closes."""
    found = gap_closed(results, role)
    if found is None:
        return ["–"]
    text, interval = f"{100 * found['share']:.0f} %", found["interval"]
    if interval is None:
        return [f"{text} (turbo3 not clearly better)"]
    return [f"{text} ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"]


def printed_tables(tables: list[dict], here: list[str], cells) -> list[str]:
    """Tables of the paper, with what was measured here in the last columns."""
    parts = []
    for printed in tables:
        header = ["V (K in q8_0)", *(f"{m}, paper" for m in printed["models"]), *here]
        rows = [
            [role, *("–" if x is None else x if isinstance(x, str) else f"{x:g}" for x in row)]
            + cells(role)
            for role, row in printed["rows"].items()
        ]
        parts.append(f"## {printed['title']}\n\n{table(header, rows)}")
    return parts


def speed_table(printed: dict, bench: dict) -> str:
    """Prefill and decode of the paper's machine, and of a bench record at its longest point."""
    names, rows = config_names(""), []
    for role, speeds in printed.items():
        here = [r for r in bench["rows"] if r["config"] in (names[role], role) and "error" not in r]
        row = max(here, key=lambda r: r["tokens"], default={})
        cells = [row.get(f"{kind}_tps") for kind in ("prompt", "generation")]
        rows.append([role, *(f"{x:g}" for x in speeds)])
        rows[-1] += [f"{cell['median']:.1f}" if cell else "–" for cell in cells]
    model = bench["model"]["name"]
    header = ["V (K in q8_0)", "prefill, paper", "decode, paper", f"{model}: prefill", "decode"]
    title = "## Tokens a second (paper: phi-4, M5 Max, 8,192 tokens)"
    return f"{title}\n\n{table(header, rows)}"


def report(short: dict, long: dict | None, needle: dict | None, bench: dict | None = None) -> str:
    """Claims and tables as Markdown."""
    printed = json.loads(PRINTED.read_text(encoding="utf-8"))
    results, model = roles_of(short), short["model"]["name"]
    windows = f"{short['n_windows']} windows of {short['n_ctx']}"
    if long is not None:
        windows += f" and {long['n_windows']} of {long['n_ctx']:,}"
    parts = [
        f"{model} on {short['text']['name']}, {windows}; {short['environment']['device']}, "
        f"back-end {short['backend']}. The paper's models are others, and its tables have no "
        "errors; ± is one standard error, of PPL over tokens and of differences over windows.",
        claims_table(judged(short, long, needle)),
    ]
    for n, rows, quality, gap in (("", results, "quality", "gap"),
                                  (long, long and roles_of(long), "long", "gap_long")):  # fmt: skip
        if rows is None:
            continue
        here = f"{model} at {n['n_ctx']:,}" if n else model
        header = [f"{here}: PPL", "against turbo2", "KLD"]
        parts += printed_tables(printed[quality], header, lambda r, at=rows: quality_cells(at, r))
        parts += printed_tables(printed[gap], [here], lambda r, at=rows: gap_cells(at, r))
    parts += printed_tables(printed["v_bits"], [model], lambda r: bits_cells(results, r))
    if bench is not None:
        parts.append(speed_table(printed["speed"], bench))
    return "\n\n".join(parts)


@click.command()
@options.combined(options.model, options.dtype, options.backend)
@click.option("--text", "-f", help="A file, sample, or wikitext-2 (default).")
@click.option("--chunks", default=64, show_default=True, help="Windows of 512.")
@click.option("--long-chunks", default=8, show_default=True, help="Windows of --long-ctx; 0: none.")
@click.option("--long-ctx", default=LONG_CTX, show_default=True)
@click.option("--group", type=click.Choice(["32", "head"]), default="32", show_default=True)
@click.option("--out", "folder", metavar="FOLDER", help="Measure, and keep the records there.")
@click.option("--from", "short", metavar="JSON", help="A perplexity record instead.")
@click.option("--long", metavar="JSON", help="The same at a longer context.")
@click.option("--needle", "needles", metavar="JSON", help="A needle record.")
@click.option("--bench", "speeds", metavar="JSON", help="A bench record.")
def command(folder, short, long, needles, speeds, **args) -> None:
    """Print the paper's tables and claims with what is measured here."""
    if (folder is None) == (short is None):
        raise InputError("Give either --out FOLDER, to measure, or --from JSON.")

    def record(path: str | None, what: str) -> dict | None:
        return None if path is None else read_json(path, what)

    if folder is None:
        short, long = (record(path, perplexity.WHAT) for path in (short, long))
    else:
        short, long = measure_both(Path(folder), **args)
    needles, speeds = record(needles, needle.WHAT), record(speeds, bench.WHAT)
    print(report(short, long, needles, speeds))


if __name__ == "__main__":
    run(command)
