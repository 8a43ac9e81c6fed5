"""The logits that are scored in each window of a text: llama-perplexity's protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

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

    The context half goes in first: only its keys and values are evaluated, so its logits are
    never computed. The scored half goes in as one piece, or where newest tokens are protected in
    steps of PROTECTED_STEP: more tokens at a time would see too many rows as the model made them.

    Args:
        first_piece: of these windows, shared by configurations.

    Shapes: windows [B, n_ctx]; returns [B, n_ctx - n_ctx // 2 - 1, vocabulary].
    """
    first = first_scored(windows.shape[1])
    read_prompt(model, mx.array(windows[:, :first]), caches, PREFILL_STEP, first_piece)
    if not any(getattr(c, "protection", UNPROTECTED).recent for c in leaves(caches)):
        return model(mx.array(windows[:, first:-1]), cache=caches)
    parts = []
    for start in range(first, windows.shape[1] - 1, PROTECTED_STEP):
        stop = min(start + PROTECTED_STEP, windows.shape[1] - 1)
        parts.append(model(mx.array(windows[:, start:stop]), cache=caches))
        mx.eval(parts[-1], [c.state for c in caches])
    return mx.concatenate(parts, axis=1)


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
