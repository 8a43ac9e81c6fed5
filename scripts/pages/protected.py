"""The page on decode and prefill with protected tokens, from bench_kernels.py."""

from __future__ import annotations

from . import read, source, table


def protected() -> str:
    """Decode with protected tokens and without, in one run."""
    record = read("bench_protected")
    times = {(r["tokens"], r["variant"]): r for r in record["rows"] if r["job"] == "decode"}
    rows = []
    for (tokens, name), plain in times.items():
        other = times.get((tokens, f"{name} protected"))
        if other is not None:
            us, apart = ([f"{r[k]:.1f}" for r in (plain, other)] for k in ("us", "apart_us"))
            ratio = f"{plain['apart_us'] / other['apart_us']:.2f}"
            rows.append([f"{tokens:,}", name, *us, _speed(plain, other), *apart, ratio])
    header = ["tokens", "K/V", "µs", "protected", "speed", "µs, apart", "protected", "speed"]
    return "\n\n".join([
        "# Decode attention with protected tokens",
        "The first 32 and the newest 128 tokens in 8.5 bits a value, beside none. Chains of calls "
        "and, apart, calls that do not wait for each other. Up to 8,192 tokens launches take "
        "most of the time.",
        table(header, rows), "## Prefill",
        "A step of 2,048 queries after so many tokens, itself counted: packing, and attention.",
        table(header[:5], _prefill(record)), source("bench_protected", record),
    ])  # fmt: skip


def _speed(plain: dict, other: dict) -> str:
    """The median over rounds of both times' ratio; that of their medians in earlier records."""
    return f"{other.get('unprotected_over_this', plain['us'] / other['us']):.2f}"


def _prefill(record: dict) -> list[list[str]]:
    times = {(r["tokens"], r["variant"]): r for r in record["rows"] if r["job"] == "prefill"}
    return [
        [f"{tokens:,}", name, *(f"{r['us']:,.0f}" for r in (plain, other)), _speed(plain, other)]
        for (tokens, name), plain in times.items()
        if (other := times.get((tokens, f"{name} protected"))) is not None
    ]
