"""The ``mlx_turbokv`` command: a group with one command a file."""

from __future__ import annotations

import importlib

import click

from .. import __version__
from .entry import console_script

COMMANDS = (
    "bench", "calibrate", "doctor", "generate", "needle", "perplexity", "plan", "report", "serve",
)  # fmt: skip


class LazyGroup(click.Group):
    """A group that imports a command only when it is called, so that --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"{__name__}.{cmd_name}").command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="mlx_turbokv")
def group() -> None:
    """A packed, layer-aware KV cache for mlx-lm models."""


main = console_script(group)
