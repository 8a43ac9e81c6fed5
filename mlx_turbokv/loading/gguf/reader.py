"""GGUF files opened with the ``gguf`` package: their metadata, and their tensors on disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import InputError, short
from .checks import checked_reader
from .shards import shard_paths

ARCHITECTURES = ("llama", "qwen2", "qwen3", "phi3", "gemma3")
MOST = (1 << 31) - 1
_LARGEST = 1e30  # numbers beyond it are no float32 in a product


@dataclass
class GGUFFile:
    """An opened GGUF file, or several that are parts of one.

    paths: of the file, or of its parts in order.
    metadata: every field of the first part by its key, as Python values.
    tensors: ``gguf.ReaderTensor`` by name; their data stays on disk until it is used.
    """

    paths: list[Path]
    metadata: dict[str, Any]
    tensors: dict[str, Any]

    @property
    def path(self) -> Path:
        """The file, or the first of its parts."""
        return self.paths[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of all parts."""
        return sum(path.stat().st_size for path in self.paths)

    @property
    def architecture(self) -> str:
        found = self.metadata.get("general.architecture", "")
        return found if isinstance(found, str) else ""

    @property
    def name(self) -> str:
        """What the file calls its model, or its own name."""
        found = self.metadata.get("general.name")
        return found if isinstance(found, str) and found else self.path.stem

    def get(self, key: str, default: Any = None) -> Any:
        """The field ``<architecture>.<key>``."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """The whole number ``<architecture>.<key>``, 1 or more.

        A list with one value a layer, all equal, counts as one.

        Raises:
            InputError: the file doesn't have it and there is no default, or it is something else.
        """
        value = self._one("a whole number", key, default)
        if type(value) is not int or not 1 <= value <= most:
            raise self.error(
                f"has {short(value)} as {self.architecture}.{key}; accepted are whole numbers "
                f"from 1 to {most:,}."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The finite number ``<architecture>.<key>``, more than 0.

        Raises:
            InputError: the file doesn't have it and there is no default, or it is something else.
        """
        value = self._one("a number", key, default)
        is_number = type(value) in (int, float) and math.isfinite(value)
        if not is_number or not 0 < value < _LARGEST:
            raise self.error(
                f"has {short(value)} as {self.architecture}.{key}; accepted are numbers above 0."
            )
        return float(value)

    def _one(self, what: str, key: str, default: float | None) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.error(f"lacks the field {self.architecture}.{key}, {what}.")
        if isinstance(value, list) and value:
            if any(other != value[0] for other in value):
                raise self.error(
                    f"varies {key} from layer to layer, which mlx-lm's {self.architecture} does "
                    "not."
                )
            value = value[0]
        return value

    def error(self, what: str) -> InputError:
        """The error "The GGUF file PATH ``what``"."""
        return InputError(f"The GGUF file {self.path} {what}")


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file and read its metadata, but no tensor.

    path: of the file, or of any part of a model that llama.cpp's gguf-split has split.

    Raises:
        InputError: missing, unreadable, damaged, a part of the model is missing or of another
            model, or the architecture is not in ARCHITECTURES.
    """
    first = _open_one(Path(path))
    paths = shard_paths(first.path, first.metadata)
    parts = [first if part == first.path else _open_one(part) for part in paths]
    for number, part in enumerate(parts):
        found = part.metadata.get("split.no", 0), part.metadata.get("split.count", 1)
        if len(parts) > 1 and found != (number, len(parts)):
            raise part.error(f"is not part {number + 1} of {len(parts)} of its model.")
    file = GGUFFile(paths, parts[0].metadata, {})
    for part in parts:
        if twice := file.tensors.keys() & part.tensors.keys():
            raise part.error(f"has the tensor {short(min(twice))}, as another part has.")
        file.tensors |= part.tensors
    announced = file.metadata.get("split.tensors.count", len(file.tensors))
    if len(parts) > 1 and announced != len(file.tensors):
        raise file.error(
            f"announces {short(announced)} tensors, and its {len(parts)} parts have "
            f"{len(file.tensors)}."
        )
    if file.architecture not in ARCHITECTURES:
        raise file.error(
            f"has the architecture {short(file.architecture)}; accepted are "
            f"{', '.join(ARCHITECTURES)}."
        )
    return file


def _open_one(path: Path) -> GGUFFile:
    if not path.is_file():
        raise InputError(f"There is no GGUF file at {path}.")
    reader = checked_reader(path)
    try:
        metadata = {key: field.contents() for key, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        raise InputError(f"The GGUF file {path} is damaged: {error}.") from error
    file = GGUFFile([path], metadata, {tensor.name: tensor for tensor in reader.tensors})
    n_tensors = metadata["GGUF.tensor_count"]
    if len(file.tensors) != n_tensors:
        raise file.error(
            f"announces {n_tensors} tensors and holds {len(file.tensors)} different ones."
        )
    return file
