"""Finished parts of a long run, kept on disk as they finish.

One JSON line for the settings, then one a part. A line that was cut off by an interruption is
dropped; everything before it counts.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from pathlib import Path

from ..errors import InputError
from ..files import cache_dir, parse_json, write_bytes, write_text
from ..log import warn_once
from .divergence import PositionStats


def journal_path(what: str, settings: dict, json_path: str | Path | None) -> Path:
    """Where a run keeps its finished parts: next to its JSON file, or in the cache folder."""
    if json_path is not None:
        return Path(f"{json_path}.partial")
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / f"{what}-{name}.partial"


class Journal:
    """Finished parts at `path`, for a run with these settings.

    Args:
        path: the file; made at the first finished part.
        settings: what makes two runs comparable.
        resume: True demands an unfinished run, False forgets it, None takes it if there is one.

    Raises:
        InputError: the file belongs to a run with other settings, or there is nothing to resume.
    """

    def __init__(self, path: str | Path, settings: dict, resume: bool | None = None):
        self.path = Path(path)
        # As they read back from the file: tuples become lists.
        self.settings = json.loads(json.dumps(settings))
        self.parts: list[dict] = []
        self._failed = False  # what the file has may end within a line
        exists = self.path.is_file()
        if resume and not exists:
            raise InputError(f"There is no unfinished run to resume at {self.path}.")
        if exists and resume is False:
            self.path.unlink()
        elif exists:
            self._read()

    def _read(self) -> None:
        text = self.path.read_text(encoding="utf-8", errors="replace")
        lines, records = text.splitlines(), []
        for line in lines:
            try:
                records.append(parse_json(line))
            except ValueError:
                break
        if not records:
            self.path.unlink()
            return
        are_parts = all(isinstance(record, dict) for record in records)
        if not are_parts or not isinstance(records[0].get("settings"), dict):
            raise InputError(
                f"{self.path} holds no finished parts that can be read; --no-resume starts anew."
            )
        found = records[0]["settings"]
        names = [k for k in {**found, **self.settings} if found.get(k) != self.settings.get(k)]
        if names:
            raise InputError(
                f"{self.path} holds an unfinished run with other settings "
                f"({', '.join(sorted(names))}); --no-resume starts anew."
            )
        self.parts = records[1:]
        if len(records) < len(lines) or not text.endswith("\n"):
            self._rewrite()

    def add(self, part: dict) -> None:
        """Append a finished part; where the disk fails, say so, and try again with the next."""
        self.parts.append(part)
        if self._failed or not self.path.exists():
            self._rewrite()
            return
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(part) + "\n")
        except OSError as error:
            self._fail(error)

    def _rewrite(self) -> None:
        records = [{"settings": self.settings}, *self.parts]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text(self.path, "".join(json.dumps(r) + "\n" for r in records))
            self._failed = False
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self._failed = True
        warn_once(
            f"Warning: {self.path} cannot be written ({error.strerror}): finished parts stay in "
            "memory, and are written with a later one."
        )

    def done(self) -> None:
        """Delete the file: the run has ended and its results are stored."""
        self.path.unlink(missing_ok=True)


class Checkpoint(Journal):
    """Finished windows at `path`, for a run with these settings; the arguments are a journal's.

    The settings are everything but the number of windows. A run that has ended may keep its windows
    (``done``), and a later one with the same settings adds to them.

    Raises:
        InputError: the file belongs to a run with other settings, or there is nothing to resume.
    """

    def __init__(self, path: str | Path, settings: dict, resume: bool | None = None):
        self.ended, ended = Path(f"{str(path).removesuffix('.partial')}.windows.gz"), []
        if resume is not False and not Path(path).is_file():
            ended = _ended_parts(self.ended, settings)
        super().__init__(path, settings, None if ended else resume)
        self.parts = ended or self.parts
        self.found_in = self.ended if ended else self.path

    def done(self, keep: bool = False) -> None:
        """The run has ended and its results are stored: delete the file.

        keep: its windows go to a file of their own, so that a run over more windows takes them.
        """
        if keep:
            records = [{"settings": self.settings}, *self.parts]
            text = "".join(json.dumps(record) + "\n" for record in records)
            try:
                write_bytes(self.ended, gzip.compress(text.encode(), mtime=0))
            except OSError as error:
                warn_once(
                    f"Warning: {self.ended} cannot be written ({error.strerror}): a run over more "
                    "windows will measure all of them."
                )
        super().done()

    @property
    def windows(self) -> dict[int, dict[str, dict]]:
        """The finished windows, by index."""
        return {part["window"]: part["results"] for part in self.parts}

    def get(self, index: int) -> dict[str, tuple[PositionStats, int]] | None:
        """Results of a window by configuration, with each one's KV bytes; None if unfinished."""
        results = self.windows.get(index)
        if results is None:
            return None
        return {
            name: (PositionStats.from_json(r["stats"]), r["kv_bytes"])
            for name, r in results.items()
        }

    def put(self, index: int, results: dict[str, tuple[PositionStats, int]]) -> None:
        """Append a finished window."""
        record = {
            name: {"stats": stats.to_json(), "kv_bytes": n} for name, (stats, n) in results.items()
        }
        self.add({"window": index, "results": record})


def _ended_parts(path: Path, settings: dict) -> list[dict]:
    """The windows of a run that has ended; none where it had other settings."""
    try:
        lines = gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
        first, *parts = (parse_json(line) for line in lines)
        same = first["settings"] == json.loads(json.dumps(settings))
        return parts if same and all(part["window"] >= 0 for part in parts) else []
    except (OSError, EOFError, ValueError, TypeError, KeyError, zlib.error):
        return []  # there is no such file, or a damaged one
