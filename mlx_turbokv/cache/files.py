"""A prompt cache on disk, with the tokens and the conversation that it holds.

The file is what ``mlx_lm.models.cache.save_prompt_cache`` writes; its metadata says which model
made it and which tokens it holds, so that a later prompt can continue it. Files that mlx-lm wrote
are read too, and their rows packed; which tokens they hold is not known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import load_prompt_cache

from ..errors import InputError, short
from ..files import parse_json
from ..model.fingerprint import fingerprint
from ..model.probing import after_one_token
from . import end_token
from .base import PackedCache
from .checkpoint import Checkpoint
from .file_checks import (
    check_checkpoint,
    check_contents,
    check_header,
    check_kinds,
    offsets,
    read_prompt_header,
)
from .file_options import Asked
from .importing import dequantized, packed_as
from .state import MOST
from .summary import leaves
from .writing import save_prompt_cache

MAKER = "mlx_turbokv"
PROMPT = "prompt"  # the kind of a file that a conversation does not change
FOREIGN = -1  # a token in a file of mlx-lm's, which does not say which


@dataclass
class Saved:
    """What a prompt cache file holds.

    caches: mlx-lm's list, one entry a layer.
    tokens: the ids whose K and V the caches hold; FOREIGN where mlx-lm read them.
    messages: the conversation so far, where a chat template was used.
    checkpoint: of an earlier place in the conversation, where caches cannot be trimmed.
    is_prompt: whether it is a prompt that is used again and again, and no conversation.
    n_packed: layers whose rows were packed when they were read.
    end_token: the tokenizer's, where it is not the model's own.
    """

    caches: list[Any]
    tokens: list[int] = field(default_factory=list)
    messages: list[dict[str, str]] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    is_prompt: bool = False
    n_packed: int = 0
    end_token: str | None = None


def save(path: Path, saved: Saved, name: str, model: nn.Module) -> None:
    """Write the file whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    metadata = {
        "maker": MAKER,
        "model": name,
        "fingerprint": fingerprint(model, adapters=True),
        **end_token.written(saved.end_token),
        "tokens": json.dumps(saved.tokens),
        "messages": json.dumps(saved.messages),
    }
    if saved.is_prompt:
        metadata["kind"] = PROMPT
    caches = saved.caches
    if saved.checkpoint is not None:
        metadata["checkpoint"] = str(saved.checkpoint.n_tokens)
        caches = [*caches, *saved.checkpoint.leaves]
    save_prompt_cache(path, caches, metadata)


def load(
    path: Path, name: str, model: nn.Module, fresh: list[Any], asked: Asked,
    source: str | None = None,
) -> Saved:  # fmt: skip
    """Read a prompt cache for a model.

    Everything in it is checked before anything of it is used: the file may be from anywhere.

    Args:
        name: of the model, as ``save`` was told.
        fresh: empty caches of the model, as this run would use them. The rows of a file of
            mlx-lm's are packed into them.
        asked: what ``fresh`` was asked to be.
        source: what the model was loaded from, which mlx-lm's files name.

    Raises:
        InputError: cut short, not a prompt cache of this package, of another model or shape, not
            what is asked for, or with values that contradict each other.
    """
    caches, metadata = read(path, len(fresh))
    maker = metadata.get("maker")
    if maker is None and isinstance(metadata.get("tokenizer_config"), str):
        return _load_foreign(path, {name, source}, model, caches, fresh, metadata, asked)
    if maker != MAKER:
        raise InputError(
            f"{path} was not saved by mlx_turbokv nor by mlx_lm.cache_prompt; accepted is a file "
            "that one of them saved."
        )
    _check_name(path, metadata, {name})
    # files of earlier versions name no fingerprint
    if metadata.get("fingerprint") not in (None, fingerprint(model, adapters=True)):
        raise InputError(
            f"The prompt cache file {path} belongs to another model that is called {name!r} too."
        )
    with _sentences(path):
        caches, copies = caches[: len(fresh)], caches[len(fresh) :]
        check_kinds(caches, fresh)
        asked.check(path, caches, fresh)
        tokens, messages = _conversation(metadata)
        end = end_token.read(metadata)
        own = after_one_token(model)
        check_contents(caches, own, len(tokens))
        checkpoint = _checkpoint(metadata, copies, len(tokens))
        check_checkpoint(checkpoint, caches, own)
        work_as(caches, fresh)
    is_prompt = metadata.get("kind") == PROMPT
    return Saved(caches, tokens, messages, checkpoint, is_prompt, end_token=end)


def _load_foreign(
    path: Path, names: set[str | None], model: nn.Module, caches: list[Any], fresh: list[Any],
    metadata: dict[str, Any], asked: Asked,
) -> Saved:  # fmt: skip
    """A file of mlx_lm.cache_prompt's, its rows packed."""
    _check_name(path, metadata, {Path(name).name for name in names if name})
    with _sentences(path):
        end = end_token.read(metadata)
        caches = [dequantized(cache) for cache in caches]
        n_tokens = check_fit(path, caches, fresh, model)
        packed = [packed_as(held, new) for held, new in zip(caches, fresh)]
        asked.check(path, packed, fresh)
        work_as(packed, fresh)
    n_packed = sum(new is not held for new, held in zip(leaves(packed), leaves(caches)))
    tokens = [FOREIGN] * n_tokens
    return Saved(packed, tokens, is_prompt=True, n_packed=n_packed, end_token=end)


def check_fit(path: Path, caches: list[Any], fresh: list[Any], model: nn.Module) -> int:
    """Check caches of a file that lists no tokens; how many it holds.

    Raises:
        InputError: they do not fit the model, or each other.
    """
    with _sentences(path):
        check_kinds(caches, fresh)
        n_tokens = max(offsets(caches), default=0)
        if not n_tokens:
            raise ValueError("it does not say how many tokens it holds")
        check_contents(caches, after_one_token(model), n_tokens)
    return n_tokens


@contextmanager
def _sentences(path: Path) -> Iterator[None]:
    """Turns the ValueErrors of checks into sentences about the file."""
    try:
        yield
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"The prompt cache file {path} cannot be used: {error}.") from error


def _check_name(path: Path, metadata: dict[str, Any], names: set[str]) -> None:
    given = metadata.get("model")
    if given not in names and not (isinstance(given, str) and Path(given).name in names):
        raise InputError(
            f"The prompt cache file {path} belongs to the model {short(given)}, not to "
            f"{' or '.join(map(repr, sorted(names)))}."
        )


def _checkpoint(metadata: dict[str, Any], copies: list[Any], n_tokens: int) -> Checkpoint | None:
    """The checkpoint of a file.

    Raises:
        ValueError: it says something else than it holds.
    """
    n = metadata.get("checkpoint")
    if n is None and not copies:
        return None
    if not isinstance(n, str) or not re.fullmatch("[0-9]{1,10}", n) or int(n) > n_tokens:
        raise ValueError("its checkpoint is none of its tokens'")
    return Checkpoint(int(n), copies)


def work_as(caches: list[Any], fresh: list[Any]) -> None:
    """Give loaded caches the back-end of a model's fresh ones, and the way they meet attention."""
    backend = next((x._backend_name for x in leaves(fresh) if isinstance(x, PackedCache)), None)
    for held, wanted in zip(leaves(caches), leaves(fresh)):
        if isinstance(held, PackedCache) and backend is not None:
            held._backend_name = backend
            held.handles = wanted.handles if isinstance(wanted, PackedCache) else None


def read(path: Path, n_layers: int) -> tuple[list[Any], dict[str, Any]]:
    """The caches of a file and its metadata, before they are compared with a model's.

    Args:
        n_layers: how many caches it holds at most.

    Raises:
        InputError: it cannot be read, is damaged, or asks for more than it holds.
    """
    header = read_prompt_header(path)
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
    if not isinstance(tokens, list) or not _are_tokens(tokens):
        raise ValueError("it does not list the tokens that it holds")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise ValueError("it does not list the messages that it holds")
    return tokens, messages


def _are_tokens(tokens: list[Any]) -> bool:
    """Whether they are ids, after as many as mlx-lm read."""
    if not all(type(x) is int and FOREIGN <= x <= MOST for x in tokens):
        return False
    return FOREIGN not in tokens[tokens.count(FOREIGN) :]


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return False
    return all(isinstance(text, str) for text in message.values())
