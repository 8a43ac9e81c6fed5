"""A model split over the processes that ``mlx.launch`` started on several machines.

Every process runs the same command and generates the same tokens; rank 0 prints them.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import mlx.core as mx

from ..errors import InputError
from .config import first_line, max_context
from .gguf.shards import gguf_source
from .models import Loaded, check_weights


def n_processes() -> int:
    """The number of processes; 1 without ``mlx.launch``."""
    return mx.distributed.init().size()


def rank() -> int:
    """The number of this process; 0 without ``mlx.launch``."""
    return mx.distributed.init().rank()


def check_source(model: str | None) -> None:
    """Raises: InputError for what mlx-lm cannot split: the default model and GGUF files."""
    if model is None or gguf_source(model):
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
    source, group = str(model), mx.distributed.init()
    try:
        found: Any = sharded_load(
            source,
            pipeline_group=group if pipeline else None,
            tensor_group=None if pipeline else group,
            return_config=True,
            tokenizer_config={"trust_remote_code": trust_remote_code},
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(
            f"{source} cannot be loaded over several machines ({first_line(error)})."
        ) from error
    part, tokenizer, config = found
    check_weights(part, source)
    name = os.path.basename(os.path.normpath(source))
    return Loaded(part, tokenizer, name, config, max_context(config), source)


def share_seed(seed: int | None) -> None:
    """Seed all processes alike: with ``seed``, or with rank 0's random state."""
    if seed is None:
        state: mx.array = mx.random.state[0]  # type: ignore[index]
        own = state if rank() == 0 else mx.zeros_like(state)
        seed = int(mx.distributed.all_sum(own).view(mx.uint64).item())  # type: ignore[arg-type]
    mx.random.seed(seed)


def silence_stdout() -> None:
    """Discard what this process prints on standard output from now on."""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")


def barrier() -> None:
    """Wait for all processes.

    Generation runs one step ahead, so a process that ends earlier would break the others.
    """
    mx.eval(mx.distributed.all_sum(mx.ones(1), stream=mx.cpu))
