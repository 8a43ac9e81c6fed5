"""Several machines: a model split over the processes that ``mlx.launch`` started.

Every process runs the same command. The first prints; all generate the same tokens.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import mlx.core as mx

from ..errors import InputError
from .models import Loaded, check_weights


def n_processes() -> int:
    """How many processes share the work; 1 without ``mlx.launch``."""
    return mx.distributed.init().size()


def is_first() -> bool:
    """Whether this process is the one that speaks."""
    return mx.distributed.init().rank() == 0


def check_options(options: dict[str, Any], refused: dict[str, str]) -> None:
    """Refuse options that do not work over several machines.

    Args:
        refused: the name of each on the command line, by its name in ``options``.

    Raises:
        InputError: one of them is given.
    """
    for key, name in refused.items():
        if options[key] is not None:
            raise InputError(f"{name} cannot be used over several machines.")


def check_source(model: str | None) -> None:
    """Raises: InputError for what mlx-lm cannot split: the default model and .gguf files."""
    if model is None or str(model).endswith(".gguf"):
        raise InputError(
            f"{model or 'The default model'} cannot be split over several machines: give --model "
            "a hub id or a folder as mlx-lm takes it."
        )


def load(model: str | None, pipeline: bool, trust_remote_code: bool = False) -> Loaded:
    """This process's part of a model and its tokenizer.

    Args:
        model: a hub id or folder, as mlx-lm takes it.
        pipeline: layers are divided up, in place of the heads of each layer.

    Raises:
        InputError: no hub id or folder, one that cannot be loaded, or a model that mlx-lm cannot
            split like this.
    """
    from mlx_lm.utils import sharded_load

    check_source(model)
    group = mx.distributed.init()
    try:
        part, tokenizer, config = sharded_load(
            model,
            pipeline_group=group if pipeline else None,
            tensor_group=None if pipeline else group,
            return_config=True,
            tokenizer_config={"trust_remote_code": trust_remote_code},
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{model} cannot be loaded over several machines ({first}).") from error
    check_weights(part, model)
    text = config.get("text_config") or config
    name = os.path.basename(os.path.normpath(model))
    return Loaded(part, tokenizer, name, config, text.get("max_position_embeddings"), model)


def agree_on_a_seed(seed: int | None) -> None:
    """Make all processes draw the same random numbers."""
    if seed is None:
        own = mx.random.state[0] if is_first() else mx.zeros_like(mx.random.state[0])
        seed = mx.distributed.all_sum(own).view(mx.uint64).item()
    mx.random.seed(seed)


def be_silent() -> None:
    """Print nothing more on standard output."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115: for the process's life


def wait_for_the_others() -> None:
    """Return when every process has come this far.

    Generation runs one step ahead, so one that ends earlier would break the others.
    """
    mx.eval(mx.distributed.all_sum(mx.ones(1), stream=mx.cpu))
