"""Plans as text, Markdown and JSON."""

from __future__ import annotations

from typing import Any

from ..model.shapes import KVShape
from .plan import GIB, Plan, Row, raw_index_v_bits, runs

MIB = 1 << 20


def as_text(plan: Plan) -> str:
    """A table for a terminal, with the formats of every layer and the notes below."""
    header, *rows = _table(plan)
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [_headline(plan), ""]
    for line in [header, *rows]:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([*lines, *_below(plan)])


def as_markdown(plan: Plan) -> str:
    """The same as Markdown."""
    header, *rows = _table(plan)
    lines = [_headline(plan), "", "| " + " | ".join(header) + " |"]
    lines.append("|---" + "|---:" * (len(header) - 1) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    below = [f"- {line}" if line else line for line in _below(plan)]
    return "\n".join([*lines, *below])


def as_json(plan: Plan) -> dict[str, Any]:
    """The same as an object that JSON can hold."""
    model = plan.model
    return {
        "model": model.name,
        "layers": model.n_caches,
        "kv_layers": len(model.shapes),
        "kv_layer_indices": [layer.index for layer in model.layers.layers],
        "heads": model.n_heads,
        "kv_heads": [shape.n_kv_heads for shape in model.shapes],
        "k_head_dim": [shape.k_head_dim for shape in model.shapes],
        "v_head_dim": [shape.v_head_dim for shape in model.shapes],
        "left_alone": model.layers.notes(),
        "max_context": model.max_context,
        "weight_bytes": plan.weight_bytes,
        "memory_bytes": plan.memory_bytes,
        "f16_bytes": plan.f16_bytes_at,
        "bytes_left_alone": plan.beside_bytes_at,
        "windows": [layer.window for layer in model.layers.layers],
        "rows": [_json_row(plan, row) for row in plan.rows],
    }


def table_of_json(record: dict[str, Any]) -> tuple[list[str], list[list[str]], list[str]]:
    """A plan that ``as_json`` gave, as (header, rows, sentences below)."""
    contexts = [int(n) for n in record["f16_bytes"]]
    header = ["cache", "K bits", "V bits", "bits", "of f16", *(f"{n:,} tokens" for n in contexts)]
    rows, notes = [], list(record["left_alone"])
    for row in record["rows"]:
        held = {int(n): size for n, size in row["bytes"].items()}
        cells = [row["name"], f"{row['k_bits']:.2f}", f"{row['v_bits']:.2f}", f"{row['bits']:.2f}"]
        rows.append([*cells, f"{row['bits'] / 16:.1%}", *(_size(held[n]) for n in contexts)])
    by_text: dict[str, list[str]] = {}
    for row in record["rows"]:
        for line in row["notes"]:
            name = row["name"]
            text = line.removeprefix(f"{name}: ") if line.startswith(f"{name}: ") else line
            by_text.setdefault(text, []).extend([name] if text != line else [])
    # What several rows have in common is said once.
    notes += [f"{', '.join(names)}: {text}" if names else text for text, names in by_text.items()]
    return header, rows, notes


def _json_row(plan: Plan, row: Row) -> dict[str, Any]:
    result = {
        "name": row.name,
        "k_bits": row.k_bits,
        "v_bits": row.v_bits,
        "bits": row.bits,
        "formats": [f"{k}/{v}" for k, v in row.formats],
        "bytes": row.bytes_at,
        "max_tokens": row.max_tokens,
        "notes": row.notes,
    }
    raw = raw_index_v_bits(row.policy, plan.model)
    if raw is not None:
        result["raw_index_v_bits"] = raw[0]
    return result


def _headline(plan: Plan) -> str:
    model = plan.model
    heads = f"{model.n_heads} query heads, " if model.n_heads else ""
    shapes = list(dict.fromkeys(model.shapes))
    kinds = "; ".join(_shape_text(shape) for shape in shapes)
    line = f"{model.name}: {len(model.shapes)} KV layers of {model.n_caches}, {heads}{kinds}"
    if model.max_context:
        line += f", made for {model.max_context:,} tokens"
    return line


def _shape_text(shape: KVShape) -> str:
    dims = f"{shape.k_head_dim}"
    if shape.v_head_dim != shape.k_head_dim:
        dims = f"K {shape.k_head_dim}, V {shape.v_head_dim}"
    return f"{shape.n_kv_heads} KV heads, head_dim {dims}"


def _table(plan: Plan) -> list[list[str]]:
    header = ["cache", "K bits", "V bits", "bits", "of f16"]
    header += [f"{n:,} tokens" for n in plan.contexts]
    if plan.memory_bytes is not None:
        header.append("tokens that fit")
    lines = [header]
    for row in plan.rows:
        cells = [row.name, f"{row.k_bits:.2f}", f"{row.v_bits:.2f}", f"{row.bits:.2f}"]
        cells.append(f"{row.bits / 16:.1%}")
        cells += [_size(row.bytes_at[n]) + _fits(plan, row.bytes_at[n]) for n in plan.contexts]
        if row.max_tokens is not None:
            cells.append(f"{row.max_tokens:,}")
        lines.append(cells)
    return lines


def _fits(plan: Plan, n_bytes: int) -> str:
    free = plan.free_bytes()
    return "" if free is None or n_bytes <= free else " (too much)"


def _size(n_bytes: int) -> str:
    if n_bytes >= GIB:
        return f"{n_bytes / GIB:.2f} GiB"
    return f"{n_bytes / MIB:.1f} MiB"


def _below(plan: Plan) -> list[str]:
    lines = [""]
    for row in plan.rows:
        pieces = runs(row.formats)
        if len(pieces) > 1:
            parts = [_run_text(*piece) for piece in pieces]
            lines.append(f"{row.name}: KV layers {', '.join(parts)}.")
    for row in plan.rows:
        lines += row.notes
        raw = raw_index_v_bits(row.policy, plan.model)
        if raw is not None:
            bits, hit, right = raw
            lines.append(
                f"{row.name}: V takes {row.v_bits:.2f} bits per value, counted over KV layers. "
                f"Counted by raw layer index, as the paper's code did, it is {bits:.2f}, "
                f"and {hit} of the {right} KV layers to protect are protected."
            )
    lines += plan.model.layers.notes()
    lines += _beside(plan)
    if plan.memory_bytes is not None and plan.weight_bytes is not None:
        lines.append(
            f"Of {_size(plan.memory_bytes)}, the weights take about {_size(plan.weight_bytes)}; "
            "what the computation needs beside weights and cache is not counted."
        )
    if plan.model.max_context and any(n > plan.model.max_context for n in plan.contexts):
        lines.append(f"The model was made for {plan.model.max_context:,} tokens.")
    return lines if len(lines) > 1 else []


def _beside(plan: Plan) -> list[str]:
    """What every row's bytes count beside packed layers."""
    kinds = [x.kind for x in plan.model.beside]
    names = {"window": "windows", "recurrent": "recurrent states"}
    parts = [f"{kinds.count(kind)} {names[kind]}" for kind in names if kind in kinds]
    if not parts:
        return []
    sizes = [f"{_size(size)} at {n:,}" for n, size in plan.beside_bytes_at.items()]
    if len(set(plan.beside_bytes_at.values())) == 1:
        sizes = [_size(next(iter(plan.beside_bytes_at.values())))]
    return [f"Every row counts {' and '.join(parts)} as mlx-lm keeps them: {', '.join(sizes)}."]


def _run_text(first: int, last: int, pair: tuple) -> str:
    span = f"{first}" if first == last else f"{first}-{last}"
    return f"{span} {pair[0]}/{pair[1]}"
