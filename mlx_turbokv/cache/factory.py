"""The packed cache for a model: made once, or attached so that all of mlx-lm uses it."""

from __future__ import annotations

import copy
import os
from typing import Any

import mlx.nn as nn

from ..attention.hook import AttentionFunctions
from ..centring.choose import Choice
from ..centring.first_use import FirstUse, for_model
from ..centring.references import References
from ..kernels.backend import select_backend
from ..log import warn_once
from ..model.caches import ModelReference, cache_at, language_model, own_caches, put_cache
from ..model.kinds import is_a, is_of_mlx_vlm, new_cache
from ..model.kv_layers import KVLayer, KVLayers, kv_layers
from ..model.probing import only_forwards_kv
from ..policy import Pair, Policy
from ..quant.formats import KVFormat, as_format, check_head_dim
from . import arguments
from .base import PackedCache
from .readable import ReadableTurboKVCache
from .rotating import TurboRotatingKVCache
from .single import TurboKVCache
from .summary import leaves


@arguments.checked_options
def make_prompt_cache(
    model: nn.Module,
    k: KVFormat | str | None = None,
    v: KVFormat | str | None = None,
    policy: Policy | str | os.PathLike | None = None,
    backend: str | None = None,
    centre: bool | str | os.PathLike | References | FirstUse | None = None,
    *,
    tokenizer: Any = None,
    compress_sliding: bool = False,
    max_kv_size: int | None = None,
    handles: bool = True,
    sink: int | None = None,
    recent: int | None = None,
) -> list[Any]:
    """Caches for one sequence (or one batch) of ``model``: packed where its layers allow it.

    Args:
        k, v: formats of K and V, where the policy does not set them. Without a policy they are
            those of every layer, and one that is not given is that of the setting ``balanced``.
        policy: which layer gets which formats: an object, a JSON file or a name, such as those of
            the settings ``near-lossless``, ``balanced`` and ``compact``.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.
        centre: whether turbo keys are centred: "auto" by references beside a policy file, and where
            there are none by what is measured at the model's first use and remembered; True by
            such a file or the key projection's bias; False not; or calibrated references or their
            file. None is "auto" with a tokenizer, and True without. Keys of windows, those of
            max_kv_size included, never are.
        tokenizer: the model's, to measure its keys.
        compress_sliding: pack layers with a sliding window too. They then count as KV layers, in
            the model's order with the others: the first two of a boundary may be sliding layers,
            and a list of formats has an entry for each. Without it they keep mlx-lm's own cache
            and policies don't see them.
        max_kv_size: tokens that a KV layer holds at most; beyond them the oldest go, but for the
            first 4. None lets caches grow. Layers with a window of their own keep that.
        handles: whether models that only pass K and V on to attention get them without arrays at
            one token, which is faster. Attention that is replaced later, and caches whose
            ``update_and_fetch`` is overridden, get arrays anyway; False is for code that holds a
            cache in an object of its own and reads what it returns.
        sink, recent: tokens at a sequence's start and, at least, at its end that are stored in 8.5
            bits: multiples of 32. None leaves it to the policy. Windows protect none.

    Returns:
        What mlx-lm's functions take as ``prompt_cache``. A layer whose formats are both f16 keeps
        mlx-lm's own cache, but for windows beside packed ones: one mask must fit them all.

    Raises:
        InputError: a value of another kind, an unknown format or policy, a policy that does not
            fit the model, a head_dim that a format cannot store, a max_kv_size below 5,
            centre="auto" without a tokenizer, or protected tokens that are not accepted, or not
            where no format is turbo or with a window.
    """
    found: Any = for_model(centre, tokenizer)
    policy = arguments.as_policy(k, v, policy).protecting(sink, recent)
    arguments.check_window(max_kv_size, sink, recent)
    options = found, compress_sliding, max_kv_size, handles
    factory = CacheFactory(language_model(model), policy, backend, None, *options)
    arguments.check_protection(policy, factory.formats, sink, recent)
    return factory()


@arguments.checked_options
def attach(
    model: nn.Module,
    k: KVFormat | str | None = None,
    v: KVFormat | str | None = None,
    policy: Policy | str | os.PathLike | None = None,
    backend: str | None = None,
    centre: bool | str | os.PathLike | References | FirstUse | None = None,
    *,
    tokenizer: Any = None,
    compress_sliding: bool = False,
    max_kv_size: int | None = None,
    handles: bool = True,
    sink: int | None = None,
    recent: int | None = None,
) -> nn.Module:
    """Make packed caches the model's own, for every function of mlx-lm that creates caches.

    A model of mlx-vlm has them at its ``language_model``, where mlx-vlm's functions look for them.
    Attaching again replaces what was attached. The arguments are those of ``make_prompt_cache``.
    What mlx-lm's functions are given as ``max_kv_size`` reaches no model that has a factory of its
    own, and this gives it one: give ``max_kv_size`` here.

    Returns:
        The model.

    Raises:
        InputError: as ``make_prompt_cache``.
    """
    found: Any = for_model(centre, tokenizer)
    policy = arguments.as_policy(k, v, policy).protecting(sink, recent)
    arguments.check_window(max_kv_size, sink, recent)
    inner = language_model(model)
    previous = vars(inner).get("make_cache")
    if isinstance(previous, CacheFactory):
        previous = previous.turbokv_previous
    options = found, compress_sliding, max_kv_size, handles
    factory = CacheFactory(inner, policy, backend, previous, *options)
    arguments.check_protection(policy, factory.formats, sink, recent)
    inner.make_cache = factory
    return model


@arguments.checked_model
def detach(model: nn.Module) -> nn.Module:
    """Give the model its own caches back; without anything attached this does nothing."""
    inner = language_model(model)
    if isinstance(factory := vars(inner).get("make_cache"), CacheFactory):
        del inner.make_cache
        if factory.turbokv_previous is not None:
            inner.make_cache = factory.turbokv_previous
    return model


class CacheFactory:
    """Makes a model's caches, with the KV layers packed.

    Args:
        model: the model; it is only read.
        policy: which KV layer gets which formats.
        backend: name of the back-end, or None.
        previous: the instance's own ``make_cache`` that this factory stands in for, if it had one.
        centre: as ``make_prompt_cache`` takes it, a FirstUse in place of "auto".
        compress_sliding, max_kv_size, handles: as ``make_prompt_cache`` takes them.

    Raises:
        InputError: the policy or a format does not fit the model, the back-end is missing, or
            max_kv_size is below 5.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        backend: str | None = None,
        previous: Any = None,
        centre: bool | str | os.PathLike | References | FirstUse = True,
        compress_sliding: bool = False,
        max_kv_size: int | None = None,
        handles: bool = True,
    ) -> None:
        self._model = ModelReference(model)
        self.policy = policy
        self.backend = backend
        self.turbokv_previous = previous
        self.compress_sliding = compress_sliding
        self.max_kv_size = max_kv_size
        caches = own_caches(model)
        self._n_caches = len(caches)
        self.layers: KVLayers = kv_layers(model, caches, compress_sliding)
        if max_kv_size is not None:
            arguments.check_max_kv_size(max_kv_size, centre, self.layers.layers)
        growing = kv_layers(model, caches) if compress_sliding else self.layers
        ordinals = {(x.index, x.sub): x.ordinal for x in self.layers.layers}
        self._n_growing = growing.n_total
        self._growing = {ordinals[x.index, x.sub]: x.ordinal for x in growing.layers}
        # a window's rows have no positions of their own to turn a reference by
        centre = centre if max_kv_size is None else False
        self._choice = Choice(model, growing, centre, policy)
        self._attention: AttentionFunctions | None = None
        self._take_formats()
        notes = [*policy.notes(self.layers.n_total), *self.layers.notes(), *self.centring.notes]
        if compress_sliding:
            sliding = KVLayers([x for x in self.layers.layers if x.window], [], self.layers.n_total)
            notes += Choice(model, sliding, False, policy).of(self.formats).notes
        if max_kv_size is not None and all(x.window for x in self.layers.layers):
            notes.append("max_kv_size has no effect: no layer keeps all tokens in a KV cache.")
        for note in notes:
            warn_once(note, type(model).__module__)
        # qwen3_5 and qwen4_exp of mlx-vlm cut the padding off K and V by themselves
        functions = AttentionFunctions(model, padded=not is_of_mlx_vlm(model))
        if handles and only_forwards_kv(model, _with_handles(self(), functions)):
            self._attention = functions

    @property
    def model(self) -> nn.Module:
        """The model; it owns the factory, which refers to it weakly."""
        return self._model()

    def about_keys_and_backend(self) -> str:
        """What turbo keys are centred by, if any are stored, and the back-end, in a few words."""
        turbo_keys = any(k.is_turbo for k, _ in self.formats)
        centred = f"{self.centring.summary()}, " if turbo_keys else ""
        return f"{centred}{select_backend(self.backend).name} back-end"

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
        f16 = as_format("f16")
        self._packs_windows = any(
            self.formats[x.ordinal] != (f16, f16)
            for x in self.layers.layers
            if x.window is not None or self.max_kv_size is not None
        )
        growing = [(f16, f16)] * self._n_growing
        for ordinal, among_growing in self._growing.items():
            growing[among_growing] = self.formats[ordinal]
        self.centring = self._choice.of(growing)

    def __call__(self, *args: Any, **kwargs: Any) -> list[Any]:
        """Fresh caches; arguments go to the model's own factory."""
        caches = own_caches(self.model, *args, **kwargs)
        for layer in self._layers_of(caches).layers:
            own = cache_at(caches, layer.index, layer.sub)
            put_cache(caches, layer.index, layer.sub, self._cache(layer, own))
        return _with_handles(caches, self._attention)

    def _cache(self, layer: KVLayer, own: Any) -> Any:
        """The cache of a KV layer in place of the model's own."""
        k, v = self.formats[layer.ordinal]
        is_f16 = k.is_f16 and v.is_f16
        window, keep = layer.window, getattr(own, "keep", 0)
        windowed = window is not None or self.max_kv_size is not None
        if window is None and self.max_kv_size is not None:
            window, keep = self.max_kv_size, arguments.KEPT_TOKENS
            own = new_cache(self.model, "RotatingKVCache", window, keep)
        if is_a(own, "StaticPrefixKVCache"):  # asked for by size; masks are made for all of it
            return own
        # one mask serves all windows, and mlx-lm's columns are in another order than ours
        if is_f16 and not (windowed and self._packs_windows):
            return own
        if window is None:
            centre = self.centring.centres.get(self._growing[layer.ordinal])
            protection = self.policy.protection.of(k, v)
            return _kind(layer)(k, v, self.backend, centre, **vars(protection))
        return TurboRotatingKVCache(k, v, window, keep, self.backend)

    def _layers_of(self, caches: list[Any]) -> KVLayers:
        """The KV layers of these caches: a model may have been split since it was attached."""
        if len(caches) != self._n_caches:
            self.layers = kv_layers(self.model, caches, self.compress_sliding)
            self._n_caches = len(caches)
        return self.layers

    def _check_head_dims(self) -> None:
        for layer in self.layers.layers:
            if layer.shape is not None:
                k, v = self.formats[layer.ordinal]
                check_head_dim(k, layer.shape.k_head_dim)
                check_head_dim(v, layer.shape.v_head_dim)


def _kind(layer: KVLayer) -> type[TurboKVCache]:
    if layer.is_indexed:  # a model of mlx-vlm's, which is optional
        from .indexed_batch import IndexedTurboKVCache

        return IndexedTurboKVCache
    return ReadableTurboKVCache if layer.is_read else TurboKVCache


def _with_handles(caches: list[Any], functions: AttentionFunctions | None) -> list[Any]:
    for cache in leaves(caches):
        if isinstance(cache, PackedCache):
            cache.handles = functions
    return caches
