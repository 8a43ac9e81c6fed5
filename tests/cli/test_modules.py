"""The commands run as modules, bare and for a shell's completion."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mlx_turbokv import __version__
from mlx_turbokv.cli import COMMANDS

MODULE = [sys.executable, "-m", "mlx_turbokv"]


def _run(*words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*words], capture_output=True, text=True, env={**os.environ, **environ}, check=False
    )


def test_the_package_runs_as_a_module() -> None:
    run = _run(*MODULE, "--version")
    assert run.stdout == f"mlx_turbokv, version {__version__}\n"
    run = _run(*MODULE, "plan", "--nonsense")
    assert run.returncode == 2 and "mlx_turbokv plan --help" in run.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_runs_as_a_module_of_its_own(name) -> None:
    """The form of mlx-lm's documentation."""
    run = _run(sys.executable, "-m", f"mlx_turbokv.{name}", "--version")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == f"mlx_turbokv.{name}, version {__version__}\n"


def test_alone_it_prints_its_help() -> None:
    bare, help = _run(*MODULE), _run(*MODULE, "-h")
    assert bare.returncode == 0 and bare.stderr == ""
    assert bare.stdout == help.stdout and all(name in bare.stdout for name in COMMANDS)


def test_shells_complete_commands_options_and_formats() -> None:
    def completed(*words: str) -> list[str]:
        run = _run(
            *MODULE, _MLX_TURBOKV_COMPLETE="bash_complete", COMP_WORDS=" ".join(words),
            COMP_CWORD=str(len(words) - 1),
        )  # fmt: skip
        return [line.partition(",")[2] for line in run.stdout.splitlines()]

    assert completed("mlx_turbokv", "pl") == ["plan"]
    assert completed("mlx_turbokv", "plan", "-ctk", "q") == ["q8_0"]
    assert completed("mlx_turbokv", "doctor", "--backend", "m") == ["metal"]
    assert "--boundary" in completed("mlx_turbokv", "plan", "--bo")
    for shell in ("bash", "zsh", "fish"):
        script = _run(*MODULE, _MLX_TURBOKV_COMPLETE=f"{shell}_source").stdout
        assert f"{shell}_complete" in script and "mlx_turbokv" in script
