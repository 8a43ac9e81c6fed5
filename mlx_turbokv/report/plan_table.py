"""Plans as text, Markdown and JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from ..evaluate.notes import protection_notes
from ..evaluate.tables import Table, bytes_text
from ..loading.weight_bits import bits_text
from ..model.shapes import KVShape
from ..policy.settings import Setting
from .plan import Plan, Row, raw_index_v_bits, runs
from .verdict import chosen, verdict


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
        "machine_bytes": plan.machine_bytes,
        "scratch_bytes": {n: plan.scratch(n) for n in plan.contexts},
        "f16_bytes": plan.f16_bytes_at,
        "bytes_left_alone": plan.uncompressed_bytes_at,
        "windows": [layer.window for layer in model.layers.layers],
        "rows": [_json_row(plan, row) for row in plan.rows],
        "chosen": None if (sentence := verdict(plan)) is None else _name(chosen(plan)),
        "verdict": sentence,
    }


def table_of_json(record: dict[str, Any]) -> Table:
    """The table of a plan that ``as_json`` gave, for the report."""
    notes = _joined((row["name"], note) for row in record["rows"] for note in row["notes"])
    return Table(*_cells(record), notes=[*record["left_alone"], *notes])


def _joined(notes: Iterable[tuple[str, str]]) -> list[str]:
    """Notes on rows, by the rows' names; what several rows have in common is said once."""
    names_by_note: dict[str, list[str]] = {}
    for name, note in notes:
        text = note.removeprefix(f"{name}: ")
        names_by_note.setdefault(text, []).extend([name] if text != note else [])
    return [f"{_listed(names)}: {x}" if names else x for x, names in names_by_note.items()]


def _listed(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _name(row: Row | None) -> str | None:
    return None if row is None else row.name


def _cells(record: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(header, rows) of a plan as JSON; numbers of tokens may be text, as JSON's keys are."""
    memory, f16_bytes = record["memory_bytes"], record["f16_bytes"]
    scratch = record.get("scratch_bytes", {})  # older records have none
    free = math.inf if memory is None else memory - (record["weight_bytes"] or 0)
    header = ["cache", "K bits", "V bits", "bits", "of f16"]
    header += [f"{int(n):,} tokens" for n in f16_bytes]
    header += [] if memory is None else ["tokens that fit"]
    rows = []
    for row in record["rows"]:
        bits = [f"{row[key]:.2f}" for key in ("k_bits", "v_bits", "bits")]
        needed = {n: (row["bytes"][n], row["bytes"][n] + scratch.get(n, 0)) for n in f16_bytes}
        held = [
            bytes_text(size) + (" (too much)" if total > free else "")
            for size, total in needed.values()
        ]
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
        "typed": row.typed,
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


def _notes(plan: Plan) -> list[str]:
    lines = []
    for row in plan.rows:
        pieces = runs(row.formats)
        if len(pieces) > 1:
            parts = [_run_text(*piece) for piece in pieces]
            lines.append(f"{row.name}: KV layers {', '.join(parts)}.")
    lines += _joined((row.name, note) for row in plan.rows for note in row.notes)
    for row in plan.rows:
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
    lines += _settings(plan)
    lines += _protected(plan)
    lines += _counted(plan)
    if sentence := verdict(plan):
        lines.append(sentence)
    elif plan.model.max_context and max(plan.contexts, default=0) > plan.model.max_context:
        lines.append(f"The model's context is {plan.model.max_context:,} tokens.")
    return lines


def _settings(plan: Plan) -> list[str]:
    """The formats of the settings that are rows."""
    found = {x.name: f"{x.k}/{x.v}" for row in plan.rows if isinstance(x := row.policy, Setting)}
    named = [f"{name} is {pair}" for name, pair in found.items()]
    return [f"{', '.join(named)}."] if named else []


def _protected(plan: Plan) -> list[str]:
    """Which rows count protected tokens."""
    found: dict[str, str | None] = {}
    for row in plan.rows:
        own = row.policy.protection
        protects = any(own.of(*pair) for pair in row.formats)
        if protects or any(fmt.is_turbo for pair in row.formats for fmt in pair):
            found[row.name] = str(own) if protects else None
    return protection_notes(found)


def _counted(plan: Plan) -> list[str]:
    """Sentences on what is counted besides the caches where there is a memory."""
    if plan.memory_bytes is None or plan.weight_bytes is None:
        return []
    scratch = [f"{bytes_text(plan.scratch(n))} at {n:,}" for n in plan.contexts]
    n_weights = plan.model.n_parameters
    bits = f" at {bits_text(plan.weight_bytes, n_weights)} bits each" if n_weights else ""
    return [
        f"The weights take {bytes_text(plan.weight_bytes)}{bits}; reading a prompt takes "
        f"{', '.join(scratch)} tokens, {plan.step:,} at a time."
    ]


def _uncompressed(plan: Plan) -> list[str]:
    """A sentence on the caches that are not compressed, which every row's bytes include."""
    kinds = [x.kind for x in plan.model.uncompressed]
    names = {"window": "windows", "recurrent": "recurrent states"}
    parts = [f"{kinds.count(kind)} {names[kind]}" for kind in names if kind in kinds]
    if not parts:
        return []
    sizes = [f"{bytes_text(size)} at {n:,}" for n, size in plan.uncompressed_bytes_at.items()]
    if len(set(plan.uncompressed_bytes_at.values())) == 1:
        sizes = [bytes_text(next(iter(plan.uncompressed_bytes_at.values())))]
    return [f"Every row counts {' and '.join(parts)} as mlx-lm keeps them: {', '.join(sizes)}."]


def _run_text(first: int, last: int, pair: tuple) -> str:
    span = f"{first}" if first == last else f"{first}-{last}"
    return f"{span} {pair[0]}/{pair[1]}"
