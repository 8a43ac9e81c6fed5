"""What the profiler prints is read as it is meant."""

from __future__ import annotations

import ncu
import pytest

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


def test_launches_and_counters_are_by_kernel(printed) -> None:
    assert ncu.launched("f16", 8) == {"pack": 2, "mlx::copy_gg_nd": 1}
    (row,) = ncu.counted("q8_0/turbo2", 32)
    wanted = {"kernel": "pack", "pair": "q8_0/turbo2", "warp_instructions": 1234, "registers": 64}
    assert row == wanted
