"""The environment, model and command that every results file records."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import __version__
from ..loading import blas

if TYPE_CHECKING:
    from ..loading.models import Loaded


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def device_name() -> str:
    """The device that MLX computes on, in words."""
    device = mx.default_device()
    if device.type == mx.DeviceType.gpu:
        info = mx.device_info(device)
        return str(info.get("device_name") or info.get("architecture") or "gpu")
    return f"{_processor()} (CPU)"


def _processor() -> str:
    """The processor that Python runs on, in words."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            for line in f:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def command_line() -> str:
    """The command that runs now, with files by their names alone."""
    words = [sys.argv[0], *sys.argv[1:]]
    return shlex.join(os.path.basename(w) if os.path.isabs(w) else w for w in words)


def checkout_commit() -> str | None:
    """The commit of the checkout that the package runs from, a plus where files differ from it.

    None where the package is installed away from its repository.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict:
    """Versions, device and processor, for the record of a run."""
    return {
        "mlx_turbokv": __version__,
        "mlx": _version("mlx"),
        "mlx_lm": _version("mlx-lm"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device_name(),
        "processor": _processor(),
        "openblas": blas.openblas_in_use(),
    }


def _weights(model: nn.Module) -> list[tuple[str, mx.array]]:
    weights: Any = tree_flatten(model.parameters())
    return weights


def model_record(loaded: Loaded) -> dict:
    """A model in a record: name, file or id, dtype of its K and V."""
    dtypes = [x.dtype for _, x in _weights(loaded.model) if mx.issubdtype(x.dtype, mx.floating)]
    # Activations, and so K and V, have the widest type among the weights.
    widest = max(dtypes, key=lambda d: d.size, default=None)
    source = str(loaded.source)
    return {
        "name": loaded.name,
        # A path would describe this machine, not the model.
        "source": os.path.basename(source.rstrip("/")) if os.path.exists(source) else source,
        "dtype": str(widest).removeprefix("mlx.core."),
        "kv_itemsize": widest.size if widest is not None else None,
    }
