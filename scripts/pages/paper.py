"""The page of the paper's claims and tables, from the records of scripts/paper_replay.py."""

from __future__ import annotations

from few_windows import NOTE
from paper_claims import MISSING, judged
from paper_roles import tables_of

from . import ROOT, read, source, table
from .paper_tables import (
    BITS,
    GAP,
    NONE,
    QUALITY,
    Measured,
    Part,
    keys_tables,
    printed_tables,
    replaces,
    speed_table,
)

PRINTED = "paper/printed"
# model: its name, its records in the order they were made, and its needles
MODELS = {
    "smollm2": (
        "SmolLM2-135M",
        ("paper/short", "paper/long", "paper/smollm2_cpu", "paper/smollm2"),
        "needle",
    ),
    "qwen": ("Qwen2.5-Coder-1.5B", ("paper/qwen_cpu", "paper/qwen"), "needle_qwen"),
}


def there(name: str) -> bool:
    """Whether there is a record."""
    return (ROOT / f"benchmarks/{name}.json").is_file()


def records_of(names: tuple[str, ...]) -> dict[str, dict]:
    """A model's records, but those of which newer ones have as much or more."""
    found = {name: read(name) for name in names if there(name)}
    stands: dict[int, tuple[str, Part]] = {}
    with_keys = [name for name, record in found.items() if "keys" in record]
    for name, record in found.items():
        for n_ctx, part in tables_of(record).items():
            if n_ctx not in stands or replaces(part, stands[n_ctx][1]):
                stands[n_ctx] = name, part
    used = {name for name, _ in stands.values()} | set(with_keys[-1:])
    return {name: record for name, record in found.items() if name in used}


def paper() -> str:
    """The paper's claims and tables on the trained models."""
    models, sources, needles = [], [], []
    for label, names, needle in MODELS.values():
        records = records_of(names)
        if not records:
            continue
        model = Measured(label)
        for name, record in records.items():
            model.add(record)
            sources.append(source(name, record))
        if there(needle):
            model.needle = read(needle)
            needles.append(f"{label} [benchmarks/{needle}.json](../../benchmarks/{needle}.json)")
        models.append(model)
    about = "`scripts/paper_replay.py` measures and prints this page ([policies](../policies.md))."
    return "\n\n".join([
        "# The paper's claims and tables", about, report(models), *sources,
        f"Needles: [needle.md](needle.md), {', '.join(needles)}.",
    ])  # fmt: skip


def report(models: list[Measured], bench: dict | None = None) -> str:
    """Claims and tables as Markdown, with a column or more for each model."""
    printed = read(PRINTED)
    parts = [
        " ".join(sentence for model in models for sentence in model.about)
        + " The paper's models are others, and its tables have no errors; ± is one standard error, "
        "of PPL over tokens and of differences over windows. No tokens are protected, and keys are "
        "not centred.",
        claims_table(models),
    ]
    shortest = [(m, min(m.tables, default=0)) for m in models]
    parts += printed_tables(printed["quality"], shortest, QUALITY)
    parts += printed_tables(printed["gap"], shortest, GAP)
    for n_ctx, suffix in ((8192, ""), (16384, "_16k")):
        long = [(m, n) for m in models if (n := m.length_for(n_ctx)) is not None]
        if suffix and all(n < n_ctx for _, n in long):
            continue
        parts += printed_tables(printed[f"long{suffix}"], long, QUALITY, n_ctx)
        parts += printed_tables(printed.get(f"gap_long{suffix}", []), long, GAP, n_ctx)
    parts += printed_tables(printed["v_bits"], shortest, BITS)
    if with_keys := [m for m in models if m.keys is not None]:
        parts.append(keys_tables(with_keys, printed["independent"]))
    if bench is not None:
        parts.append(speed_table(printed["speed"], bench))
    return "\n\n".join(parts)


def claims_table(models: list[Measured]) -> str:
    """Every claim with each model's difference and verdicts."""
    found: dict[tuple[str, str], dict[str, dict]] = {}
    for model in models:
        tables = {n: rows for n, (_, rows) in model.tables.items()}
        for entry in judged(tables, model.needle, model.keys):
            if entry["verdict"] != MISSING:
                found.setdefault((entry["where"], entry["claim"]), {})[model.label] = entry

    def order(where: str) -> tuple[int, int]:
        number = where.replace(",", "")
        return (0, int(number)) if number.isdigit() else (1, 0)

    wheres = sorted(dict.fromkeys(where for where, _ in found), key=order)
    rows = []
    for place in wheres:
        for (where, claim), entries in found.items():
            if where == place:
                cells = [_claim_cells(entries.get(model.label)) for model in models]
                rows.append([claim, where, *sum(cells, [])])
    header = ["the paper says", "tokens"]
    for model in models:
        header += [f"{model.label}: difference, nats (95 %)", "by loss", "by KLD from f16"]
    return f"## Claims\n\n{NOTE}\n\n{table(header, rows)}"


def _claim_cells(entry: dict | None) -> list[str]:
    if entry is None:
        return [NONE] * 3
    if entry["unit"] == "nats of KLD":
        return [difference_cell(entry), NONE, entry["verdict"]]
    by_kld = entry["by_kld"]["verdict"] if "by_kld" in entry else NONE
    return [difference_cell(entry), entry["verdict"], by_kld]


def difference_cell(entry: dict) -> str:
    """A claim's difference with its interval."""
    if entry.get("difference") is None:
        return NONE
    scale, spec, unit = (100, "+.2f", " %") if entry["unit"] == "PPL" else (1, "+.4f", "")
    unit = " of cosine" if entry["unit"] == "cosine" else unit
    text = f"{scale * entry['difference']:{spec}}{unit}"
    if entry.get("interval"):
        low, high = entry["interval"]
        text += f" ({scale * low:{spec}} to {scale * high:{spec}})"
    return text + (f"; {entry['lost']} of {entry['of']} lost" if "lost" in entry else "")
