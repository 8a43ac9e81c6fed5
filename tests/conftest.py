"""Fixtures that several test files share."""

from __future__ import annotations

from collections.abc import Iterator

import mlx_turbokv  # noqa: F401, I001: before mlx.core, so that OpenBLAS is used
import pytest
from metal_host import HostMetal
from metal_host.coverage import session_folder


@pytest.fixture(scope="session")
def metal_host() -> Iterator[HostMetal]:
    """Runs Metal kernels on the CPU, and counts the lines of metal/ that run."""
    host = HostMetal(coverage=session_folder())
    yield host
    host.close()
