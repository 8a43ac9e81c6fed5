"""What the profiler prints is read as it is meant."""

from __future__ import annotations

from collections import Counter

import ncu
import pytest

from mlx_turbokv.kernels import assemble

PACK = "mlx::core::cu::custom_kernel_turbokv_pack_float16_8(const __half *, unsigned int *)"
OUTPUT = f"""==PROF== Connected to process 7
a line of the script
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","{PACK}","smsp__inst_executed.sum","inst","1,234"
"0","{PACK}","launch__registers_per_thread","register/thread","64"
"1","void mlx::copy_gg_nd<int, float>(a)","smsp__inst_executed.sum","inst","5"
==PROF== Disconnected
"""


def test_rows_stand_among_other_lines() -> None:
    rows = ncu.parsed(OUTPUT)
    assert [row["Metric Value"] for row in rows] == ["1,234", "64", "5"]
    assert [ncu.short_name(row["Kernel Name"]) for row in rows] == [
        "pack",
        "pack",
        "mlx::copy_gg_nd",
    ]
    assert ncu.parsed("ncu: command failed\n") == []


@pytest.fixture
def printed(monkeypatch):
    """What ncu prints, in place of running it."""
    rows = ncu.parsed(OUTPUT)
    monkeypatch.setattr(ncu, "profiled", lambda *_, only=None: rows[:2] if only else rows)


def test_a_step_of_protected_rows_launches_no_more(metal_host, monkeypatch) -> None:
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    monkeypatch.setattr(ncu, "HEADS", (2, 1))
    monkeypatch.setattr(ncu, "STEP_TOKENS", 1300)
    names = []
    for name in (ncu.PAIRS[1], f"{ncu.PAIRS[1]} protected"):
        counts = []
        for steps in (1, 3):
            metal_host.launches.clear()
            ncu.decode_steps(name, steps)
            counts.append(Counter(ncu.short_name(launch.name) for launch in metal_host.launches))
        names.append(counts[1] - counts[0])
        for built in ("dequantize", "read_segments"):
            del names[-1][built]  # which the CPU runs, and is never evaluated
    decodes = "decode_partial", "decode_protected"
    assert names == [{"pack": 2, decode: 2, "decode_merge": 2} for decode in decodes]


def test_launches_and_counters_are_by_kernel(printed) -> None:
    assert ncu.launched("f16", 8) == {"pack": 2, "mlx::copy_gg_nd": 1}
    (row,) = ncu.counted("q8_0/turbo2", 32)
    wanted = {"kernel": "pack", "pair": "q8_0/turbo2", "warp_instructions": 1234, "registers": 64}
    assert row == wanted
