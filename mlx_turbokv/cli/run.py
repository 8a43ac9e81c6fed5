"""``mlx_turbokv run``: a command of mlx-lm's or mlx-vlm's, with packed caches."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import click

from ..errors import InputError
from . import options
from .command import Command, instead_of_kv_bits
from .entry import console_script
from .output import print_status
from .runs import asked_of_file
from .values import check_max_kv_size

COMMANDS = (
    "benchmark", "cache_prompt", "chat", "evaluate", "generate", "lora", "perplexity", "server",
)  # fmt: skip
WITHOUT_CACHES = (
    "awq", "convert", "dwq", "dynamic_quant", "fuse", "gptq", "manage", "share", "upload",
)  # fmt: skip
VLM_COMMANDS = ("chat", "generate", "server")
_NO_EFFECT = (
    "kv_group_size", "quantized_kv_start", "kv_key_bits", "kv_value_bits", "kv_key_scheme",
    "kv_value_scheme", "kv_quant_scheme",
)  # fmt: skip
_WORDS = "mlx_turbokv.words"
_PYTHON = ("python", "python3")


class _Command(Command):
    """Keeps the words that it is given."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta[_WORDS] = list(args)
        return super().parse_args(ctx, args)


@click.command(
    "run", cls=_Command, epilog=options.CACHE_HELP,
    context_settings={"allow_interspersed_args": False},
)  # fmt: skip
@options.cache
@click.argument("words", nargs=-1, type=click.UNPROCESSED, metavar="-- mlx_lm.COMMAND [OPTIONS]")
@click.pass_context
def command(ctx: click.Context, words: tuple[str, ...], **args: Any) -> None:
    """Run a command of mlx-lm's with packed KV caches attached to each model that it loads.

    mlx_turbokv run -ctk turbo4 -ctv turbo4 -- mlx_lm.chat --model ID

    COMMAND is generate, chat, evaluate, benchmark, perplexity, cache_prompt, server or lora, whose
    evaluations read packed caches too. --model takes .gguf files as well. --max-kv-size goes to the
    packed caches. Vision models: -- mlx_vlm.generate, chat or server, where mlx-vlm is installed.
    """
    from ..loading import blas

    package, name, rest = command_of(words)
    if (package, name) == ("mlx_lm", "server"):  # which needs more than attached caches
        from .serve import command as serve

        given = ctx.meta[_WORDS][: len(ctx.meta[_WORDS]) - len(words)]
        serve.main([*(word for word in given if word != "--"), *rest], standalone_mode=False)
        return
    blas.require_mlx()
    if package == "mlx_vlm":
        from ..loading.attached_vlm import AttachingVLM as Attaching
    else:
        from ..loading.attached import Attaching

    attaching = Attaching(print_status, _check, **options.attach_options(args))
    # mlx-lm's commands take a file's windows as they are
    attaching.asked = replace(asked_of_file(args), windows=False)
    attaching.run(name, rest)
    if not attaching.has_packed:
        print_status(f"{package}.{name} made no KV cache.")


main = console_script(command)


def command_of(words: tuple[str, ...]) -> tuple[str, str, list[str]]:
    """The package, the command's name in it, and its arguments.

    Args:
        words: ``mlx_lm.NAME …``, ``mlx_lm NAME …``, or either after ``python -m``; or of mlx_vlm.

    Raises: InputError for anything else, or a command that makes no cache.
    """
    rest = list(words)
    if len(rest) > 1 and os.path.basename(rest[0]) in _PYTHON and rest[1] == "-m":
        rest = rest[2:]
    package = os.path.basename(rest[0]).split(".")[0] if rest else ""
    if rest and os.path.basename(rest[0]) == package and len(rest) > 1:
        rest = [f"{package}.{rest[1]}", *rest[2:]]
    first = os.path.basename(rest[0]) if rest else ""
    name = first.removeprefix(f"{package}.")
    if package == "mlx_lm" and name in WITHOUT_CACHES:
        raise InputError(f"mlx_lm.{name} makes no KV cache: run it by itself.")
    accepted = {"mlx_lm": COMMANDS, "mlx_vlm": VLM_COMMANDS}.get(package, ())
    if first == name or name not in accepted:
        said = f"{first!r} is not accepted" if first else "There is no command"
        of, accepted = ("mlx-vlm", VLM_COMMANDS) if package == "mlx_vlm" else ("mlx-lm", COMMANDS)
        raise InputError(
            f"{said}: give one of {of}'s after --, {', '.join(accepted[:-1])} or {accepted[-1]}, "
            f"as in -- {of.replace('-', '_')}.chat --model ID."
        )
    return package, name, rest[1:]


def _check(attaching: Any, given: Any, parser: Any) -> None:
    """Refuse or pass on what a command does of its own with caches."""
    if (bits := getattr(given, "kv_bits", None)) is not None:
        raise InputError(instead_of_kv_bits(str(bits), " to mlx_turbokv run, before the --"))
    for task in getattr(given, "tasks", None) or ():
        if os.path.basename(task) != task:
            raise InputError(
                f"--tasks {task} is not accepted: mlx_lm.evaluate names its result by it. Run it "
                f"in that folder, with --tasks {os.path.basename(task)}."
            )
    if attaching.package == "mlx_vlm" and getattr(given, "draft_model", None) is not None:
        raise InputError(
            "--draft-model is not accepted: mlx-vlm's speculative decoding needs caches of its own."
        )
    for name in _NO_EFFECT:
        if getattr(given, name, None) != parser.get_default(name):
            option = f"--{name.replace('_', '-')}"
            raise InputError(f"{option} has no effect on packed caches: omit it.")
    if (n := getattr(given, "max_kv_size", None)) is not None:
        check_max_kv_size(n)
        attaching.cache_options["max_kv_size"] = n
        attaching.asked = replace(attaching.asked, windows=True)
        print_status(f"--max-kv-size {n} goes to the packed caches, which keep the first 4 tokens.")
