"""``mlx_turbokv doctor``: check every kernel on this machine and time it."""

from __future__ import annotations

import re
from itertools import product

import click

from ..errors import InputError
from ..files import CACHE_VARIABLE, cache_dir
from ..quant.formats import as_format
from ..quant.layout import KVLayout
from . import options
from .command import Command
from .entry import console_script
from .output import check_writable, print_status, write_json
from .runs import print_record
from .values import Number, exclude, refuse

FAILED_STATUS = 1
SHAPES, PAIRS = ("32,8,128",), ("q8_0/turbo2", "turbo4/turbo3")


@click.command("doctor", cls=Command)
@click.option("--quick", is_flag=True, help="Two pairs of formats at head_dim 64 and 128.")
@click.option("--full", is_flag=True, help="Every pair of formats, every format at every head_dim.")
@click.option(
    "--tune", is_flag=True,
    help="In place of the checks: time other tunings of decode on this machine, and remember the "
    "fastest that pass their self-check.",
)  # fmt: skip
@click.option(
    "--shape", "shapes", multiple=True, metavar="HEADS,KV_HEADS,HEAD_DIM",
    help="Of --tune; repeatable.  [default: 32,8,128]",
)  # fmt: skip
@click.option(
    "--pair", "pairs", multiple=True, metavar="K/V",
    help=f"Formats of --tune; repeatable.  [default: {', '.join(PAIRS)}]",
)  # fmt: skip
@click.option(
    "--time-limit", default=300.0, type=Number(1), metavar="SECONDS",
    help="Of --tune, about.  [default: 300]",
)  # fmt: skip
@options.backend
@click.option("--no-times", is_flag=True, help="Check the kernels, do not time them.")
@click.option("--json", "json_file", metavar="FILE", help="Write the whole record there too.")
def command(
    quick: bool, full: bool, tune: bool, shapes: tuple[str, ...], pairs: tuple[str, ...],
    time_limit: float, backend: str, no_times: bool, json_file: str | None,
) -> int:  # fmt: skip
    """Compile every kernel variant, compare it with the reference and time it.

    Prints one Markdown report, made to be pasted into an issue. The exit status is 0 if all
    agrees, and 1 if a kernel or its source does not; the report names it.
    """
    from ..loading import blas

    exclude("quick", "full")
    if tune:
        refuse(["quick", "full", "no_times"], "with --tune")
    else:
        refuse(["shapes", "pairs", "time_limit"], "without --tune")
    blas.require_mlx()
    from .. import doctor
    from ..doctor.report import as_markdown

    check_writable(json_file)
    options.check_backend(backend)
    if tune:
        return _tune(shapes, pairs, time_limit, backend, json_file)
    size = "quick" if quick else "full" if full else "default"
    record = print_record(
        lambda: doctor.examine(size, backend, times=not no_times, progress=print_status),
        as_markdown,
    )
    if json_file is not None:
        write_json(json_file, record)
    return 0 if record["passed"] else FAILED_STATUS


def _tune(
    shapes: tuple[str, ...], pairs: tuple[str, ...], seconds: float, backend: str,
    json_file: str | None,
) -> int:  # fmt: skip
    from ..doctor.tune import as_markdown, tune
    from ..kernels.backend import select_backend
    from ..kernels.trust import UntrustedKernelError

    chosen = product(pairs or PAIRS, shapes or SHAPES)
    wanted = [layout_and_heads(shape, pair) for pair, shape in chosen]
    name = select_backend(backend).name
    if name == "reference":
        raise InputError(
            "--tune has nothing to tune on the reference back-end: accepted are metal and cuda."
        )
    try:
        record = print_record(lambda: tune(wanted, name, seconds, print_status), as_markdown)
    except UntrustedKernelError as error:
        raise InputError(f"--tune cannot begin: {error} Run doctor without --tune.") from error
    except OSError as error:
        raise InputError(
            f"The tuning cannot be kept in {cache_dir()} ({error.strerror or error}): "
            f"name another folder in {CACHE_VARIABLE}."
        ) from error
    if json_file is not None:
        write_json(json_file, record)
    return 0


def layout_and_heads(shape: str, pair: str) -> tuple[KVLayout, tuple[int, int]]:
    """What --shape and --pair name.

    Raises: InputError.
    """
    found = re.fullmatch(r"(\d{1,4}),(\d{1,4}),(\d{1,4})", shape.replace(" ", ""))
    n_heads, n_kv_heads, head_dim = (int(n) for n in found.groups()) if found else (0, 0, 0)
    if not (n_heads and n_kv_heads and head_dim) or n_heads % n_kv_heads:
        raise InputError(
            f"--shape {shape!r}: accepted is HEADS,KV_HEADS,HEAD_DIM, such as 32,8,128, with HEADS "
            "a multiple of KV_HEADS."
        )
    k, slash, v = pair.partition("/")
    if not slash:
        raise InputError(f"--pair {pair!r}: accepted is K/V, such as q8_0/turbo2.")
    return KVLayout(as_format(k), as_format(v), head_dim, head_dim), (n_heads, n_kv_heads)


main = console_script(command)
