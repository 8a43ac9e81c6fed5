"""``mlx_turbokv serve``: mlx_lm.server with packed caches."""

from __future__ import annotations

from argparse import SUPPRESS
from typing import Any

import click

from ..errors import InputError
from . import options
from .command import Command
from .entry import console_script
from .mlx_lm_options import KEPT_TOKENS
from .values import MOST_TOKENS, SIZE, check_max_kv_size, refuse


class _Command(Command):
    """Adds mlx_lm.server's options to the help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from ..serve.options import server_parser

        super().format_options(ctx, formatter)
        rows = []
        for action in server_parser()._actions:
            if action.option_strings and action.dest != "help" and action.help != SUPPRESS:
                value = "" if action.nargs == 0 else f" {action.dest.upper()}"
                rows.append((", ".join(action.option_strings) + value, action.help or ""))
        with formatter.section("Options of mlx_lm.server"):
            formatter.write_dl(rows)


@click.command(
    "serve", cls=_Command, epilog=options.CACHE_HELP,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)  # fmt: skip
@click.option(
    "--allow-model",
    "allowed",
    multiple=True,
    metavar="ID|FOLDER|GGUF",
    help="A model, draft model or adapters that clients may name too; repeatable. Besides these "
    "they may only name models that are in the local hub cache.",
)
@click.option(
    "--max-kv-size",
    type=click.IntRange(KEPT_TOKENS + 1, MOST_TOKENS),
    help="Tokens that a KV layer holds at most: beyond it the oldest are dropped, except the first "
    f"{KEPT_TOKENS}. Requests are then served one at a time.",
)
@click.option(
    "--prompt-cache-dir",
    metavar="FOLDER",
    help="Keep packed caches of finished requests in this folder, beyond the end of the server. "
    "It holds what users wrote, and is made for its owner alone.",
)
@click.option(
    "--prompt-cache-disk",
    type=SIZE,
    default="20GB",
    show_default=True,
    help="Bytes of the files in --prompt-cache-dir at most; the least recently used go first.",
)
@click.option(
    "--ctx-checkpoints",
    type=click.IntRange(0, 1000),
    default=8,
    show_default=True,
    help="How many copies of recurrent states and sliding windows an entry of the prompt cache "
    "has at most. With them an edited prompt need not be read from its start.",
)
@click.option(
    "--checkpoint-every-n-tokens",
    type=click.IntRange(0, MOST_TOKENS),
    default=2048,
    show_default=True,
    help="Keep such a copy at multiples of as many tokens of a prompt; 0: at its end alone.",
)
@click.option(
    "--memory-limit",
    type=SIZE,
    help="What the server may hold in memory, its model included: a request that cannot fit is "
    "answered with 413.  [default: the GPU's recommended working set, or the machine's memory]",
)
@options.cache
@click.pass_context
def command(
    ctx: click.Context, backend: str, compress_sliding: bool, keys: str | None, no_centre: bool,
    no_calibrate: bool, allowed: tuple[str, ...], max_kv_size: int | None,
    prompt_cache_dir: str | None, prompt_cache_disk: int, ctx_checkpoints: int,
    checkpoint_every_n_tokens: int, memory_limit: int | None, **cache: Any,
) -> None:  # fmt: skip
    """Serve a model over HTTP, as mlx_lm.server does, through packed KV caches.

    Every option of mlx_lm.server is accepted, except --kv-bits and its kind, which ask for another
    cache.
    Its limits on prompt caches count packed bytes.
    """
    from ..loading import blas

    blas.require_mlx()
    from ..loading import distributed
    from ..serve import options as server_options
    from ..serve import server

    check_max_kv_size(max_kv_size)
    if prompt_cache_dir is None:
        refuse(["prompt_cache_disk"], "without --prompt-cache-dir")
    elif not prompt_cache_dir.strip():
        raise InputError(f"--prompt-cache-dir {prompt_cache_dir!r} is not accepted: give a folder.")
    policy = options.policy_from(**cache)
    centre = options.centre_from(keys, no_centre, [policy], no_calibrate)
    options.check_backend(backend)
    arguments = server_options.parse(ctx.args)
    if arguments.pipeline and distributed.n_processes() == 1:
        raise InputError("--pipeline has no effect in one process: start several with mlx.launch.")
    vars(arguments).update(
        prompt_cache_dir=prompt_cache_dir,
        prompt_cache_disk=prompt_cache_disk,
        ctx_checkpoints=ctx_checkpoints,
        checkpoint_every_n_tokens=checkpoint_every_n_tokens,
        memory_limit=memory_limit,
    )
    server.serve(
        arguments,
        policy,
        allowed,
        max_kv_size=max_kv_size,
        backend=backend,
        centre=centre,
        compress_sliding=compress_sliding,
    )


main = console_script(command)
