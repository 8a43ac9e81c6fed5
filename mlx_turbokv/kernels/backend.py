"""Which back-end packs and reads the cache: chosen once, by name or by what the machine has."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import mlx.core as mx

from ..checked import Kind
from ..errors import InputError
from ..log import warn_once
from ..quant.layout import KVLayout
from . import (
    assemble,
    decode,
    dequantize,
    pack,
    reference,
    requantize,
    selfcheck,
    tables,
    trust,
    tuning,
)
from .segment_rows import segment_rows
from .segments import SegmentedKV, dequantized
from .trust import UntrustedKernelError

trust.checker = selfcheck.problem
ENVIRONMENT = "TURBOKV_BACKEND"
BACKENDS = ("auto", "metal", "cuda", "reference")
BACKEND = Kind(f"one of {', '.join(map(repr, BACKENDS))}", lambda x: isinstance(x, str) and bool(x))


class Backend(NamedTuple):
    """The operations on packed rows, as one implementation has them.

    Args:
        attention: of any number of queries, in plain ops.
        decode, rotated_rows: the kernels for few queries and for many, which
            attention/dispatch.py chooses between; None for the reference.
    """

    name: str
    pack: Callable
    dequantize: Callable
    attention: Callable = reference.attention
    decode: Callable | None = None
    rotated_rows: Callable | None = None
    forced: bool = False

    @property
    def request(self) -> str:
        """The name that chooses this back-end again: by auto, where nobody asked for it."""
        return self.name if self.forced or self.decode is None else "auto"

    def covering(self, layout: KVLayout) -> Backend:
        """This back-end, or the reference where its kernels don't handle a layout.

        Raises:
            InputError: they don't, and the back-end was asked for by name.
        """
        if self.decode is None or _covered(self.name, self.forced, layout):
            return self
        return REFERENCE

    def requantize(self, tiles: mx.array, layout: KVLayout, new: KVLayout) -> mx.array:
        """Tiles in other formats of the same basis, as ``requantize.requantize``."""
        own = self.covering(layout)
        read = own.rotated_rows or reference.rotated_rows
        return requantize.requantize(tiles, layout, new, read, own.pack)


REFERENCE = Backend("reference", reference.pack, reference.dequantize)


def select_backend(name: str | None = None) -> Backend:
    """The back-end called ``name``; None asks the environment variable, then the machine.

    Raises:
        InputError: no such back-end, or this machine does not have it.
    """
    if name is not None:
        BACKEND("backend", name)
    return _selected(name or os.environ.get(ENVIRONMENT) or "auto", assemble.factory)


@cache
def _selected(name: str, factory: Callable | None) -> Backend:
    """``factory``, that of assemble.py, is a part of the key: it decides what is available."""
    name = name.lower()
    if name not in BACKENDS:
        raise InputError(f"Unknown back-end {name!r}: accepted are {', '.join(BACKENDS)}.")
    available = available_backends()
    if name == "auto":
        return _backend(available[0], forced=False)
    if name not in available:
        raise InputError(
            f"Back-end {name!r} is not available here: accepted are auto, {', '.join(available)}."
        )
    return _backend(name, forced=True)


def available_backends() -> tuple[str, ...]:
    """What this machine has, the best first."""
    return _available(assemble.factory)


@cache
def _available(factory: Callable | None) -> tuple[str, ...]:
    names = []
    if factory is not None or mx.metal.is_available():
        names.append("metal")
    if mx.cuda.is_available():
        names.append("cuda")
    return (*names, "reference")


@cache
def _backend(name: str, forced: bool) -> Backend:
    if name == "reference":
        return REFERENCE
    return Backend(
        name,
        partial(_pack, name, forced),
        partial(_dequantize, name, forced),
        decode=partial(_decode, name, forced),
        rotated_rows=partial(_rotated_rows, name, forced),
        forced=forced,
    )


def _pack(name, forced, keys, values, layout, tail=None, n_tail=0, **options):
    if _covered(name, forced, layout):
        try:
            return pack.pack(keys, values, layout, tail, n_tail, **options, backend=name)
        except UntrustedKernelError as error:
            _refuse(name, forced, error)
    return reference.pack(keys, values, layout, tail, n_tail, **options)


def _dequantize(name, forced, packed, dtype):
    covered = _covered(name, forced, packed.layout)
    if isinstance(packed, SegmentedKV):
        read = partial(_rotated_rows, name, forced) if covered else reference.rotated_rows
        return dequantized(packed, dtype, read)
    if covered:
        try:
            return dequantize.dequantize(packed, dtype, backend=name)
        except UntrustedKernelError as error:
            _refuse(name, forced, error)
    return reference.dequantize(packed, dtype)


def _decode(name, forced, queries, packed, scale, causal=False, sinks=None, left_padding=None):
    given = queries, packed, scale, causal, sinks, left_padding
    try:
        return decode.decode(*given, backend=name)
    except UntrustedKernelError as error:
        failed = error
    try:  # where doctor --tune had chosen another tuning
        output = decode.decode(*given, backend=name, cut=tuning.built_in(name))
        warn_once(f"{failed} The built-in tuning takes over: run `mlx_turbokv doctor --tune`.")
        return output
    except UntrustedKernelError as error:
        _refuse(name, forced, error)
    mask = "causal" if causal else None
    return reference.attention(queries, packed, scale, mask, sinks, left_padding)


def _rotated_rows(name, forced, packed, dtype, first, count):
    try:
        if isinstance(packed, SegmentedKV):
            return segment_rows(packed, dtype, (first, count), name)
        return dequantize.rotated_rows(packed, dtype, first, count, name)
    except UntrustedKernelError as error:
        _refuse(name, forced, error)
    return reference.rotated_rows(packed, dtype, first, count)


def _refuse(name: str, forced: bool, error: UntrustedKernelError) -> None:
    """Say that the reference takes over from a kernel that failed its check.

    Raises:
        InputError: the back-end was asked for by name.
    """
    if forced:
        raise InputError(
            f"Back-end {name!r} cannot be used here: {error} Accepted are auto and reference; "
            "`mlx_turbokv doctor` makes a report."
        ) from error
    warn_once(
        f"{error} The reference back-end takes over, which is slower: run `mlx_turbokv doctor` "
        "and report what it says."
    )


@cache
def _covered(name: str, forced: bool, layout: KVLayout) -> bool:
    """Whether the kernels handle a layout.

    Raises:
        InputError: they do not, and the back-end was asked for by name.
    """
    reason = tables.uncovered(layout)
    if reason is None:
        return True
    pair = f"K {layout.k_format} with V {layout.v_format}"
    if forced:
        raise InputError(
            f"Back-end {name!r} does not cover {pair}, {reason}: accepted are auto and reference."
        )
    warn_once(f"{pair} runs on the reference back-end: {reason}.")
    return False
