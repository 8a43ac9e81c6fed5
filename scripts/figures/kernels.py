"""Figures of the kernels: how they were checked on a GPU."""

from __future__ import annotations

from . import figure, read


@figure
def gpu() -> dict[str, str]:
    """What ran on an NVIDIA GPU, against float64 and against the reference back-end."""
    record = read("gpu_check")
    pairs = record["model"]["pairs"]
    alike = max(p["largest_difference"] for p in pairs)
    return {
        "cases": str(len(record["kernels"])),
        "windows": str(len(pairs[0]["nll_by_window"]["first"])),
        "alike": f"{alike:.0e}".replace("e-0", "e-"),
        "own": f"{max(p['largest_difference_free'] for p in pairs):.3f}",
    }
