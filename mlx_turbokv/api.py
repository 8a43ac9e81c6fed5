"""The packed cache for a model: made once, or attached so that all of mlx-lm uses it."""

from __future__ import annotations

import copy
import logging
import os
from typing import Any

import mlx.nn as nn

from .cache import TurboKVCache
from .centring.choose import Choice
from .centring.references import References
from .errors import InputError
from .formats import KVFormat, check_head_dim
from .kernels.backend import select_backend
from .kv_layers import KVLayers, kv_layers
from .policy import Pair, Policy, Uniform, load_policy
from .shapes import own_caches

logger = logging.getLogger("mlx_turbokv")
_said: set[tuple[str, str]] = set()


def make_prompt_cache(
    model: nn.Module,
    k: KVFormat | str = "q8_0",
    v: KVFormat | str = "turbo2",
    policy: Policy | str | os.PathLike | None = None,
    backend: str | None = None,
    centre: bool | str | os.PathLike | References = True,
) -> list[Any]:
    """Caches for one sequence (or one batch) of ``model``: packed where its layers allow it.

    Args:
        k, v: formats of K and V, where the policy does not set them.
        policy: which layer gets which formats, an object or a name; None is the same everywhere.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: whether turbo keys are centred: True by what there is (means beside a policy file,
            or the key projection's bias), False not, or calibrated references or their file.

    Returns:
        What mlx-lm's functions take as ``prompt_cache``. A layer whose formats are both f16 keeps
        mlx-lm's own cache.

    Raises:
        InputError: unknown format or policy, a policy that does not fit the model, or a head_dim
            that a format cannot store.
    """
    return CacheFactory(model, _as_policy(k, v, policy), backend, centre=centre)()


def attach(
    model: nn.Module,
    k: KVFormat | str = "q8_0",
    v: KVFormat | str = "turbo2",
    policy: Policy | str | os.PathLike | None = None,
    backend: str | None = None,
    centre: bool | str | os.PathLike | References = True,
) -> nn.Module:
    """Make packed caches the model's own, for every function of mlx-lm that creates caches.

    Attaching again replaces what was attached. The arguments are those of ``make_prompt_cache``.
    mlx-lm's ``max_kv_size`` is for models without a factory of their own, so it has no effect then.

    Returns:
        The model.

    Raises:
        InputError: as ``make_prompt_cache``.
    """
    previous = vars(model).get("make_cache")
    if isinstance(previous, CacheFactory):
        previous = previous.turbokv_previous
    model.make_cache = CacheFactory(model, _as_policy(k, v, policy), backend, previous, centre)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Give the model its own caches back; without anything attached this does nothing."""
    factory = vars(model).get("make_cache")
    if isinstance(factory, CacheFactory):
        del model.make_cache
        if factory.turbokv_previous is not None:
            model.make_cache = factory.turbokv_previous
    return model


class CacheFactory:
    """Makes a model's caches, with the KV layers packed.

    Args:
        model: the model; it is only read.
        policy: which KV layer gets which formats.
        backend: name of the back-end, or None.
        previous: the instance's own ``make_cache`` that this factory stands in for, if it had one.
        centre: as ``make_prompt_cache`` takes it.

    Raises:
        InputError: the policy or a format does not fit the model, or the back-end is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        backend: str | None = None,
        previous: Any = None,
        centre: bool | str | os.PathLike | References = True,
    ) -> None:
        self.model = model
        self.policy = policy
        self.backend = backend
        self.turbokv_previous = previous
        select_backend(backend)  # one that is missing is an error now, not at the first token
        caches = own_caches(model)
        self._n_caches = len(caches)
        self.layers: KVLayers = kv_layers(model, caches)
        self._choice = Choice(model, self.layers, centre, policy)
        self._take_formats()
        notes = [*policy.notes(self.layers.n_total), *self.layers.notes(), *self.centring.notes]
        for note in notes:
            _say_once(model, note)

    def with_policy(self, policy: Policy) -> CacheFactory:
        """A factory for the same model under another policy, without looking at the model again.

        Raises:
            InputError: the policy or a format does not fit the model.
        """
        other = copy.copy(self)
        other.policy = policy
        other._take_formats()
        return other

    def _take_formats(self) -> None:
        """Everything that depends on the policy's formats."""
        self.formats: list[Pair] = self.policy.formats(self.layers.n_total)
        self._check_head_dims()
        self.centring = self._choice.of(self.formats)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Fresh caches; arguments go to the model's own factory."""
        caches = own_caches(self.model, *args, **kwargs)
        for layer in self._layers_of(caches).layers:
            k, v = self.formats[layer.ordinal]
            if k.is_f16 and v.is_f16:
                continue
            packed = TurboKVCache(k, v, self.backend, self.centring.centres.get(layer.ordinal))
            if layer.sub is None:
                caches[layer.index] = packed
            else:
                entries = list(caches[layer.index].caches)
                entries[layer.sub] = packed
                caches[layer.index].caches = tuple(entries)
        return caches

    def _layers_of(self, caches: list[Any]) -> KVLayers:
        """The KV layers of these caches: a model may have been split since it was attached."""
        if len(caches) != self._n_caches:
            self.layers, self._n_caches = kv_layers(self.model, caches), len(caches)
        return self.layers

    def _check_head_dims(self) -> None:
        for layer in self.layers.layers:
            if layer.shape is not None:
                k, v = self.formats[layer.ordinal]
                check_head_dim(k, layer.shape.k_head_dim)
                check_head_dim(v, layer.shape.v_head_dim)


def _as_policy(
    k: KVFormat | str, v: KVFormat | str, policy: Policy | str | os.PathLike | None
) -> Policy:
    if policy is None:
        return Uniform(k, v)
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, (str, os.PathLike)):
        is_file = os.fspath(policy).lower().endswith(".json")
        return load_policy(policy) if is_file else load_policy(policy, k, v)
    raise InputError(f"Policy {policy!r} is not accepted: give a policy object or a name.")


def _say_once(model: nn.Module, note: str) -> None:
    key = (type(model).__module__, note)
    if key not in _said:
        _said.add(key)
        logger.warning(note)
