"""docs/apple.md and its tables: what an Apple GPU's compiler makes of the kernels.

Records: benchmarks/apple_kernels.json and apple_kernels_before.json (scripts/apple_kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mlx_turbokv.doctor.timing import GPU_SHAPE
from mlx_turbokv.kernels.chips import CHIPS, LANES_A_CORE, Chip
from mlx_turbokv.quant.formats import KVFormat

from . import commands, read, source, table

PAIRS, DIM, ROWS = ("q8_0/turbo2", "turbo4/turbo3"), 128, 4
DECODE = ("decode_partial", "decode_protected")
CACHE_BYTES = 12 * 1024  # of M1's instructions, metal-benchmarks
MOST_REGISTERS = 256
# Clocks of GPUs in GHz, which Apple does not publish: metal-benchmarks (of M2 Pro, Max and Ultra
# its lower bound); of M4 Pro powermetrics, as eclecticlight.co printed it in January 2025.
CLOCKS = {
    "Apple M1": 1.278, "Apple M1 Pro": 1.296, "Apple M1 Max": 1.296, "Apple M1 Ultra": 1.296,
    "Apple M2": 1.398, "Apple M2 Pro": 1.398, "Apple M2 Max": 1.398, "Apple M2 Ultra": 1.398,
    "Apple M4 Pro": 1.578,
}  # fmt: skip
SLOWEST = min(CLOCKS.values())
Row = dict | None


def _rows(name: str) -> dict[str, dict]:
    return {row["variant"]: row for row in read(name)["rows"]}


def _change(before: Row, after: Row, show: Callable[[dict], str], n_column: int = 1) -> str:
    """One figure of both records; a row without figures says why in its first column."""
    cells = []
    for row in (before, after):
        failed = row is not None and "error" in row
        missing = "in memory" if failed and n_column == 0 else "–"
        cells.append(missing if row is None or failed else show(row))
    return " → ".join(cells)


def _spills(row: dict) -> str:
    return f"{row['spills']} : {row['fills']}" if row["spills"] or row["fills"] else "0"


def _kilobytes(field: str) -> Callable[[dict], str]:
    return lambda row: f"{row[field] / 1024:.1f}" if field in row else "–"


def _number(field: str) -> Callable[[dict], str]:
    return lambda row: f"{row[field]:,}" if row.get(field) is not None else "–"


COLUMNS: dict[str, Callable[[dict], str]] = {
    "instructions": _number("instructions"), "demand": _number("demand"),
    "threads a core": _number("threads_a_core"), "spills : fills": _spills,
    "code, KiB": _kilobytes("code_bytes"), "outer loop, KiB": _kilobytes("outer_loop_bytes"),
    "largest inner loop, KiB": _kilobytes("inner_loop_bytes"),
    "instructions a token": _number("instructions_a_token"),
}  # fmt: skip


def _table(names: Iterable[str], columns: Iterable[str], about: Callable[[str], str] = str) -> str:
    before, after = _rows("apple_kernels_before"), _rows("apple_kernels")
    shown = list(columns)
    rows = [
        [about(name), *(_change(before.get(name), after.get(name), COLUMNS[column], n)
                        for n, column in enumerate(shown))]
        for name in names
    ]  # fmt: skip
    return table(["", *shown], rows)


def _decode_name(pair: str, dim: int, rows: int, centred: bool) -> str:
    return f"{pair}-d{dim}-decode-rows{rows}-split" + ("-centred" if centred else "")


def _decode() -> str:
    found = _rows("apple_kernels")

    def about(name: str) -> str:
        row = found[name]
        passes = f" in {row['passes']} passes" if row["passes"] > 1 else ""
        centred = ", centred" if row["centred"] else ""
        return f"{row['pair']}, rows {row['rows']}{passes}{centred}"

    names = [_decode_name(pair, DIM, rows, centred)
             for pair in PAIRS for centred in (False, True) for rows in (1, 2, 4, 8)]  # fmt: skip
    columns = ("demand", "threads a core", "spills : fills", "largest inner loop, KiB",
               "instructions a token")  # fmt: skip
    return _table(names, columns, about)


def _protected() -> str:
    """Decode of DIM that reads protected tokens too."""
    shown = ("demand", "threads a core", "spills : fills", "largest inner loop, KiB")
    rows = [
        [f"{row['pair']}, rows {row['rows']}, {row['how'].removeprefix('protected')[1:] or 'split'}"
         f"{', centred' if row['centred'] else ''}", *(COLUMNS[column](row) for column in shown)]
        for row in read("apple_kernels")["rows"]
        if row["kernel"] == "decode_protected" and row["head_dim"] == DIM and row["pair"] in PAIRS
        and row["rows"] <= ROWS
    ]  # fmt: skip
    return table(["", *shown], rows)


def _fits() -> str:
    """How many variants of decode spill, and the fewest threads a core at DIM, in a sentence."""
    rows = [row for row in read("apple_kernels")["rows"] if row["kernel"] in DECODE]
    spilled = sum(row["spills"] > 0 for row in rows)
    fewest = min(row["threads_a_core"] for row in rows if row["head_dim"] == DIM)
    return (f"Of all {len(rows)} variants of decode, with protected tokens and without, "
            f"{spilled or 'none'} spill; at head_dim {DIM} every one leaves at least {fewest} "
            "threads a core.")  # fmt: skip


def _others() -> str:
    kernels = ("pack", "dequantize", "read_segments")
    names = [f"{pair}-d{DIM}-{kernel}" for pair in PAIRS for kernel in kernels]
    names = [f"{PAIRS[0]}-d{DIM}-merge", *names, *(f"{name}-centred" for name in names)]
    return _table(
        names,
        ("instructions", "demand", "threads a core", "spills : fills"),
        lambda name: name.replace(f"-d{DIM}-", ", ").replace("-centred", ", centred"),
    )


def _summary() -> str:
    """Decode by head_dim: how many variants spill, and the worst of each figure."""
    records = [_rows("apple_kernels_before"), _rows("apple_kernels")]

    def change(dim: int, figure: Callable[[list[dict]], object]) -> str:
        found = []
        for rows in records:
            decode = [row for row in rows.values()
                      if row["kernel"] == "decode_partial" and row["head_dim"] == dim]  # fmt: skip
            found.append(str(figure(decode)))
        return " → ".join(found)

    def compiled(rows: list[dict], field: str) -> list[int]:
        return [row[field] for row in rows if "error" not in row]

    figures: dict[str, Callable[[list[dict]], object]] = {
        "variants": len,
        "array in memory": lambda rows: sum("error" in row for row in rows),
        "spill": lambda rows: sum(n > 0 for n in compiled(rows, "spills")),
        "most demand": lambda rows: max(compiled(rows, "demand")),
        "fewest threads a core": lambda rows: min(compiled(rows, "threads_a_core")),
        "largest inner loop, KiB": lambda rows:
            f"{max(compiled(rows, 'inner_loop_bytes')) / 1024:.1f}",
    }  # fmt: skip
    dims = sorted({row["head_dim"] for row in records[1].values()})
    lines = [[str(dim), *(change(dim, figure) for figure in figures.values())] for dim in dims]
    return table(["head_dim", *figures], lines)


def _needs(pair: str) -> tuple[int, int]:
    """Packed bytes, and lane instructions, of one token of one KV head with four query rows."""
    row = _rows("apple_kernels")[_decode_name(pair, DIM, ROWS, False)]
    formats = [KVFormat.parse(name) for name in pair.split("/")]
    return sum(fmt.row_bytes(DIM) for fmt in formats), row["instructions_a_token"]


def _budget(name: str, chip: Chip, pair: str) -> list[str]:
    """GHz at which instructions take as long as bytes, what limits decode, and what that allows.

    Where the clock is not known, from the slowest that is known to one at which bytes bind.
    """
    n_bytes, instructions = _needs(pair)
    bandwidth, lanes = max(chip.bandwidths), chip.cores * LANES_A_CORE
    tokens, n_kv_heads, _ = GPU_SHAPE
    by_bytes = n_bytes / bandwidth  # ns a token, as are the others
    by_instructions = instructions / (lanes * CLOCKS.get(name, SLOWEST))
    times = [max(by_bytes, by_instructions)]
    limit = "bytes" if by_bytes >= by_instructions else "instructions"
    if limit == "instructions" and name not in CLOCKS:
        limit, times = "not known", [*times, by_bytes]

    def shown(figures: Iterable[float], spec: str) -> str:
        return " to ".join(dict.fromkeys(f"{x:{spec}}" for x in figures))

    return [f"{instructions / lanes / by_bytes:.2f}", limit,
            shown((n_bytes / t for t in times), ".0f"),
            shown((tokens * n_kv_heads * t / 1e3 for t in reversed(times)), ".0f"),
            shown((4 * DIM / bandwidth / t for t in times), ".1f")]  # fmt: skip


def _budgets() -> str:
    header = ["", "GB/s", "lanes", "clock, GHz"]
    for pair in PAIRS:
        header += [f"{pair}: GHz needed", "limited by", "GB/s", "`doctor`, µs", "times fp16"]
    lines = []
    for name, chip in CHIPS.items():
        if name.startswith("Apple"):
            widths = " or ".join(f"{b:g}" for b in chip.bandwidths)
            clock = f"{CLOCKS[name]:.3f}" if name in CLOCKS else "–"
            cells = [name, widths, f"{chip.cores * LANES_A_CORE:,}", clock]
            lines.append(cells + [cell for pair in PAIRS for cell in _budget(name, chip, pair)])
    return table(header, lines)


def kernels() -> str:
    """docs/results/apple-kernels.md: every variant before and after."""
    record, before = read("apple_kernels"), read("apple_kernels_before")
    names = dict.fromkeys([*_rows("apple_kernels"), *_rows("apple_kernels_before")])
    dims = sorted({row["head_dim"] for row in record["rows"]})
    parts = [
        "# Kernel variants by Mesa's compiler for Apple GPUs",
        f"Before (commit {before['commit']}) → after ({record['commit']}). [What the columns mean, "
        "and what follows](../apple.md). `split`: one of several splits of the tokens; `whole`: "
        "all tokens; `alone`: all tokens, of a single sequence.",
    ]  # fmt: skip
    for dim in dims:
        chosen = [name for name in names if f"-d{dim}-" in name]
        parts += [f"## head_dim {dim}", _table(chosen, COLUMNS)]
    return "\n\n".join([*parts, source("apple_kernels", record), commands(before["command"])])


def apple() -> str:
    """docs/apple.md."""
    record, before = read("apple_kernels"), read("apple_kernels_before")
    needs = "; ".join(
        f"{pair} {n_bytes} bytes and {n:,} instructions"
        for pair, (n_bytes, n) in zip(PAIRS, map(_needs, PAIRS))
    )
    tokens, n_kv_heads, n_heads = GPU_SHAPE
    return "\n\n".join([
        "# Apple GPUs",
        "**Computed, not measured: the kernels have not yet run on a Mac.** The text of every "
        f"variant that Metal's tuning uses ({len(record['rows'])} of them) was compiled for M1 and "
        f"M2 by {record['compiler']}'s compiler, which needs no Mac. It is not Apple's compiler, "
        "but it meets the same register file. Figures below are from commit "
        f"{before['commit']}, whose kernels were tuned on an NVIDIA H100, → commit "
        f"{record['commit']}.",
        "- *demand*: the registers of 16 bits that a thread wants before anything is spilled; it "
        f"has {MOST_REGISTERS} at most.\n"
        "- *threads a core*: how many a GPU core then holds. Arithmetic is busy from 24 SIMD "
        "groups on, 768 threads "
        "([metal-benchmarks](https://github.com/philipturner/metal-benchmarks)).\n"
        "- *spills : fills*: registers written to memory and read back.\n"
        "- *in memory*: a private array stays in memory, and the compiler gives up.\n"
        f"- *largest inner loop*: M1's instruction cache has {CACHE_BYTES // 1024} KiB.\n"
        "- *instructions a token*: of one lane, for a token of one KV head and all its query "
        "rows, waits and moves included. Branches count as taken.",
        "## Decode", f"head_dim {DIM}, one of several splits; rows are query heads a KV head "
        "times queries. In each pass the packed rows are read again.", _decode(),
        "All variants: seven pairs of formats, 1 to 8 rows, centred keys and not, split and whole. "
        "[Each of them](results/apple-kernels.md).", _summary(),
        "## Decode with protected tokens",
        "[Two loops in one launch](kernels.md#protected-tokens): a threadgroup runs one of "
        "them; *whole*: one after the other.", _protected(), _fits(),
        "## Packing, merging, dequantising", _others(),
        "## What limits which chip",
        f"One token of one KV head, head_dim {DIM}, {ROWS} query rows: {needs}. A chip reads so "
        "many bytes at its published bandwidth (the larger one, where it was sold with two), and "
        f"executes so many instructions on {LANES_A_CORE} lanes a core, one a cycle: what takes "
        "longer limits decode.",
        "- *GHz needed*: the clock from which on bytes bind.\n"
        "- *clock*: Apple publishes none. M1 and M2 as metal-benchmarks found them (of M2 Pro, Max "
        "and Ultra it gives a lower bound), M4 Pro as powermetrics reports it "
        f"(eclecticlight.co). Elsewhere a range from {SLOWEST} GHz, the slowest known, to a clock "
        "at which bytes bind.\n"
        "- *GB/s*: of packed bytes, at most.\n"
        f"- *`doctor`, µs*: of its decode ({tokens:,} tokens, {n_kv_heads} KV heads, {n_heads} "
        "query heads), at least.\n"
        "- *times fp16*: against an fp16 attention that takes as long as its bytes, at most.",
        _budgets(),
        "## What `doctor` should show",
        "`mlx_turbokv.doctor` prints µs and GB/s of each kernel. At head_dim "
        f"{DIM}, decode of the two pairs above cannot exceed the GB/s of the table. How near it "
        "comes is not known: launches, and waits for memory, are not in these figures. `doctor`'s "
        "context is short, so large chips mostly show what launches cost. Please report less than "
        "half of the table's GB/s, with `doctor`'s output:",
        "- All pairs are low: registers spill after all, or too few threadgroups share a core.\n"
        "- `turbo3` to `turbo6` are low, `q8_0` and `turbo2` are not: table lookups in threadgroup "
        "memory.\n"
        "- All pairs take the same µs: launches.\n"
        "- A kernel is refused when it is compiled, or differs from the reference: always report.",
        "## What is not known",
        "- Apple's compiler may allocate registers better, and unroll, inline and schedule "
        "differently. Mesa's adds moves, waits more often, and spreads a shuffle over four "
        "instructions; demand and threads a core carry over best.\n"
        "- M3 and later allocate registers while a kernel runs (Apple calls it dynamic caching), "
        "so occupancy there is not what a table of M1 says. Their lanes a core are assumed.\n"
        "- An instruction is counted as one cycle. By Mesa's model an integer multiplication, a "
        "shift or a power of two keeps its unit busy for four, while others go on.\n"
        "- Bank conflicts of threadgroup memory, waits for memory, and launches are not counted.\n"
        "- Clocks fall under load.",
        "## How to reproduce it", source("apple_kernels", record, up=".."),
        "TOOLS is a folder with Mesa's compiler, which the script's text describes. A second run "
        "compiles only what has changed. The same for the figures before:",
        commands(before["command"]),
        "Tests hold registers by clang's back-end for AMD GPUs, which CI has "
        "([testing.md](testing.md#metal-kernels-without-a-mac)).",
    ])  # fmt: skip
