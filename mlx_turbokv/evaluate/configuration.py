"""The configurations of an evaluation, made ready for a model; names.py has their names."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import mlx.nn as nn

from ..cache.factory import CacheFactory
from ..errors import InputError
from ..kernels.backend import select_backend
from ..model.kv_layers import kv_layers
from ..model.shapes import KVShape
from ..policy import LayerList, Policy, Protection, bits_per_value
from ..policy.protection import DEFAULT_PROTECTION, UNPROTECTED
from ..quant.formats import as_format
from . import llama_cpp
from .mlx_lm_quantized import DEQUANTIZED, MLX_LM, make_quantized_caches, needs_dequantizing
from .names import LLAMA_CPP_NAME, MLX_LM_NAME, parse_policy
from .prepared import Prepared

_DEFAULT_GROUP = 64


class AffineFormat(NamedTuple):
    """A format of mlx-lm's quantised cache: a scale and a bias of 16 bits for each group."""

    bits: int
    group: int

    def bits_per_value(self, head_dim: int) -> float:
        """Bits that one value takes, its share of the scales included."""
        return self.bits + 2 * 16 / self.group

    def __str__(self) -> str:
        return f"affine{self.bits}:{self.group}"


def fitting(
    model: nn.Module, names: Sequence[str], backend: str | None = None
) -> tuple[list[str], list[str]]:
    """The names that fit a model, and why each of the others does not."""
    found, reasons = [], []
    for name in names:
        try:
            prepare(model, name, backend)
            found.append(name)
        except InputError as error:
            reasons.append(f"Left out {name}: {error}")
    return found, reasons


def prepare(
    model: nn.Module,
    config: str | Policy,
    backend: str | None = None,
    name: str | None = None,
    centre: Any = True,
    compress_sliding: bool = False,
    timed: bool = False,
) -> Prepared:
    """Make a configuration ready for a model.

    Args:
        config: a name, or a policy object.
        backend: as `make_prompt_cache` takes it.
        name: what to call it; default: as given.
        centre: as `make_prompt_cache` takes it.
        compress_sliding: as `make_prompt_cache` takes it; mlx-lm's own quantised cache has no
            window, and ignores it.
        timed: whether its speed is measured: mlx-lm's quantised cache then has mlx-lm's attention,
            even on a device that lacks it.

    Raises:
        InputError: an unknown name, or one that does not fit the model.
    """
    if isinstance(config, str) and (found := MLX_LM_NAME.fullmatch(config.strip().lower())):
        fmt = AffineFormat(int(found[1]), int(found[2] or _DEFAULT_GROUP))
        return _prepare_mlx_lm(model, name or config, fmt, timed)
    if isinstance(config, str) and (found := LLAMA_CPP_NAME.fullmatch(config.strip().lower())):
        return _prepare_llama_cpp(model, name or config, found[1], timed)
    policy = parse_policy(config) if isinstance(config, str) else config
    factory = CacheFactory(
        model,
        policy,
        backend,
        centre=centre,
        compress_sliding=compress_sliding,
    )
    pairs = [factory.formats[layer.ordinal] for layer in factory.layers.layers]
    shapes, protected_bits = kv_shapes(model, compress_sliding), None
    protects = any(policy.protection.of(k, v) for k, v in pairs)
    if protects and shapes is not None:
        protected_bits = shape_bits([(k.protected, v.protected) for k, v in pairs], shapes)
    packed = not all(k.is_f16 and v.is_f16 for k, v in pairs)
    return Prepared(
        name=name or (config if isinstance(config, str) else policy.name),
        make_caches=factory,
        layers=[(str(k), str(v)) for k, v in pairs],
        **_bits(pairs, shapes),
        backend=select_backend(factory.backend).name if packed else MLX_LM,
        centred=factory.centring.summary(),
        protection=policy.protection if protects else UNPROTECTED,
        protected_bits=protected_bits,
        centres=tuple(factory.centring.centres.values()),
        n_values=_n_values(shapes or []),
        warnings=tuple(factory.centring.notes),
    )


def layer_list(
    pairs: Sequence[tuple[str, str]], name: str, protection: Protection = DEFAULT_PROTECTION
) -> LayerList:
    """The policy of one pair of formats, by name, for each KV layer."""
    formats = tuple((as_format(k), as_format(v)) for k, v in pairs)
    return LayerList(formats, name, protection=protection)


def _n_values(shapes: Sequence[KVShape]) -> tuple[int, int]:
    heads = [(s.n_kv_heads * s.k_head_dim, s.n_kv_heads * s.v_head_dim) for s in shapes]
    return sum(k for k, _ in heads), sum(v for _, v in heads)


def _prepare_mlx_lm(model: nn.Module, name: str, fmt: AffineFormat, timed: bool) -> Prepared:
    shapes = kv_shapes(model)
    for head_dim in (dim for s in shapes or [] for dim in (s.k_head_dim, s.v_head_dim)):
        if head_dim % fmt.group:
            raise InputError(
                f"Configuration {name!r} does not fit head_dim {head_dim}: its group of "
                f"{fmt.group} must divide it."
            )
        # mlx-lm's cache gives a row this many words; mx.quantize may fill fewer.
        words, given = head_dim * fmt.bits // 32, head_dim // (32 // fmt.bits)
        if words != given:
            raise InputError(
                f"Configuration {name!r} does not fit head_dim {head_dim}: {fmt.bits} bits a value "
                f"take {words} words a row, not {given} words as in mlx-lm's cache."
            )
    pairs = [(fmt, fmt)] * len(kv_layers(model).layers)
    dequantized = needs_dequantizing() and not timed
    return Prepared(
        name=name,
        make_caches=partial(make_quantized_caches, model, *fmt, dequantized),
        layers=[(str(k), str(v)) for k, v in pairs],
        backend=DEQUANTIZED if dequantized else MLX_LM,
        **_bits(pairs, shapes),
    )


def _prepare_llama_cpp(model: nn.Module, name: str, fmt: str, timed: bool) -> Prepared:
    if timed:
        raise InputError(f"Configuration {name!r} is simulated: it has no speed to measure.")
    shapes = kv_shapes(model)
    for head_dim in (dim for s in shapes or [] for dim in (s.k_head_dim, s.v_head_dim)):
        llama_cpp.check_head_dim(name, head_dim)
    pairs = [(llama_cpp.FORMATS[fmt], llama_cpp.FORMATS[fmt])] * len(kv_layers(model).layers)
    return Prepared(
        name=name,
        make_caches=partial(llama_cpp.make_rotated_caches, model, fmt),
        layers=[(str(k), str(v)) for k, v in pairs],
        backend=llama_cpp.SIMULATED,
        **_bits(pairs, shapes),
    )


def backend_of(configs: Sequence[Prepared]) -> str:
    """The back-end of a run: that of its packed caches, or mlx-lm where there are none."""
    others = (MLX_LM, llama_cpp.SIMULATED)
    return next((c.backend for c in configs if not c.backend.startswith(others)), MLX_LM)


def kv_shapes(model: nn.Module, compress_sliding: bool = False) -> list[KVShape] | None:
    """Shapes of the KV layers in order, or None if the model cannot be probed."""
    shapes = [layer.shape for layer in kv_layers(model, None, compress_sliding).layers]
    known = [shape for shape in shapes if shape is not None]
    return known if known and len(known) == len(shapes) else None


def shape_bits(
    pairs: Sequence[tuple[Any, Any]], shapes: Sequence[KVShape]
) -> tuple[float, float, float]:
    """Bits per value of K, of V and of both, with one pair of formats for each KV layer."""
    return bits_per_value(
        list(pairs),
        [s.k_head_dim for s in shapes],
        [s.v_head_dim for s in shapes],
        [s.n_kv_heads for s in shapes],
    )


def _bits(pairs: Sequence[tuple[Any, Any]], shapes: list[KVShape] | None) -> dict[str, Any]:
    if shapes is None:
        return {}
    k, v, both = shape_bits(pairs, shapes)
    by_layer = [
        (k.bits_per_value(s.k_head_dim), v.bits_per_value(s.v_head_dim))
        for (k, v), s in zip(pairs, shapes)
    ]
    return {"layer_bits": by_layer, "k_bits": k, "v_bits": v, "bits": both}
