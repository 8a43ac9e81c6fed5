"""A text as windows of tokens, a forward pass each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError

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
