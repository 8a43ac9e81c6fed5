"""Checks of a prompt cache file: of its header before it is loaded, of its caches before their use.

Errors are ValueErrors whose text goes into a sentence about the file, read_prompt_header's
InputErrors.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import ArraysCache, CacheList, ChunkedKVCache, KVCache, RotatingKVCache

from ..errors import InputError
from ..safetensors import Header, read_header
from .base import PackedCache
from .checkpoint import Checkpoint, always_trims
from .rotating import TurboRotatingKVCache
from .state import MOST, count
from .summary import PACKED, leaves

MOST_ARRAYS = 256  # arrays and scalars of one layer
MOST_LEVELS = 8  # lists in lists
MOST_CHARACTERS = 4096  # of one string of a state
SPARE_ENTRIES = 4096  # entries of all lists that no array is named for
_ARRAY = re.compile(r"\d+(\.\d+)*", re.ASCII)
_SCALAR = re.compile(r"2\.(\d+)\.0", re.ASCII)


def check_header(header: Header, n_layers: int) -> None:
    """Compare what a header declares with what a model of ``n_layers`` can have.

    mlx-lm makes lists as long as the largest index in a name.

    Raises:
        ValueError: too many arrays, or names and strings that ask for more than the file has.
    """
    arrays, metadata = header
    most = MOST_ARRAYS * n_layers
    if len(arrays) > most:
        raise ValueError(f"it has {len(arrays):,} arrays, and {n_layers} layers at most {most:,}")
    if len(metadata) > 3 * most:
        raise ValueError(f"its metadata has {len(metadata):,} entries")
    if wrong := next((name for name in arrays if not _ARRAY.fullmatch(name)), None):
        raise ValueError(f"its array {wrong[:60]!r} is no part of a cache")
    _check_lists(arrays)
    _check_lists(metadata)
    n_named = sum(key.startswith("1.") for key in metadata)
    n_held = len({name.partition(".")[0] for name in arrays})
    if n_named != n_held:
        raise ValueError(f"it names {n_named} caches and holds {n_held}")
    for key, name in metadata.items():
        if (match := _SCALAR.fullmatch(key)) and metadata.get(f"2.{match[1]}.1") == "string":
            n = math.prod(arrays.get(name, ("", ()))[1])
            if n > MOST_CHARACTERS:
                raise ValueError(f"it has a string of {n:,} characters")


def _check_lists(names: Iterable[str]) -> None:
    """The lists that these names make are not much longer than there are names."""
    names = list(names)
    lengths: dict[str, int] = {}
    for name in names:
        parts = name.split(".", MOST_LEVELS)
        if len(parts) > MOST_LEVELS:
            raise ValueError(f"its name {name[:60]!r} is nested too deeply")
        for level, part in enumerate(parts):
            try:
                index = int(part)
            except ValueError:
                continue
            parent = ".".join(parts[:level])
            lengths[parent] = max(lengths.get(parent, 0), index + 1)
    n = sum(lengths.values())
    if n > SPARE_ENTRIES + MOST_LEVELS * len(names):
        raise ValueError(f"its names ask for {n:,} entries, and it has {len(names):,}")


def check_kinds(caches: list[Any], fresh: list[Any]) -> None:
    """The caches are as many and of the kinds that the model's are.

    Raises:
        ValueError: they are not.
    """
    if len(caches) != len(fresh):
        raise ValueError(f"it has {len(caches)} layers, and the model {len(fresh)}")
    for index, (held, wanted) in enumerate(zip(caches, fresh)):
        if _kinds(held) != _kinds(wanted):
            raise ValueError(f"its layer {index} is of another kind than the model's")


def _kinds(cache: Any) -> list[str]:
    """The classes of a cache's leaves; one name for all that hold rows of K and V."""
    names = ["list"] if isinstance(cache, CacheList) else []
    for leaf in leaves([cache]):
        if type(leaf) in (KVCache, RotatingKVCache, *PACKED):
            names.append("K and V")
        else:
            names.append(type(leaf).__name__)
    return names


def check_contents(caches: list[Any], own: list[Any] | None, n_tokens: int) -> None:
    """What each cache holds agrees with itself, with the model and with the number of tokens.

    Args:
        own: the model's own caches after one token; None for a model that needs more than tokens.

    Raises:
        ValueError: it does not.
    """
    for index, held in enumerate(caches):
        models = list(leaves([own[index]])) if own else []
        for sub, leaf in enumerate(leaves([held])):
            try:
                _check_leaf(leaf, models[sub] if models else None, n_tokens)
            except ValueError as error:
                raise ValueError(f"its layer {index} does not fit: {error}") from None
    _check_agreement(caches)


def check_checkpoint(
    checkpoint: Checkpoint | None, caches: list[Any], own: list[Any] | None
) -> None:
    """A checkpoint has a copy of every cache that cannot be trimmed, of the same kind.

    Args:
        caches, own: as ``check_contents`` takes them.

    Raises:
        ValueError: it does not.
    """
    if checkpoint is None:
        return
    held = list(leaves(caches))
    models = list(leaves(own)) if own else [None] * len(held)
    fixed = [(leaf, model) for leaf, model in zip(held, models) if not always_trims(leaf)]
    if len(fixed) != len(checkpoint.leaves):
        raise ValueError(f"its checkpoint has {len(checkpoint.leaves)} caches, not {len(fixed)}")
    for copied, (leaf, model) in zip(checkpoint.leaves, fixed):
        alike = type(copied) is type(leaf), formats(copied) == formats(leaf)
        if not all(alike) or window(copied) != window(leaf):
            raise ValueError("its checkpoint has caches of another kind")
        _check_leaf(copied, model, checkpoint.n_tokens)
    _check_agreement(checkpoint.leaves)


def _check_agreement(caches: list[Any]) -> None:
    """Models make one mask for all windows of a size, and one for all chunks."""
    found: dict[tuple[str, int | None], tuple[Any, ...]] = {}
    for leaf in leaves(caches):
        if isinstance(leaf, TurboRotatingKVCache):
            counts = leaf.keep, leaf.n_hidden, leaf.n_dropped, leaf.n_rows
        elif type(leaf) is RotatingKVCache and leaf.keys is not None:
            counts = leaf.keep, leaf._idx, leaf.offset, leaf.keys.shape[2]
        elif type(leaf) is ChunkedKVCache and leaf.keys is not None:
            counts = leaf.chunk_size, leaf.start_position
        else:
            continue
        kind = type(leaf).__name__, getattr(leaf, "max_size", None)
        if found.setdefault(kind, counts) != counts:
            raise ValueError("its windows are not of the same tokens in all layers")


def _check_leaf(held: Any, own: Any, n_tokens: int) -> None:
    if isinstance(held, ArraysCache):
        _check_arrays(held, own)
        return
    if isinstance(held, PackedCache):
        shape = None
        if held.layout is not None:
            dims = held.layout.k_head_dim, held.layout.v_head_dim
            shape = (*held.newest.shape[:2], *dims)
    elif type(held) in (KVCache, RotatingKVCache, ChunkedKVCache):
        shape = _plain_shape(held)
    else:
        return
    if isinstance(held, ChunkedKVCache):
        chunk = count(held.chunk_size, "its chunk", 1)
        if own is not None and chunk != own.chunk_size:
            raise ValueError(f"its chunk has {chunk:,} tokens, and the model's {own.chunk_size:,}")
    keys, values = getattr(own, "keys", None), getattr(own, "values", None)
    if shape is not None and keys is not None and values is not None:
        wanted = (1, keys.shape[1], keys.shape[3], values.shape[3])
        if shape != wanted:
            raise ValueError(
                f"it has (B, H, k_head_dim, v_head_dim) = {shape}, and the model {wanted}"
            )
        centre = getattr(held, "centre", None)
        if centre is not None and centre.mu.shape != (wanted[1], wanted[2]):
            raise ValueError(f"its centre is {centre.mu.shape}")
    unused, offset = shape is None and keys is None, offsets([held])
    if not unused and offset != [n_tokens]:
        raise ValueError(f"it holds {sum(offset):,} tokens, and {n_tokens:,} are listed")


def _plain_shape(cache: Any) -> tuple[int, ...] | None:
    """(B, H, k_head_dim, v_head_dim) of one of mlx-lm's own caches; None of an empty one."""
    offset = count(cache.offset, "its offset")
    if isinstance(cache, RotatingKVCache):
        max_size = count(cache.max_size, "its window", 1)
        count(cache.keep, "its number of kept tokens", 0, max_size - 1)
    if cache.keys is None and cache.values is None:
        count(offset, "its offset", 0, 0)
        return None
    keys, values = _rows(cache.keys), _rows(cache.values)
    if keys.shape[:3] != values.shape[:3]:
        raise ValueError(f"its keys are {keys.shape} and its values {values.shape}")
    n = keys.shape[2]
    if isinstance(cache, RotatingKVCache):
        count(cache._idx, "its index", 0, n)
        if n < cache.max_size:
            count(offset, "its offset", 0, n)
    else:
        start = 0
        if isinstance(cache, ChunkedKVCache):
            start = count(cache.start_position, "its start", 0, offset)
        count(offset - start, "its offset", 0, n)
    return *keys.shape[:2], keys.shape[3], values.shape[3]


def _rows(array: Any) -> mx.array:
    if not isinstance(array, mx.array) or array.ndim != 4 or 0 in array.shape:
        raise ValueError("its keys or values are no array of four dimensions")
    if not mx.issubdtype(array.dtype, mx.floating):
        raise ValueError(f"its keys or values are {array.dtype}")
    return array


def _check_arrays(held: ArraysCache, own: Any) -> None:
    """A recurrent state has the shapes and the kinds of types that the model's own has."""
    arrays: Any = held.cache
    if not isinstance(arrays, list) or held.left_padding is not None or held.lengths is not None:
        raise ValueError("it is no state of one sequence")
    wanted = own.cache if isinstance(own, ArraysCache) else arrays
    if len(arrays) != len(wanted):
        raise ValueError(f"it has {len(arrays)} arrays, and the model {len(wanted)}")
    for array, model in zip(arrays, wanted):
        if not isinstance(array, (mx.array, type(None))) or (array is None) != (model is None):
            raise ValueError("it is no list of arrays")
        if array is not None and model is not None and _kind(array) != _kind(model):
            raise ValueError(f"it has an array {array.shape}, and the model {model.shape}")


def _kind(array: mx.array) -> tuple[Any, ...]:
    """Shape, and type; one type stands for all floating ones."""
    is_float = mx.issubdtype(array.dtype, mx.floating)
    return array.shape, mx.float32 if is_float else array.dtype


def offsets(caches: Iterable[Any]) -> list[int]:
    """Tokens that caches say they were given; recurrent states do not count them."""
    found = [getattr(cache, "offset", None) for cache in leaves(caches)]
    return [n for n in found if type(n) is int and n <= MOST]


def formats(cache: Any) -> str:
    """``K/V`` of a cache that grows or has a window, or the class of any other.

    Protected tokens are named where there are any.
    """
    if type(cache) in (mlx_lm_cache.KVCache, mlx_lm_cache.RotatingKVCache):
        return "f16/f16"
    if isinstance(cache, PACKED):
        protection = cache.protection
        kept = f" with {protection.sink} first and {protection.recent} newest tokens protected"
        return f"{cache.k_format}/{cache.v_format}{kept if protection else ''}"
    return type(cache).__name__


def window(cache: Any) -> str:
    """What a cache's window is called."""
    size = getattr(cache, "max_size", None)
    return "no window" if size is None else f"a window of {size} tokens"


def read_prompt_header(path: Path) -> Header:
    """The header of a prompt cache file.

    Raises:
        InputError: it cannot be read, or is no prompt cache.
    """
    try:
        return read_header(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise InputError(
            f"{path} is not a prompt cache, or it is damaged or cut short: {error}."
        ) from error
