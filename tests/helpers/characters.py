"""A tokenizer of single characters, and a small model loaded with it, for tests of the commands."""

from __future__ import annotations

from mlx_turbokv.loading.models import Loaded

FIRST = 32  # code of the first printable character; 95 of them, then the newline


class Characters:
    """Encodes printable ASCII character by character; anything else becomes a newline."""

    bos_token_id = None
    eos_token_ids = frozenset()
    has_chat_template = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) - FIRST if FIRST <= ord(c) < FIRST + 95 else 95 for c in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(chr(t + FIRST) if t < 95 else "\n" for t in tokens)


def loaded(model, config: dict | None = None) -> Loaded:
    """A model as ``models.load`` gives it."""
    config = config or {"vocab_size": 96}
    return Loaded(model, Characters(), "tiny", config, 4096, "tiny")
