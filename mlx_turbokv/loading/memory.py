"""What a model takes: bytes of its weights, of its caches by tokens, and of reading a prompt."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.cache import ArraysCache, make_prompt_cache

from ..cache.summary import leaves
from ..model.probing import after_one_token

# A layer's packed rows are dequantised for many queries in slices of this many bytes at most.
DEQUANTIZE_BYTES = 128 << 20
MOST_ROWS = 1 << 16  # more are counted in proportion
TABLES_BYTES = 1 << 20  # codebooks, rotations, masks of a step
ROUND = 256  # tokens; what caches take is computed once for so many
# Activations of a layer at the same time, in widths: of the residual stream, and of the widest
# projection (gate, up and their product). MLX runs some operations ahead, so twice that.
RESIDUALS, PROJECTIONS, AHEAD = 4, 3, 2


class Footprint:
    """Bytes that a model and its caches take; nothing is computed for it but shapes.

    Args:
        models: with what is attached to them; a model, or a model and its draft model.
        step: prompt tokens at a time.
        caches: empty ones of the first model; None: those that mlx-lm makes for it.
    """

    def __init__(
        self, models: Iterable[nn.Module], step: int, caches: list[Any] | None = None
    ) -> None:
        models = list(models)
        self.step = step
        self.weights = sum(_weight_bytes(model) for model in models)
        self._activations = max((activation_bytes(model) for model in models), default=0)
        self._heads = max((_n_heads(model) for model in models), default=0)
        self._leaves: list[tuple[Any, Any, int]] | None = []
        for model in models:
            own = after_one_token(model)
            if own is None:
                self._leaves = None
                return
            kinds: dict[Any, tuple[Any, Any, int]] = {}
            empty = make_prompt_cache(model) if caches is None else caches
            caches = None
            for fresh, held in zip(leaves(empty), leaves(own)):
                key = _kind(fresh, held)
                n = kinds[key][2] if key in kinds else 0
                kinds[key] = fresh, _shapes(held), n + 1
            self._leaves += kinds.values()
        self.cache_bytes = lru_cache(maxsize=1024)(self._cache_bytes)

    @property
    def is_known(self) -> bool:
        """Whether the caches' sizes are known: not of a model that needs more than tokens."""
        return self._leaves is not None

    def caches(self, n_tokens: int) -> int:
        """Bytes of a sequence's caches after ``n_tokens``."""
        return self.cache_bytes(-(-n_tokens // ROUND) * ROUND) if self.is_known else 0

    def scratch(self, n_tokens: int, n_sequences: int = 1) -> int:
        """Bytes above weights and caches while a prompt of ``n_tokens`` is read."""
        if mx.default_device() == mx.gpu:
            return gpu_scratch(n_tokens, self.step, self._activations, n_sequences)
        n = min(self.step, n_tokens) * n_sequences
        # MLX's CPU back-end makes all scores, and their softmax, in float32
        return TABLES_BYTES + n * (self._activations + 2 * 4 * self._heads * n_tokens)

    def _cache_bytes(self, n_tokens: int) -> int:
        return sum(n * _bytes_after(fresh, shapes, n_tokens, self.step)
                   for fresh, shapes, n in self._leaves or ())  # fmt: skip


def gpu_scratch(n_tokens: int, step: int, activations: int, n_sequences: int = 1) -> int:
    """Bytes above weights and caches while a GPU reads a prompt of ``n_tokens``.

    Args:
        step: prompt tokens at a time.
        activations: bytes of one token, as ``activation_bytes`` says.
    """
    n = min(step, n_tokens) * n_sequences
    # a mask takes a byte a pair of tokens
    return TABLES_BYTES + DEQUANTIZE_BYTES + n * (activations + n_tokens)


def apple_gpu_bytes(memory: int) -> int:
    """Bytes that macOS lets the GPU of a Mac with ``memory`` bytes use, at least.

    Two thirds up to 32 GiB and three quarters beyond; a newer macOS gives more. The machine itself
    says it exactly: ``default_limit``.
    """
    return memory * 2 // 3 if memory <= 32 << 30 else memory * 3 // 4


def default_limit() -> int:
    """The GPU's recommended working set, or without a GPU the machine's memory; 0: not known."""
    if mx.default_device() == mx.gpu:
        info: dict[str, Any] = mx.device_info()
        for name in ("max_recommended_working_set_size", "total_memory", "memory_size"):
            if info.get(name):
                return int(info[name])
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (OSError, ValueError):
        return 0
    return min(physical, _container_limit() or physical)


def warning(footprint: Footprint, n_tokens: int, limit: int | None = None) -> str | None:
    """A sentence where a run over ``n_tokens`` is not expected to fit; None where it is."""
    limit = default_limit() if limit is None else limit
    caches, scratch = footprint.caches(n_tokens), footprint.scratch(n_tokens)
    needed = footprint.weights + caches + scratch
    if not limit or needed <= limit:
        return None
    return (
        f"{n_tokens:,} tokens are expected to take {gigabytes(needed)} (weights "
        f"{gigabytes(footprint.weights)}, caches {gigabytes(caches)}, reading the prompt "
        f"{gigabytes(scratch)}), and there are {gigabytes(limit)}."
    )


def gigabytes(n: int) -> str:
    """Bytes as people say them."""
    return f"{n / 1e9:.2f} GB" if n >= 1e8 else f"{n / 1e6:.2f} MB"


def _container_limit() -> int | None:
    """The memory that a container may use, under Linux."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            return int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii"))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return None


def _weights(model: nn.Module) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(model.parameters())
    return found


def _weight_bytes(model: nn.Module) -> int:
    return sum({id(weight): weight.nbytes for _, weight in _weights(model)}.values())


def _arguments(model: nn.Module, *names: str) -> int:
    """The largest of these fields of a model's arguments, those of a text model included."""
    args: Any = getattr(model, "args", None)
    fields = [args, getattr(args, "text_config", None)]
    found = [0]
    for field in fields:
        for name in names:
            value = field.get(name) if isinstance(field, dict) else getattr(field, name, None)
            if isinstance(value, int):
                found.append(value)
    return max(found)


def _n_heads(model: nn.Module) -> int:
    return _arguments(model, "num_attention_heads", "n_heads", "num_heads", "n_head")


def activation_bytes(model: nn.Module) -> int:
    """Bytes of a layer's activations of one token."""
    norms = [w for name, w in _weights(model) if w.ndim == 1 and "norm" in name]
    width = max((w.size for w in norms), default=0)
    itemsize = max((w.dtype.size for w in norms), default=4)
    experts = max(1, _arguments(model, "num_experts_per_tok", "moe_topk", "moe_top_k", "top_k"))
    projections = [
        weight.shape[-2]
        for name, weight in _weights(model)
        if weight.ndim >= 2 and name.endswith("weight") and not _is_vocabulary(name)
    ]
    widest = max(projections, default=width)
    return AHEAD * itemsize * (RESIDUALS * width + PROJECTIONS * widest * experts)


def _is_vocabulary(name: str) -> bool:
    return "embed" in name or "lm_head" in name or name.endswith("wte.weight")


def _kind(fresh: Any, held: Any) -> Any:
    """What decides a leaf's size."""
    formats = getattr(fresh, "k_format", None), getattr(fresh, "v_format", None)
    window = getattr(fresh, "max_size", None), getattr(fresh, "chunk_size", None)
    centre = getattr(fresh, "centre", None)
    return type(fresh), formats, window, centre is None, _shapes(held)


def _shapes(held: Any) -> Any:
    """A leaf's bytes, where they don't grow; else (heads, k_head_dim, v_head_dim, type)."""
    if isinstance(held, ArraysCache):
        return held.nbytes
    keys, values = getattr(held, "keys", None), getattr(held, "values", None)
    if not isinstance(keys, mx.array) or not isinstance(values, mx.array):
        return 0
    return keys.shape[1], keys.shape[3], values.shape[3], keys.dtype


def _bytes_after(fresh: Any, shapes: Any, n_tokens: int, step: int) -> int:
    """Bytes of a leaf after an update of shapes alone."""
    if isinstance(shapes, int):
        return shapes
    n_heads, k_head_dim, v_head_dim, dtype = shapes
    window = getattr(fresh, "max_size", None) or getattr(fresh, "chunk_size", None)
    n = n_tokens if window is None else min(n_tokens, window + step)
    if n > MOST_ROWS:  # shapes end at 32 bits
        return -(-n * _bytes_after(fresh, shapes, MOST_ROWS, step) // MOST_ROWS)
    leaf = copy.deepcopy(fresh)
    leaf.update_and_fetch(
        mx.zeros((1, n_heads, n, k_head_dim), dtype), mx.zeros((1, n_heads, n, v_head_dim), dtype)
    )
    return leaf.nbytes
