"""The options of serve that are mlx_lm.server's: their parser, and what they may be."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from mlx_lm import server

from ..errors import InputError, short
from ..loading.patching import patched
from .requests import TEMPLATE_ARGUMENTS
from .schema import MOST_DRAFT_TOKENS, MOST_TOKENS

NO_LIMIT = 1 << 63
# Options that mlx_lm.server does not have.
DEFAULTS: dict[str, Any] = {
    "prompt_cache_dir": None, "prompt_cache_disk": 20_000_000_000, "ctx_checkpoints": 8,
    "checkpoint_every_n_tokens": 2048, "memory_limit": None,
}  # fmt: skip
# What mlx_lm.server's numbers may be: no default is outside of what a request may ask for.
_RANGES = {
    "port": (0, 65535), "temp": (0, 1000), "top_p": (0, 1), "min_p": (0, 1), "top_k": (0, NO_LIMIT),
    "max_tokens": (1, MOST_TOKENS), "num_draft_tokens": (1, MOST_DRAFT_TOKENS),
    "decode_concurrency": (1, 4096), "prompt_concurrency": (1, 4096),
    "prefill_step_size": (1, MOST_TOKENS), "prompt_cache_size": (0, NO_LIMIT),
    "prompt_cache_bytes": (0, NO_LIMIT),
}  # fmt: skip
_MORE = {
    "prompt_cache_bytes": "a number of bytes such as 2GB",
    "chat_template_args": 'a JSON object such as {"enable_thinking": false}',
}
# Options of mlx-lm's own quantised cache: neither accepted nor listed.
_OF_OTHER_CACHES = ("kv_bits", "kv_group_size", "quantized_kv_start")


class _ParserReadyError(Exception):
    """Ends mlx_lm.server's main function when its parser is complete."""


class _RefusedError(Exception):
    """A value that is not accepted; argparse has its own words for a ValueError."""


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
        if action.dest in _RANGES or action.dest == "chat_template_args":
            action.type = _checked(action)
    return parser


def _checked(action: argparse.Action) -> Callable[[str], Any]:
    """The type of an option, which says what it takes where a value is not accepted."""
    option, convert = action.option_strings[0], cast(Any, action.type)
    least, most = _RANGES.get(action.dest, (0, 0))
    accepted = _MORE.get(action.dest)
    if accepted is None:
        kind = "a whole number" if convert is int else "a number"
        accepted = (
            f"{kind} from {least} to {most}" if most < NO_LIMIT else f"{kind}, {least} or more"
        )

    def checked(text: str) -> Any:
        try:
            value = convert(text)
            is_good = isinstance(value, dict) if most == 0 else least <= value <= most
        except (TypeError, ValueError, ArithmeticError, KeyError, RecursionError):
            is_good = False
        if not is_good:
            raise _RefusedError(f"{option} {short(text)} is not accepted: give {accepted}.")
        return value

    return checked


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the options of mlx_lm.server; the others are at their defaults.

    Raises:
        InputError: an unknown option or a value that is not accepted.
    """
    parser = server_parser()
    try:
        options = parser.parse_args(list(arguments))
    except _RefusedError as error:
        raise InputError(str(error)) from error
    words = [word.split("=")[0] for word in arguments]
    for name in _OF_OTHER_CACHES:
        option, value = f"--{name.replace('_', '-')}", getattr(options, name)
        if option in words or value != parser.get_default(name):
            raise InputError(
                f"{option} {value} is of mlx-lm's own quantised cache; the packed cache's formats "
                "are given with -ctk and -ctv."
            )
    for name in options.chat_template_args:
        if name in TEMPLATE_ARGUMENTS:
            raise InputError(
                f"--chat-template-args {short(name)} is not accepted: give variables of the chat "
                "template, such as enable_thinking."
            )
    if options.draft_model is None and "--num-draft-tokens" in words:
        raise InputError("--num-draft-tokens has no effect without --draft-model.")
    if options.chat_template and options.use_default_chat_template:
        raise InputError(
            "--chat-template and --use-default-chat-template cannot be given together."
        )
    vars(options).update(DEFAULTS)
    return options
