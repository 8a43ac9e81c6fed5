"""The references of a model's keys: a mean key for each KV layer, in memory and in files.

A file of references is two: NAME.keys.safetensors with one array a layer, and NAME.keys.json with
what it belongs to. ``calibrate`` writes them beside the policy NAME.json, where they are found.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError
from ..model.fingerprint import fingerprint

MAKER = "mlx_turbokv key references"
VERSION = 1
ATTRIBUTE = "turbokv_references"


@dataclass(frozen=True)
class References:
    """Calibrated references.

    Args:
        means: by ordinal of the KV layer, [H, head_dim] float32.
        without_rope: ordinals of the layers whose keys do not depend on the position.
        model: the fingerprint of the model that they belong to.
        record: where they come from: sha256 of the text, tokens, first tokens left out.
    """

    means: dict[int, mx.array]
    without_rope: frozenset[int]
    model: str
    record: dict[str, Any] = field(default_factory=dict)


def set_references(model: nn.Module, references: References | None) -> None:
    """Give a model references of its own: whatever makes its caches finds them; None takes them."""
    vars(model).pop(ATTRIBUTE, None)
    if references is not None:
        setattr(model, ATTRIBUTE, references)


def paths_for(path: str | os.PathLike) -> tuple[Path, Path]:
    """The safetensors and the JSON file of references called ``path``.

    ``path`` is either of them, or the policy file that they lie beside.
    """
    path = Path(path)
    name = path.name
    for end in (".keys.safetensors", ".keys.json", ".json"):
        if name.lower().endswith(end):
            name = name[: -len(end)]
            break
    return path.with_name(f"{name}.keys.safetensors"), path.with_name(f"{name}.keys.json")


def save_references(path: str | os.PathLike, references: References) -> None:
    """Write references to the two files called ``path`` (see ``paths_for``).

    Raises:
        InputError: they cannot be written.
    """
    arrays_file, json_file = paths_for(path)
    record = {
        "maker": MAKER,
        "version": VERSION,
        "model": references.model,
        "layers": sorted(references.means),
        "unturned": sorted(references.without_rope),
        "record": references.record,
    }
    try:
        arrays = {f"layer.{i}": mean for i, mean in references.means.items()}
        mx.save_safetensors(str(arrays_file), arrays)
        json_file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise InputError(f"The key references {json_file} cannot be written ({error}).") from error


def load_references(path: str | os.PathLike, model: nn.Module) -> References:
    """Read references, and check that they are of ``model``.

    Raises:
        InputError: a file is missing or damaged, or belongs to another model.
    """
    arrays_file, json_file = paths_for(path)
    for file in (json_file, arrays_file):
        if not file.is_file():
            raise InputError(
                f"There are no key references at {file}; calibrate --keys writes them."
            )
    try:
        record = json.loads(json_file.read_text(encoding="utf-8"))
        if record["maker"] != MAKER or record["version"] != VERSION:
            raise ValueError(f"maker {record['maker']!r}, version {record['version']}")
        arrays: Any = mx.load(str(arrays_file))
        means = {int(i): arrays[f"layer.{i}"].astype(mx.float32) for i in record["layers"]}
        mx.eval(means)
        without_rope = frozenset(int(i) for i in record["unturned"])
        references = References(means, without_rope, record["model"], record["record"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(
            f"{json_file} holds no key references that can be read ({error})."
        ) from error
    if references.model != fingerprint(model):
        raise InputError(f"The key references {json_file} belong to another model.")
    return references
