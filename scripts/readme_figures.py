"""Draw the recorded figures into README.md, between its begin and end marks.

    python scripts/readme_figures.py           # rewrite
    python scripts/readme_figures.py --check   # fail if the README differs
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from mlx_turbokv.evaluate import needle_table  # noqa: E402
from mlx_turbokv.evaluate.statistics import ratio  # noqa: E402
from mlx_turbokv.report import summary  # noqa: E402
from paper_tables import difference_cell  # noqa: E402
from mlx_turbokv.evaluate.table import as_markdown, footnotes, heading  # noqa: E402


def read(name: str) -> dict:
    """A record of benchmarks/."""
    return json.loads((ROOT / f"benchmarks/{name}.json").read_text(encoding="utf-8"))


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def perplexity() -> str:
    """Perplexity and divergence, with the command that made them."""
    record = read("perplexity")
    parts = [heading(record).replace("\n", "; ") + ".", as_markdown(record["results"])]
    return "\n\n".join([*parts, footnotes(record), f"`{record['command']}`"])


def calibrated() -> str:
    """Calibrated policies beside uniform formats, Boundary V and mlx-lm's caches."""
    record = read("calibrate")
    found = {r["config"]: r for r in record["results"]}
    boundary = found["la-v7"]
    policies = [r for name, r in found.items() if name.startswith("sample/")]
    ratios = {n: ratio(r["kld_by_window"], boundary["kld_by_window"]) for n, r in found.items()}
    shown = policies + [found[name] for name in BESIDE_CALIBRATED]
    rows = [
        [_policy_name(r["config"]), f"{r['bits_per_value']:.3f}", f"{r['k_bits_per_value']:.2f}",
         f"{r['v_bits_per_value']:.2f}", f"{r['kld']['mean']:.5f} ± {r['kld']['se']:.5f}",
         f"{100 * r['same_top']['mean']:.1f} %", _ratio_text(ratios[r["config"]])]
        for r in sorted(shown, key=lambda r: -r["bits_per_value"])
    ]  # fmt: skip
    at_its_bits = next(r for r in policies if r["config"].endswith("bits-la-v7.json"))
    enough = [r for r in policies if ratios[r["config"]]["interval"][1] <= 1]
    least = min(enough, key=lambda r: r["bits_per_value"])
    summary = (
        f"At the bits of `la-v7` ({boundary['bits_per_value']:.3f} per value), the calibrated "
        f"policy has {_ratio_text(ratios[at_its_bits['config']])} times its KLD. The smallest "
        f"budget here that does not exceed its KLD, with the whole interval, is "
        f"{least['bits_per_value']:.3f} bits: "
        f"{least['bits_per_value'] / boundary['bits_per_value']:.2f} of its bits."
    )
    checked = read("calibration")["policies"]
    factors = [at["measured_over_predicted"]["mean"] for at in checked]
    most = max(checked, key=lambda at: at["measured_over_predicted"]["mean"])
    summary += (
        f" On the calibration windows the whole assignments measured {min(factors):.2f} to "
        f"{max(factors):.2f} times what was predicted, the most at {most['bits_per_value']:.3f} bits."
    )
    uniform = {r["bits_per_value"]: r for r in record["results"] if r["config"] in EQUAL_BITS}
    beside = [
        r["kld"]["mean"] / uniform[r["bits_per_value"]]["kld"]["mean"]
        for r in policies if r["bits_per_value"] in uniform
    ]  # fmt: skip
    summary += (
        " Much of the gain is the balance between K and V, which one pair of formats in every layer "
        f"can strike too: `turbo6/turbo5` has {_ratio_text(ratios['turbo6/turbo5'])} times the KLD "
        f"of `la-v7`. At equal bits, calibrated policies have {min(beside):.2f} to "
        f"{max(beside):.2f} times the KLD of one pair in every layer."
    )
    long = read("calibrate_long")
    by_name = {r["config"]: r["kld_by_window"] for r in long["results"]}
    at_length = ratio(by_name["sample/bits-la-v7.json"], by_name["la-v7"])
    summary += (
        f" Over {long['n_windows']} windows of {long['n_ctx']:,} tokens "
        f"({long['environment']['device']}) the first of these ratios is "
        f"{_ratio_text(at_length)}."
    )
    few = {r["windows"]: max(r["mean_excess"]) for r in read("calibration_windows")["rows"]}
    summary += (
        f" Few windows are enough: on the windows left out, policies from one window are predicted "
        f"to cost at most {few[1]:.1%} more than the best ones, from four {few[4]:.1%}."
    )
    about = heading(record).replace("\n", "; ") + ". In brackets: 95 % interval, paired bootstrap."
    header = ["K/V", "bits/value", "K bits", "V bits", "KLD", "same top", "KLD / `la-v7`'s"]
    return "\n\n".join([summary, about, table(header, rows), f"`{record['command']}`"])


BESIDE_CALIBRATED = (
    "q8_0/q8_0", "la-v7", "mode-10", "q8_0/turbo3", "q8_0/turbo2", "turbo6/turbo5",
    "turbo5/turbo5", "turbo5/turbo4", "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3",
)  # fmt: skip
EQUAL_BITS = (
    "turbo5/turbo5", "turbo5/turbo4", "turbo4/turbo4", "turbo4/turbo3", "turbo3/turbo3",
    "turbo3/turbo2",
)  # fmt: skip


def _policy_name(config: str) -> str:
    """sample/bits-3.5.json is a policy calibrated for 3.5 bits."""
    if not config.endswith(".json"):
        return config
    budget = config.split("/")[-1].removeprefix("bits-").removesuffix(".json")
    return f"**calibrated** for {budget if budget.startswith('la') else budget + ' bits'}"


def _ratio_text(found: dict) -> str:
    low, high = found["interval"]
    return f"{found['mean']:.3f} ({low:.3f} to {high:.3f})"


def decode() -> str:
    """Decode attention on a GPU against MLX's fp16 attention, from one run."""
    record = read("bench_kernels")
    rows = [r for r in record["rows"] if r["heads"] == [32, 8]]
    variants = list(dict.fromkeys(r["variant"] for r in rows))
    by = {(r["tokens"], r["variant"]): r for r in rows}
    lines = []
    for tokens in sorted({r["tokens"] for r in rows}):
        cells = [f"{tokens:,}"]
        for variant in variants:
            row = by[tokens, variant]
            ratio = "" if variant == "fp16" else f" ({row['fp16_over_this']:.2f}×)"
            cells.append(f"{row['us']:.1f}{ratio}")
        lines.append(cells)
    about = (
        f"{record['device']}, mlx {record['mlx']}: µs of one attention call of one query, "
        "32 query and 8 KV heads, head_dim 128; in brackets, how many times faster than MLX's "
        "fp16 attention in the same run. `rows` dequantises first and calls that attention. Building a call takes further time of the CPU: "
        f"{max(r['build_us'] for r in rows if 'rows' not in r['variant']):.0f} µs at most, and "
        f"{max(by[t, 'fp16']['build_us'] for t, _ in by):.0f} µs for fp16."
    )
    return "\n\n".join([about, table(["tokens", *variants], lines), f"`{record['command']}`"])


def reference() -> str:
    """The reference back-end on a CPU."""
    record = read("reference_speed")
    rows = [
        [r["config"], f"{1 / r['decode_s']:.2f}", f"{r['decode_tps_ratio']:.2f}",
         f"{r['window_s']:.2f}", f"{r['window_time_ratio']:.2f}"]
        for r in record["rows"]
    ]  # fmt: skip
    about = (
        f"{record['device']}, two cores, mlx {record['mlx']}, OpenBLAS: the default model at "
        f"{record['tokens']:,} tokens, and a window of 512 tokens."
    )
    header = ["K/V", "decode tok/s", "of f16", "window s", "of f16"]
    return "\n\n".join([about, table(header, rows), f"`{record['command']}`"])


def centred() -> str:
    """Keys alone quantised, centred and not, at several contexts."""
    record = read("centred_keys")
    parts = record["parts"]
    kld = {
        (name, row["config"]): row["kld"] for name, part in parts.items() for row in part["rows"]
    }

    def cell(name: str, config: str) -> str:
        pair = kld[name, config]["mean"], kld[name, f"{config} centred"]["mean"]
        return f"{pair[0]:.4f} → {pair[1]:.4f} ({pair[1] / pair[0]:.2f})"

    names = {name: f"{part['n_ctx']:,} tokens" for name, part in parts.items()}
    rows = []
    for config in dict.fromkeys(c.removesuffix(" centred") for _, c in kld if c != "f16/f16"):
        rows.append([config, *(cell(n, config) if (n, config) in kld else "" for n in names)])
    windows = ", ".join(f"{part['windows']} of {part['n_ctx']:,}" for part in parts.values())
    about = (
        f"The default model in {record['model']['dtype']} on wikitext-2 (sha256 "
        f"{record['text_sha256'][:12]}…), windows: {windows}; means from "
        f"{record['calibration_windows']} windows of the package's own sample; {record['device']}, "
        f"back-end {record['backend']}, mlx {record['mlx']}. KLD against f16, not centred → centred "
        "(ratio)."
    )
    return "\n\n".join([about, table(["K/V", *names.values()], rows), f"`{record['command']}`"])


def needle() -> str:
    """What is still found, f16 beside every configuration."""
    record = read("needle")
    parts = [needle_table.heading(record).replace("\n", "; ") + "."]
    parts += [needle_table.as_markdown(record["summary"]), needle_table.footnotes(record)]
    if record["not_measured"]:
        n, left = len(record["cases"]), record["not_measured"]
        parts.append(f"{left} of {n + left} cases were left when the time was over.")
    return "\n\n".join([*parts, f"`{record['command']}`"])


def claims() -> str:
    """The paper's claims on the default model."""
    record = read("paper_claims")
    long = record["long"]
    about = (
        f"{record['model']['name']} on {record['text']['name']}, {record['n_windows']} windows of "
        f"{record['n_ctx']:,} and {long['n_windows']} of {long['n_ctx']:,}; "
        f"{record['environment']['device']}."
    )
    rows = [
        [
            entry["claim"],
            entry["where"],
            difference_cell(entry),
            entry["verdict"],
            entry["by_kld"]["verdict"] if "by_kld" in entry else "–",
        ]
        for entry in record["claims"]
    ]
    header = ["the paper says", "tokens", "difference, nats (95 %)", "by loss", "by divergence from f16"]
    return "\n\n".join([about, table(header, rows), f"`{record['command']}`"])


def report() -> str:
    """The summary of a report on the default model."""
    record = read("report")
    header, rows, front = summary.table_of(record)
    rows = [[f"{row[0]} ●" if row[0] in front else row[0], *row[1:]] for row in rows]
    quality, needles = record["perplexity"], record["needle"]
    about = (
        f"{record['model']['name']}, {record['environment']['device']}, back-end "
        f"{record['backend']}: {quality['n_windows']} windows of {quality['n_ctx']} of "
        f"{quality['text']['name']}, {len(needles['cases'])} needles at "
        f"{' and '.join(f'{n:,}' for n in needles['contexts'])} tokens."
    )
    parts = [about, table(header, rows), " ".join(summary.notes(record))]
    return "\n\n".join([*parts, f"`{quality['command']}`"])


SECTIONS = {
    "perplexity": perplexity, "calibrated": calibrated, "centred": centred,
    "decode": decode, "reference": reference, "needle": needle, "claims": claims, "report": report,
}  # fmt: skip


def drawn(readme: str) -> str:
    """The README with every section drawn anew."""
    for name, section in SECTIONS.items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        head, rest = readme.split(begin)
        tail = rest.split(end)[1]
        readme = f"{head}{begin}\n\n{section()}\n\n{end}{tail}"
    return readme


def main() -> None:
    path = ROOT / "README.md"
    before = path.read_text(encoding="utf-8")
    after = drawn(before)
    if "--check" in sys.argv:
        sys.exit("README.md differs from the records." if before != after else 0)
    path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
