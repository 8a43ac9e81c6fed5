"""The configurations of an evaluation: a name for each way of storing K and V.

Names: `K/V` (one pair in every layer), a policy's name or file, `K/V@POLICY` and `POLICY:K` (the
formats that a policy leaves open), and `mlx-kvN[:GROUP]`, mlx-lm's own affine `kv_bits` cache.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.nn as nn

from ..cache.factory import CacheFactory
from ..errors import InputError
from ..kernels.backend import select_backend
from ..model.kv_layers import kv_layers
from ..model.probing import probe_shapes
from ..model.shapes import KVShape
from ..policy import LayerList, Policy, Uniform, load_policy
from ..quant.formats import as_format
from .mlx_lm_quantized import DEQUANTIZED, MLX_LM, make_quantized_caches, needs_dequantizing

REFERENCE = "f16/f16"
DEFAULT_CONFIGS = (
    REFERENCE,
    "q8_0/q8_0",
    "q8_0/turbo4",
    "q8_0/turbo3",
    "q8_0/turbo2",
    "la-v5",
    "la-v6",
    "la-v7",
    "mode-10",
    "turbo4/turbo4",
    "turbo3/turbo3",
)
ACCEPTED = "K/V such as q8_0/turbo3, a policy, K/V@POLICY, POLICY:K or mlx-kvN:GROUP"
_MLX_LM_NAME = re.compile(r"mlx-kv([2348])(?::(32|64|128))?")
DEFAULT_GROUP = 64


@dataclass(frozen=True)
class Prepared:
    """A configuration made ready for one model.

    name: what the table calls it.
    make_caches: makes empty caches.
    layers: names of K's and V's format in each KV layer.
    k_bits, v_bits, bits: bits per value of K, of V and of both; None if the model's shapes
        cannot be learnt.
    layer_bits: the same of K and V in each KV layer.
    backend: what packs and reads the rows: a back-end's name, or "mlx-lm" (and whether its rows
        are dequantised for attention).
    centred: what the keys are centred by, in words.
    """

    name: str
    make_caches: Callable[[], list[Any]]
    layers: list[tuple[str, str]] = field(default_factory=list)
    k_bits: float | None = None
    v_bits: float | None = None
    bits: float | None = None
    layer_bits: list[tuple[float, float]] | None = None
    backend: str = MLX_LM
    centred: str = "keys not centred"


def parse_policy(name: str) -> Policy:
    """The policy that a configuration's name stands for.

    Raises:
        InputError: an unknown format or policy.
    """
    text = name.strip()
    # A file's name may hold anything, so files come before the forms with signs in them.
    if text.lower().endswith(".json"):
        return load_policy(text)
    pair, at, policy = text.partition("@")
    if at:
        return load_policy(policy, *_pair(pair, name))
    if "/" in text and not re.match(r"(?i)(boundary|last):", text):
        return Uniform(*_pair(text, name))
    # boundary:2,2:f16 has colons of its own, and takes K by K/V@boundary:...
    if ":" in text and not re.match(r"(?i)(boundary|last):", text):
        policy, _, k = text.partition(":")
        return load_policy(policy, as_format(k))
    try:
        return load_policy(text)
    except InputError:
        raise InputError(f"Unknown configuration {name!r}: accepted are {ACCEPTED}.") from None


def _pair(text: str, name: str) -> tuple:
    parts = text.split("/")
    if len(parts) != 2:
        raise InputError(f"Unknown configuration {name!r}: accepted are {ACCEPTED}.")
    return as_format(parts[0]), as_format(parts[1])


def check_name(name: str) -> None:
    """Check a configuration's name before any model is loaded.

    Raises:
        InputError: as `parse_policy`.
    """
    if not _MLX_LM_NAME.fullmatch(name.strip().lower()):
        parse_policy(name)


def fitting(
    model: nn.Module, names: Sequence[str], backend: str | None = None
) -> tuple[list[str], list[str]]:
    """The names that fit a model, and a sentence on each that does not."""
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
            window, and is not concerned.
        timed: its speed is asked for: mlx-lm's quantised cache has mlx-lm's attention, even on a
            device that lacks it.

    Raises:
        InputError: an unknown name, or one that does not fit the model.
    """
    if isinstance(config, str) and (found := _MLX_LM_NAME.fullmatch(config.strip().lower())):
        bits, group = int(found[1]), int(found[2] or DEFAULT_GROUP)
        return _prepare_mlx_lm(model, name or config, bits, group, timed)
    policy = parse_policy(config) if isinstance(config, str) else config
    factory = CacheFactory(
        model,
        policy,
        None if backend == "auto" else backend,
        centre=centre,
        compress_sliding=compress_sliding,
    )
    pairs = [factory.formats[layer.ordinal] for layer in factory.layers.layers]
    packed = not all(k.is_f16 and v.is_f16 for k, v in pairs)
    shapes = kv_shapes(model, compress_sliding)
    return Prepared(
        name=name or (config if isinstance(config, str) else policy.name),
        make_caches=factory,
        layers=[(str(k), str(v)) for k, v in pairs],
        **_bits([(k.bits_per_value, v.bits_per_value) for k, v in pairs], shapes),
        backend=select_backend(factory.backend).name if packed else MLX_LM,
        centred=factory.centring.summary(),
    )


def backend_of(configs: Sequence[Prepared]) -> str:
    """The back-end of a run: that of its packed caches, or mlx-lm where there are none."""
    return next(
        (c.backend for c in configs if not c.backend.startswith(MLX_LM)),
        MLX_LM,
    )


def prepare_layers(
    model: nn.Module,
    pairs: list[tuple[str, str]],
    name: str,
    backend: str | None = None,
    centre: Any = True,
) -> Prepared:
    """A configuration from one pair of formats a KV layer."""
    return prepare(model, LayerList(tuple(pairs), name), backend, name, centre)


def _prepare_mlx_lm(model: nn.Module, name: str, bits: int, group: int, timed: bool) -> Prepared:
    found = kv_layers(model)
    shapes = kv_shapes(model)
    for shape in shapes or []:
        for head_dim in (shape.k_head_dim, shape.v_head_dim):
            if head_dim % group:
                raise InputError(
                    f"Configuration {name!r} does not fit head_dim {head_dim}: its group of "
                    f"{group} must divide it."
                )
    label = f"affine{bits}:{group}"

    def cost(_head_dim: int, itemsize: int = 2) -> float:
        return bits + 2 * 8 * itemsize / group  # a scale and a bias a group

    dequantized = needs_dequantizing() and not timed
    return Prepared(
        name=name,
        make_caches=partial(make_quantized_caches, model, bits, group, dequantized),
        layers=[(label, label)] * len(found.layers),
        backend=DEQUANTIZED if dequantized else MLX_LM,
        **_bits([(cost, cost)] * len(found.layers), shapes),
    )


def kv_shapes(model: nn.Module, compress_sliding: bool = False) -> list[KVShape] | None:
    """Shapes of the KV layers in order, or None if the model cannot be probed."""
    layers = kv_layers(model, None, compress_sliding)
    found = probe_shapes(model, layers.positions)
    wanted = [(x.index, x.sub) for x in layers.layers]
    return [found[at] for at in wanted] if wanted and all(at in found for at in wanted) else None


def _bits(costs: list[tuple[Callable, Callable]], shapes: list[KVShape] | None) -> dict:
    if shapes is None:
        return {}
    k_values = sum(s.n_kv_heads * s.k_head_dim for s in shapes)
    v_values = sum(s.n_kv_heads * s.v_head_dim for s in shapes)
    k_bits = sum(s.n_kv_heads * s.k_head_dim * k(s.k_head_dim) for (k, _), s in zip(costs, shapes))
    v_bits = sum(s.n_kv_heads * s.v_head_dim * v(s.v_head_dim) for (_, v), s in zip(costs, shapes))
    by_layer = [(k(s.k_head_dim), v(s.v_head_dim)) for (k, v), s in zip(costs, shapes)]
    return {
        "layer_bits": by_layer,
        "k_bits": k_bits / k_values,
        "v_bits": v_bits / v_values,
        "bits": (k_bits + v_bits) / (k_values + v_values),
    }
