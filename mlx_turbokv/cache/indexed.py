"""Packed caches that also keep an indexer's keys, for qwen4_exp of mlx-vlm.

Its indexer (Qwen Sparse Attention) chooses blocks of tokens by keys of its own, one a token, which
its cache holds beside K and V. K and V are packed; the indexer's keys stay as the model made them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from .base import PackedCache, loadable
from .single import TurboKVCache


class IndexRows(NamedTuple):
    """What an indexer keeps of each token.

    Shapes:
        keys: [B, n, index_head_dim]; positions: [B, n], or [3, B, n] of M-RoPE.
    """

    keys: mx.array
    positions: mx.array

    def taken(self, first: int, end: int) -> IndexRows:
        """Rows ``first`` to ``end``."""
        return IndexRows(self.keys[:, first:end], self.positions[..., first:end])

    def of_sequences(self, indices: mx.array) -> IndexRows:
        """These sequences, in this order."""
        return IndexRows(self.keys[indices], mx.take(self.positions, indices, axis=-2))

    def moved(self, shifts: list[int], n: int) -> IndexRows:
        """Row p is row p - shift of its sequence, for n rows; zeros where that is no row."""
        rows = mx.arange(n)[None] - mx.array(shifts)[:, None]
        held = self.keys.shape[1]
        is_row, rows = (rows >= 0) & (rows < held), mx.clip(rows, 0, held - 1)
        keys = mx.take_along_axis(self.keys, rows[..., None], axis=1)
        keys = mx.where(is_row[..., None], keys, mx.zeros((), keys.dtype))
        index = mx.broadcast_to(rows, (*self.positions.shape[:-1], n))
        positions = mx.take_along_axis(self.positions, index, axis=-1)
        return IndexRows(keys, mx.where(is_row, positions, mx.zeros((), positions.dtype)))


def joined(parts: Sequence[IndexRows], of_sequences: bool) -> IndexRows:
    """Rows after rows, or sequences after sequences."""
    positions = [part.positions for part in parts]
    if n := max((x.shape[0] for x in positions if x.ndim == 3), default=0):
        # positions of text alone are the same in all parts of M-RoPE
        positions = [mx.broadcast_to(x, (n, *x.shape[-2:])) for x in positions]
    keys = mx.concatenate([part.keys for part in parts], axis=0 if of_sequences else 1)
    return IndexRows(keys, mx.concatenate(positions, axis=-2 if of_sequences else -1))


class Indexed(PackedCache):
    """What qwen4_exp asks of its cache for its indexer.

    The model reads and writes ``index_block_keys`` and ``index_block_ratio``, what it computed of
    whole blocks, and computes them anew where they are None.
    """

    index_rows: IndexRows | None = None
    index_block_keys: mx.array | None = None
    index_block_ratio: int | None = None

    def update_indexer(self, keys: mx.array, position_ids: mx.array) -> tuple[mx.array, mx.array]:
        """Add the indexer's keys of new tokens, before K and V of them; returns all.

        Shapes:
            keys: [B, L, index_head_dim]; position_ids: [B, L] or [3, B, L].
            returns: [B, n, index_head_dim]; [B, n] or [3, B, n].
        """
        new = IndexRows(keys, position_ids)
        self.index_rows = new if self.index_rows is None else joined([self.index_rows, new], False)
        return self.index_rows.keys, self.index_rows.positions

    @property
    def index_offset(self) -> int:
        """Tokens whose indexer's keys are held, padding included."""
        return 0 if self.index_rows is None else self.index_rows.keys.shape[1]

    def clear_index_blocks(self) -> None:
        """Forget what the model computed of whole blocks."""
        self.index_block_keys = self.index_block_ratio = None

    def _clear(self) -> None:
        super()._clear()
        self.index_rows = None
        self.clear_index_blocks()

    def trim(self, n: int) -> int:
        n = super().trim(n)
        self.clear_index_blocks()
        if self.index_rows is not None:
            self.index_rows = self.index_rows.taken(0, self.n_rows)
        return n

    @property
    def nbytes(self) -> int:
        """Bytes resident, those of the indexer's keys included."""
        blocks = 0 if self.index_block_keys is None else self.index_block_keys.nbytes
        return super().nbytes + blocks + sum(x.nbytes for x in self.index_rows or ())

    def _extra_state(self) -> list:
        return [*super()._extra_state(), *(self.index_rows or (None, None))]

    def _set_extra_state(self, extra: list) -> None:
        if len(extra) < 2:
            raise ValueError("it has no keys of an indexer")
        *extra, keys, positions = extra
        super()._set_extra_state(extra)
        if keys is None and positions is None and self.layout is None:
            return
        rows = (self.newest.shape[0], self.n_rows) if self.layout is not None else ()
        self.index_rows = _checked(keys, positions, rows)


def _checked(keys: Any, positions: Any, rows: tuple[int, ...]) -> IndexRows:
    """An indexer's keys and positions of a state.

    Args:
        rows: sequences, and rows of each.

    Raises:
        ValueError: they are not one for each row.
    """
    is_keys = isinstance(keys, mx.array) and mx.issubdtype(keys.dtype, mx.floating)
    if not is_keys or keys.ndim != 3 or keys.shape[:2] != rows:
        raise ValueError("its indexer's keys are not one for each row")
    is_positions = isinstance(positions, mx.array) and mx.issubdtype(positions.dtype, mx.integer)
    if not is_positions or positions.shape not in (rows, (3, *rows)):
        raise ValueError("its indexer's positions are not one for each row")
    return IndexRows(keys, positions)


@loadable
class IndexedTurboKVCache(Indexed, TurboKVCache):
    """A packed KV cache for one layer that also keeps the keys of an indexer.

    Takes what ``TurboKVCache`` takes.
    """

    batch_class: Any = None  # set by indexed_batch.py, which the factory imports: it needs mlx-vlm
