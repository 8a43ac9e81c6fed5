"""Decode over protected tokens on the CPU, against float64."""

from __future__ import annotations

import pytest
from metal_host.typecheck import check_launches
from segment_cases import CASES, STEPS, SegmentCase, run_segment_case

from mlx_turbokv.kernels import assemble, tuning

pytestmark = pytest.mark.slow


@pytest.fixture
def host(metal_host, monkeypatch):
    """The launchers' Metal kernels run on the CPU."""
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    return metal_host


@pytest.mark.parametrize("case", CASES, ids=str)
def test_protected_case_agrees_with_float64(host, case: SegmentCase) -> None:
    """And the text of each of its launches is sound Metal."""
    n_before = len(host.launches)
    assert run_segment_case(case, "metal")["failures"] == []
    assert [str(problem) for problem in check_launches(host.launches[n_before:])] == []


@pytest.mark.parametrize("case", [*CASES[: -len(STEPS) : 6], *STEPS], ids=str)
def test_protected_case_agrees_as_cut_for_nvidia(host, monkeypatch, case: SegmentCase) -> None:
    monkeypatch.setattr(tuning, "built_in", lambda backend: tuning.CUDA)
    assert run_segment_case(case, "metal")["failures"] == []
