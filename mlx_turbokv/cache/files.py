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
import mlx.nn as nn
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import load_prompt_cache

from ..errors import InputError, short
from ..files import check_can_write, check_regular, parse_json, replacing
from ..model.fingerprint import fingerprint
from ..model.probing import after_one_token
from ..safetensors import read_header
from .base import PackedCache
from .file_checks import check_contents, check_header, check_kinds, formats, window
from .state import MOST
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
    try:
        if os.path.exists(path):
            check_regular(path)
        check_can_write(path)
    except OSError as error:
        raise InputError(
            f"The prompt cache file {path} cannot be written ({error.strerror}): give the name of "
            "a file in a folder that exists, on a disk with room."
        ) from error


def save(path: Path, saved: Saved, name: str, model: nn.Module) -> None:
    """Write the file whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    metadata = {
        "maker": MAKER,
        "model": name,
        "fingerprint": fingerprint(model, adapters=True),
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


def load(path: Path, name: str, model: nn.Module, fresh: list[Any], same_formats: bool) -> Saved:
    """Read a prompt cache for a model.

    Everything in it is checked before anything of it is used: the file may be from anywhere.

    Args:
        name: of the model, as ``save`` was told.
        fresh: empty caches of the model, as this run would use them.
        same_formats: whether the file's K and V formats must be those of ``fresh``.

    Raises:
        InputError: cut short, not a prompt cache of this package, of another model or shape, of
            other formats, or with values that contradict each other.
    """
    caches, metadata = read(path, len(fresh))
    if metadata.get("maker") != MAKER:
        raise InputError(
            f"{path} was not saved by mlx_turbokv.generate; accepted is a file that it saved."
        )
    if metadata.get("model") != name:
        raise InputError(
            f"The prompt cache file {path} belongs to the model {short(metadata.get('model'))}, "
            f"not to {name!r}."
        )
    # files of earlier versions name no fingerprint
    if metadata.get("fingerprint") not in (None, fingerprint(model, adapters=True)):
        raise InputError(
            f"The prompt cache file {path} belongs to another model that is called {name!r} too."
        )
    try:
        check_kinds(caches, fresh)
        _check_options(path, caches, fresh, same_formats)
        tokens, messages = _conversation(metadata)
        check_contents(caches, after_one_token(model), len(tokens))
        work_as(caches, fresh)
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"The prompt cache file {path} cannot be used: {error}.") from error
    return Saved(caches, tokens, messages)


def work_as(caches: list[Any], fresh: list[Any]) -> None:
    """Give loaded caches the back-end of a model's fresh ones, and the way they meet attention."""
    for held, wanted in zip(leaves(caches), leaves(fresh)):
        if isinstance(held, PackedCache) and isinstance(wanted, PackedCache):
            held.handles = wanted.handles
            held._backend_name = wanted._backend_name


def read(path: Path, n_layers: int) -> tuple[list[Any], dict[str, Any]]:
    """The caches of a file and its metadata, before they are compared with a model's.

    Args:
        n_layers: how many caches it holds at most.

    Raises:
        InputError: it cannot be read, is damaged, or asks for more than it holds.
    """
    try:
        header = read_header(path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    except ValueError as error:
        raise InputError(
            f"{path} is not a prompt cache, or it is damaged or cut short: {error}."
        ) from error
    try:
        check_header(header, n_layers)
        caches, metadata = load_prompt_cache(str(path), return_metadata=True)
        # Everything is read now, because saving replaces the file.
        mx.eval([cache.state for cache in caches])
        if not isinstance(metadata, dict):
            raise ValueError("it does not say who made it")
    except (
        RuntimeError,
        ValueError,
        KeyError,
        IndexError,
        TypeError,
        AttributeError,
        OverflowError,
    ) as error:  # mlx-lm takes the file's structure for granted
        text = " ".join(str(error).split()).rstrip(".")[:300]
        raise InputError(f"{path} is not a prompt cache that can be read ({text}).") from error
    return caches, metadata


def _conversation(metadata: dict[str, Any]) -> tuple[list[int], list[dict[str, str]]]:
    """The tokens and the messages of a file.

    Raises:
        ValueError: it does not say them.
    """
    texts = metadata.get("tokens"), metadata.get("messages")
    tokens, messages = (parse_json(x) if isinstance(x, str) else None for x in texts)
    if not isinstance(tokens, list) or not all(type(x) is int and 0 <= x <= MOST for x in tokens):
        raise ValueError("it does not list the tokens that it holds")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError("it does not list the messages that it holds")
    return tokens, messages


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return False
    return all(isinstance(text, str) for text in message.values())


def _check_options(path: Path, caches: list[Any], fresh: list[Any], same_formats: bool) -> None:
    """The caches have the windows that are asked for, and the formats if they are asked for."""
    for held, wanted in zip(leaves(caches), leaves(fresh)):
        if window(held) != window(wanted):
            raise InputError(
                f"The prompt cache file {path} holds a layer with {window(held)} where "
                f"{window(wanted)} is asked for: give the --max-kv-size that it was made with."
            )
        if same_formats and formats(held) != formats(wanted):
            raise InputError(
                f"The prompt cache file {path} holds {formats(held)} where {formats(wanted)} is "
                "asked for; omit the cache options to keep the formats of the file."
            )
