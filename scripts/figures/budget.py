"""What the kernels need for a token, and what GPUs give in the time that its bytes take."""

from __future__ import annotations

from math import log2

from mlx_turbokv.kernels.chips import CHIPS, LANES_A_CORE, Chip
from mlx_turbokv.quant.formats import KVFormat

from . import figure, read, table
from .kernels import span

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
        if row["part"] == "lengths"
        and row["tokens"] == record["tokens"]
        and row["variant"] in decode
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
        "doctor_us": span([DOCTOR_ROWS * n["bytes"] / max(c.bandwidths) / 1e3 for c in large for n in decode.values()], 0),
        "m1_packs": span(
            M1_GHZ * 1e6 * CHIPS["Apple M1"].cores * LANES_A_CORE
            / ((n["lanes"] + n["halves"]) * LAYERS * KV_HEADS)
            for n in needs if n["kernel"] == "pack"
        ),
        "share": ", ".join(f"{pair} {part:.0%}" for pair, part in share.items()),
        "command": f"`{record['command']}`",
    }  # fmt: skip
