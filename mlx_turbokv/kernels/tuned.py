"""Tunings that ``doctor --tune`` found best on this machine, in a file of the cache folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from ..files import cache_dir, parse_json, read_bytes, write_text
from ..quant.layout import KVLayout
from . import trust, tuning
from .tuning import Tuning

FILE_NAME = "tuned.json"
MOST_MACHINES = 16  # and texts, whose tunings the file remembers


@dataclass(frozen=True)
class Shape:
    """What a tuning is for: query rows a KV head, head dims, and the formats of K and V.

    Args:
        n_rows: query heads of a KV head times queries.
    """

    n_rows: int
    k_head_dim: int
    v_head_dim: int
    k_format: str
    v_format: str

    @classmethod
    def of(cls, layout: KVLayout, n_rows: int) -> Shape:
        """The shape of a layer."""
        dims = layout.k_head_dim, layout.v_head_dim
        return cls(n_rows, *dims, str(layout.k_format), str(layout.v_format))

    def __str__(self) -> str:
        dims = f"{self.k_head_dim}"
        if self.v_head_dim != self.k_head_dim:
            dims += f"/{self.v_head_dim}"
        return (
            f"{self.k_format}/{self.v_format}, head_dim {dims}, {self.n_rows} query rows a KV head"
        )


class Range(NamedTuple):
    """The tuning of contexts of up to so many tokens."""

    most_tokens: int
    cut: Tuning


def cut_for(backend: str, layout: KVLayout, n_rows: int, n_tokens: int) -> Tuning:
    """The tuning of a decode launch: what was found best here, or what the package has."""
    for most_tokens, cut in _ranges(backend, layout, n_rows):
        if n_tokens <= most_tokens:
            return cut
    return tuning.built_in(backend)


@lru_cache(maxsize=256)
def _ranges(backend: str, layout: KVLayout, n_rows: int) -> tuple[Range, ...]:
    found = stored(backend)
    return found.get(str(Shape.of(layout, n_rows)), ()) if found else ()


@lru_cache(maxsize=8)
def _stored(backend: str, path: Path) -> dict[str, tuple[Range, ...]]:
    own = _read(path).get(trust.machine_name("decode", backend), {})
    found = {}
    for shape, entries in own.items() if isinstance(own, dict) else ():
        ranges = _parsed(entries)
        if ranges:
            found[shape] = ranges
    return found


def stored(backend: str) -> dict[str, tuple[Range, ...]]:
    """The tunings of this machine by shape; none where the file is missing, damaged or of another
    machine, version or text."""
    return _stored(backend, cache_dir() / FILE_NAME)


def _read(path: Path) -> dict[str, Any]:
    try:
        machines = parse_json(read_bytes(path))["tuned"]
        return dict(machines) if isinstance(machines, dict) else {}
    except (OSError, ValueError, TypeError, KeyError):
        return {}


def _parsed(entries: Any) -> tuple[Range, ...]:
    """The ranges of a shape; none where one of them is not whole."""
    types = {field.name: type(getattr(tuning.APPLE, field.name)) for field in fields(Tuning)}
    found = []
    for entry in entries if isinstance(entries, list) else ():
        values = entry.get("tuning") if isinstance(entry, dict) else None
        most = entry.get("most_tokens") if isinstance(entry, dict) else None
        if type(most) is not int or not isinstance(values, dict) or set(values) != set(types):
            return ()
        if any(type(values[name]) is not kind or values[name] < 0 for name, kind in types.items()):
            return ()
        found.append(Range(most, Tuning(**values)))
    return tuple(sorted(found, key=lambda r: r.most_tokens))


def store(backend: str, shape: Shape, ranges: Sequence[Range]) -> Path:
    """Remember the tunings of a shape, in place of earlier ones; they are used from now on.

    Raises:
        OSError: the cache folder cannot be written.
    """
    path, machine = cache_dir() / FILE_NAME, trust.machine_name("decode", backend)
    machines = _read(path)
    own = machines.pop(machine, {})
    own = own if isinstance(own, dict) else {}
    own.pop(str(shape), None)
    if ranges:
        own[str(shape)] = [{"most_tokens": r.most_tokens, "tuning": asdict(r.cut)} for r in ranges]
    kept = dict([*machines.items()][-(MOST_MACHINES - 1) :])
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"tuned": {**kept, machine: own}}, indent=1) + "\n")
    forget()
    return path


def forget() -> None:
    """Read the file again at the next launch."""
    _stored.cache_clear()
    _ranges.cache_clear()


def summary(backend: str) -> str:
    """Which tuning decode has here, in words."""
    if backend == "reference":
        return "none"
    found = stored(backend)
    if not found:
        return "built in"
    return f"of this machine for {'; '.join(found)} (doctor --tune); built in for others"
