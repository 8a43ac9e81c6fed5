"""Which back-end packs and reads the cache: chosen once, by name or by what the machine has."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

from ..errors import InputError
from . import reference

ENVIRONMENT = "TURBOKV_BACKEND"
BACKENDS = ("auto", "metal", "cuda", "reference")


class Backend(NamedTuple):
    """The three operations on packed rows, as one implementation has them."""

    name: str
    pack: Callable
    attention: Callable
    dequantize: Callable


def select_backend(name: str | None = None) -> Backend:
    """The back-end called ``name``; None asks the environment variable, then the machine.

    Raises:
        InputError: no such back-end, or this machine does not have it.
    """
    return _backend((name or os.environ.get(ENVIRONMENT) or "auto").lower())


@lru_cache(maxsize=None)
def _backend(name: str) -> Backend:
    if name not in BACKENDS:
        raise InputError(f"Unknown back-end {name!r}: accepted are {', '.join(BACKENDS)}.")
    if name in ("metal", "cuda"):
        raise InputError(f"Back-end {name!r} is not available here: accepted is reference.")
    return Backend("reference", reference.pack, reference.attention, reference.dequantize)
