"""Mean keys and their scales, measured at a model's first use and kept in the cache folder.

Two windows of the package's sample are enough: one of 512 tokens has nearly the mean of others.
What is remembered is found by a digest of the model's weights: another quantisation is measured for
itself.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..files import cache_dir
from ..log import logger, warn_once
from ..model.fingerprint import weights_digest
from ..model.kv_layers import KVLayers
from ..model.text_windows import cut_windows
from . import AUTO
from .calibration import calibrate_keys, centrable_layers
from .references import References, load_references, paths_for, save_references

N_CTX, N_WINDOWS = 512, 2
FOLDER = "keys"  # within the cache folder


def for_model(centre: Any, tokenizer: Any, name: str | None = None) -> Any:
    """``centre`` for one model: AUTO becomes a ``FirstUse``.

    Args:
        centre: None is AUTO with a tokenizer, and True without.
        tokenizer: the model's.
        name: of the model that a command loaded; None where the user asked for AUTO.

    Raises:
        InputError: AUTO without a tokenizer.
    """
    if centre is None:
        centre = True if tokenizer is None else AUTO
    if not isinstance(centre, str) or centre != AUTO:
        return centre
    if tokenizer is None:
        raise InputError(
            f'centre="{AUTO}" reads a text with the model: give its tokenizer as tokenizer=.'
        )
    return FirstUse(tokenizer, name or "the model", asked=name is None)


class FirstUse:
    """The references of one model, measured when its caches first need them.

    Args:
        tokenizer: the model's.
        name: what to call it.
        asked: whether the user asked for this by name, and is told where it cannot be done.
    """

    def __init__(self, tokenizer: Any, name: str = "the model", asked: bool = False) -> None:
        self.tokenizer, self.name, self.asked = tokenizer, name, asked
        self._found: list[References | None] = []  # one, once it is known

    def __deepcopy__(self, memo: dict) -> FirstUse:
        return self

    def references(self, model: nn.Module, found: KVLayers) -> References | None:
        """What was remembered, else measured; None where that cannot be done.

        Args:
            found: its KV layers.
        """
        if not self._found:
            self._found.append(self._remembered_or_measured(model, found))
        return self._found[0]

    def _remembered_or_measured(self, model: nn.Module, found: KVLayers) -> References | None:
        group = mx.distributed.init()
        if group.size() > 1:
            if group.rank() == 0:
                warn_once(
                    f"The keys of {self.name} are not measured: {group.size()} processes run, and "
                    "each may have a part of it."
                )
            return None
        text = (files("mlx_turbokv") / "evaluate" / "sample.txt").read_bytes()
        sha256 = hashlib.sha256(text).hexdigest()
        path = _path(model, sha256)
        if (remembered := _remembered(path, model, found)) is not None:
            return remembered
        references = self._measured(model, text.decode(), sha256)
        if references is not None:
            _remember(path, references)
        return references

    def _measured(self, model: nn.Module, text: str, sha256: str) -> References | None:
        try:
            centrable_layers(model)
            windows = cut_windows(self.tokenizer, text, N_CTX, N_WINDOWS)
            with _progress(f"Measuring the keys of {self.name}, once", windows.size) as progress:
                references = calibrate_keys(model, windows, sha256, progress=progress, scale=True)
        except InputError as error:  # nothing to centre, or no text for it
            if self.asked:
                warn_once(f"The keys of {self.name} are not measured: {error}")
            return None
        except Exception as error:  # what a model needs beyond tokens is known to it alone
            warn_once(
                f"The keys of {self.name} could not be measured ({type(error).__name__}: {error})."
            )
            return None
        finally:
            mx.clear_cache()
        measured = *references.means.values(), *references.scales.values()
        if not all(mx.isfinite(x).all().item() for x in measured):
            warn_once(f"The keys of {self.name} could not be measured: some are not finite.")
            return None
        return references


def _path(model: nn.Module, text_sha256: str) -> Path:
    """The file of references for all that they depend on."""
    settings = weights_digest(model), text_sha256, N_CTX, N_WINDOWS
    name = hashlib.sha256(repr(settings).encode()).hexdigest()[:32]
    return cache_dir() / FOLDER / f"{name}.keys.json"


def _remembered(path: Path, model: nn.Module, found: KVLayers) -> References | None:
    """What a file holds; None where there is none, or none that can be used."""
    if not os.path.isfile(path):  # it is written last
        return None
    try:
        references = load_references(path, model)
        for layer in found.layers:
            mean, shape = references.means.get(layer.ordinal), layer.shape
            if mean is None or shape is None:
                continue
            if mean.shape != (shape.n_kv_heads, shape.k_head_dim):
                raise InputError(f"{path} has {mean.shape} in layer {layer.ordinal}.")
    except (InputError, OSError) as error:
        logger.warning(f"{str(error).rstrip('.')}: the keys are measured anew.")
        return None
    return references


def _remember(path: Path, references: References) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_references(path, references)
    except (InputError, OSError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        why = getattr(cause, "strerror", None) or cause
        folder = paths_for(path)[0].parent
        logger.warning(
            f"The folder {folder} cannot be written ({why}): the keys are measured at each start."
        )


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A bar of tokens on stderr."""
    from tqdm import tqdm

    bar = tqdm(desc=what, total=total, unit=" tokens", leave=False, file=sys.stderr,
               mininterval=0.5 if sys.stderr.isatty() else 10)  # fmt: skip

    def show(done: int, n_windows: int) -> None:
        bar.update(total * done // n_windows - bar.n)

    with bar:
        yield show
