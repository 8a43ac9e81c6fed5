"""``mlx_turbokv serve``: mlx_lm.server with packed caches."""

from __future__ import annotations

from typing import Any

import click

from . import options
from .command import Command
from .entry import console_script


class _Command(Command):
    """Adds mlx_lm.server's options to the help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..serve.options import server_parser

        super().format_options(ctx, formatter)
        rows = []
        for action in server_parser()._actions:
            if action.option_strings and action.dest != "help":
                value = "" if action.nargs == 0 else f" {action.dest.upper()}"
                rows.append((", ".join(action.option_strings) + value, action.help or ""))
        with formatter.section("Options of mlx_lm.server"):
            formatter.write_dl(rows)


@click.command(
    "serve", cls=_Command, epilog=options.CACHE_HELP,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)  # fmt: skip
@options.cache
@click.pass_context
def command(
    ctx: click.Context, backend: str, compress_sliding: bool, keys: str | None, no_centre: bool,
    **cache: Any,
) -> None:  # fmt: skip
    """Serve a model over HTTP, as mlx_lm.server does, through packed KV caches.

    Every option of mlx_lm.server is accepted, except --kv-bits, which asks for another cache.
    Its limits on prompt caches count packed bytes.
    """
    from ..loading import blas

    blas.require_mlx()
    from ..serve import options as server_options
    from ..serve import server

    policy = options.policy_from(**cache)
    centre = options.centre_from(keys, no_centre, [policy])
    options.check_backend(backend)
    server.serve(
        server_options.parse(ctx.args),
        policy,
        backend=backend,
        centre=centre,
        compress_sliding=compress_sliding,
    )


main = console_script(command)
