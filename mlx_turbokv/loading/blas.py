"""OpenBLAS for MLX on Linux, and a check that MLX has a back-end.

MLX's CPU wheel for Linux links the reference BLAS. An OpenBLAS whose symbols are global before
MLX is loaded replaces it and is many times faster in float32, so ``preload`` runs before the
first ``import mlx.core``.
"""

from __future__ import annotations

import ctypes
import os
import sys

from ..errors import InputError

SWITCH = "TURBOKV_OPENBLAS"
_LIBRARIES = ("libopenblas.so.0", "libopenblasp.so.0")
_in_use = False


def preload() -> bool:
    """Load OpenBLAS for MLX where it is installed; returns whether MLX will use it.

    Does nothing outside Linux, with ``TURBOKV_OPENBLAS=0``, and once MLX is loaded.
    """
    global _in_use
    if not sys.platform.startswith("linux") or _in_use:
        return _in_use
    if _is_openblas_global():
        _in_use = True
    elif os.environ.get(SWITCH, "1") != "0" and "mlx.core" not in sys.modules:
        _in_use = any(_load(name) for name in _LIBRARIES)
    return _in_use


def openblas_in_use() -> bool:
    """Whether MLX's matrix products on the CPU go through OpenBLAS."""
    return _in_use


def how_to_get_openblas() -> str:
    """What to do so that MLX runs on OpenBLAS, as the end of a sentence."""
    if os.environ.get(SWITCH, "1") == "0":
        return f"unset {SWITCH}"
    if any(_load(name) for name in _LIBRARIES):
        return "import mlx_turbokv before mlx.core"
    return "Debian and Ubuntu: apt install libopenblas0"


def require_mlx() -> None:
    """Import ``mlx.core``.

    Raises:
        InputError: MLX is installed without a back-end, as plain ``mlx`` is on Linux.
    """
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"MLX cannot be loaded ({error}); on Linux install a back-end with "
            'pip install "mlx_turbokv[cpu]" or, for an NVIDIA GPU, "mlx_turbokv[cuda]".'
        ) from error


def _load(name: str) -> bool:
    try:
        ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _is_openblas_global() -> bool:
    """Whether OpenBLAS is loaded for the whole process, as by LD_PRELOAD."""
    try:
        return hasattr(ctypes.CDLL(None), "openblas_get_config")
    except OSError:
        return False
