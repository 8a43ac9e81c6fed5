"""Models for every command: mlx-lm ids and folders, GGUF files, and the default small model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from . import blas, default_model
from .errors import InputError


@dataclass
class Loaded:
    """A model ready to generate.

    model: mlx-lm's model.
    tokenizer: mlx_lm's TokenizerWrapper.
    name: what to call it in reports.
    config: the model's config.json, or the same made from a GGUF file's metadata.
    max_context: the positions the model was made for, if it says.
    source: the hub id, folder or file that it was loaded from.
    """

    model: nn.Module
    tokenizer: Any
    name: str
    config: dict[str, Any]
    max_context: int | None
    source: str


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    adapter_path: str | None = None,
    trust_remote_code: bool = False,
    tokenizer_config: dict[str, Any] | None = None,
    dtype: mx.Dtype | None = None,
) -> Loaded:
    """Load a model and its tokenizer.

    model: a hub id or folder as mlx_lm takes it, a .gguf file, or None for the default model.
    adapter_path: LoRA adapters, as ``mlx_lm.load`` takes them.
    dtype: run dequantised in this type; None takes float32 on a CPU with OpenBLAS and leaves
        the weights as they are elsewhere.

    Raises:
        InputError: the model is missing, damaged, of an unsupported kind, cannot be fetched, or
            has weights that are not numbers.
    """
    if dtype is None and _runs_on_cpu():
        if blas.openblas_in_use():
            dtype = mx.float32
        else:
            _say_what_openblas_brings()
    if model is None:
        path = default_model.default_model_file()
        loaded = _load_gguf(path, dtype)
        loaded.name = default_model.NAME if path.name == default_model.FILE_NAME else path.stem
    elif str(model).endswith(".gguf"):
        loaded = _load_gguf(Path(model), dtype)
    else:
        loaded = _load_mlx_lm(str(model), trust_remote_code, tokenizer_config, dtype)
    if adapter_path is not None:
        _add_adapters(loaded, adapter_path)
    check_weights(loaded.model, loaded.source)
    return loaded


def check_weights(model: nn.Module, name: str) -> None:
    """Look for weights that are not numbers.

    Raises:
        InputError: a parameter holds NaN.
    """
    floats = [
        (key, value)
        for key, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating)
    ]
    # The sum of a tensor that holds NaN is NaN, and reads each weight only once.
    found = mx.stack([mx.any(mx.isnan(value)) for _, value in floats]).tolist()
    bad = [key for (key, _), is_bad in zip(floats, found) if is_bad]
    if bad:
        raise InputError(f"The model {name} has NaN among its weights ({bad[0]}).")


def _load_gguf(path: Path, dtype: mx.Dtype | None) -> Loaded:
    from .gguf import open_gguf
    from .gguf_model import model_from_gguf
    from .gguf_tokenizer import build_tokenizer

    file = open_gguf(path)
    tokenizer = build_tokenizer(file.metadata)
    model, config = model_from_gguf(file, packed=dtype is None, dtype=dtype)
    name = file.metadata.get("general.name") or path.stem
    return Loaded(model, tokenizer, name, config, config["max_position_embeddings"], str(path))


def _load_mlx_lm(
    source: str,
    trust_remote_code: bool,
    tokenizer_config: dict[str, Any] | None,
    dtype: mx.Dtype | None,
) -> Loaded:
    import mlx_lm

    model, tokenizer, config = mlx_lm.load(
        source,
        tokenizer_config={"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
        return_config=True,
        trust_remote_code=trust_remote_code,
    )
    return Loaded(model, tokenizer, Path(source).name, config, _max_context(config), source)


def _max_context(config: dict[str, Any]) -> int | None:
    for level in (config, config.get("text_config") or {}):
        if value := level.get("max_position_embeddings"):
            return int(value)
    return None


def _runs_on_cpu() -> bool:
    return sys.platform.startswith("linux") and mx.default_device() == mx.Device(mx.cpu)


def _say_what_openblas_brings() -> None:
    pass


def _add_adapters(loaded: Loaded, adapter_path: str) -> None:
    from mlx_lm.utils import load_adapters

    loaded.model = load_adapters(loaded.model, adapter_path)
    loaded.model.eval()
