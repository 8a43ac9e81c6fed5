"""Finished windows of a perplexity run, kept in a journal as they finish."""

from __future__ import annotations

from pathlib import Path

from .divergence import PositionStats
from .journal import Journal, journal_path


def checkpoint_path(settings: dict, json_path: str | Path | None) -> Path:
    """Where a run keeps its finished windows: beside its JSON file, or in the cache folder."""
    return journal_path("perplexity", settings, json_path)


class Checkpoint(Journal):
    """Finished windows at `path`, for a run with these settings; the arguments are a journal's.

    The settings are everything but the number of windows.

    Raises:
        InputError: the file belongs to a run with other settings, or there is nothing to resume.
    """

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
        """Write a finished window down."""
        record = {
            name: {"stats": stats.to_json(), "kv_bytes": n} for name, (stats, n) in results.items()
        }
        self.add({"window": index, "results": record})
