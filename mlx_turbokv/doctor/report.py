"""The report of ``doctor``: Markdown to paste into an issue."""

from __future__ import annotations

from ..evaluate.tables import Table
from ..kernels.chips import Chip, published
from .checks import JOBS
from .tolerances import TOLERANCES

GIB = 2**30
# of a failure's message; a compiler's list of errors may be long
MESSAGE_LINES = 12
LINE_LENGTH = 200
MOST_SHOWN = 10


def as_markdown(record: dict) -> str:
    """A record of ``examine`` as Markdown."""
    verdict = "PASS" if record["passed"] else "FAIL"
    checks = ["job", "variants", "agree", "worst", "accepted"]
    parts = [
        f"### mlx_turbokv doctor: {verdict}",
        _table(["", ""], _facts(record)),
        *_failures(record["failures"]),
        "#### Checks",
        _table(checks, _checks(record)),
        *_times(record),
    ]
    return "\n\n".join(parts)


def _facts(record: dict) -> list[list[str]]:
    info, chip = record["device_info"], published(record["device"])
    memory = info.get("memory_size") or info.get("total_memory")
    working_set = info.get("max_recommended_working_set_size")
    neural = record["neural_accelerators"]
    rows = {
        "device": record["device"],
        "architecture": info.get("architecture"),
        "memory": memory and f"{memory / GIB:.1f} GiB",
        "recommended working set": working_set and f"{working_set / GIB:.1f} GiB",
        "published memory bandwidth": chip and f"{_bandwidths(chip)} GB/s",
        "neural accelerators": neural and f"{'usable' if neural[0] else 'no'} ({neural[1]})",
        "system": f"{record['os']}, Python {record['python']}",
        "versions": f"mlx_turbokv {record['mlx_turbokv']}, mlx {record['mlx']}, "
        f"mlx-lm {record['mlx_lm']}",
        "back-ends": f"{', '.join(record['backends'])}; checked here: **{record['backend']}**",
        "tuning of decode": record.get("tuning"),
        "kernel sources": _sources(record),
        "centred keys": _centred(record["variants"]),
        "command": f"`{record['command']}`",
    }
    return [[name, str(value)] for name, value in rows.items() if value]


def _sources(record: dict) -> str:
    wrong = sum(f["file"] is not None for f in record["failures"])
    return f"{record['source_files']} files, " + (f"{wrong} wrong" if wrong else "whole")


def _centred(variants: list[dict]) -> str:
    n = sum(v["centred"] for v in variants)
    return (
        f"turbo keys of {n} of {len(variants)} variants, centred by the constant part of the rows "
        "checked (a model's are by means that are measured, or by its key bias)"
    )


def _failures(failures: list[dict]) -> list[str]:
    parts = ["#### Failures"] if failures else []
    for failure in failures[:MOST_SHOWN]:
        kernels = ", ".join(failure["kernels"])
        if failure["file"] is None:
            where = f"**{kernels}**, {failure['variant']}"
        else:
            where = f"metal/{failure['file']}" + (f" (**{kernels}**)" if kernels else "")
        lines = [line[:LINE_LENGTH] for line in failure["message"].splitlines() if line.strip()]
        if len(lines) == 1:
            parts.append(f"- {where}: {lines[0]}")
        else:
            text = "\n".join(f"  {line}" for line in lines[:MESSAGE_LINES])
            parts.append(f"- {where}:\n  ```\n{text}\n  ```")
    if (more := len(failures) - MOST_SHOWN) > 0:
        parts.append(f"- and {more} more")
    return parts


def _checks(record: dict) -> list[list[str]]:
    rows, n = [], len(record["variants"])
    for job in JOBS:
        outcomes = [v["jobs"][job] for v in record["variants"] if job in v["jobs"]]
        good = sum(o["message"] is None for o in outcomes)
        worst = _worst(record["variants"], job)
        rows.append([job, f"{len(outcomes)} of {n}", str(good), worst, TOLERANCES[job]])
    return rows


def _worst(variants: list[dict], job: str) -> str:
    """The largest accepted error; decode's by dtype, like its tolerances."""
    worst: dict[str, float] = {}
    for variant in variants:
        error = variant["jobs"].get(job, {}).get("error")
        if error is not None:
            kind = variant["dtype"] if job in ("decode", "protected") else ""
            worst[kind] = max(worst.get(kind, 0.0), error)
    return ", ".join(f"{error:.1e} {kind}".rstrip() for kind, error in worst.items())


def _times(record: dict) -> list[str]:
    timed = [v for v in record["variants"] if v["times"]]
    if not timed:
        return []
    n, n_kv_heads, n_heads = timed[0]["times"]["shape"]
    title = (
        f"#### Times: {n} tokens, {n_kv_heads} KV heads, {n_heads} query heads (median; GB/s of "
        "what is read and written; × is MLX's fp16 attention over decode)"
    )
    head = ["variant", "pack", "decode", "× fp16", "dequantize", "fp16 attention"]
    rows = [_times_row(v["variant"], v["times"]) for v in timed]
    chip = published(record["device"])
    if chip is None:
        return [title, _table(head, rows)]
    head.insert(3, f"at {_bandwidths(chip)} GB/s")
    for row, variant in zip(rows, timed):
        row.insert(3, f"{_least_us(variant['times']['packed_bytes'], chip)} µs")
    note = (
        "Decode cannot take less than its packed bytes take at the published bandwidth, the "
        "column after it, unless a cache holds them. docs/apple.md says what to expect."
    )
    return [title, _table(head, rows), note]


def _times_row(variant: str, times: dict) -> list[str]:
    pack, decode, dequantize, fp16 = (
        f"{times[f'{job}_us']:.0f} µs, {times[f'{job}_gb_s']:.3g} GB/s"
        for job in ("pack", "decode", "dequantize", "fp16")
    )
    return [variant, pack, decode, f"{times['decode_speedup']:.2f}", dequantize, fp16]


def _bandwidths(chip: Chip) -> str:
    return " or ".join(f"{bandwidth:g}" for bandwidth in chip.bandwidths)


def _least_us(n_bytes: int, chip: Chip) -> str:
    """Microseconds that the chip's memory needs to read so many bytes."""
    return " or ".join(f"{n_bytes / bandwidth / 1e3:.0f}" for bandwidth in chip.bandwidths)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return Table(head, rows, left=tuple(range(len(head)))).markdown()
