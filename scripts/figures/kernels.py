"""Figures of the kernels: how they were checked and measured on a GPU."""

from __future__ import annotations

from math import log2

from mlx_turbokv.chips import CHIPS, LANES_A_CORE, Chip
from mlx_turbokv.formats import KVFormat

from . import figure, read, table


@figure
def gpu() -> dict[str, str]:
    """What ran on an NVIDIA GPU, against float64 and against the reference back-end."""
    record = read("gpu_check")
    kernels, pairs = record["kernels"], record["model"]["pairs"]
    texts = [text for pair in pairs for text in pair["greedy"]]
    gaps = [abs(text["gap"]) for text in texts if text["gap"] is not None]
    ratios = [row["decode_ratio"] for row in kernels["rows"] if row.get("decode_ratio")]
    return {
        "device": f"{record['device']}, mlx {record['mlx']}",
        "cases": str(kernels["cases"]),
        "cases_said": _cases_said(kernels),
        "decode_ratio": f"{max(ratios):.2f}",
        "sanitizer": _sanitizer_said(record["sanitizer"], kernels["cases"] + len(kernels["not_run"])),
        "windows": str(len(pairs[0]["nll_by_window"]["first"])),
        "alike": f"{max(p['largest_difference'] for p in pairs):.0e}".replace("e-0", "e-"),
        "own": f"{max(p['largest_difference_free'] for p in pairs):.3f}",
        "texts": _texts_said(len(texts), gaps, texts[0]["n_tokens"]),
        "launches": _launches_said(record["launches"]["rows"]),
        "doctor": _doctor_said(record["doctor"]),
    }


def _cases_said(kernels: dict) -> str:
    """How many cases ran and which disagreed."""
    failed = [row for row in kernels["rows"] if row["failures"]]
    n = kernels["cases"] + len(kernels["not_run"])
    ran = f"all {n} cases" if not kernels["not_run"] else f"{kernels['cases']} of {n} cases"
    if not failed:
        return f"{ran} agree with float64"
    names = "; ".join(f"`{row['case']}`: {', '.join(row['failures'])}" for row in failed)
    return f"of {ran} against float64, {len(failed)} did not agree ({names})"


def _sanitizer_said(tools: list[dict], n: int) -> str:
    """What compute-sanitizer was run on and what it reported."""
    parts = []
    for tool in tools:
        found = "; ".join(tool["failures"]) or "nothing"
        ran = f"all {n}" if not tool["not_run"] else f"{tool['cases']} of {n}"
        parts.append(f"{tool['tool']} on {ran} cases reports {found}")
    return ", ".join(parts)


def _texts_said(n: int, gaps: list[float], n_tokens: int) -> str:
    """How greedy texts of the two back-ends part."""
    same = n - len(gaps)
    if not gaps:
        return f"all {n} greedy texts of {n_tokens} tokens are the same"
    return (
        f"of {n} greedy texts of {n_tokens} tokens {same} are the same, the others part where two "
        f"tokens are at most {max(gaps):.3f} nats apart"
    )


def _launches_said(rows: list[dict]) -> str:
    """Kernels that a layer's cache and attention launch in a decode step."""
    return ", ".join(f"{row['cache']} {row['launches']:g}" for row in rows)


def _doctor_said(rows: list[dict]) -> str:
    """What doctor said of a whole tree and of changed ones."""
    parts = []
    for row in rows:
        verdict = "passes" if row["passed"] else f"fails with status {row['exit']}"
        if row["changed"] is None:
            parts.append(verdict)
        else:
            parts.append(f"with {row['changed'].replace(':', ',')}, it {verdict} and names {', '.join(row['named'])}")
    return "; ".join(parts)


def _variants(rows: list[dict], measure: str) -> list[str]:
    """Cells of one row a variant: µs and the ratio to fp16."""
    return [
        f"{row[measure]:.1f}" + (f" ({row['fp16_over_this']:.2f}×)" if row["variant"] != "fp16" else "")
        for row in rows
    ]


NOT_IN_RUN = "Not measured in this run."


@figure
def bench() -> dict[str, str]:
    """The kernels' times: attention by length, by pair and by shape; packing and reading back."""
    record = read("bench_kernels")
    parts = {part: [r for r in record["rows"] if r["part"] == part] for part in _parts(record)}
    lengths = parts["lengths"]
    names = list(dict.fromkeys(r["variant"] for r in lengths))
    by_length = [
        [f"{n:,}", *_variants([r for r in lengths if r["tokens"] == n], "us")]
        for n in sorted({r["tokens"] for r in lengths})
    ]
    own = [r for r in record["rows"] if r["job"] == "decode" and "/" in r["variant"] and "rows" not in r["variant"]]
    errors = [r["error"] for r in record["rows"] if "error" in r]
    found = {
        "about": f"{record['device']}, mlx {record['mlx']}, {record['date']}, commit {record['commit']}",
        "copy": f"{record['copy_gb_per_s']:,.0f}",
        "rounds": str(record["rounds"]),
        "lengths": table(["tokens", *names], by_length),
        "build": _range(r["build_us"] for r in own),
        "build_fp16": _range(r["build_us"] for r in record["rows"] if r["job"] == "decode" and r["variant"] == "fp16"),
        "error": f"{max(errors):.0e}".replace("e-0", "e-") if errors else "–",
        "command": f"`{record['command']}`",
    }
    found["pairs"] = _shares(parts.get("pairs", []), lambda r: r["variant"])
    found["shapes"] = _shares(
        parts.get("shapes", []),
        lambda r: f"({r['heads'][0]}, {r['heads'][1]}), D = {r['head_dim']}: {r['variant']}",
    )
    found["centred"] = _centred(parts.get("centred", []))
    jobs = [r for part in ("pack", "dequantize") for r in parts.get(part, [])]
    found["jobs"] = NOT_IN_RUN if not jobs else table(
        ["", "µs", "GB/s", "of copying"],
        [
            [f"{r['job']}, {r['tokens']:,} tokens: {r['variant']}", f"{r['us']:.1f}",
             f"{r['gb_per_s']:,.0f}", f"{r['share_of_copy']:.0%}"]
            for r in jobs
        ],
    )  # fmt: skip
    return found


@figure
def kv_bits() -> dict[str, str]:
    """mlx-lm's quantised attention beside this package's and fp16's, in a run of its own."""
    record = read("bench_kv_bits")
    rows = record["rows"]
    names = list(dict.fromkeys(r["variant"] for r in rows))
    lines = [
        [f"{n:,}", *_variants([r for r in rows if r["tokens"] == n], "us")]
        for n in sorted({r["tokens"] for r in rows})
    ]
    return {"lengths": table(["tokens", *names], lines), "command": f"`{record['command']}`"}


def _centred(rows: list[dict]) -> str:
    """What anchors cost: each centred variant beside the same pair without them."""
    us = {r["variant"]: r["us"] for r in rows}
    found = [
        f"{name} {us[name]:.1f} µs against {us[name.removesuffix(' centred')]:.1f}"
        for name in us if name.endswith(" centred")
    ]  # fmt: skip
    return f"{', '.join(found)} at {rows[0]['tokens']:,} tokens" if found else "not measured in this run"


def _parts(record: dict) -> list[str]:
    return list(dict.fromkeys(r["part"] for r in record["rows"]))


def _range(values, digits: int = 0) -> str:
    values = list(values)
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}" if values else "–"


def _shares(rows: list[dict], name) -> str:
    """Time, ratio to fp16 and share of the copy bandwidth, one line a variant."""
    if not rows:
        return NOT_IN_RUN
    lines = [
        [name(r), f"{r['us']:.1f} ({r['low_us']:.1f} to {r['high_us']:.1f})",
         f"{r['fp16_over_this']:.2f}×", f"{r['gb_per_s']:,.0f}", f"{r['share_of_copy']:.0%}"]
        for r in rows
    ]  # fmt: skip
    return table(["K/V", "µs (range)", "against fp16", "GB/s", "of copying"], lines)


@figure
def decode_log() -> dict[str, str]:
    """Steps of tuning decode: what was expected, what came, what was learned."""
    record = read("decode_log")
    pairs = list(dict.fromkeys(pair for step in record["steps"] for pair in step["us"]))

    def cell(step: dict, pair: str) -> str:
        if pair not in step["us"]:
            return ""
        ratio = step.get("fp16_over_this", {}).get(pair)
        return f"{step['us'][pair]:g}" + (f" ({ratio:.2f}×)" if ratio else "")

    steps = [
        [step["change"], step["expected"], *(cell(step, pair) for pair in pairs), step.get("note", "")]
        for step in record["steps"]
    ]
    counters = {name: f"{value:g}" for name, value in record["counters"].items()}
    return {
        "about": f"{record['what']}. {record['device']}, mlx {record['mlx']}. {record['note']}",
        "steps": table(["change", "expected", *pairs, ""], steps),
        **counters,
    }


SIMD_LANES = 32
PER_TOKEN = ("bytes", "operations", "lanes", "halves")
M1_GHZ = 1.278  # metal-benchmarks; the slowest clock known
LAYERS, KV_HEADS = 32, 8  # Llama-3.1-8B's
DOCTOR_ROWS = 8192 * 8  # tokens and KV heads that doctor times
H100 = "NVIDIA H100 80GB HBM3"


def _formula(pair: str, dim: int, gqa_factor: int) -> dict[str, dict[str, float]]:
    """Bytes and multiply-adds that each kernel needs for one token and KV head, whatever its code.

    Packing adds and subtracts log2(dim) times a value of a turbo row, and multiplies by its scale.
    """
    formats = [KVFormat.parse(name) for name in pair.split("/")]
    row, half_row = sum(fmt.row_bytes(dim) for fmt in formats), 4 * dim
    rotations = sum(dim * log2(dim) for fmt in formats if fmt.is_turbo)
    return {
        "decode_partial": {"bytes": row, "operations": 2 * dim * gqa_factor},
        "pack": {"bytes": row + half_row, "operations": 2 * dim + rotations},
        "dequantize": {"bytes": row + half_row, "operations": 2 * dim},
    }


def _needs(record: dict) -> list[dict]:
    """Of each kernel and pair: bytes, least operations and instructions of a token and KV head.

    ``lanes`` counts instructions of one lane, ``halves`` those among them that work on two halves.
    """
    heads, dim = record["heads"], record["head_dim"]
    found = []
    for row in record["rows"]:
        least = _formula(row["pair"], dim, heads[0] // heads[1]).get(row["kernel"])
        if least is not None:  # merge reads results of splits, not tokens
            rows = record["tokens"] * heads[1]
            lanes = row["warp_instructions"] * SIMD_LANES / rows
            halves = row["float16_operations"] / rows
            row = {**row, **least, "lanes": lanes, "halves": halves}
        found.append(row)
    return found


def _rate(chip: Chip) -> float:
    """Instructions of one lane for each byte at the chip's larger bandwidth, at a clock of 1 GHz."""
    return chip.cores * LANES_A_CORE / max(chip.bandwidths)


@figure
def budget() -> dict[str, str]:
    """What the kernels need for a token, and what GPUs give in the time that its bytes take."""
    record = read("kernel_counters")
    needs = _needs(record)
    kernels = [
        [f"{n['kernel']}, {n['pair']}",
         *(f"{n[key]:,.0f}" if key in n else "–" for key in PER_TOKEN),
         f"{n['registers']:.0f}", f"{n['shared_bytes'] / 1024:.1f} KiB", f"{n['threads']:.0f}"]
        for n in needs
    ]  # fmt: skip
    decode = {n["pair"]: n for n in needs if n["kernel"] == "decode_partial"}
    share = {
        row["variant"]: row["gb_per_s"] / max(CHIPS[read("bench_kernels")["device"]].bandwidths)
        for row in read("bench_kernels")["rows"]
        if row["part"] == "lengths" and row["tokens"] == record["tokens"] and row["variant"] in decode
    }
    apple = {name: chip for name, chip in CHIPS.items() if name.startswith("Apple")}
    large = [chip for name, chip in apple.items() if name.endswith(("Max", "Ultra"))]
    chips = []
    for name, chip in {**apple, H100: CHIPS[H100]}.items():
        widths = " or ".join(f"{b:g}" for b in chip.bandwidths)
        cells = [name, widths, f"{chip.cores * LANES_A_CORE:,}", f"{_rate(chip):.1f}"]
        for pair, need in decode.items():
            executed = need["lanes"] + (need["halves"] if name in apple else 0)
            ghz = executed / need["bytes"] / _rate(chip)
            low = min(chip.bandwidths) * share[pair]
            if name in apple:
                low *= min(1, M1_GHZ / ghz)
            cells += [f"{ghz:.2f}", f"{low:.0f} to {max(chip.bandwidths):g}"]
        chips.append([*cells, chip.source])
    head = ["", "GB/s", "lanes", "instructions a byte"]
    for pair in decode:
        head += [f"{pair}: GHz needed", "`doctor`, GB/s"]
    return {
        "about": f"{record['device']}, mlx {record['mlx']}, {record['date']}, commit {record['commit']}",
        "kernels": table(
            ["", "bytes", "operations at least", "instructions", "on pairs of halves", "registers",
             "threadgroup memory", "threads"],
            kernels,
        ),
        "chips": table([*head, "source"], chips),
        "doctor_us": _range([DOCTOR_ROWS * n["bytes"] / max(c.bandwidths) / 1e3 for c in large for n in decode.values()], 0),
        "m1_packs": _range(
            M1_GHZ * 1e6 * CHIPS["Apple M1"].cores * LANES_A_CORE
            / ((n["lanes"] + n["halves"]) * LAYERS * KV_HEADS)
            for n in needs if n["kernel"] == "pack"
        ),
        "share": ", ".join(f"{pair} {part:.0%}" for pair, part in share.items()),
        "command": f"`{record['command']}`",
    }  # fmt: skip
