"""The page on decode and prefill with protected tokens, from bench_kernels.py."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from . import commands, read, source, table

PROMPTS = (("before", "turbo4/turbo3"), ("now", "turbo4/turbo3+0,0"), ("now", "turbo4/turbo3"))


def protected() -> str:
    """Decode and prefill with protected tokens and without, each in one run."""
    decode, prefill = read("bench_protected"), read("bench_prefill")
    rows = []
    for tokens, name, plain, other in _pairs(decode):
        us, apart = ([f"{r[k]:.1f}" for r in (plain, other)] for k in ("us", "apart_us"))
        ratio = f"{plain['apart_us'] / other['apart_us']:.2f}"
        rows.append([f"{tokens:,}", name, *us, _speed(other), *apart, ratio])
    header = ["tokens", "K/V", "µs", "protected", "speed", "µs, apart", "protected", "speed"]
    prefill_rows = [
        [f"{tokens:,}", name, *(f"{r['us']:,.0f}" for r in (plain, other)), _speed(other)]
        for tokens, name, plain, other in _pairs(prefill)
    ]
    return "\n\n".join([
        "# Attention with protected tokens",
        "The first 32 and the newest 128 tokens in 8.5 bits a value, beside none. Times are "
        "medians; the first speed is the median of the ratios of one round.",
        "## Decode",
        "Chains of calls and, apart, calls that do not wait for each other. Up to 8,192 tokens "
        "launches take most of the time.",
        table(header, rows), source("bench_protected", decode), "## Prefill",
        "A step of 2,048 queries after so many tokens, itself counted: packing, and attention.",
        table(header[:5], prefill_rows), source("bench_prefill", prefill),
        "## Prompts of a whole model", _prompts(),
    ])  # fmt: skip


def _prompts() -> str:
    """A whole model's prompts before there were protected tokens, now without, and with."""
    record = read("bench_prompts")
    by_tokens: dict[int, dict[tuple[str, str], dict]] = {}
    for row in record["rows"]:
        by_tokens.setdefault(row["tokens"], {})[row["tree"], row["config"]] = row
    lines = []
    for tokens, rows in by_tokens.items():
        before, without, now = (rows[key] for key in PROMPTS)
        cells = [f"{r['median']:,.0f} ({_processes(r)})" for r in (before, without, now)]
        ratios = [f"{now['median'] / other['median']:.3f}" for other in (before, without)]
        lines.append([f"{tokens:,}", *cells, *ratios])
    name, commit = record["model"]["name"], before["commit"]
    header = ["tokens", "before", "no protected", "protected", "to before", "to none"]
    return "\n\n".join([
        f"Tokens a second: medians of all trials, and the least and the largest median of "
        f"{len(now['trials'])} processes. {name}, {record['weights']}, turbo4/turbo3, steps of "
        f"{record['prefill_step_size']:,} tokens. Before: commit {commit}, which had no protected "
        "tokens, in processes in turn with these.",
        table(header, lines), source("bench_prompts", record), commands(*record["runs"].values()),
    ])  # fmt: skip


def _processes(row: dict) -> str:
    """The least and the largest median of a process."""
    found = [median(run) for run in row["trials"]]
    return f"{min(found):,.0f} to {max(found):,.0f}"


def _pairs(record: dict) -> Iterator[tuple[int, str, dict, dict]]:
    """Tokens, K/V, and the figures without protected tokens and with."""
    times = {(r["tokens"], r["variant"]): r for r in record["rows"]}
    for (tokens, name), plain in times.items():
        other = times.get((tokens, f"{name} protected"))
        if other is not None:
            yield tokens, name, plain, other


def _speed(other: dict) -> str:
    """The median over rounds of both times' ratio."""
    return f"{other['unprotected_over_this']:.2f}"
