"""Figures of the kernels: how they were checked and measured on a GPU."""

from __future__ import annotations

from collections.abc import Callable

from . import figure, read, table


@figure
def gpu() -> dict[str, str]:
    """What ran on an NVIDIA GPU, against float64 and against the reference back-end."""
    record = read("gpu_check")
    kernels, pairs = record["kernels"], record["model"]["pairs"]
    texts = [text for pair in pairs for text in pair["greedy"]]
    ratios = [row["decode_ratio"] for row in kernels["rows"] if row.get("decode_ratio")]
    return {
        "device": f"{record['device']}, mlx {record['mlx']}",
        "cases_said": _cases_said(kernels),
        "decode_ratio": f"{max(ratios):.2f}",
        "sanitizer": _sanitizer_said(
            record["sanitizer"], kernels["cases"] + len(kernels["not_run"])
        ),
        "windows": str(len(pairs[0]["nll_by_window"]["first"])),
        "alike": _power(max(p["largest_difference"] for p in pairs)),
        "own": f"{max(p['largest_difference_free'] for p in pairs):.3f}",
        "texts": texts_said(texts),
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


def texts_said(texts: list[dict]) -> str:
    """How greedy texts of the two back-ends agree with ties settled alike, and part without."""
    settled, free = ([text[kind] for text in texts] for kind in ("settled", "free"))
    steps, equal = (sum(text[key] for text in settled) for key in ("n_tokens", "n_equal"))
    chosen = f"all {steps}" if equal == steps else f"{equal} of {steps}"
    gaps = [text["gap"] for text in settled if text["gap"] is not None]
    others = f" (two tokens are at most {_power(max(gaps))} nats apart at the rest)" if gaps else ""
    apart = _power(max(text["log_probability"] for text in settled))
    gaps = [abs(text["gap"]) for text in free if text["gap"] is not None]
    parted = "none parts"
    if gaps:
        parted = (
            f"{len(gaps)} of them part, where two tokens are at most {max(gaps):.3f} nats apart"
        )
    return (
        f"with ties settled alike, both choose the same token at {chosen} steps of {len(texts)} "
        f"greedy texts{others}, log-probabilities differing by at most {apart} nats; where each "
        f"settles its own, {parted}"
    )


def _power(x: float) -> str:
    """One digit and a power of ten, as 5e-7."""
    return f"{x:.0e}".replace("e-0", "e-")


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
            parts.append(
                f"with {row['changed'].replace(':', ',')}, it {verdict} and names {', '.join(row['named'])}"
            )
    return "; ".join(parts)


def _variants(rows: list[dict], measure: str) -> list[str]:
    """Cells of one row a variant: µs and the ratio to fp16."""
    return [
        f"{row[measure]:.1f}"
        + (f" ({row['fp16_over_this']:.2f}×)" if row["variant"] != "fp16" else "")
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
    own = [
        r
        for r in record["rows"]
        if r["job"] == "decode" and "/" in r["variant"] and "rows" not in r["variant"]
    ]
    errors = [r["error"] for r in record["rows"] if "error" in r]
    found = {
        "about": _about(record),
        "scheme": _scheme_said(record, own),
        "copy": f"{record['copy_gb_per_s']:,.0f}",
        "rounds": str(record["rounds"]),
        "lengths": table(["tokens", *names], by_length),
        "build": span(r["build_us"] for r in own),
        "build_fp16": span(r["build_us"] for r in _fp16(record)),
        "error": _power(max(errors)) if errors else "–",
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
    names = [
        name.replace("kv_bits", "kv_bits=") for name in dict.fromkeys(r["variant"] for r in rows)
    ]
    lines = [
        [f"{n:,}", *_variants([r for r in rows if r["tokens"] == n], "us")]
        for n in sorted({r["tokens"] for r in rows})
    ]
    return {
        "about": _about(record),
        "lengths": table(["tokens", *names], lines),
        "command": f"`{record['command']}`",
    }


def _about(record: dict) -> str:
    return f"{record['device']}, mlx {record['mlx']}, {record['date']}, commit {record['commit']}"


def _fp16(record: dict) -> list[dict]:
    return [r for r in record["rows"] if r["job"] == "decode" and r["variant"] == "fp16"]


def _scheme_said(record: dict, own: list[dict]) -> str:
    """How a run's chains were handed over, and what that took of the CPU."""
    own_us, fp16_us = (span(r["handed_over_us"] for r in rows) for rows in (own, _fp16(record)))
    return (
        f"a chain was handed over in steps of {record['calls_a_step']} calls, each while the one before "
        f"ran; handing over takes {own_us} µs a call of the CPU ({record['processor']}; fp16: {fp16_us}), "
        "hidden as far as the GPU is busy meanwhile"
    )


def _centred(rows: list[dict]) -> str:
    """What anchors cost: each centred variant beside the same pair without them."""
    return with_anchors(
        rows, lambda pair, us, plain: f"{pair} centred {us:.1f} µs against {plain:.1f}"
    )


def with_anchors(rows: list[dict], said: Callable[[str, float, float], str]) -> str:
    """What is said of each centred variant: its pair, its time and that without anchors, in µs."""
    us = {r["variant"]: r["us"] for r in rows}
    pairs = [name.removesuffix(" centred") for name in us if name.endswith(" centred")]
    if not pairs:
        return "not measured in this run"
    found = ", ".join(said(pair, us[f"{pair} centred"], us[pair]) for pair in pairs)
    return f"{found} at {rows[0]['tokens']:,} tokens"


def _parts(record: dict) -> list[str]:
    return list(dict.fromkeys(r["part"] for r in record["rows"]))


def span(values, digits: int = 0) -> str:
    """The least and the most of some numbers."""
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
        [
            step["change"],
            step["expected"],
            *(cell(step, pair) for pair in pairs),
            step.get("note", ""),
        ]
        for step in record["steps"]
    ]
    counters = {name: f"{value:g}" for name, value in record["counters"].items()}
    later = [
        [
            trial["change"], trial["expected"],
            "; ".join(f"{what}: {_plain(before)} → {_plain(after)}" for what, before, after in trial["measured"]),
            "; ".join([*([] if trial["kept"] else ["dropped"]), *filter(None, [trial.get("note")])]),
        ]
        for trial in record["later"]["trials"]
    ]  # fmt: skip
    return {
        "about": f"{record['what']}. {record['device']}, mlx {record['mlx']}. {record['note']}",
        "steps": table(["change", "expected", *pairs, ""], steps),
        "later_about": record["later"]["note"],
        "later": table(["change", "expected", "before → after", ""], later),
        **counters,
    }


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"
