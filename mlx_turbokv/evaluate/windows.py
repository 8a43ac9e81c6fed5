"""The logits that are scored in each window of a text: llama-perplexity's protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

import mlx.core as mx
import numpy as np

from ..cache.summary import leaves
from ..policy.protection import UNPROTECTED, Protection
from .first_piece import FirstPiece

PREFILL_STEP = 2048
LONG_CTX = 2048  # tokens of windows that are mostly unprotected by default
PROTECTED_STEP = 32  # tokens


def first_scored(n_ctx: int) -> int:
    """The first position whose prediction is scored: those before it only give context."""
    return n_ctx // 2


def targets_of(windows: np.ndarray) -> mx.array:
    """The tokens that the scored positions should have predicted.

    Shapes: windows [..., n_ctx]; returns [..., n_ctx - n_ctx // 2 - 1].
    """
    return mx.array(windows[..., first_scored(windows.shape[-1]) + 1 :])


def scored_logits(
    model, window: np.ndarray, caches: list, first_piece: FirstPiece | None = None
) -> mx.array:
    """Logits of a window's scored positions, computed through the given empty caches.

    Shapes: window [n_ctx]; returns [n_ctx - n_ctx // 2 - 1, vocabulary].
    """
    return batch_logits(model, window[None], caches, first_piece)[0]


def batch_logits(
    model, windows: np.ndarray, caches: list, first_piece: FirstPiece | None = None
) -> mx.array:
    """Logits of the scored positions of several windows at once.

    Args:
        first_piece: of these windows, shared by configurations.

    Shapes: windows [B, n_ctx]; returns [B, n_ctx - n_ctx // 2 - 1, vocabulary].
    """
    return mx.concatenate(list(logits_in_pieces(model, windows, caches, first_piece)), axis=1)


def logits_in_pieces(
    model, windows: np.ndarray, caches: list, first_piece: FirstPiece | None = None,
    most: int | None = None,
) -> Iterator[mx.array]:  # fmt: skip
    """The same, piece by piece: a vocabulary is long, and all logits of many windows are large.

    The context half goes in first: only its keys and values are evaluated, so its logits are
    never computed. The scored half goes in as one piece, or where newest tokens are protected in
    steps of PROTECTED_STEP: more tokens at a time would see too many rows as the model made them.

    Args:
        most: tokens of a piece where none are protected, a multiple of PROTECTED_STEP: figures do
            not depend on it. None: all.

    Shapes: windows [B, n_ctx]; yields [B, n, vocabulary].
    """
    first, end = first_scored(windows.shape[1]), windows.shape[1] - 1
    read_prompt(model, mx.array(windows[:, :first]), caches, PREFILL_STEP, first_piece)
    in_steps = any(getattr(c, "protection", UNPROTECTED).recent for c in leaves(caches))
    step = PROTECTED_STEP if in_steps else most or end - first
    for start in range(first, end, step):
        logits = model(mx.array(windows[:, start : min(start + step, end)]), cache=caches)
        mx.eval(logits, [c.state for c in caches])
        yield logits


def read_prompt(
    model, tokens: mx.array, caches: list, step: int, first_piece: FirstPiece | None = None
) -> None:
    """Read tokens into empty caches, ``step`` at a time.

    Args:
        first_piece: of these tokens, shared by configurations.

    Shapes: tokens [B, n].
    """
    if tokens.shape[1]:
        (first_piece or FirstPiece(model)).read(tokens[:, :step], caches)
    for start in range(step, tokens.shape[1], step):
        model(tokens[:, start : start + step], cache=caches)
        mx.eval([c.state for c in caches])


def short_windows(protected: Mapping[str, Protection], n_ctx: int) -> str | None:
    """A sentence where less than half of the rows that scored tokens read are unprotected.

    Args:
        protected: what each configuration protects, by name.
    """
    names = [name for name, x in protected.items() if _mostly_protected(x, n_ctx)]
    if not names:
        return None
    longer = LONG_CTX
    while any(_mostly_protected(x, longer) for x in protected.values()):
        longer *= 2
    return (
        f"Windows of {n_ctx} tokens measure mostly protected rows in {', '.join(names)}: "
        f"-c {longer} measures the formats."
    )


def _mostly_protected(protection: Protection, n_ctx: int) -> bool:
    return bool(protection) and protection.share_left(first_scored(n_ctx), n_ctx - 1) < 0.5


def digest(windows: np.ndarray) -> str:
    """sha256 of the windows."""
    return hashlib.sha256(np.ascontiguousarray(windows, np.int32).tobytes()).hexdigest()
