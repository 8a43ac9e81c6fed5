"""Loading of models: mlx-lm ids and folders, GGUF files, and the default model."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError
from ..log import warn_once
from . import blas, default_model
from .config import first_line, max_context, read_config


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
    packed: bool | None = None,
) -> Loaded:
    """Load a model and its tokenizer.

    model: a hub id or folder as mlx_lm takes it, a .gguf file, or None for the default model.
    adapter_path: LoRA adapters, as ``mlx_lm.load`` takes them.
    tokenizer_config: passed on to the tokenizer of an mlx-lm model.
    dtype, packed: the type to run in, and whether quantised weights stay so. None leaves both as
        the model has them, but on Linux without a GPU takes what is fastest there (``cpu_form``).

    Raises:
        InputError: the model is missing, damaged, of an unsupported kind, cannot be fetched, or
            has weights that are not numbers.
    """
    source, name = _locate(model)
    form = None
    if dtype is not None or packed is not None or not _runs_on_linux_cpu():
        form = Form(dtype, True if packed is None else packed)
    if source.endswith(".gguf"):
        loaded = _load_gguf(Path(source), form)
        loaded.name = name or loaded.name
        if adapter_path is not None:
            _add_adapters(loaded.model, adapter_path)
    else:
        loaded = _load_mlx_lm(source, adapter_path, trust_remote_code, tokenizer_config, form)
    check_weights(loaded.model, loaded.name)
    return loaded


def load_config(model: str | os.PathLike[str] | None = None) -> tuple[dict[str, Any], str, str]:
    """A model's configuration without its weights: (config, name, source).

    model: as ``load`` takes it, or a config.json. Of a hub id only the config is fetched.

    Raises:
        InputError: missing, damaged, of an unsupported kind, or not to be fetched.
    """
    from .gguf.reader import config_from_gguf, open_gguf

    source, name = _locate(model)
    if source.endswith(".gguf"):
        file = open_gguf(source)
        return config_from_gguf(file), name or _gguf_name(file), source
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        path = _hub_config(source)
    config = read_config(path, source)
    return config, _source_name(source), source


def check_weights(model: nn.Module, name: str) -> None:
    """Look for weights that are not numbers; each weight is read once.

    Raises:
        InputError: a parameter holds NaN.
    """
    floats = [
        (key, value)
        for key, value in tree_flatten(model.parameters())
        if mx.issubdtype(value.dtype, mx.floating)
    ]
    found = mx.stack([mx.any(mx.isnan(value)) for _, value in floats]).tolist()
    bad = [key for (key, _), is_bad in zip(floats, found) if is_bad]
    if bad:
        raise InputError(f"The model {name} has NaN among its weights ({bad[0]}).")


@dataclass(frozen=True)
class Form:
    """How weights are held: the type to run in (None: the model's own), and packed or not."""

    dtype: mx.Dtype | None
    packed: bool


def cpu_form(n_weights: int | None = None) -> Form:
    """The fastest form on MLX's CPU back-end for Linux: float32, dequantised with OpenBLAS.

    n_weights: how many values the model has, where that is known.

    Half precision is many times slower there. Without OpenBLAS quantised weights decode
    faster than dequantised ones, and are kept; so they are where float32 would not fit in memory.
    """
    if not blas.openblas_in_use():
        warn_once(
            "OpenBLAS is not in use, so the weights stay quantised; with it "
            f"({blas.how_to_get_openblas()}) prompts are read more than ten times as fast."
        )
        return Form(mx.float32, packed=True)
    needed, memory = 4 * (n_weights or 0), _physical_bytes()
    if memory and needed > 0.6 * memory:
        warn_once(
            f"The weights stay quantised: in float32 they would take {needed / 1e9:.1f} GB of "
            f"{memory / 1e9:.1f} GB."
        )
        return Form(mx.float32, packed=True)
    return Form(mx.float32, packed=False)


def _locate(model: str | os.PathLike[str] | None) -> tuple[str, str | None]:
    """(source, name); the name only for the default model."""
    if model is None:
        path = default_model.default_model_file()
        name = default_model.NAME if path.name == default_model.FILE_NAME else None
        return str(path), name
    source = str(model)
    if not source:
        raise InputError("The model's name is empty; give a hub id, a folder or a .gguf file.")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise InputError(f"The folder {source} holds no model: it has no config.json.")
    if Path(source).is_file() and not source.endswith((".gguf", ".json")):
        raise InputError(
            f"{source} is a file, and the only files accepted as a model are .gguf files."
        )
    return source, None


def _load_gguf(path: Path, form: Form | None) -> Loaded:
    from .gguf.model import model_from_gguf
    from .gguf.reader import open_gguf
    from .gguf.tokenizer import build_tokenizer

    file = open_gguf(path)
    if form is None:
        form = cpu_form(sum(int(tensor.n_elements) for tensor in file.tensors.values()))
    tokenizer = build_tokenizer(file.metadata)
    model, config = model_from_gguf(file, packed=form.packed, dtype=form.dtype)
    context = config["max_position_embeddings"]
    return Loaded(model, tokenizer, _gguf_name(file), config, context, str(path))


def _load_mlx_lm(
    source: str,
    adapter_path: str | None,
    trust_remote_code: bool,
    tokenizer_config: dict[str, Any] | None,
    form: Form | None,
) -> Loaded:
    import mlx_lm
    from mlx_lm.utils import dequantize_model, get_total_parameters

    try:
        model, tokenizer, config = mlx_lm.load(
            source,
            tokenizer_config={"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
            adapter_path=adapter_path,
            return_config=True,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise _load_error(source, adapter_path, error) from error
    form = form or cpu_form(get_total_parameters(model))
    if form.dtype is not None:
        model.set_dtype(form.dtype)
    if not form.packed:
        model = dequantize_model(model)
    mx.eval(model.parameters())
    name = _source_name(source)
    return Loaded(model, tokenizer, name, config, max_context(config), source)


def _load_error(source: str, adapter_path: str | None, error: Exception) -> Exception:
    """The InputError for an error of ``mlx_lm.load``; an unknown error itself."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    accepted = "give a hub id, a folder or a .gguf file"
    if isinstance(error, HFValidationError):
        return InputError(f"There is no model at {source}; {accepted}.")
    if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
        return InputError(
            f"The model {source} is no folder here and the hub cannot be reached; {accepted}."
        )
    if isinstance(error, HfHubHTTPError):
        return InputError(f"The hub does not give the model {source} ({first_line(error)}).")
    if isinstance(error, (OSError, ValueError, KeyError, TypeError, RuntimeError)):
        with_adapters = f" with adapters {adapter_path}" if adapter_path else ""
        what = f"{error!r}" if isinstance(error, KeyError) else first_line(error)
        return InputError(f"The model {source}{with_adapters} cannot be loaded ({what}).")
    return error


def _hub_config(source: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "config.json"))
    except Exception as error:
        raise _load_error(source, None, error) from error


def _add_adapters(model: nn.Module, adapter_path: str) -> None:
    from mlx_lm.utils import load_adapters

    try:
        load_adapters(model, adapter_path)
    except Exception as error:
        raise _load_error("from GGUF", adapter_path, error) from error
    model.eval()


def _gguf_name(file: Any) -> str:
    return file.metadata.get("general.name") or file.path.stem


def _source_name(source: str) -> str:
    path = Path(source)
    if path.name == "config.json":
        path = path.parent
    return path.resolve().name if path.exists() else path.name


def _runs_on_linux_cpu() -> bool:
    return sys.platform.startswith("linux") and mx.default_device() == mx.Device(mx.cpu)


def _physical_bytes() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0
