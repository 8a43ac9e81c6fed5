"""The page of tables of the trained models, from the records of scripts/quality_table.py."""

from __future__ import annotations

from collections import Counter

from quality_table import LONG, PAIRS, PEERS, PRESETS, SCALED, WINDOWS, protected

from mlx_turbokv.evaluate.statistics import ratio
from mlx_turbokv.evaluate.tables import bytes_text

from . import ROOT, interval, read, source, table

# record, and what a reader should know of the model
MODELS = {
    "quality_smollm2": "30 KV layers with 3 KV heads, head_dim 64.",
    "quality_qwen": "28 KV layers with 2 KV heads, head_dim 128. Its key projection has a large "
    "bias.",
    "quality_gemma": "3 of its 18 layers are packed, one KV head, head_dim 256; the other 15 have "
    "sliding windows of 512 tokens, stay in 16 bits, and are not in the figures of bits and bytes. "
    "The presets' boundaries cover all 3 layers. mlx-lm's cache cannot hold 3 bits at head_dim "
    "256.",
}
NAMES = {
    "quality_smollm2": "SmolLM2-135M-Instruct", "quality_qwen": "Qwen2.5-Coder-1.5B-Instruct",
    "quality_gemma": "Gemma 3 270M",
}  # fmt: skip
SCALES, MEAN, BIAS = "mean and scales", "mean", "key bias"
# of a configuration that was not measured with the default, which is shown, and how it is marked
OLDER = {SCALES: " (scales of 6 windows)", BIAS: " (by the bias alone)", MEAN: " (by means alone)"}
NONE = "–"
NO_PROTECTION = " (no protected tokens)"
SCALES_TITLE = (
    "[Scales of pairs of dims](../centred-keys.md#scales-of-pairs-of-dims), with protected tokens, "
    "on the same windows; the ratio of KLDs is paired:"
)
Row = dict


def records() -> dict[str, dict]:
    """The records that there are, by name."""
    return {name: read(name) for name in MODELS if (ROOT / f"benchmarks/{name}.json").is_file()}


def base(config: str) -> str:
    """A configuration without its protected tokens; a calibrated policy by its bits."""
    name = config.partition("+")[0]
    if name.endswith(".json"):
        bits = name.rsplit("/", 1)[-1].removeprefix("bits-").removesuffix(".json")
        return f"calibrated for {bits} bits"
    return name


def main_rows(part: dict) -> list[Row]:
    """One row a configuration, without the reference's: the default keys', or the nearest to it."""
    order = [None, *OLDER]
    found: dict[str, Row] = {}
    for row in part["rows"][1:]:
        keys, held = row["asked_keys"], found.get(row["config"])
        if keys in order and (held is None or order.index(keys) < order.index(held["asked_keys"])):
            found[row["config"]] = row
    return list(found.values())


def mark(*rows: Row | None) -> str:
    """What tells rows of other key references from those of the default."""
    return next((OLDER[r["asked_keys"]] for r in rows if r and r["asked_keys"] in OLDER), "")


def pairs(part: dict) -> dict[str, tuple[Row | None, Row | None]]:
    """Rows without and with protected tokens, by configuration, most bits first."""
    found: dict[str, list[Row | None]] = {}
    for row in main_rows(part):
        found.setdefault(base(row["config"]), [None, None])[row["protected"] is not None] = row

    def bits(item: tuple[str, list[Row | None]]) -> tuple[float, float]:
        row = item[1][0] or item[1][1]
        assert row is not None
        return -row["bits_32k"], row["kld"]["mean"]

    return {name: (rows[0], rows[1]) for name, rows in sorted(found.items(), key=bits)}


def _cell(row: Row | None, key: str, spec: str) -> str:
    return NONE if row is None else interval(row[key], spec)


def _share(row: Row | None) -> str:
    if row is None:
        return NONE
    low, high = row["same_top"]["interval"] or (None, None)
    found = f"{100 * row['same_top']['mean']:.1f}"
    return found + ("" if low is None else f" ({100 * low:.1f} to {100 * high:.1f})")


def of_length(part: dict) -> str:
    """One table: what is protected stands beside what is not, where both were measured."""
    found = pairs(part)
    both = any(plain is not None and protected is not None for plain, protected in found.values())
    rows = []
    for name, sides in found.items():
        # other projects' caches protect nothing: they share a column where nothing else is in it
        shown = sides if both else [sides[0] or sides[1]]
        cells = [
            [f"{row['bits']:.2f}" if row else NONE, f"{row['bits_32k']:.2f}" if row else NONE,
             bytes_text(row["kv_bytes_32k"]) if row else NONE,
             _cell(row, "kld", ".5f"), _cell(row, "delta_nll", "+.4f"), _share(row)]
            for row in shown
        ]  # fmt: skip
        name += mark(*shown) + ("" if both or sides[0] is None else NO_PROTECTION)
        rows.append([name, *sum(cells, [])])
    header = ["K/V", "bits", "at 32K", "cache at 32K", "KLD", "Δnll", "same top, %"]
    return table([*header, "protected: bits", *header[2:]] if both else header, rows)


def groups(n_ctx: int) -> dict[str, list[str]]:
    """The plan of windows of this length, for any model, by what configurations are."""
    if n_ctx > 2048:
        with_them = [protected(name, n_ctx) for name in LONG]
        return {"with protected tokens": with_them, "without": [f"{name}+0,0" for name in LONG]}
    return {
        "pairs with protected tokens": [protected(name, n_ctx) for name in PAIRS],
        "pairs without them": [f"{name}+0,0" for name in PAIRS],
        "the paper's policies with protected tokens": [protected(name, n_ctx) for name in PRESETS],
        "the paper's policies without them": [f"{name}+0,0" for name in PRESETS],
        "mlx-lm's `kv_bits`": [name for name in PEERS if name.startswith("mlx")],
        "llama.cpp's rotated cache": [name for name in PEERS if name.startswith("llama")],
        **({"scales beside means alone": [f"{name} {MEAN}" for name in SCALED]}
           if n_ctx == 2048 else {}),
    }  # fmt: skip


def missing(part: dict, n_ctx: int) -> str:
    """What of the plan was not measured, in a sentence; empty where all was."""
    there = {row["config"] for row in part["rows"]}
    there |= {f"{base(r['config'])} {MEAN}" for r in part["rows"] if r["asked_keys"] == MEAN}
    found = []
    for name, configs in groups(n_ctx).items():
        have = [base(config) for config in configs if config in there]
        lacking = [base(config) for config in configs if config not in there]
        which = "all but " * (len(have) < len(lacking)) + ", ".join(min(lacking, have, key=len))
        found += [name + (f" ({which})" if have else "")] if lacking else []
    return f"Not measured: {'; '.join(found)}." if found else ""


def _protection_of(part: dict) -> str:
    sink, recent = next(r["protected"] for r in part["rows"] if r["protected"]).split(",")
    return f"the first {sink} and the newest {recent} tokens or more"


def scales(part: dict) -> str | None:
    """Pairs with keys centred by a mean, with scales of pairs of dims and without."""
    found = {(row["config"], row["keys"]): row for row in part["rows"]
             if row["asked_keys"] or row["keys"] not in (MEAN, SCALES)}  # fmt: skip
    rows, biased = [], any(row["keys"] == BIAS for row in part["rows"])
    for (config, keys), row in found.items():
        other = found.get((config, MEAN))
        if keys != SCALES or other is None:
            continue
        times = ratio(row["kld_by_window"], other["kld_by_window"])
        rows.append([
            base(config), *([_cell(found.get((config, BIAS)), "kld", ".5f")] if biased else []),
            _cell(other, "kld", ".5f"), _cell(row, "kld", ".5f"), interval(times, ".2f"),
        ])  # fmt: skip
    header = ["K/V", *(["KLD, centred by the bias"] if biased else []), "KLD, centred by means",
              "by means, with scales", "ratio"]  # fmt: skip
    return table(header, rows) if rows else None


def scales_measured() -> str:
    """The tables of scales that there are, for the page on centred keys."""
    of_models = [(NAMES[name], 2048, r["tables"].get("2048"), "") for name, r in records().items()]
    for name in ("qwen", "gemma"):
        part = read(f"scales_{name}")["tables"]["512"]
        of_models.append((NAMES[f"quality_{name}"], 512, part, ", on a CPU"))
    parts = []
    for name, n_ctx, part, where in of_models:
        if part and (made := scales(part)):
            parts.append(
                f"{name}, {part['n_windows']} windows of {n_ctx:,} tokens of "
                f"wikitext-2{where}, with protected tokens; in brackets 95 % intervals, of ratios "
                f"paired:\n\n{made}"
            )
    return "\n\n".join(parts)


def quality() -> str:
    """Every table of every record."""
    parts = [
        "# Quality against bits: three trained models",
        "wikitext-2, always through the cache ([protocol](../evaluation.md)): KLD against the f16 "
        "cache in nats a token, added loss, and the share of positions with the same most likely "
        "token; in brackets 95 % intervals, bootstrap over windows. Bits per value are of K and "
        "V together, with scales, protected tokens and anchors of centred keys: at a window's end, "
        "and after 32,768 tokens, by which rows go, with the bytes there. Protected tokens are a "
        "larger part of a window than of a long context: KLD there was not measured. "
        "`mlx-kvN:64` is mlx-lm's `kv_bits=N`, its rows dequantised before attention; `llama-…` "
        "is llama.cpp's rotated cache, simulated by its published rule. "
        "Policies calibrated for the default model are for it alone. Where tokens are protected, "
        "those of the step at hand, 32 at most, are read as the model made them; `q8_0/q8_0` has "
        "nothing to protect, and all its rows are read as stored, which on Qwen2.5, whose keys it "
        "does not centre, is most of its KLD. "
        "Needles: [needle-protected.md](needle-protected.md).",
        f"{NONE}: not measured. At 8,192 tokens only {', '.join(LONG)} were.",
        "![KLD against bits per value](kld-by-bits.svg)",
    ]
    for name, record in records().items():
        parts += [f"## {NAMES[name]}", f"{MODELS[name]} {_centred_by(record)}"]
        for n_ctx, part in sorted(record["tables"].items(), key=lambda item: int(item[0])):
            parts += _length(NAMES[name], n_ctx, part)
        lengths = [f"{n:,}" for n in sorted(WINDOWS) if str(n) not in record["tables"]]
        if lengths:
            parts.append(f"Windows of {' and '.join(lengths)} tokens were not measured.")
        parts += [source(name, record), *elsewhere(record)]
    return "\n\n".join(parts)


def elsewhere(record: dict) -> list[str]:
    """A sentence on the rows of other runs than the record's."""
    found: dict[str, Counter] = {}
    for n_ctx, part in record["tables"].items():
        for row in part["rows"]:
            if "device" in row:
                where = f"{row['device']}, commit {row['commit']}, {row['date']}"
                found.setdefault(where, Counter())[int(n_ctx)] += 1
    runs = [
        f"{where}: {', '.join(f'{n} at {n_ctx:,} tokens' for n_ctx, n in counts.items())}"
        for where, counts in found.items()
    ]
    return [f"Rows of other runs, which the record marks: {'; '.join(runs)}."] if runs else []


def _length(name: str, n_ctx: str, part: dict) -> list[str]:
    """The parts of the page about windows of one length."""
    reference = part["rows"][0]["ppl"]
    about = (
        f"{part['n_windows']} windows; perplexity with f16 {reference['ppl']:.2f} ± "
        f"{reference['se']:.2f}. Protected: {_protection_of(part)}. {missing(part, int(n_ctx))}"
    )
    made = scales(part)
    return [
        f"### {name}, {int(n_ctx):,} tokens", about.rstrip(), of_length(part),
        *([SCALES_TITLE, made] if made else []),
    ]  # fmt: skip


def _centred_by(record: dict) -> str:
    taken = record["calibration"]
    return (
        "Turbo keys are centred and scaled as at a model's first use "
        f"({taken['windows']} windows of {taken['tokens']} tokens), but in rows that say otherwise "
        f"({taken['windows_asked_for']} windows); the model runs in "
        f"{record['model']['dtype']}."
    )
