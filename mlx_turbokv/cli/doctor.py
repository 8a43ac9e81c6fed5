"""``mlx_turbokv doctor``: check every kernel on this machine and time it."""

from __future__ import annotations

import json
from pathlib import Path

import click

from . import options
from .entry import console_script
from .output import print_status

FAILED_STATUS = 1


@click.command("doctor")
@click.option("--quick", is_flag=True, help="Two pairs of formats at head_dim 64 and 128.")
@click.option("--full", is_flag=True, help="Every pair of formats, every format at every head_dim.")
@click.option(
    "--backend", type=click.Choice(options.BACKENDS), default="auto",
    help="Which kernels to check; a named one that is missing is an error.",
)  # fmt: skip
@click.option("--no-times", is_flag=True, help="Check the kernels, do not time them.")
@click.option("--json", "json_file", metavar="FILE", help="Write the whole record there too.")
def command(quick: bool, full: bool, backend: str, no_times: bool, json_file: str | None) -> int:
    """Compile every kernel variant, compare it with the reference and time it.

    Prints one Markdown report, made to be pasted into an issue. The exit status is 0 if all
    agrees, and 1 if a kernel or its source does not; the report names it.
    """
    from ..loading import blas

    blas.require_mlx()
    from ..doctor import examine
    from ..doctor.report import as_markdown

    if quick and full:
        raise click.UsageError("--quick and --full cannot be given together")
    if json_file is not None:
        Path(json_file).touch()  # an error now, not after minutes
    size = "quick" if quick else "full" if full else "default"
    record = examine(size, backend, times=not no_times, progress=print_status)
    click.echo(as_markdown(record))
    if json_file is not None:
        Path(json_file).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0 if record["passed"] else FAILED_STATUS


main = console_script(command)
