"""The references of a model's keys: a mean key for each KV layer, in memory and in files.

A file of references is two: NAME.keys.safetensors with one array a layer, and NAME.keys.json with
what it belongs to. ``calibrate`` writes them beside the policy NAME.json, where they are found.
Version 2 has a second array for layers whose pairs of dims are scaled; others are version 1.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import InputError, short
from ..files import parse_json, read_text, replacing, write_text
from ..model.fingerprint import fingerprint
from ..safetensors import read_header
from .scales import check_scales

MAKER = "mlx_turbokv key references"
VERSION, SCALED_VERSION = 1, 2
ATTRIBUTE = "turbokv_references"


@dataclass(frozen=True)
class References:
    """Calibrated references.

    Args:
        means: by ordinal of the KV layer, [H, head_dim] float32.
        without_rope: ordinals of the layers whose keys do not depend on the position.
        model: the fingerprint of the model that they belong to.
        record: where they come from: sha256 of the text, tokens, first tokens left out.
        scales: of pairs of dims, by ordinal of layers that have a mean, [H, head_dim / 2] float32.
    """

    means: dict[int, mx.array]
    without_rope: frozenset[int]
    model: str
    record: dict[str, Any] = field(default_factory=dict)
    scales: dict[int, mx.array] = field(default_factory=dict)


def set_references(model: nn.Module, references: References | None) -> None:
    """Give a model references of its own: whatever makes its caches finds them; None takes them."""
    vars(model).pop(ATTRIBUTE, None)
    if references is not None:
        setattr(model, ATTRIBUTE, references)


def paths_for(given: str | os.PathLike) -> tuple[Path, Path]:
    """The safetensors and the JSON file of references called ``given``.

    That is either of them, or the policy file that they lie beside.

    Raises:
        InputError: it ends in no file's name.
    """
    path = Path(given)
    name = path.name
    if not name.strip(".") or "\0" in str(path):
        raise InputError(
            f"{short(os.fspath(given))} is not the name of a file of mean keys: `mlx_turbokv "
            "calibrate --keys` writes one."
        )
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
        "version": SCALED_VERSION if references.scales else VERSION,
        "model": references.model,
        "layers": sorted(references.means),
        "unturned": sorted(references.without_rope),
        "record": references.record,
    }
    try:
        with replacing(arrays_file, suffix=".safetensors") as temporary:
            arrays = {f"layer.{i}": mean for i, mean in references.means.items()}
            arrays |= {f"scales.{i}": scales for i, scales in references.scales.items()}
            mx.save_safetensors(str(temporary), arrays)
        write_text(json_file, json.dumps(record, indent=1) + "\n")
    except (OSError, RuntimeError) as error:
        raise InputError(f"The key references {json_file} cannot be written ({error}).") from error


def load_references(path: str | os.PathLike, model: nn.Module) -> References:
    """Read references, and check that they are of ``model``.

    Raises:
        InputError: a file is missing or damaged, has values that are wrong, or belongs to another
            model.
    """
    arrays_file, json_file = paths_for(path)
    for file in (json_file, arrays_file):
        if not file.is_file():
            raise InputError(
                f"There are no key references at {file}; calibrate --keys writes them."
            )
    try:
        references = _read(json_file, arrays_file)
    except (OSError, ValueError, RuntimeError) as error:
        text = " ".join(str(error).split()).rstrip(".")[:300]
        raise InputError(
            f"{json_file} holds no key references that can be read ({text})."
        ) from error
    if references.model != fingerprint(model):
        raise InputError(f"The key references {json_file} belong to another model.")
    return references


def _read(json_file: Path, arrays_file: Path) -> References:
    """References from their two files.

    Raises:
        OSError, ValueError, RuntimeError: a file cannot be read, or is not what it must be.
    """
    record = parse_json(read_text(json_file))
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    maker, version = record.get("maker"), record.get("version")
    if maker != MAKER or type(version) is not int or version not in (VERSION, SCALED_VERSION):
        raise ValueError(f"it has maker {short(maker)} and version {short(version)}")
    layers, unturned = (_ordinals(record, key) for key in ("layers", "unturned"))
    if not layers or not set(unturned) <= set(layers):
        raise ValueError("its layers are none, or not those that are unturned")
    name, details = record.get("model"), record.get("record")
    if not isinstance(name, str) or not isinstance(details, dict):
        raise ValueError("it does not say its model, or where it comes from")
    header = read_header(arrays_file).arrays
    scaled = [i for i in layers if f"scales.{i}" in header] if version == SCALED_VERSION else []
    if set(header) != {f"layer.{i}" for i in layers} | {f"scales.{i}" for i in scaled}:
        raise ValueError(f"{arrays_file.name} has other layers")
    arrays: Any = mx.load(str(arrays_file))
    means, scales = {}, {}
    for i in layers:
        dtype, shape = header[f"layer.{i}"]
        if dtype not in ("F32", "F16", "BF16") or len(shape) != 2 or 0 in shape or shape[1] % 2:
            raise ValueError(f"the mean of layer {i} is {dtype} {shape}")
        means[i] = arrays[f"layer.{i}"].astype(mx.float32)
    finite = {i: mx.isfinite(mean).all() for i, mean in means.items()}
    mx.eval(means, finite)  # at once: a GPU takes longer to be asked than to answer
    for i, is_finite in finite.items():
        if not is_finite.item():
            raise ValueError(f"the mean of layer {i} has values that are not finite")
    for i in scaled:
        scales[i] = arrays[f"scales.{i}"]
        check_scales(scales[i], f"the scales of layer {i}")
        if scales[i].shape != (means[i].shape[0], means[i].shape[1] // 2):
            raise ValueError(f"the scales of layer {i} are {scales[i].shape}")
    return References(means, frozenset(unturned), name, details, scales)


def _ordinals(record: dict[str, Any], key: str) -> list[int]:
    numbers = record.get(key)
    if not isinstance(numbers, list) or not all(type(i) is int and i >= 0 for i in numbers):
        raise ValueError(f"its {key} are no list of numbers")
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"its {key} name one twice")
    return numbers
