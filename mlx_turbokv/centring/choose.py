"""Which layers of a model have their keys centred, and by what."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import sqrt
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..model.caches import ModelReference
from ..model.kv_layers import KVLayer, KVLayers, kv_layers, model_skeleton, ranges
from ..policy import Pair
from .bias import key_biases
from .centre import Centre
from .first_use import FirstUse
from .references import ATTRIBUTE, References, load_references, paths_for
from .rope import RopeFrequencies, find_rope_frequencies
from .scales import PairScales

BY_BIAS = "key bias"
BY_MEAN, SCALED = "calibrated mean", " and scales"
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


class Choice:
    """Centres of a model's layers, found when a policy first needs them and kept.

    A calibrated mean goes before a bias, which it contains.

    Args:
        found: the model's KV layers.
        centre: True: by what there is, a file beside the policy's, references that the model was
            given, or the bias; FirstUse: the same, but measured before the bias is taken; False:
            not at all; or references, or the name of their file.
        policy: where its file is, references may lie beside it.

    Raises:
        InputError: at first use: references that cannot be read or belong to another model.
    """

    def __init__(self, model: nn.Module, found: KVLayers, centre: Any, policy: Any) -> None:
        self._model = ModelReference(model)
        self.found, self.centre = found, centre
        self.path = getattr(policy, "path", None)

    def of(self, formats: list[Pair]) -> Centring:
        """What the layers whose keys are in a turbo format are centred by.

        Args:
            formats: (K format, V format) of all KV layers, by ordinal.
        """
        turbo = {x.ordinal for x in self.found.layers if formats[x.ordinal][0].is_turbo}
        if not turbo:
            return Centring()
        centres = {i: centre for i, centre in self._centres.items() if i in turbo}
        notes = _large({i: b for i, b in self._biases.items() if i in turbo}, centres, formats)
        if misfits := sorted(turbo & self._misfits):
            notes.append(
                f"The key references do not fit the KV heads of layers {ranges(misfits)} here; "
                "their keys are centred by the key bias or not at all."
            )
        return Centring(centres, notes)

    @cached_property
    def _biases(self) -> dict[int, mx.array]:
        return key_biases(self._model(), self.found.layers)

    @cached_property
    def _references(self) -> References | None:
        if self.centre is False:
            return None
        if isinstance(self.centre, References):
            return self.centre
        if isinstance(self.centre, (str, os.PathLike)):
            return load_references(self.centre, self._model())
        if self.path is not None and paths_for(self.path)[1].is_file():
            return load_references(self.path, self._model())
        given = vars(self._model()).get(ATTRIBUTE)
        if given is None and isinstance(self.centre, FirstUse):
            return self.centre.references(self._model(), self.found)
        return given

    @cached_property
    def _misfits(self) -> set[int]:
        """Layers whose KV heads are not those of the references: the model was split."""
        means = self._references.means if self._references else {}
        shapes = {x.ordinal: x.shape for x in self.found.layers if x.ordinal in means and x.shape}
        return {
            i for i, shape in shapes.items()
            if means[i].shape != (shape.n_kv_heads, shape.k_head_dim)
        }  # fmt: skip

    @cached_property
    def _centres(self) -> dict[int, Centre]:
        references = self._references
        means = references.means if references else {}
        if self.centre is False or not (means or self._biases):
            return {}
        ropes = find_rope_frequencies(*_whole(self._model(), self.found))
        chosen: dict[int, tuple[mx.array, RopeFrequencies, str]] = {}
        scales = references.scales if references else {}
        for layer in self.found.layers:
            i = layer.ordinal
            mean, rope = means.get(i), ropes.get(i)
            if mean is not None and references and i in references.without_rope:
                rope = RopeFrequencies.none(mean.shape[-1])
            if mean is not None and rope is not None and i not in self._misfits:
                chosen[i] = mean, rope, BY_MEAN
            elif i in self._biases and rope is not None:
                chosen[i] = self._biases[i], rope, BY_BIAS
        sharing = Counter(rope for _, rope, _ in chosen.values())
        centres = {}
        for i, (mu, rope, source) in chosen.items():
            first_key_uncentred = not _in_all_keys(mu, self._biases.get(i))
            of_layer = None
            if source == BY_MEAN and i in scales:
                of_layer, source = PairScales(scales[i], rope), source + SCALED
                mu = mu * of_layer.of_dims
            centres[i] = Centre(mu, rope, source, sharing[rope], first_key_uncentred, of_layer)
        return centres


def _whole(model: nn.Module, found: KVLayers) -> tuple[nn.Module, list[KVLayer]]:
    """The model, and its layers, to be called: on a rank of a pipeline the whole one's skeleton."""
    if len(found.layers) == found.n_total:
        return model, found.layers
    skeleton = model_skeleton(model)
    return skeleton, kv_layers(skeleton).layers


def _in_all_keys(mu: mx.array, bias: mx.array | None) -> bool:
    """Whether a bias, which the first key has too, is the larger part of ``mu``."""
    if bias is None:
        return False
    return bool((2 * mx.square(bias).sum() > mx.square(mu).sum()).item())


def _large(
    biases: dict[int, mx.array], centres: dict[int, Centre], formats: list[Pair]
) -> list[str]:
    """A warning where large biases stay in keys of few bits."""
    norms = {}
    for i, bias in biases.items():
        norm = float(mx.linalg.norm(bias, axis=-1).max())
        if i not in centres and norm > LARGE_BIAS * sqrt(bias.shape[-1]):
            norms[i] = norm
    if not norms:
        return []
    names = ", ".join(sorted({str(formats[i][0]) for i in norms}))
    return [
        f"The key projection has a large bias (norm up to {max(norms.values()):,.0f}, layers "
        f"{ranges(sorted(norms))}) and these keys are not centred: {names} keys then ruin what "
        "the model says. Let them be centred, or give K q8_0."
    ]
