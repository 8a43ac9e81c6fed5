"""The ``mlx_turbokv`` command: a group with one command a file."""

from __future__ import annotations

import importlib
import sys

import click

from .. import __version__
from . import entry
from .command import HELP_NAMES, PipeCommand

COMMANDS = (
    "bench", "cache_prompt", "calibrate", "chat", "convert_cache", "doctor", "generate", "needle",
    "perplexity", "plan", "report", "run", "serve",
)  # fmt: skip


class LazyGroup(PipeCommand, click.Group):
    """A group that imports a command only when it is called, so that --help stays quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f"{__name__}.{cmd_name}").command


@click.group(
    cls=LazyGroup, invoke_without_command=True, context_settings={"help_option_names": HELP_NAMES}
)
@click.version_option(__version__, package_name="mlx_turbokv")
@click.pass_context
def group(ctx: click.Context) -> None:
    """A packed, layer-aware KV cache for mlx-lm models."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


main = entry.console_script(group)


def run_as_module(name: str) -> None:
    """Run a command as ``python -m mlx_turbokv.NAME`` does, under the name of its script."""
    sys.argv[0] = f"mlx_turbokv.{name}"  # what records and messages call it
    entry.run(importlib.import_module(f"{__name__}.{name}").command)
