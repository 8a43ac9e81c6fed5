"""The report of ``doctor``: Markdown to paste into an issue."""

from __future__ import annotations

from ..kernels.chips import Chip, published
from .checks import JOBS, TOLERANCES

GIB = 2**30
# of a failure's message; a compiler's list of errors is longer than anybody reads
MESSAGE_LINES = 12
LINE_LENGTH = 200
MOST_SHOWN = 10


def as_markdown(record: dict) -> str:
    """The report of a record that ``examine`` made."""
    verdict = "PASS" if record["passed"] else "FAIL"
    parts = [f"### mlx_turbokv doctor: {verdict}", _table(("", ""), _facts(record))]
    if record["failures"]:
        parts += _failures(record["failures"])
    head = ("job", "variants", "agree", "worst", "accepted")
    parts += ["#### Checks", _table(head, _checks(record))]
    if times := _times(record):
        parts += times
    return "\n\n".join(parts)


def _facts(record: dict) -> list[tuple[str, str]]:
    info = record["device_info"]
    rows = [("device", record["device"])]
    if "architecture" in info:
        rows.append(("architecture", str(info["architecture"])))
    if memory := info.get("memory_size") or info.get("total_memory"):
        rows.append(("memory", f"{memory / GIB:.1f} GiB"))
    if working_set := info.get("max_recommended_working_set_size"):
        rows.append(("recommended working set", f"{working_set / GIB:.1f} GiB"))
    if chip := published(record["device"]):
        rows.append(("published memory bandwidth", f"{_bandwidths(chip)} GB/s"))
    if record["neural_accelerators"] is not None:
        usable, why = record["neural_accelerators"]
        rows.append(("neural accelerators", f"{'usable' if usable else 'no'} ({why})"))
    rows += [
        ("system", f"{record['os']}, Python {record['python']}"),
        ("versions", f"mlx_turbokv {record['mlx_turbokv']}, mlx {record['mlx']}, "
         f"mlx-lm {record['mlx_lm']}"),
        ("back-ends", f"{', '.join(record['backends'])}; checked here: **{record['backend']}**"),
        ("kernel sources", _sources(record)),
        ("centred keys", _centred(record["variants"])),
        ("command", f"`{record['command']}`"),
    ]  # fmt: skip
    return rows


def _sources(record: dict) -> str:
    wrong = sum(f["file"] is not None for f in record["failures"])
    return f"{record['source_files']} files, " + (f"{wrong} wrong" if wrong else "whole")


def _centred(variants: list[dict]) -> str:
    n = sum(v["centred"] for v in variants)
    return (
        f"turbo keys of {n} of {len(variants)} variants, centred by the constant part of the rows "
        "checked (a model's are by its key bias, or by calibrated means)"
    )


def _failures(failures: list[dict]) -> list[str]:
    parts = ["#### Failures"]
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


def _checks(record: dict) -> list[tuple[str, ...]]:
    rows = []
    for job in JOBS:
        outcomes = [v["jobs"][job] for v in record["variants"] if job in v["jobs"]]
        n = f"{len(outcomes)} of {len(record['variants'])}"
        good = sum(o["message"] is None for o in outcomes)
        rows.append((job, n, str(good), _worst(record["variants"], job), TOLERANCES[job]))
    return rows


def _worst(variants: list[dict], job: str) -> str:
    """The largest error that was accepted; decode's by dtype, as its tolerances are."""
    worst: dict[str, float] = {}
    for variant in variants:
        error = variant["jobs"].get(job, {}).get("error")
        if error is not None:
            kind = variant["dtype"] if job == "decode" else ""
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
    chip = published(record["device"])
    if chip is not None:
        head.insert(3, f"at {_bandwidths(chip)} GB/s")
    rows = []
    for variant in timed:
        t = variant["times"]

        def cell(job: str) -> str:
            return f"{t[f'{job}_us']:.0f} µs, {t[f'{job}_gb_s']:.3g} GB/s"

        speedup = f"{t['decode_speedup']:.2f}"
        cells = [
            variant["variant"],
            cell("pack"),
            cell("decode"),
            speedup,
            cell("dequantize"),
            cell("fp16"),
        ]
        if chip is not None:
            cells.insert(3, f"{_least_us(t['packed_bytes'], chip)} µs")
        rows.append(tuple(cells))
    parts = [title, _table(tuple(head), rows)]
    if chip is not None:
        parts.append(
            "Decode cannot take less than its packed bytes take at the published bandwidth, the "
            "column after it, unless a cache holds them. docs/kernels.md says what to expect."
        )
    return parts


def _bandwidths(chip: Chip) -> str:
    return " or ".join(f"{bandwidth:g}" for bandwidth in chip.bandwidths)


def _least_us(n_bytes: int, chip: Chip) -> str:
    """Microseconds in which the chip's memory delivers so many bytes."""
    return " or ".join(f"{n_bytes / bandwidth / 1e3:.0f}" for bandwidth in chip.bandwidths)


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)
