"""Commands that take the options of one of mlx-lm's, with its names, defaults and help."""

from __future__ import annotations

import importlib
from typing import Any

import click

from ..loading import blas
from . import sampling
from .command import Command
from .values import COUNT, MOST_TOKENS

KEPT_TOKENS = 4  # by a cache with --max-kv-size, before those that it drops
# The values that an option takes; None: any.
TYPES: dict[str, Any] = {
    "prompt": None, "system_prompt": None, "prefill_response": None, "ignore_chat_template": None,
    "chat_template_config": None, "extra_eos_token": None, "eos_token": None, "max_tokens": int,
    "verbose": bool, "max_kv_size": click.IntRange(KEPT_TOKENS + 1, MOST_TOKENS),
    "prefill_step_size": COUNT, "num_draft_tokens": COUNT, **sampling.TYPES,
}  # fmt: skip
_MORE_HELP = {
    "extra_eos_token": "; repeatable.",
    "max_tokens": "; -1: no limit.",
    "max_kv_size": ": beyond it the oldest tokens are dropped, except the first 4.",
}


class MlxLmCommand(Command):
    """Adds the options of a command of mlx-lm.

    Args:
        mlx_lm: the module of mlx_lm whose ``setup_arg_parser`` has them. Those in TYPES are added,
            but for those that the command has itself.
    """

    def __init__(self, *args: Any, mlx_lm: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mlx_lm = mlx_lm

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        blas.require_mlx()
        parser = importlib.import_module(f"mlx_lm.{self.mlx_lm}").setup_arg_parser()
        present = {param.name for param in self.params}
        for action in parser._actions:
            if action.dest not in TYPES or action.dest in present:
                continue
            help = action.help or ""
            more = _MORE_HELP.get(action.dest)
            option = click.Option(
                list(action.option_strings),
                is_flag=action.nargs == 0,
                multiple=action.nargs == "+",
                type=TYPES[action.dest],
                **({"required": True} if action.required else {"default": action.default}),
                show_default="default" not in help and action.nargs is None,
                help=help.rstrip(".") + more if more else help,
            )
            self.params.append(option)
        return super().get_params(ctx)
