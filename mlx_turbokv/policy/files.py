"""Policy files: one pair of formats a KV layer, as JSON.

    {"version": 1, "sink": 32, "recent": 128, "layers": [{"k": "q8_0", "v": "turbo2"}, ...]}

``sink`` and ``recent``, the numbers of protected tokens, may be absent.
Further keys (the model, how the list was found) are kept by writers and ignored by readers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from ..errors import InputError, short
from ..files import parse_json, read_text, write_text
from ..quant.formats import NAME, KVFormat, as_format
from .policies import LayerList, Pair
from .protection import Protection, check_count

VERSION = 1
_PROTECTED = tuple(field.name for field in fields(Protection))
_LAYER = 'an object such as {"k": "q8_0", "v": "turbo3"}'


def read_layer_list(path: str | os.PathLike) -> LayerList:
    """Read a policy file.

    Raises:
        InputError: the file is missing, is not JSON, or has another schema or version.
    """
    path = Path(path)
    try:
        document = parse_json(read_text(path))
    except OSError as error:
        raise InputError(f"Policy file {str(path)!r} cannot be read: {error.strerror}.") from None
    except ValueError:
        raise InputError(f"Policy file {str(path)!r} is not JSON text.") from None
    if not isinstance(document, dict):
        raise InputError(
            f"Policy file {str(path)!r} is not a JSON object: one with 'version' and 'layers' is "
            "accepted."
        )
    if "version" not in document:
        raise InputError(
            f'Policy file {str(path)!r} names no version: "version": {VERSION} is accepted.'
        )
    found = document["version"]
    if type(found) is not int or found != VERSION:
        raise InputError(
            f"Policy file {str(path)!r} has version {short(found)}: version {VERSION} is accepted."
        )
    if "layers" not in document:
        raise InputError(
            f"Policy file {str(path)!r} has no list named 'layers': one with {_LAYER} for each KV "
            "layer is accepted."
        )
    layers = document["layers"]
    if not isinstance(layers, list) or not layers:
        raise InputError(
            f"Policy file {str(path)!r}: 'layers' is {short(layers)}; a list with {_LAYER} for "
            "each KV layer is accepted."
        )
    pairs = tuple(_read_pair(path, ordinal, layer) for ordinal, layer in enumerate(layers))
    try:
        protected = {
            name: check_count(name, document[name]) for name in _PROTECTED if name in document
        }
    except InputError as error:
        raise InputError(f"Policy file {str(path)!r}: {error}") from None
    return LayerList(pairs, path.stem, str(path)).protecting(**protected)


def _read_pair(path: Path, ordinal: int, layer: object) -> Pair:
    where = f"Policy file {str(path)!r}, layer {ordinal}"
    if not isinstance(layer, dict):
        raise InputError(f"{where}: {short(layer)} is not accepted: give {_LAYER}.")
    for name in ("k", "v"):
        if name not in layer:
            raise InputError(f"{where} has no {name!r}: {_LAYER} is accepted.")
    try:
        for name in ("k", "v"):
            NAME(name, layer[name])
        return as_format(layer["k"]), as_format(layer["v"])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def write_layer_list(
    path: str | os.PathLike,
    pairs: Iterable[tuple[KVFormat | str, KVFormat | str]],
    protection: Protection | None = None,
    **metadata: object,
) -> None:
    """Write a policy file; the old file stays whole until the new one is complete.

    Args:
        protection: the protected tokens that the policy asks for; None leaves them open.
        metadata: further keys of the document that JSON can hold.

    Raises:
        InputError: the folder cannot be written.
    """
    path = Path(path)
    document = {
        "version": VERSION,
        **metadata,
        **({} if protection is None else asdict(protection)),
        "layers": [{"k": str(as_format(k)), "v": str(as_format(v))} for k, v in pairs],
    }
    text = json.dumps(document, indent=1) + "\n"
    try:
        write_text(path, text)
    except OSError as error:
        raise InputError(
            f"Policy file {str(path)!r} cannot be written: {error.strerror}."
        ) from None
