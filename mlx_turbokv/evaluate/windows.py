"""Windows of a text, and the logits that are scored in each: llama-perplexity's protocol."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..cache.summary import leaves
from ..errors import InputError
from ..policy.protection import UNPROTECTED
from .first_piece import FirstPiece

PREFILL_STEP = 2048
PROTECTED_STEP = 32  # tokens
SHORTEST = 4  # tokens: two of context, one scored prediction


def adds_bos(tokenizer) -> bool:
    """Whether the vocabulary puts a BOS token in front of every text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return False
    first = tokenizer.encode("a")
    return len(first) > 0 and first[0] == bos


def encode(tokenizer, text: str) -> list[int]:
    """Tokens of a whole text, BOS in front if the vocabulary adds it, never EOS behind.

    Raises: InputError if the text is empty.
    """
    if not text.strip():
        raise InputError("The text is empty: perplexity needs at least one window of text.")
    tokens = list(tokenizer.encode(text, add_special_tokens=False))
    return [tokenizer.bos_token_id, *tokens] if adds_bos(tokenizer) else tokens


def check_sizes(n_ctx: int, chunks: int | None) -> None:
    """Check a window's length and a number of windows.

    Raises: InputError.
    """
    if n_ctx < SHORTEST:
        raise InputError(f"Context {n_ctx} is too short: at least {SHORTEST} tokens are needed.")
    if chunks is not None and chunks < 1:
        raise InputError(f"Chunks {chunks} is not accepted: at least 1 window must be scored.")


def cut_windows(
    tokenizer,
    text: str | Sequence[int],
    n_ctx: int = 512,
    chunks: int | None = None,
    stride: int | None = None,
) -> np.ndarray:
    """The first `chunks` windows of a text (all of them if None), int32 [windows, n_ctx].

    `text` may be tokens already. BOS overwrites the first token of each window if the vocabulary
    adds BOS. Windows begin `stride` tokens apart, by default n_ctx: they do not overlap.

    Raises: InputError for n_ctx < 4, chunks < 1, or a text shorter than one window.
    """
    check_sizes(n_ctx, chunks)
    stride = stride or n_ctx
    tokens = encode(tokenizer, text) if isinstance(text, str) else list(text)
    available = (len(tokens) - n_ctx) // stride + 1
    if available < 1:
        raise InputError(
            f"The text has {len(tokens)} tokens, fewer than one window of {n_ctx}; "
            "give a longer text or a smaller context."
        )
    n_windows = available if chunks is None else min(chunks, available)
    starts = range(0, n_windows * stride, stride)
    windows = np.array([tokens[i : i + n_ctx] for i in starts], np.int32)
    if adds_bos(tokenizer):
        windows[:, 0] = tokenizer.bos_token_id
    return windows


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


def digest(windows: np.ndarray) -> str:
    """sha256 of the windows."""
    return hashlib.sha256(np.ascontiguousarray(windows, np.int32).tobytes()).hexdigest()
