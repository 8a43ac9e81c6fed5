"""A packed, layer-aware KV cache for mlx-lm models.

    from mlx_turbokv import attach
    attach(model)  # or policy="near-lossless", or k="q8_0", v="turbo3"

and everything in mlx-lm that makes a cache for ``model`` makes a packed one.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .loading import blas

__version__ = "0.1.0"

_WHERE = {
    "KVFormat": "quant.formats",
    "InputError": "errors",
    "Policy": "policy",
    "Uniform": "policy",
    "Boundary": "policy",
    "LastN": "policy",
    "LayerList": "policy",
    "load_policy": "policy",
    "TurboKVCache": "cache",
    "TurboRotatingKVCache": "cache",
    "make_prompt_cache": "cache",
    "attach": "cache",
    "detach": "cache",
}
__all__ = [*_WHERE, "__version__"]

blas.preload()


def __getattr__(name: str) -> Any:
    """Import the public names at first use: MLX is loaded only when it is needed."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _WHERE[name]
    if module == "cache":
        blas.require_mlx()
    return getattr(import_module(f".{module}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
