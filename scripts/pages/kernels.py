"""Pages on the kernels: times, counters, and the checks on an NVIDIA GPU."""

from __future__ import annotations

from math import log2

from mlx_turbokv.quant.formats import KVFormat

from . import commands, power, read, source, span, table

SIMD_LANES = 32


def _shape(rows: list[dict]) -> str:
    (heads, dim), *_ = {(tuple(r["heads"]), r["head_dim"]) for r in rows}
    return f"{heads[0]} query and {heads[1]} KV heads, head_dim {dim}"


def _heads(row: dict) -> str:
    return f"({row['heads'][0]}, {row['heads'][1]})"


def _by_length(rows: list[dict]) -> str:
    """µs by context and variant, and the ratio to fp16."""
    names = list(dict.fromkeys(r["variant"] for r in rows))
    lines = []
    for n in sorted({r["tokens"] for r in rows}):
        at = [r for r in rows if r["tokens"] == n]
        ratios = ["" if r["variant"] == "fp16" else f" ({r['fp16_over_this']:.2f}×)" for r in at]
        lines.append([f"{n:,}", *(f"{r['us']:.1f}{ratio}" for r, ratio in zip(at, ratios))])
    return table(["tokens", *(name.replace("kv_bits", "kv_bits=") for name in names)], lines)


def _shares(rows: list[dict], name=lambda r: r["variant"]) -> str:
    """Time, ratio to fp16 and share of the copy bandwidth, one line a variant."""
    lines = [
        [name(r), f"{r['us']:.1f} ({r['low_us']:.1f} to {r['high_us']:.1f})",
         f"{r['fp16_over_this']:.2f}×" if "fp16_over_this" in r else "–", f"{r['gb_per_s']:,.0f}",
         f"{r['share_of_copy']:.0%}"]
        for r in rows
    ]  # fmt: skip
    return table(["", "µs (range)", "against fp16", "GB/s", "of copying"], lines)


def _scheme(record: dict) -> str:
    """How the calls were timed."""
    decode = [r for r in record["rows"] if r["job"] == "decode"]
    fp16 = [r for r in decode if r["variant"] == "fp16"]
    own = [r for r in decode if "/" in r["variant"] and "rows" not in r["variant"]]
    errors = [r["error"] for r in record["rows"] if "error" in r]
    text = (
        f"Medians of {record['rounds']} rounds, in µs a call, launches included; chains of calls "
        f"are submitted in steps of {record['calls_a_step']} calls. CPU time a call "
        f"({record['processor']}): {span(r['submit_us'] for r in own)} µs to submit (fp16: "
        f"{span(r['submit_us'] for r in fp16)}), {span(r['build_us'] for r in own)} to build "
        f"the graph (fp16: {span(r['build_us'] for r in fp16)}). A copy in the same run: "
        f"{record['copy_gb_per_s']:,.0f} GB/s."
    )
    if errors:
        text += f" Largest relative difference from the reference: {power(max(errors))}."
    return text


def kernels() -> str:
    """Attention by length, pair and shape; centred keys; packing and reading back."""
    record = read("bench_kernels")
    parts: dict[str, list[dict]] = {}
    for row in record["rows"]:
        parts.setdefault(row["part"], []).append(row)
    text = [
        "# Kernel times",
        "One query against packed rows, compared with MLX's fp16 attention in the same run. `rows` "
        "dequantises first. [How it is timed](../kernels.md#accuracy-times-and-limits).",
        _scheme(record), "## By context", _shape(parts["lengths"]), _by_length(parts["lengths"]),
    ]  # fmt: skip
    if "pairs" in parts:
        title = f"## By pair of formats, {parts['pairs'][0]['tokens']:,} tokens"
        text += [title, _shares(parts["pairs"])]
    if "shapes" in parts:
        text += ["## By shape", _shares(
            parts["shapes"],
            lambda r: f"{_heads(r)}, D = {r['head_dim']}: {r['variant']}",
        )]  # fmt: skip
    if "batches" in parts:
        text += [f"## By batch, {parts['batches'][0]['tokens']:,} tokens each", _shares(
            parts["batches"], lambda r: f"{_heads(r)}, {r['batch']} sequences: {r['variant']}",
        )]  # fmt: skip
    if "queries" in parts:
        text += [f"## Several queries, {parts['queries'][0]['tokens']:,} tokens", _shares(
            parts["queries"], lambda r: f"{r['queries']} queries: {r['variant']}",
        )]  # fmt: skip
    if "centred" in parts:
        title = f"## Centred keys, {parts['centred'][0]['tokens']:,} tokens"
        text += [title, _shares(parts["centred"])]
    jobs = [r for part in ("pack", "dequantize") for r in parts.get(part, [])]
    if jobs:
        text += [
            "## Packing a prefill step, appending a token, reading back",
            "`fp16` is what mlx-lm's fp16 cache does. GB/s of what is read and written.",
            _shares(jobs, lambda r: f"{r['job']}, {r['tokens']:,} tokens: {r['variant']}"),
        ]
    return "\n\n".join([*text, source("bench_kernels", record)])


def turns() -> str:
    """The kernels of an earlier commit and these, timed in turns."""
    record = read("bench_turns")
    lines = []
    for row in record["rows"]:
        if row["variant"] == "fp16":
            drift = row["against_over_this"]
            continue
        several = [f"{row[key]} {key}" for key in ("batch", "queries") if row[key] > 1]
        shape = ", ".join([f"{row['job']} {_heads(row)}", f"D = {row['head_dim']}", *several])
        ratio = f"{row['fp16_over_this']:.2f}×" if "fp16_over_this" in row else "–"
        lines.append([
            f"{shape}: {row['variant']}", f"{row['tokens']:,}", f"{row['against']['us']:.1f}",
            f"{row['us']:.1f}", f"{row['submit_us']:.1f}", f"{row['against_over_this']:.2f}",
            f"{drift:.2f}", ratio,
        ])  # fmt: skip
    header = [
        "",
        "tokens",
        "µs before",
        "µs",
        "to submit",
        "before / now",
        "fp16's",
        "against fp16",
    ]
    return "\n\n".join([
        "# Kernels of an earlier commit and these, in turns",
        f"Before: commit {record['against']['commit']}, in a process of its own. {_scheme(record)} "
        "`fp16's` is MLX's attention in the two processes: how far it is from 1 is what they "
        "differ by without a change of the kernels. Where submitting takes as long as the call, "
        "the time is the CPU's.",
        table(header, lines), source("bench_turns", record),
    ])  # fmt: skip


def kv_bits() -> str:
    """mlx-lm's quantised attention, this package's and fp16's in one run."""
    record = read("bench_kv_bits")
    return "\n\n".join([
        "# mlx-lm's kv_bits attention", f"Groups of 64 values; {_shape(record['rows'])}.",
        _scheme(record), _by_length(record["rows"]), source("bench_kv_bits", record),
    ])  # fmt: skip


def _least(pair: str, dim: int, gqa_factor: int) -> dict[str, tuple[float, float]]:
    """Bytes and multiply-adds that each kernel cannot do without, for one token and KV head.

    Packing adds and subtracts log2(dim) times a value of a turbo row, and multiplies by its scale.
    """
    formats = [KVFormat.parse(name) for name in pair.split("/")]
    row, half_row = sum(fmt.row_bytes(dim) for fmt in formats), 4 * dim
    rotations = sum(dim * log2(dim) for fmt in formats if fmt.is_turbo)
    return {
        "decode_partial": (row, 2 * dim * gqa_factor),
        "pack": (row + half_row, 2 * dim + rotations),
        "dequantize": (row + half_row, 2 * dim),
    }


def _needs(record: dict) -> list[dict]:
    """Each kernel's row with its needs for a token and KV head.

    ``lanes`` counts instructions of one lane, ``halves`` those of them on two halves.
    """
    (heads, kv_heads), dim, found = record["heads"], record["head_dim"], []
    n = record["tokens"] * kv_heads
    for row in record["rows"]:
        least = _least(row["pair"], dim, heads // kv_heads).get(row["kernel"])
        if least is not None:  # merge reads results of splits, not tokens
            lanes = row["warp_instructions"] * SIMD_LANES / n
            row = {**row, "bytes": least[0], "operations": least[1], "lanes": lanes,
                   "halves": row["float16_operations"] / n}  # fmt: skip
        found.append(row)
    return found


def counters() -> str:
    """What the kernels need for a token, counted on an NVIDIA GPU."""
    record = read("kernel_counters")
    needs = _needs(record)
    rows = [
        [f"{n['kernel']}, {n['pair']}",
         *(f"{n[k]:,.0f}" if k in n else "–" for k in ("bytes", "operations", "lanes", "halves")),
         f"{n['registers']:.0f}", f"{n['shared_bytes'] / 1024:.1f} KiB", f"{n['threads']:.0f}"]
        for n in needs
    ]  # fmt: skip
    header = ["", "bytes", "operations at least", "instructions", "on pairs of halves", "registers",
              "threadgroup memory", "threads"]  # fmt: skip
    return "\n\n".join([
        "# Kernel counters",
        f"For one token of one KV head (head_dim {record['head_dim']}, "
        f"{record['heads'][0] // record['heads'][1]} query heads a KV head). [How to read "
        "it](../kernels.md#instructions-and-bandwidth).",
        table(header, rows), source("kernel_counters", record),
    ])  # fmt: skip


def _decode_errors(rows: list[dict]) -> str:
    """The largest of decode's errors, by what they were compared with when they were recorded."""
    parts = [row["decode_of_bound"] for row in rows if "decode_of_bound" in row]
    if parts:
        return (
            f"Decode's error in a row is at most {max(parts):.2f} of its bound, which follows from "
            "the number formats (mlx_turbokv/doctor/error_bound.py)."
        )
    ratio = max(row["decode_ratio"] for row in rows if row.get("decode_ratio"))
    return (
        "Decode's relative error (geometric mean over three draws of the queries) is at most "
        f"{ratio:.2f} times that of an attention in plain ops at the case's precision."
    )


def gpu_check() -> str:
    """What ran on an NVIDIA GPU, against float64 and against the reference back-end."""
    record = read("gpu_check")
    cases, pairs = record["kernels"], record["model"]["pairs"]
    runs = [("kernels against float64", cases), *((t["tool"], t) for t in record["sanitizer"])]
    ran = [[name, str(run["cases"]), str(len(run["not_run"])), str(len(run["failures"]))]
           for name, run in runs]  # fmt: skip
    failures = [f"- {failure}" for _, run in runs for failure in run["failures"]]
    errors = _decode_errors(cases["rows"])
    losses = [
        [p["pair"], str(len(p["nll_by_window"]["first"])), power(p["largest_difference"]),
         f"{p['largest_difference_free']:.3f}",
         f"{p['differing']:,} of {p['codes']:,}", str(p["wrong"])]
        for p in pairs
    ]  # fmt: skip
    doctor = [
        [row["changed"] or "nothing changed", str(row["exit"]), ", ".join(row["named"]) or "–"]
        for row in record["doctor"]
    ]
    others = [record[name]["command"] for name in ("kernels", "model", "launches")]
    return "\n\n".join([
        "# Checks on an NVIDIA GPU",
        "The text of the Metal kernels, compiled as CUDA. [What is compared, and what "
        "teacher-forced codes are](../testing.md#on-an-nvidia-gpu).",
        table(["kernel cases", "run", "not run", "failures"], ran), *failures,
        errors,
        "## The default model on both back-ends",
        *([f"Of commit {record['model']['commit']}."] if "commit" in record["model"] else []),
        "Largest difference of a window's loss, in nats, with teacher-forced codes and without.",
        table(["K/V", "windows", "teacher-forced", "free", "codes that differ", "no near-tie"],
              losses),
        "Greedy texts: steps at which both choose the same token and the largest difference of a "
        "log-probability, with teacher-forced codes; without them, the equal tokens before the "
        "first difference, and how far apart the two tokens are there, in nats.",
        table(["K/V, prompt", "same token", "log-probability", "equal if free", "apart"],
              [[f"{p['pair']}, {text['prompt']}", *text_cells(text)]
               for p in pairs for text in p["greedy"]]),
        "## Launches of a layer's cache and attention in a decode step",
        table(["cache", "launches"],
              [[r["cache"], f"{r['launches']:g}"] for r in record["launches"]["rows"]]),
        "## doctor",
        *([f"Of commit {record['doctor_commit']}."] if "doctor_commit" in record else []),
        table(["kernel text", "exit status", "kernels named"], doctor),
        source("gpu_check", record),
        commands(*others, *(tool["command"] for tool in record["sanitizer"])),
    ])  # fmt: skip


def text_cells(text: dict) -> list[str]:
    """How the greedy texts of two back-ends agree, with teacher-forced codes and without."""
    forced, free = text["forced"], text["free"]
    gap = "–" if free["gap"] is None else f"{abs(free['gap']):.3f}"
    same = f"{forced['n_equal']} of {forced['n_tokens']}"
    return [same, power(forced["log_probability"]), str(free["n_equal"]), gap]
