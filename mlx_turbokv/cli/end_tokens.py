"""Tokens that end an answer: more of them, or another one than the model's own."""

from __future__ import annotations

import re
from typing import Any

from ..errors import InputError, short


def add_end_tokens(loaded: Any, tokens: tuple[str, ...]) -> None:
    """Add those of --extra-eos-token.

    Raises: InputError for what is no token.
    """
    vocabulary = loaded.tokenizer.get_vocab()
    for token in tokens:
        is_number = re.fullmatch("[0-9]{1,9}", token) and int(token) < len(vocabulary)
        if token not in vocabulary and not is_number:
            raise InputError(
                f"--extra-eos-token {token!r} is no token of {loaded.name}; give a token's text "
                "or its number."
            )
        loaded.tokenizer.add_eos_token(token)


class EndToken:
    """The tokenizer's end token, which --eos-token of cache_prompt sets and its file keeps.

    The model's own ids, those of its configuration, end answers beside it.

    Args:
        loaded: a ``models.Loaded``.
    """

    def __init__(self, loaded: Any) -> None:
        self._loaded = loaded
        self._own: tuple[str | None, set[int]] | None = None
        self.text: str | None = None  # None: the model's own

    def use(self, text: str | None, where: object) -> None:
        """Set the token; None brings the model's own back.

        Args:
            where: what a message says before the token.

        Raises: InputError for what is no token.
        """
        tokenizer = self._loaded.tokenizer
        if text == self.text:
            return
        if self._own is None:
            self._own = tokenizer.eos_token, set(tokenizer.eos_token_ids)
        token, ids = self._own
        if text is not None:
            vocabulary = tokenizer.get_vocab()
            if text not in vocabulary:
                raise InputError(
                    f"{where} {short(text)} is no token of {self._loaded.name}; give a token's "
                    "text."
                )
            token, ids = text, ids | {vocabulary[text]}
        tokenizer.eos_token, tokenizer.eos_token_ids = token, ids
        self.text = text
