"""Which tokens of a sequence are protected: stored in 8.5 bits a value, whatever the policy says.

The first tokens are attention sinks (StreamingLLM, arXiv 2309.17453), and the newest are read most
(the residual window of KIVI, arXiv 2402.02750).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..checked import Kind
from ..quant.formats import KVFormat

STEP = 32  # tokens; rows are stored in tiles of so many
LEAVE_TOGETHER = 128  # tokens that stop being among the newest at a time, at least
MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class Protection:
    """How many tokens of each sequence are protected.

    Args:
        sink: tokens at its start.
        recent: tokens at its end, at least; up to LEAVE_TOGETHER - 1 more, until they leave.

    Raises:
        InputError: one is no multiple of 32, or negative.
    """

    sink: int = 0
    recent: int = 0

    def __post_init__(self) -> None:
        for name in ("sink", "recent"):
            check_count(name, getattr(self, name))

    def __bool__(self) -> bool:
        return self.sink > 0 or self.recent > 0

    def of(self, k: KVFormat, v: KVFormat) -> Protection:
        """What is protected of a layer: nothing where all its rows take 8.5 bits or more anyway."""
        return UNPROTECTED if (k.protected, v.protected) == (k, v) else self

    def rows_after(self, n: int) -> tuple[int, int]:
        """Rows that are stored after a prompt of ``n`` tokens: unprotected and protected ones.

        The first tokens are held twice once the others are no longer protected.
        """
        if not self.recent:
            return n, min(n, self.sink)
        if n < self.recent + LEAVE_TOGETHER:
            return 0, n
        left = (n - self.recent) // STEP * STEP
        return left, n - left + self.sink

    def most_rows(self, n: int) -> tuple[int, int]:
        """The most rows that there are while a sequence grows to ``n`` tokens, rising with n."""
        if not self.recent:
            return n, min(n, self.sink)
        most = self.recent + LEAVE_TOGETHER
        if n < most:
            return 0, n
        return n - self.recent, most - 1 + self.sink

    def share_left(self, first: int, n: int) -> float:
        """The part of the rows that tokens ``first`` to ``n`` read which is not protected.

        They come STEP at a time, after a prompt of ``first`` tokens.
        """
        left, shares = self.rows_after(first)[0], []
        for at in range(first, n, STEP):
            if not self.recent:
                left = at
            elif at - left >= self.recent + LEAVE_TOGETHER:
                left = (at - self.recent) // STEP * STEP
            shares.append(max(0, left - self.sink) / max(at, 1))
        return sum(shares) / len(shares) if shares else 0.0

    def __str__(self) -> str:
        return f"{self.sink},{self.recent}"


def check_count(name: str, value: Any) -> int:
    """A number of protected tokens.

    Raises:
        InputError: it is no multiple of 32, negative, or too large.
    """
    PROTECTED(name, value)
    return value


def _is_count(value: Any) -> bool:
    return type(value) is int and value % STEP == 0 and 0 <= value <= MOST_TOKENS


PROTECTED = Kind(f"a multiple of {STEP} from 0 to {MOST_TOKENS:,} tokens", _is_count)
UNPROTECTED = Protection()
DEFAULT_PROTECTION = Protection(32, 128)
