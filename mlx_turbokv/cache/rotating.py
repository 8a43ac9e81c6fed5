"""TurboRotatingKVCache: packed K and V of a sliding window, a drop-in for mlx-lm's RotatingKVCache.

Rows stay in the order of their tokens. Rows that have left the window are hidden from attention
first and dropped by whole tiles later, when the body is written anew anyway; so what is held is the
window and at most SLACK_TOKENS more, and after a longer update the rows of that update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask

from ..attention.arrays import Hidden, Source
from ..checked import INTEGER
from ..errors import InputError
from ..kernels.packed import empty_tiles
from ..quant.formats import KVFormat
from ..quant.layout import TILE
from .base import PackedCache, loadable
from .padding import PaddedBatch
from .state import MOST, count

FLUSH_TOKENS = 64
# Hidden rows that stay, so that a draft's tokens can be taken back after the window has moved on.
SPARE_TOKENS = 32
SLACK_TOKENS = FLUSH_TOKENS + SPARE_TOKENS + TILE


class RotatingRows(PackedCache):
    """What the packed caches of a window share: rows that expire at the front.

    Attributes:
        max_size: tokens that the newest token sees, itself included.
        keep: how many first tokens stay visible for ever.
        n_hidden: rows from ``keep`` on that no query sees any more.
    """

    flush_tokens = FLUSH_TOKENS

    def __init__(
        self,
        k_format: KVFormat | str,
        v_format: KVFormat | str,
        max_size: int,
        keep: int = 0,
        backend: str | None = None,
    ) -> None:
        INTEGER("max_size", max_size)
        INTEGER("keep", keep)
        if max_size < 1 or not 0 <= keep < max_size:
            raise InputError(
                f"A window of {max_size} tokens that keeps {keep} is not accepted: give a window "
                "of 1 or more, and fewer kept tokens than that."
            )
        self.max_size, self.keep = max_size, keep
        super().__init__(k_format, v_format, backend)

    def _clear(self) -> None:
        super()._clear()
        self.n_hidden = 0

    @property
    def _kept_tiles(self) -> int:
        """Tiles at the front that are never dropped."""
        return -(-self.keep // TILE)

    def _n_unreachable(self) -> int:
        """Rows that share a tile with the kept ones and can never be seen again."""
        return 0

    def _n_hidden_next(self) -> int:
        """Rows that the tokens to come don't see."""
        return max(self._n_unreachable(), self.n_rows - (self.max_size - 1))

    def _append(self, keys: mx.array, values: mx.array) -> None:
        self.n_hidden = self._n_hidden_next()
        self._drop(self.n_tail + keys.shape[2] >= self.flush_tokens)
        super()._append(keys, values)

    def _drop(self, body_is_rewritten: bool) -> None:
        """Drop tiles of hidden rows, if the body is written anew or it is worth doing so."""
        first, last = self._kept_tiles, self.n_body // TILE
        n = min((self.keep + self.n_hidden - SPARE_TOKENS) // TILE, last) - first
        if n < (1 if body_is_rewritten else self.flush_tokens // TILE):
            return
        parts = [self.body[:, :, :first], self.body[:, :, first + n : last]]
        parts = [part for part in parts if part.shape[2]]
        body = mx.concatenate(parts, axis=2) if len(parts) > 1 else (parts or [empty_tiles()])[0]
        # kernels would copy a slice at each step
        self.body = body if body_is_rewritten else mx.contiguous(body)
        self.n_body -= n * TILE
        self.n_hidden -= n * TILE
        self._count_dropped(n * TILE)

    def _count_dropped(self, n: int) -> None:
        """Count ``n`` dropped rows."""
        raise NotImplementedError

    def _source(self) -> Source:
        hidden = Hidden(self.keep, self.n_hidden)
        return Source(self.packed, self.backend, hidden)


@loadable
class TurboRotatingKVCache(RotatingRows):
    """A packed KV cache for one layer with a sliding window.

    As in mlx-lm, an update of several tokens past the window masks all tokens by their distance,
    the kept ones too; updates of one token always see those.

    Args:
        k_format, v_format: formats or their names.
        max_size: tokens of the window, the newest included.
        keep: how many first tokens stay visible when the window moves on.
        backend: ``metal``, ``cuda`` or ``reference``; None chooses.

    Raises:
        InputError: an unknown format or back-end, or a window that is not accepted.
    """

    batch_class: type[PaddedBatch]  # set by rotating_batch.py

    def _clear(self) -> None:
        super()._clear()
        self.n_dropped = 0

    def _count_dropped(self, n: int) -> None:
        self.n_dropped += n

    def _n_unreachable(self) -> int:
        return self._kept_tiles * TILE - self.keep if self.n_dropped else 0

    @property
    def offset(self) -> int:
        """Tokens written so far and not taken back."""
        return self.n_rows + self.n_dropped

    def size(self) -> int:
        """Tokens in the window."""
        return min(self.offset, self.max_size)

    def make_mask(self, n: int, window_size: int | None = None, return_array: bool = False):
        """The mask of the next tokens, before the update, as mlx-lm makes it.

        Columns are the tokens that ``update_and_fetch`` will return, oldest first.
        """
        n_before = self.n_rows - self._n_hidden_next()
        if n > 1:
            window_size = window_size or self.max_size
            if n_before + n > window_size or return_array:
                return create_causal_mask(n, n_before, window_size=window_size)
            return "causal"
        if window_size is None or n_before < window_size:
            return None
        return mx.arange(n_before + 1) > n_before - window_size

    def is_trimmable(self) -> bool:
        """Whether any number of tokens can be taken off the end: the window has not moved on."""
        return self.offset < self.max_size

    def trim(self, n: int) -> int:
        """Take up to ``n`` tokens off the end; returns how many.

        After the window has moved on, as many can be taken as leave it complete: back to at least
        SPARE_TOKENS before the furthest token.

        Raises:
            ValueError: tokens that the window would need have been dropped.
        """
        n = min(self.offset, n)
        needed = min(self.offset - n, self.max_size - 1)
        if self.n_rows - self._n_unreachable() - n < needed:
            raise ValueError(
                f"[TurboRotatingKVCache] {n} tokens cannot be taken back: the window of "
                f"{self.max_size} has moved on, and older tokens are gone."
            )
        n_dropped = self.n_dropped
        super().trim(n)
        self.n_dropped = n_dropped
        self.n_hidden = min(self.n_hidden, self._n_hidden_next())
        return n

    def to_batch(self, left_padding: Sequence[int]) -> PaddedBatch:
        """An empty batch of the same window, as mlx-vlm asks for it; it keeps no first tokens."""
        kind: Any = self.batch_class
        formats = self.k_format, self.v_format
        batch = kind(*formats, self.max_size, left_padding, self._backend_name)
        batch.handles = self.handles
        return batch

    @classmethod
    def merge(cls, caches: Sequence[TurboRotatingKVCache]) -> PaddedBatch:
        """One batch of the sequences of several caches; as in mlx-lm, it keeps no first tokens.

        Raises:
            ValueError: the caches differ in formats, shapes or windows.
        """
        return cls.batch_class.merge(caches)

    def _extra_state(self) -> list:
        return [self.max_size, self.keep, self.n_hidden, self.n_dropped]

    def _set_extra_state(self, extra: list) -> None:
        max_size, keep, n_hidden, n_dropped = extra
        self.max_size = count(max_size, "max_size", 1)
        self.keep = count(keep, "keep", 0, self.max_size - 1)
        self.n_dropped = count(n_dropped, "n_dropped", 0, MOST - self.n_rows)
        self.n_hidden = count(n_hidden, "n_hidden", 0, max(0, self.n_rows - self.keep))
