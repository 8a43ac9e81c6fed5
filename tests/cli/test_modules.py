"""The package run as a module."""

from __future__ import annotations

import subprocess
import sys

from mlx_turbokv import __version__

MODULE = [sys.executable, "-m", "mlx_turbokv"]


def test_the_package_runs_as_a_module() -> None:
    run = subprocess.run([*MODULE, "--version"], capture_output=True, text=True, check=True)
    assert run.stdout == f"mlx_turbokv, version {__version__}\n"
    run = subprocess.run([*MODULE, "plan", "--nonsense"], capture_output=True, text=True)
    assert run.returncode == 2 and "mlx_turbokv plan --help" in run.stderr
