"""GGUF files of a folder, and the parts that llama.cpp's gguf-split makes of a large file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ...errors import InputError, short

MOST_PARTS = 99_999  # as their names have five digits
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<ending>\.gguf)", re.I)
_PROJECTOR = "mmproj"  # the image encoder that lies beside a model, and is none itself


def gguf_source(source: str) -> Path | None:
    """The GGUF file that a model's name means, or None where it means something else.

    source: a file of any name, or a folder with the GGUF files of one model.

    Raises:
        InputError: a folder with GGUF files of several models.
    """
    path = Path(source)
    if path.is_dir():
        return None if _has_weights(path) else _only_model(path)
    if path.suffix.lower() == ".gguf":
        return path
    return path if path.is_file() and _begins_as_gguf(path) else None


def shard_paths(path: Path, metadata: dict[str, Any]) -> list[Path]:
    """The parts of a model in order, found beside one of them by its name.

    path, metadata: of any part; a file that is no part is its own only one.

    Raises:
        InputError: a part is missing, or the file's name does not say where they are.
    """
    count = metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= MOST_PARTS:
        raise InputError(f"The GGUF file {path} has {short(count)} as split.count.")
    if count < 2:
        return [path]
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count or not 1 <= int(match["number"]) <= count:
        raise InputError(
            f"The GGUF file {path} is one of {count} parts, which are found by names that end in "
            f"-00001-of-{count:05}.gguf and so on: give it its own name again."
        )
    names = (f"{match['stem']}-{i:05}-of-{count:05}{match['ending']}" for i in range(1, count + 1))
    paths = [path.with_name(name) for name in names]
    missing = [part.name for part in paths if not part.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
        raise InputError(
            f"The GGUF file {path} is one of {count} parts, and {missing[0]}{more} missing in its "
            "folder."
        )
    return paths


def _only_model(folder: Path) -> Path | None:
    """The first file of the one model that a folder's GGUF files are."""
    models: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() == ".gguf" and not path.name.lower().startswith(_PROJECTOR):
            match = _PART.fullmatch(path.name)
            models.setdefault(f"{match['stem']} in {match['count']}" if match else path.name, path)
    if len(models) > 1:
        names = ", ".join(path.name for path in list(models.values())[:4])
        raise InputError(
            f"The folder {folder} holds GGUF files of {len(models)} models ({names}"
            f"{', …' if len(models) > 4 else ''}): give one of them."
        )
    return next(iter(models.values()), None)


def _has_weights(folder: Path) -> bool:
    """Whether a folder is a model as mlx-lm keeps it."""
    return (folder / "config.json").is_file() and any(folder.glob("model*.safetensors"))


def _begins_as_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False
