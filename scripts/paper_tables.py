"""The paper's tables beside what this package measures, and its claims: hold, do not, cannot tell.

    python scripts/paper_tables.py --out benchmarks/paper --text FILE --chunks 64
    python scripts/paper_tables.py --from benchmarks/paper/short.json --long benchmarks/paper/long.json

The first form measures (interrupted, it goes on where it was); the second only prints. On a hybrid
model boundaries by raw layer index, as the paper's code counted, are measured beside those by KV
layer. V's formats have a norm per 32 values, the paper's 2.5 and 3.5 bits, unless --group head.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import click  # noqa: E402
import paper_claims as claims  # noqa: E402
import paper_data as paper  # noqa: E402

from mlx_turbokv.cli import options as cli_options  # noqa: E402
from mlx_turbokv.cli import perplexity  # noqa: E402
from mlx_turbokv.cli.entry import run  # noqa: E402
from mlx_turbokv.cli.output import print_status, read_json, write_json  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402

LONG_CTX = 2048
RAW = {"raw 2+2": ("raw-2-2.json", "la-v7"), "raw 4+4": ("raw-4-4.json", "mode-10")}


def config_names(group: str) -> dict[str, str]:
    """The configuration of each role; ``group`` is "" or ":32"."""
    v2, v3 = f"turbo2{group}", f"turbo3{group}"
    names = {"q8": "q8_0/q8_0", "turbo3": f"q8_0/{v3}", "turbo2": f"q8_0/{v2}"}
    for role, policy in (("la-v5", "la-v5"), ("la-v6", "la-v6"), ("la-v7", "la-v7"),
                         ("4+4", "mode-10")):  # fmt: skip
        names[role] = f"q8_0/{v2}@{policy}" if group else policy
    names["f16 2+2"] = f"q8_0/{v2}@boundary:2,2:f16"
    names["f16 4+4"] = f"q8_0/{v2}@boundary:4,4:f16"
    names["swapped"] = f"{v3}/q8_0"
    return names


def file_or_name(config: str) -> str:
    """A policy file without its folder; any other name as it is."""
    return os.path.basename(config) if config.endswith(".json") else config


def roles_of(record: dict) -> dict[str, dict]:
    """A perplexity record's rows by role."""
    rows = {file_or_name(r["config"]): r for r in record["results"]}
    group = ":32" if "q8_0/turbo2:32" in rows else ""
    found = {role: rows.get(name) for role, name in config_names(group).items()}
    found |= {role: rows.get(file) for role, (file, _) in RAW.items()}
    return {role: row for role, row in found.items() if row is not None}


def raw_index_policies(model, folder: Path, group: str) -> list[str]:
    """Files of the boundary policies as raw layer indices give them; none for pure attention."""
    from mlx_turbokv.model.caches import own_caches
    from mlx_turbokv.model.kv_layers import kv_layers
    from mlx_turbokv.policy import load_policy
    from mlx_turbokv.policy.files import write_layer_list

    layers, n_caches = kv_layers(model).layers, len(own_caches(model))
    if len(layers) == n_caches:
        return []
    names = []
    for file, policy in RAW.values():
        raw = load_policy(policy, "q8_0", f"turbo2{group}").formats(n_caches)
        path = folder / file
        write_layer_list(path, [raw[layer.index] for layer in layers])
        names.append(os.path.relpath(path))
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


def ppl_cell(row: dict | None) -> str:
    if row is None:
        return "–"
    error = row["ppl"]["se"]
    return f"{row['ppl']['ppl']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def delta_cell(row: dict | None, baseline: dict | None) -> str:
    """PPL against uniform turbo2 in percent, paired: what the windows share drops out."""
    if row is None or baseline is None:
        return "–"
    import numpy as np

    d = np.array(row["nll_by_window"]) - np.array(baseline["nll_by_window"])
    mean = 100 * np.expm1(d.mean())
    if d.size < 2:
        return f"{mean:+.2f} %"
    return f"{mean:+.2f} ± {100 * d.std(ddof=1) / np.sqrt(d.size):.2f} %"


def kld_cell(row: dict | None) -> str:
    if row is None:
        return "–"
    error = row["kld"]["se"]
    return f"{row['kld']['mean']:.5f}" + ("" if error is None else f" ± {error:.5f}")


def v_bits_cell(row: dict | None) -> str:
    bits = None if row is None else row["v_bits_per_value"]
    return "–" if bits is None else f"{bits:.2f}"


def number(value) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:g}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def quality_tables(tables: dict, results: dict[str, dict], model: str) -> str:
    """Perplexities of the paper, and the same roles measured here."""
    parts = []
    for title, (models, rows) in tables.items():
        header = ["V (K in q8_0)", *(f"{m}, paper" for m in models)]
        header += [f"{model}: PPL", "against turbo2", "KLD"]
        lines = [
            [role, *map(number, cells), ppl_cell(results.get(role)),
             delta_cell(results.get(role), results.get("turbo2")), kld_cell(results.get(role))]
            for role, cells in rows.items()
        ]  # fmt: skip
        parts.append(f"### {title}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def plain_tables(tables: dict, here: str, cell) -> str:
    parts = []
    for title, (models, rows) in tables.items():
        header = ["V", *(f"{m}, paper" for m in models), here]
        lines = [[role, *map(number, cells), cell(role)] for role, cells in rows.items()]
        parts.append(f"### {title}\n\n{markdown(header, lines)}")
    return "\n\n".join(parts)


def gap_cell(results: dict[str, dict], role: str) -> str:
    found = claims.gap_closed(results, role)
    if found is None:
        return "–"
    interval = found["interval"]
    if interval is None:
        return f"{100 * found['share']:.0f} % (turbo3 not clearly better)"
    return f"{100 * found['share']:.0f} % ({100 * interval[0]:.0f} to {100 * interval[1]:.0f})"


def speed_table(bench: dict, names: dict[str, str]) -> str:
    rows = []
    for role, (prompt, generation) in paper.SPEED.items():
        here = [r for r in bench["rows"] if r["config"] in (names[role], role) and "error" not in r]
        cells = ["–", "–"]
        if here:
            row = max(here, key=lambda r: r["tokens"])
            prompt_here = row.get("prompt_tps")
            cells = [f"{prompt_here['median']:.1f}" if prompt_here else "–",
                     f"{row['generation_tps']['median']:.1f}"]  # fmt: skip
        rows.append([role, f"{prompt:g}", f"{generation:g}", *cells])
    model = bench["model"]["name"]
    header = ["V (K in q8_0)", "prefill, paper", "decode, paper", f"{model}: prefill", "decode"]
    return "### Speed in tokens a second (paper: phi-4, M5 Max, 8,192 tokens)\n\n" + markdown(
        header, rows
    )


def judged(short: dict, long: dict | None, needle: dict | None) -> list[dict]:
    """Every claim with its verdicts; ``where`` is the tokens of a window, or what else was asked."""
    records = [short] if long is None else [short, long]
    places = [(f"{r['n_ctx']:,}", roles_of(r)) for r in records]
    short = places[0][1]
    wanted = claims.CLAIMS
    if any(role in short for role in RAW):
        wanted += claims.HYBRID_CLAIMS
    found = []
    for where, results in places:
        for claim in wanted:
            found.append({
                "claim": claim.text, "where": where, "unit": "nats",
                **claims.judge(claim, results),
                "by_kld": claims.judge(claim, results, "kld"),
            })  # fmt: skip
    cost = claims.turbo2_cost(short)
    text = "turbo2 for V costs 3 to 5 % of PPL"
    found.append({"claim": text, "where": places[0][0], "unit": "PPL", **cost})
    if long is not None:
        text = "the gain of Boundary V over turbo2 shrinks with the context"
        found.append(
            {"claim": text, "where": "both", "unit": "nats", **claims.dilution(short, places[1][1])}
        )
    if needle is not None:
        name = short["la-v7"]["config"] if "la-v7" in short else "la-v7"
        names = {r["config"] for r in needle["summary"]}
        result = claims.retrieval(needle, name if name in names else "la-v7")
        text = "Boundary V does not impair retrieval"
        found.append({"claim": text, "where": "needle", "unit": "nats of the answer", **result})
    return found


def claims_table(found: list[dict]) -> str:
    rows = []
    for entry in found:
        kld = entry.get("by_kld")
        rows.append([
            entry["claim"], entry["where"], difference_cell(entry), entry["verdict"],
            "–" if kld is None else kld["verdict"],
        ])  # fmt: skip
    header = ["the paper says", "where", "difference (95 %)", "by loss", "by divergence from f16"]
    return "### Claims\n\n" + markdown(header, rows)


def difference_cell(entry: dict) -> str:
    if entry.get("difference") is None:
        return "–"
    if entry["unit"] == "PPL":
        low, high = entry["interval"] or (float("nan"),) * 2
        return f"{100 * entry['difference']:+.2f} % ({100 * low:+.2f} to {100 * high:+.2f})"
    text = f"{entry['difference']:+.4f}"
    if entry.get("interval"):
        text += f" ({entry['interval'][0]:+.4f} to {entry['interval'][1]:+.4f})"
    if "lost" in entry:
        text += f"; {entry['lost']} of {entry['of']} lost"
    return text


def report(
    short: dict, long: dict | None, needle: dict | None, bench: dict | None
) -> tuple[str, list]:
    """(everything as Markdown, the verdicts)."""
    results, model = roles_of(short), short["model"]["name"]
    long_results = None if long is None else roles_of(long)
    found = judged(short, long, needle)
    parts = [
        f"{model} on {short['text']['name']}, {short['n_windows']} windows of {short['n_ctx']}"
        + ("" if long is None else f" and {long['n_windows']} of {long['n_ctx']}")
        + f"; {short['environment']['device']}, back-end {short['backend']}. The paper's models are "
        "not these, and their tables have no errors; ± is one standard error, PPL's over tokens "
        "and the differences' over windows.",
        claims_table(found),
        quality_tables(paper.QUALITY, results, model),
        plain_tables(paper.V_BITS, model, lambda role: v_bits_cell(results.get(role))),
        plain_tables(paper.GAP, model, lambda role: gap_cell(results, role)),
    ]
    if long_results is not None:
        parts.append(quality_tables(paper.LONG, long_results, f"{model} at {long['n_ctx']}"))
        parts.append(plain_tables(paper.GAP_LONG, model, lambda role: gap_cell(long_results, role)))
    if bench is not None:
        parts.append(speed_table(bench, config_names("")))
    return "\n\n".join(parts), found


@click.command()
@cli_options.model
@click.option("--text", "-f", help="A file, sample, or wikitext-2 (default).")
@click.option("--chunks", default=64, show_default=True, help="Windows of 512.")
@click.option("--long-chunks", default=8, show_default=True, help="Windows of --long-ctx; 0: none.")
@click.option("--long-ctx", default=LONG_CTX, show_default=True)
@click.option("--group", type=click.Choice(["32", "head"]), default="32", show_default=True)
@click.option("--dtype", help="Dequantise the weights to this type, such as float16.")
@click.option("--backend", default="auto", show_default=True)
@click.option("--out", "folder", metavar="FOLDER", help="Measure, and keep the records there.")
@click.option("--from", "short_path", metavar="JSON", help="A perplexity record instead.")
@click.option("--long", "long_path", metavar="JSON", help="The same at a longer context.")
@click.option("--needle", "needle_path", metavar="JSON", help="A needle record.")
@click.option("--bench", "bench_path", metavar="JSON", help="A bench record.")
@click.option("--json", "json_path", metavar="FILE", help="Write the verdicts there.")
def command(
    model, adapter_path, trust_remote_code, text, chunks, long_chunks, long_ctx, group, dtype, backend,
    folder, short_path, long_path, needle_path, bench_path, json_path,
) -> None:  # fmt: skip
    """Print the paper's tables and claims beside what is measured here."""
    from mlx_turbokv.cli import bench as bench_command
    from mlx_turbokv.cli import needle as needle_command

    if (folder is None) == (short_path is None):
        raise InputError("Give either --out FOLDER, to measure, or --from JSON.")
    if folder is None:
        short = read_json(short_path, perplexity.WHAT)
        long = None if long_path is None else read_json(long_path, perplexity.WHAT)
    else:
        import mlx.core as mx

        from mlx_turbokv.evaluate.text import load_text
        from mlx_turbokv.loading.models import load

        source = load_text(text)
        form = {} if dtype is None else {"dtype": getattr(mx, dtype), "packed": False}
        loaded = load(model, adapter_path=adapter_path, trust_remote_code=trust_remote_code, **form)
        Path(folder).mkdir(parents=True, exist_ok=True)
        suffix = ":32" if group == "32" else ""
        short = measure(loaded, source, Path(folder), 512, chunks, suffix, backend)
        long = None
        if long_chunks:
            long = measure(loaded, source, Path(folder), long_ctx, long_chunks, suffix, backend)
    needle = None if needle_path is None else read_json(needle_path, needle_command.WHAT)
    bench = None if bench_path is None else read_json(bench_path, bench_command.WHAT)
    page, found = report(short, long, needle, bench)
    print(page)
    if json_path is not None:
        kept = ("model", "text", "n_ctx", "n_windows", "backend", "environment", "command")
        about = {key: short[key] for key in kept}
        if long is not None:
            about["long"] = {key: long[key] for key in ("n_ctx", "n_windows")}
        record = {"what": "claims of the paper", **about, "claims": found}
        write_json(json_path, json.loads(json.dumps(record)))


if __name__ == "__main__":
    run(command)
