"""Which layers of a model have their keys centred, and by what."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..centre import Centre, Turning
from ..kv_layers import KVLayer, KVLayers, kv_layers, model_skeleton, ranges
from ..policy import Pair
from .bias import key_biases
from .probe import find_turnings
from .references import References, load_references, paths_for

BY_BIAS = "key bias"
BY_MEAN = "calibrated mean"
# a bias whose root mean square is above this is large: keys that vary are about one a value
LARGE_BIAS = 2.0


@dataclass(frozen=True)
class Centring:
    """What was chosen for a model.

    Args:
        centres: by ordinal of the KV layer; layers that are missing keep their keys whole.
        notes: what a user should know: large biases that stay, references that do not fit.
    """

    centres: dict[int, Centre] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def summary(self) -> str:
        """A few words: how many layers, and by what."""
        return describe(Counter(centre.source for centre in self.centres.values()))


def describe(sources: Mapping[str, int]) -> str:
    """``keys centred by key bias (24 layers)``, or that none are."""
    if not sources:
        return "keys not centred"
    parts = (f"{source} ({n} layer{'s' * (n > 1)})" for source, n in sources.items())
    return f"keys centred by {', '.join(parts)}"


def choose_centring(
    model: nn.Module, found: KVLayers, formats: list[Pair], centre: Any = True, policy: Any = None
) -> Centring:
    """Choose centres for the layers whose keys are in a turbo format.

    A calibrated mean goes before a bias, which it contains.

    Args:
        found: the model's KV layers.
        formats: (K format, V format) of all of them, by ordinal.
        centre: True: by what there is, a file beside the policy's or the bias; False: not at all;
            or references, or the name of their file.
        policy: where its file is, references may lie beside it.

    Raises:
        InputError: references that cannot be read or belong to another model.
    """
    layers = [layer for layer in found.layers if formats[layer.ordinal][0].is_turbo]
    if not layers:
        return Centring()
    references = None if centre is False else _references(model, centre, policy)
    biases = key_biases(model, layers)
    wanted = biases.keys() | (references.means.keys() if references else set())
    if centre is False or not wanted:
        return Centring({}, _large(biases, {}, formats))
    turnings = find_turnings(*_whole(model, found, layers))
    chosen: dict[int, tuple[mx.array, Any, str]] = {}
    misfits = []
    for layer in layers:
        i, n_heads = layer.ordinal, layer.shape.n_kv_heads if layer.shape else None
        turning = turnings.get(i)
        mean = references.means.get(i) if references else None
        if mean is not None and n_heads not in (None, mean.shape[0]):
            misfits.append(i)
            mean = None
        if mean is not None and i in references.unturned:
            chosen[i] = mean, _still(mean), BY_MEAN
        elif mean is not None and turning is not None:
            chosen[i] = mean, turning, BY_MEAN
        elif i in biases and turning is not None:
            chosen[i] = biases[i], turning, BY_BIAS
    sharing = Counter(turning for _, turning, _ in chosen.values())
    centres = {
        i: Centre(mu, turning, source, sharing[turning], not _in_all_keys(mu, biases.get(i)))
        for i, (mu, turning, source) in chosen.items()
    }
    notes = _large(biases, centres, formats)
    if misfits:
        notes.append(
            f"The key references do not fit the KV heads of layers {_listed(misfits)} here; their "
            "keys are centred by the key bias or not at all."
        )
    return Centring(centres, notes)


def _references(model: nn.Module, centre: Any, policy: Any) -> References | None:
    if isinstance(centre, References):
        return centre
    if isinstance(centre, (str, os.PathLike)):
        return load_references(centre, model)
    beside = getattr(policy, "path", None)
    if beside is not None and paths_for(beside)[1].is_file():
        return load_references(beside, model)
    return None


def _whole(
    model: nn.Module, found: KVLayers, layers: list[KVLayer]
) -> tuple[nn.Module, list[KVLayer]]:
    """The model, and its layers, to be called: on a rank of a pipeline the whole one's skeleton."""
    if len(found.layers) == found.n_total:
        return model, layers
    skeleton = model_skeleton(model)
    return skeleton, kv_layers(skeleton).layers


def _in_all_keys(mu: mx.array, bias: mx.array | None) -> bool:
    """Whether a bias, which the first key has too, is the larger part of ``mu``."""
    if bias is None:
        return False
    return (2 * mx.square(bias).sum() > mx.square(mu).sum()).item()


def _still(mean: mx.array) -> Turning:
    return Turning.none(mean.shape[-1])


def _large(biases: dict[int, mx.array], centres: dict[int, Centre], formats: list[Pair]) -> list[str]:
    """A warning where large biases stay in keys of few bits."""
    norms = {}
    for i, bias in biases.items():
        norm = mx.linalg.norm(bias, axis=-1).max().item()
        if i not in centres and norm > LARGE_BIAS * sqrt(bias.shape[-1]):
            norms[i] = norm
    if not norms:
        return []
    names = ", ".join(sorted({str(formats[i][0]) for i in norms}))
    return [
        f"The key projection has a large bias (norm up to {max(norms.values()):,.0f}, layers "
        f"{_listed(list(norms))}) and these keys are not centred: expect {names} keys to harm the "
        "model."
    ]


def _listed(ordinals: list[int]) -> str:
    return ranges(sorted(ordinals))
