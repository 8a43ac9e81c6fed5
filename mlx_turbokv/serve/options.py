"""The options of serve that are mlx_lm.server's: their parser, and what they may be."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from typing import Any, NoReturn

from mlx_lm import server

from ..errors import InputError
from ..loading.patching import patched

NO_LIMIT = 1 << 63
MOST_TOKENS = 1 << 24
# Options that mlx_lm.server does not have.
DEFAULTS: dict[str, Any] = {
    "prompt_cache_dir": None, "prompt_cache_disk": 20_000_000_000, "ctx_checkpoints": 8,
    "checkpoint_every_n_tokens": 2048, "memory_limit": None,
}  # fmt: skip
# What mlx_lm.server's numbers may be.
_RANGES = {
    "port": (0, 65535), "temp": (0, 1000), "top_p": (0, 1), "min_p": (0, 1), "top_k": (0, NO_LIMIT),
    "max_tokens": (1, NO_LIMIT), "num_draft_tokens": (1, MOST_TOKENS),
    "decode_concurrency": (1, 4096), "prompt_concurrency": (1, 4096),
    "prefill_step_size": (1, MOST_TOKENS), "prompt_cache_size": (0, NO_LIMIT),
    "prompt_cache_bytes": (0, NO_LIMIT),
}  # fmt: skip


# Options of mlx-lm's own quantised cache: neither accepted nor listed.
_OF_OTHER_CACHES = ("kv_bits", "kv_group_size", "quantized_kv_start")


class _ParserReadyError(Exception):
    """Ends mlx_lm.server's main function when its parser is complete."""


def server_parser() -> argparse.ArgumentParser:
    """The parser of mlx_lm.server's own options; its errors are InputErrors."""
    found: list[Any] = []

    def parse_args(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        found.append(parser)
        raise _ParserReadyError

    def error(message: str) -> NoReturn:
        raise InputError(f"{message[:1].upper()}{message[1:]}; see mlx_turbokv serve --help.")

    with patched(argparse.ArgumentParser, parse_args=parse_args):
        with contextlib.suppress(_ParserReadyError):
            server.main()
    parser = found[0]
    parser.error = error
    for action in parser._actions:
        if action.dest in _OF_OTHER_CACHES:
            action.help = argparse.SUPPRESS
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of mlx_lm.server; the others are at their defaults.

    Raises:
        InputError: an unknown option or a value that is not accepted.
    """
    parser = server_parser()
    try:
        options = parser.parse_args(list(arguments))
    except (ArithmeticError, KeyError, RecursionError) as error:
        # what the types of mlx_lm.server's options raise beside what argparse expects
        raise InputError(
            "--prompt-cache-bytes takes a number of bytes, or one with M, MB, G or GB, and "
            f"--chat-template-args a JSON object ({type(error).__name__})."
        ) from error
    words = [word.split("=")[0] for word in arguments]
    for name in _OF_OTHER_CACHES:
        option, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if option in words or value != parser.get_default(name):
            raise InputError(
                f"{option} {value} is of mlx-lm's own quantised cache; the packed cache's formats "
                "are given with -ctk and -ctv."
            )
    for name, (least, most) in _RANGES.items():
        value = getattr(options, name)
        if value is not None and not least <= value <= most:
            limits = f"{least} to {most}" if most < NO_LIMIT else f"{least} or more"
            raise InputError(f"--{name.replace('_', '-')} {value} is not accepted: give {limits}.")
    if not isinstance(options.chat_template_args, dict):
        raise InputError("--chat-template-args is not a JSON object.")
    if options.draft_model is None and "--num-draft-tokens" in words:
        raise InputError("--num-draft-tokens has no effect without --draft-model.")
    if options.chat_template and options.use_default_chat_template:
        raise InputError(
            "--chat-template and --use-default-chat-template cannot be given together."
        )
    vars(options).update(DEFAULTS)
    return options
