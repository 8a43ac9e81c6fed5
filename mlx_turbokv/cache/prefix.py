"""What mlx-vlm asks of a cache beyond mlx-lm's protocol: batches, and its server's prefix cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class PrefixCached:
    """Copies of a packed cache for mlx-vlm's automatic prefix cache (APC), which stay packed.

    The cache says nothing of the bytes it will take (``memory_profile``): mlx-vlm then counts
    ``nbytes`` for each token.
    """

    handles: Any
    state: Any
    meta_state = ""  # all is in ``state``; mlx-vlm keeps both

    @classmethod
    def from_state(cls, state: list, meta_state: Any = "") -> Any:
        """A cache that holds what ``state`` says; mlx-vlm gives ``meta_state`` with it."""
        cache = cls.__new__(cls)
        cache.state = state
        return cache

    def prefix_cache_snapshot(self) -> dict[str, Any]:
        """What ``prefix_cache_restore`` takes; its arrays are the cache's own."""
        return {"state": self.state, "handles": self.handles}

    def prefix_cache_restore(self, snapshot: dict[str, Any]) -> None:
        """Hold what a snapshot says.

        Raises:
            InputError: it is of another class of caches.
        """
        self.state, self.handles = snapshot["state"], snapshot["handles"]

    def prefix_cache_merge(self, rows: Sequence[Any], prefix_lens: Sequence[int]) -> Any:
        """A batch of the sequences of several caches, or None where they are of several classes."""
        if any(type(row) is not type(self) for row in rows) or not hasattr(self, "batch_class"):
            return None
        return type(self).merge(rows)  # type: ignore[attr-defined]
