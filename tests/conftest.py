"""Fixtures that several test files share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import mlx_turbokv  # noqa: F401, I001: before mlx.core, so that OpenBLAS is used
import pytest
from hypothesis import settings
from metal_host import HostMetal
from metal_host.coverage import collect, report, session_folder


# A slow machine is no failure.
settings.register_profile("mlx_turbokv", deadline=None)
settings.load_profile("mlx_turbokv")


@pytest.fixture(scope="session")
def metal_host() -> Iterator[HostMetal]:
    """Runs Metal kernels on the CPU, and counts the lines of metal/ that run."""
    host = HostMetal(coverage=session_folder())
    yield host
    host.close()


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints which lines of metal/ ran on the CPU, if any did."""
    if session_folder.cache_info().currsize == 0:
        return
    coverage = collect(session_folder())
    if any(c.ran for c in coverage.values()):
        terminalreporter.section("lines of metal/ that ran on the CPU")
        terminalreporter.write_line(report(coverage))
    if "METAL_HOST_COVERAGE" not in os.environ:
        shutil.rmtree(session_folder())
