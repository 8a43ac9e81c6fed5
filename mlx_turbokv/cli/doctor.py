"""``mlx_turbokv doctor``: check every kernel on this machine and time it."""

from __future__ import annotations

import click

from . import options
from .command import Command
from .entry import console_script
from .output import check_writable, print_status, write_json
from .runs import print_record
from .values import exclude

FAILED_STATUS = 1


@click.command("doctor", cls=Command)
@click.option("--quick", is_flag=True, help="Two pairs of formats at head_dim 64 and 128.")
@click.option("--full", is_flag=True, help="Every pair of formats, every format at every head_dim.")
@options.backend
@click.option("--no-times", is_flag=True, help="Check the kernels, do not time them.")
@click.option("--json", "json_file", metavar="FILE", help="Write the whole record there too.")
def command(quick: bool, full: bool, backend: str, no_times: bool, json_file: str | None) -> int:
    """Compile every kernel variant, compare it with the reference and time it.

    Prints one Markdown report, made to be pasted into an issue. The exit status is 0 if all
    agrees, and 1 if a kernel or its source does not; the report names it.
    """
    from ..loading import blas

    exclude("quick", "full")
    blas.require_mlx()
    from .. import doctor
    from ..doctor.report import as_markdown

    check_writable(json_file)
    options.check_backend(backend)
    size = "quick" if quick else "full" if full else "default"
    record = print_record(
        lambda: doctor.examine(size, backend, times=not no_times, progress=print_status),
        as_markdown,
    )
    if json_file is not None:
        write_json(json_file, record)
    return 0 if record["passed"] else FAILED_STATUS


main = console_script(command)
