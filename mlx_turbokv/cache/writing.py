"""Prompt cache files that are written whole or not at all."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

from mlx_lm.models import cache as mlx_lm_cache

from ..errors import InputError
from ..files import check_can_write, check_regular, replacing

TEMPORARY = ".turbokv-"


def check_target(path: Path) -> None:
    """Find out before a long run whether the file can be written after it.

    Raises:
        InputError: the name doesn't end in .safetensors, or its folder can't be written.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"The prompt cache file {path} must have a name ending in .safetensors.")
    try:
        if os.path.exists(path):
            check_regular(path)
        check_can_write(path)
    except OSError as error:
        raise InputError(
            f"The prompt cache file {path} cannot be written ({error.strerror}): give the name of "
            "a file in a folder that exists, on a disk with room."
        ) from error


def save_prompt_cache(
    path: str | os.PathLike[str], caches: list[Any], metadata: dict[str, str] | None = None
) -> None:
    """Write what mlx-lm's ``save_prompt_cache`` writes, whole or not at all.

    The file is made under another name and renamed, so whatever ends the process leaves the old
    file or the new one. What killed processes left half written in the same folder is removed.
    ``mlx_lm.models.cache.load_prompt_cache`` reads it.

    Args:
        caches: one entry a layer, packed or not.
        metadata: strings to keep in the file.

    Raises:
        InputError: it cannot be written.
    """
    prefix = f"{TEMPORARY}{_host()}-{os.getpid()}-"
    try:
        _remove_abandoned(Path(os.path.realpath(path)).parent)
        with replacing(path, prefix, ".safetensors") as temporary:
            mlx_lm_cache.save_prompt_cache(str(temporary), caches, metadata)
    except (OSError, RuntimeError) as error:
        raise InputError(f"The prompt cache file {path} cannot be written ({error}).") from error


def _host() -> str:
    """Where process ids are this process's, as a file name's part: machine and namespace."""
    name = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())[:64]
    try:
        return f"{name}_{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # not Linux
        return name


def _remove_abandoned(folder: Path) -> None:
    """Remove temporary files of this machine's processes that are no more.

    A process that cannot be asked about, or of another machine, keeps its file.
    """
    pattern = re.compile(re.escape(f"{TEMPORARY}{_host()}-") + r"(\d+)-\w+\.safetensors")
    for path in folder.iterdir():
        match = pattern.fullmatch(path.name)
        if match and path.is_file() and not path.is_symlink() and _is_dead(int(match[1])):
            path.unlink(missing_ok=True)


def _is_dead(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False
