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
    "perplexity": perplexity, "centred": centred, "decode": decode, "reference": reference,
    "needle": needle, "claims": claims, "report": report,
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
