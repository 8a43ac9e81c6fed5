"""Options of sampling: their ranges, and what they may be given with."""

from __future__ import annotations

from typing import Any

import click

from ..errors import InputError
from .output import print_status
from .values import COUNT, SEED, UNIT, Number, Temperature, given, refuse

TYPES: dict[str, Any] = {
    "temp": Temperature(0), "top_p": UNIT, "min_p": UNIT, "top_k": click.IntRange(0),
    "xtc_probability": UNIT, "xtc_threshold": Number(0, 0.5), "min_tokens_to_keep": COUNT,
    "seed": SEED,
}  # fmt: skip
# The values at which they take nothing away.
OFF = {"top_p": (0, 1), "min_p": (0,), "top_k": (0,), "xtc_probability": (0,)}
_NEED = {"xtc_threshold": "xtc_probability", "min_tokens_to_keep": "min_p"}


def check(args: dict[str, Any]) -> None:
    """Check options that only do something together with others.

    Args:
        args: those of ``TYPES`` that the command has.

    Raises: InputError.
    """
    for name, needed in _NEED.items():
        if name in args and args[needed] == 0:
            refuse([name], f"without --{needed.replace('_', '-')}")
    names = [name for name, off in OFF.items() if args.get(name, 0) not in off]
    if options := [given(name) for name in names if args["temp"] == 0 and given(name)]:
        # mlx_lm.generate takes them without a word, so scripts may have them
        print_status(f"{', '.join(map(str, options))}: no effect at --temp 0, the default.")


def check_vocabulary(loaded: Any, args: dict[str, Any]) -> None:
    """Check numbers of tokens against a model's vocabulary, without computing anything.

    Args:
        loaded: a ``models.Loaded``.

    Raises: InputError.
    """
    counts = {"--top-k": args["top_k"], "--min-tokens-to-keep": args["min_tokens_to_keep"]}
    if args["temp"] == 0 or max(counts.values()) <= 1:
        return
    import mlx.core as mx

    from ..model.caches import own_caches

    model = loaded.model
    n_tokens = model(mx.zeros((1, 1), mx.int32), cache=own_caches(model)).shape[-1]
    for option, count in counts.items():
        if count >= n_tokens:
            raise InputError(
                f"{option} {count} is not below the vocabulary of {loaded.name}, which has "
                f"{n_tokens} tokens."
            )
