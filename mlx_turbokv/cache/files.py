"""A prompt cache on disk, with the tokens and the conversation that it holds.

The file is what ``mlx_lm.models.cache.save_prompt_cache`` writes; its metadata says which model
made it and which tokens it holds, so that a later prompt can continue it.
"""

from __future__ import annotations

import json
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import CacheList, load_prompt_cache

from ..errors import InputError
from ..files import check_regular, replacing
from .summary import leaves

MAKER = "mlx_turbokv"
TEMPORARY = ".turbokv-"


@dataclass
class Saved:
    """What a prompt cache file holds.

    caches: mlx-lm's list, one entry a layer.
    tokens: the ids whose K and V the caches hold.
    messages: the conversation so far, where a chat template was used.
    """

    caches: list[Any]
    tokens: list[int] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)


def check_target(path: Path) -> None:
    """Find out before a long run whether the file can be written after it.

    Raises:
        InputError: the name doesn't end in .safetensors, or its folder can't be written.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"The prompt cache file {path} must have a name ending in .safetensors.")
    folder = Path(os.path.realpath(path)).parent
    try:
        if os.path.lexists(path):
            check_regular(path)
    except FileNotFoundError:
        pass  # a link to a file that is yet to be written
    except OSError as error:
        raise InputError(
            f"The prompt cache file {path} cannot be used ({error.strerror}): give the name of a "
            "file."
        ) from error
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"The folder of the prompt cache file {path} cannot be written.")


def save(path: Path, saved: Saved, model: str) -> None:
    """Write the file whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    metadata = {
        "maker": MAKER,
        "model": model,
        "tokenizer_config": "{}",
        "tokens": json.dumps(saved.tokens),
        "messages": json.dumps(saved.messages),
    }
    save_prompt_cache(path, saved.caches, metadata)


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


def load(path: Path, model: str, fresh: list[Any], same_formats: bool) -> Saved:
    """Read a prompt cache for a model.

    model: what ``save`` was told.
    fresh: empty caches of the model, as this run would use them.
    same_formats: whether the file's K and V formats must be those of ``fresh``.

    Raises:
        InputError: cut short, not a prompt cache of this package, of another model or shape, or
            of other formats.
    """
    _check_extents(path)
    try:
        caches, metadata = load_prompt_cache(str(path), return_metadata=True)
        # Everything is read now, because saving replaces the file.
        mx.eval([cache.state for cache in caches])
        maker = metadata.get("maker") if isinstance(metadata, dict) else None
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{path} is not a prompt cache that can be read ({error}).") from error
    if maker != MAKER:
        raise InputError(
            f"{path} was not saved by mlx_turbokv.generate; accepted is a file that it saved."
        )
    if metadata.get("model") != model:
        raise InputError(
            f"The prompt cache file {path} belongs to the model {metadata.get('model')!r}, not to "
            f"{model!r}."
        )
    _check_match(path, caches, fresh, same_formats)
    try:
        tokens, messages = json.loads(metadata["tokens"]), json.loads(metadata["messages"])
    except (KeyError, ValueError) as error:
        raise InputError(f"The prompt cache file {path} does not say what it holds.") from error
    return Saved(caches, tokens, messages)


def _check_extents(path: Path) -> None:
    """MLX reads a safetensors file's data lazily and doesn't notice that it ends too early."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, size)))
        ends = [value["data_offsets"][1] for key, value in header.items() if key[:2] != "__"]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is not a prompt cache: it is no safetensors file.") from error
    if 8 + length + max(ends, default=0) != size:
        raise InputError(f"The prompt cache file {path} is damaged or cut short.")


def _check_match(path: Path, caches: list[Any], fresh: list[Any], same_formats: bool) -> None:
    if len(caches) != len(fresh):
        raise InputError(
            f"The prompt cache file {path} has {len(caches)} layers and the model {len(fresh)}."
        )
    for index, (held, wanted) in enumerate(zip(caches, fresh)):
        if isinstance(wanted, CacheList) != isinstance(held, CacheList):
            raise InputError(f"Layer {index} of the prompt cache file {path} is of another kind.")
    held_leaves, wanted_leaves = list(leaves(caches)), list(leaves(fresh))
    for held, wanted in zip(held_leaves, wanted_leaves):
        held_formats, wanted_formats = _formats(held), _formats(wanted)
        held_window, wanted_window = _window(held), _window(wanted)
        if held_window != wanted_window:
            raise InputError(
                f"The prompt cache file {path} holds a layer with {held_window} where "
                f"{wanted_window} is asked for: give the --max-kv-size that it was made with."
            )
        if held_formats != wanted_formats and (
            same_formats or "/" not in held_formats or "/" not in wanted_formats
        ):
            raise InputError(
                f"The prompt cache file {path} holds {held_formats} where {wanted_formats} is "
                "asked for; leave the cache options away to go on with the file's own."
            )


def _formats(cache: Any) -> str:
    """``K/V`` of a cache that grows or has a window, or the class of any other."""
    if type(cache) in (mlx_lm_cache.KVCache, mlx_lm_cache.RotatingKVCache):
        return "f16/f16"
    if hasattr(cache, "k_format"):
        return f"{cache.k_format}/{cache.v_format}"
    return type(cache).__name__


def _window(cache: Any) -> str:
    """What a cache's window is called."""
    return f"a window of {cache.max_size} tokens" if hasattr(cache, "max_size") else "no window"
