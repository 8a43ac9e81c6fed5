"""What a user asks for beside a prompt cache file: equal to what the file holds, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import RotatingKVCache

from ..errors import InputError
from .base import PackedCache
from .file_checks import formats, window
from .rotating import TurboRotatingKVCache
from .summary import leaves


@dataclass(frozen=True)
class Asked:
    """Properties of caches that were asked for by options; the others are the file's.

    formats: K and V formats, and protected tokens.
    windows: sizes of windows, and that there are none.
    references: the name of key references.
    whole_keys: keys that are not centred.
    packed_windows: windows whose rows are packed.
    """

    formats: bool = False
    windows: bool = True
    references: str | None = None
    whole_keys: bool = False
    packed_windows: bool = False

    def check(self, path: Path, caches: list[Any], fresh: list[Any]) -> None:
        """Compare the caches of a file with empty ones that the options made.

        Raises:
            InputError: what was asked for is not what the file holds.
        """
        pairs = list(zip(leaves(caches), leaves(fresh)))
        if self.windows:
            _check_windows(path, pairs)
        if self.formats:
            _check_formats(path, pairs)
        if self.packed_windows and any(
            type(held) is RotatingKVCache and isinstance(wanted, TurboRotatingKVCache)
            for held, wanted in pairs
        ):
            raise InputError(
                f"--compress-sliding has no effect on {path}, whose windows are not packed."
            )
        if self.whole_keys and any(_centre(held) is not None for held, _ in pairs):
            raise InputError(f"--no-centre has no effect on {path}, whose keys are stored centred.")
        if self.references is not None:
            _check_references(path, pairs, self.references)


def _check_windows(path: Path, pairs: Iterable[tuple[Any, Any]]) -> None:
    for held, wanted in pairs:
        if window(held) != window(wanted):
            has_one = getattr(held, "max_size", None) is not None
            todo = "give the --max-kv-size that it was made with"
            if not has_one:
                todo = "omit --max-kv-size"
            raise InputError(
                f"The prompt cache file {path} holds a layer with {window(held)} where "
                f"{window(wanted)} is asked for: {todo}."
            )


def _check_formats(path: Path, pairs: Iterable[tuple[Any, Any]]) -> None:
    for held, wanted in pairs:
        if formats(held) != formats(wanted):
            raise InputError(
                f"The prompt cache file {path} holds {formats(held)} where {formats(wanted)} is "
                "asked for; omit the cache options, and TURBO_LAYER_ADAPTIVE, to keep the formats "
                "of the file."
            )


def _check_references(path: Path, pairs: list[tuple[Any, Any]], name: str) -> None:
    turbo = [
        (held, wanted) for held, wanted in pairs
        if isinstance(held, PackedCache) and held.k_format.is_turbo
    ]  # fmt: skip
    if not turbo:
        raise InputError(
            f"--keys {name} has no effect on {path}, none of whose K formats is turbo."
        )
    if any(_centre(held) != _centre(wanted) for held, wanted in turbo):
        raise InputError(
            f"The prompt cache file {path} holds keys that are not centred by {name}; omit the "
            "cache options to keep them as they are."
        )


def _centre(cache: Any) -> Any:
    return getattr(cache, "centre", None)
