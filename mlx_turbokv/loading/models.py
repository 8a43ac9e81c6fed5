"""Loading of models: mlx-lm ids and folders, GGUF files, and the default model."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..files import check_regular
from ..log import warn_once
from . import blas, default_model, hub
from .config import first_line, max_context, parameters, read_config
from .gguf.shards import gguf_source


@dataclass
class Loaded:
    """A model ready to generate.

    Args:
        model: mlx-lm's model.
        tokenizer: mlx_lm's TokenizerWrapper.
        name: of the model, for reports.
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

    Args:
        model: a hub id or folder as mlx_lm takes it, a .gguf file, or None for the default model.
        adapter_path: LoRA adapters, as ``mlx_lm.load`` takes them.
        tokenizer_config: passed on to the tokenizer of an mlx-lm model; of a .gguf file's, only a
            ``chat_template`` counts.
        dtype: the type to run in.
        packed: whether quantised weights stay so. None for both leaves the model as it is, except
            on Linux without a GPU, where the fastest form is used (``cpu_form``).

    Raises:
        InputError: the model is missing, damaged, of an unsupported kind, cannot be fetched, or
            has weights that are not numbers.
    """
    from mlx_lm.utils import load_adapters

    source, name = _locate(model)
    form = None
    if dtype is not None or packed is not None or not _runs_on_linux_cpu():
        form = Form(dtype, True if packed is None else packed)
    if gguf := gguf_source(source):
        template = (tokenizer_config or {}).get("chat_template")
        loaded = _load_gguf(gguf, form, template)
        loaded.name = name or loaded.name
        if adapter_path is not None:
            with load_errors(loaded.name, adapter_path):
                _check_files(adapter_path)
                load_adapters(loaded.model, adapter_path)
            loaded.model.eval()
    else:
        loaded = _load_mlx_lm(
            source,
            form,
            adapter_path,
            tokenizer_config={"trust_remote_code": trust_remote_code, **(tokenizer_config or {})},
            trust_remote_code=trust_remote_code,
        )
    check_weights(loaded.model, loaded.name)
    return loaded


def load_config(model: str | os.PathLike[str] | None = None) -> tuple[dict[str, Any], str, str]:
    """A model's configuration without its weights: (config, name, source).

    model: as ``load`` takes it, or a config.json. Of a hub id only the config is fetched.

    Raises:
        InputError: missing, damaged, of an unsupported kind, or not to be fetched.
    """
    from .gguf.hyperparameters import config_from_gguf
    from .gguf.reader import open_gguf

    source, name = _locate(model)
    if gguf := gguf_source(source):
        file = open_gguf(gguf)
        return config_from_gguf(file), name or file.name, source
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    elif not path.is_file():
        path = hub.fetch_config(source)
    return read_config(path, source), _source_name(source), source


def check_weights(model: nn.Module, name: str) -> None:
    """Look for weights that are not numbers; each weight is read once.

    Raises:
        InputError: a parameter holds NaN.
    """
    floats = {key: x for key, x in parameters(model).items() if mx.issubdtype(x.dtype, mx.floating)}
    has_nan: Any = mx.stack([mx.any(mx.isnan(x)) for x in floats.values()]).tolist()
    if any(has_nan):
        bad = list(floats)[has_nan.index(True)]
        raise InputError(f"The model {name} has NaN among its weights ({bad}).")


@dataclass(frozen=True)
class Form:
    """Form of the weights: the type to run in (None: the model's own), and quantised or not."""

    dtype: mx.Dtype | None
    packed: bool


def cpu_form(n_weights: int | None = None) -> Form:
    """The fastest form on MLX's CPU back-end for Linux: float32, dequantised with OpenBLAS.

    Half precision is many times slower there. Quantised weights are kept without OpenBLAS, where
    they decode faster than dequantised ones, and where float32 would not fit in memory.

    Args:
        n_weights: the number of values of the model, where that is known.
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
    path = Path(source)
    if gguf_source(source) is None:
        if path.is_dir() and not (path / "config.json").is_file():
            raise InputError(
                f"The folder {source} holds no model: it has neither a config.json nor a .gguf "
                "file."
            )
        if path.is_file() and path.suffix != ".json":
            raise InputError(
                f"{source} is a file, and the only files accepted as a model are GGUF files."
            )
    return source, None


def _load_gguf(path: Path, form: Form | None, chat_template: str | None = None) -> Loaded:
    from .gguf.hyperparameters import config_from_gguf
    from .gguf.model import model_from_gguf
    from .gguf.reader import open_gguf
    from .gguf.tokenizer import build_tokenizer

    file = open_gguf(path)
    if form is None:
        form = cpu_form(sum(int(tensor.n_elements) for tensor in file.tensors.values()))
    with _progress(f"Loading {file.name}") as progress:
        tokenizer = build_tokenizer(file.metadata, chat_template)
        n_tokens, n_rows = len(tokenizer.get_vocab()), config_from_gguf(file)["vocab_size"]
        if n_tokens > n_rows:
            raise file.error(f"has {n_tokens:,} tokens and an embedding of {n_rows:,}.")
        model, config = model_from_gguf(
            file, packed=form.packed, dtype=form.dtype, progress=progress
        )
    context = config["max_position_embeddings"]
    return Loaded(model, tokenizer, file.name, config, context, str(path))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on stderr, of what takes longer than a second."""
    from tqdm import tqdm

    bar = tqdm(desc=what, unit="B", unit_scale=True, delay=1, leave=False, file=sys.stderr,
               mininterval=0.5 if sys.stderr.isatty() else 10)  # fmt: skip

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        yield show


def _load_mlx_lm(
    source: str, form: Form | None, adapter_path: str | None, **options: Any
) -> Loaded:
    import mlx_lm
    from mlx_lm.utils import dequantize_model, get_total_parameters

    with load_errors(source, adapter_path):
        for folder in (source, adapter_path):
            _check_files(folder)
        if os.path.isdir(source):
            read_config(Path(source) / "config.json", source)
        hub.check_reachable(source)
        found: Any = mlx_lm.load(source, adapter_path=adapter_path, return_config=True, **options)
    model, tokenizer, config = found
    form = form or cpu_form(get_total_parameters(model))
    if form.dtype is not None:
        model.set_dtype(form.dtype)
    if not form.packed:
        model = dequantize_model(model)
    mx.eval(model.parameters())
    return Loaded(model, tokenizer, _source_name(source), config, max_context(config), source)


def _check_files(folder: str | None) -> None:
    """Look for FIFOs and devices in a folder: mlx-lm would wait for what they give.

    Raises:
        OSError: there is one.
    """
    if folder is not None and Path(folder).is_dir():
        for path in Path(folder).iterdir():
            if path.exists() and not path.is_dir():
                check_regular(path)


@contextmanager
def load_errors(source: str, adapter: str | None = None, gguf: bool = True) -> Iterator[None]:
    """Turns the errors of mlx-lm and of the hub into InputErrors; others pass."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    accepted = f"give a hub id{', a folder or a .gguf file' if gguf else ' or a folder'}"
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"There is no model at {source}; {accepted}.") from error
    except (LocalEntryNotFoundError, ConnectionError) as error:
        raise InputError(
            f"The model {source} is no folder here and the hub cannot be reached; {accepted}."
        ) from error
    except HfHubHTTPError as error:
        raise InputError(
            f"The hub does not give the model {source} ({first_line(error)})."
        ) from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ArithmeticError) as error:
        with_adapters = f" with adapters {adapter}" if adapter else ""
        what = f"{error!r}" if isinstance(error, KeyError) else first_line(error)
        raise InputError(f"The model {source}{with_adapters} cannot be loaded ({what}).") from error


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
