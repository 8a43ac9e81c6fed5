"""Plans as text, Markdown and JSON."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from ..evaluate.tables import Table
from ..model.shapes import KVShape
from .plan import GIB, Plan, Row, raw_index_v_bits, runs

MIB = 1 << 20


def plan_table(plan: Plan) -> Table:
    """The plan's rows, with the formats of every layer and the notes below."""
    return Table(*_cells(as_json(plan)), _headline(plan), _notes(plan))


def as_text(plan: Plan) -> str:
    """A table for a terminal."""
    return plan_table(plan).render("text")


def as_markdown(plan: Plan) -> str:
    """The same as Markdown, the notes as a list."""
    table = plan_table(plan)
    return replace(table, notes=[f"- {note}" for note in table.notes]).render("markdown")


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
        "bytes_left_alone": plan.uncompressed_bytes_at,
        "windows": [layer.window for layer in model.layers.layers],
        "rows": [_json_row(plan, row) for row in plan.rows],
    }


def table_of_json(record: dict[str, Any]) -> Table:
    """The table of a plan that ``as_json`` gave, for the report."""
    names_by_note: dict[str, list[str]] = {}
    for row in record["rows"]:
        for note in row["notes"]:
            text = note.removeprefix(f"{row['name']}: ")
            names_by_note.setdefault(text, []).extend([row["name"]] if text != note else [])
    # A note that several rows have in common is given once.
    notes = [f"{', '.join(names)}: {x}" if names else x for x, names in names_by_note.items()]
    return Table(*_cells(record), notes=[*record["left_alone"], *notes])


def _cells(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a plan as JSON; numbers of tokens may be text, as JSON's keys are."""
    memory, f16_bytes = record["memory_bytes"], record["f16_bytes"]
    free = math.inf if memory is None else memory - (record["weight_bytes"] or 0)
    header = ["cache", "K bits", "V bits", "bits", "of f16"]
    header += [f"{int(n):,} tokens" for n in f16_bytes]
    header += [] if memory is None else ["tokens that fit"]
    rows = []
    for row in record["rows"]:
        bits = [f"{row[key]:.2f}" for key in ("k_bits", "v_bits", "bits")]
        sizes = (row["bytes"][n] for n in f16_bytes)
        held = [_size(n) + (" (too much)" if n > free else "") for n in sizes]
        cells = [row["name"], *bits, f"{row['bits'] / 16:.1%}", *held]
        if memory is not None:
            cells.append("" if row["max_tokens"] is None else f"{row['max_tokens']:,}")
        rows.append(cells)
    return header, rows


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
        line += f", context of up to {model.max_context:,} tokens"
    return line


def _shape_text(shape: KVShape) -> str:
    dims = f"{shape.k_head_dim}"
    if shape.v_head_dim != shape.k_head_dim:
        dims = f"K {shape.k_head_dim}, V {shape.v_head_dim}"
    return f"{shape.n_kv_heads} KV heads, head_dim {dims}"


def _size(n_bytes: int) -> str:
    if n_bytes >= GIB:
        return f"{n_bytes / GIB:.2f} GiB"
    return f"{n_bytes / MIB:.1f} MiB"


def _notes(plan: Plan) -> list[str]:
    lines = []
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
    lines += _uncompressed(plan)
    if plan.memory_bytes is not None and plan.weight_bytes is not None:
        lines.append(
            f"Of {_size(plan.memory_bytes)}, the weights take about {_size(plan.weight_bytes)}; "
            "what the computation needs besides weights and cache is not counted."
        )
    if plan.model.max_context and any(n > plan.model.max_context for n in plan.contexts):
        lines.append(f"The model's context is {plan.model.max_context:,} tokens.")
    return lines


def _uncompressed(plan: Plan) -> list[str]:
    """A sentence on the caches that are not compressed, which every row's bytes include."""
    kinds = [x.kind for x in plan.model.uncompressed]
    names = {"window": "windows", "recurrent": "recurrent states"}
    parts = [f"{kinds.count(kind)} {names[kind]}" for kind in names if kind in kinds]
    if not parts:
        return []
    sizes = [f"{_size(size)} at {n:,}" for n, size in plan.uncompressed_bytes_at.items()]
    if len(set(plan.uncompressed_bytes_at.values())) == 1:
        sizes = [_size(next(iter(plan.uncompressed_bytes_at.values())))]
    return [f"Every row counts {' and '.join(parts)} as mlx-lm keeps them: {', '.join(sizes)}."]


def _run_text(first: int, last: int, pair: tuple) -> str:
    span = f"{first}" if first == last else f"{first}-{last}"
    return f"{span} {pair[0]}/{pair[1]}"
