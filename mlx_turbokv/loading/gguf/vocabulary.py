"""The tokenizer's fields of a GGUF file's metadata, with their types checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ...errors import InputError, short

MOST_CHARACTERS = 1024  # of a token: SentencePiece's merges take its every split
ROLES = ("bos", "eos", "eot", "eom", "unknown", "padding")


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer is made of.

    Args:
        kind: ``gpt2``, ``llama`` or another.
        tokens: their texts.
        types: of the tokens, as numbers of the GGUF specification; empty where it gives none.
        scores: of the tokens; empty where it gives none.
        merges: pairs of texts with a space between.
        pre: name of the pre-tokenizer.
        ids: of the tokens with a role, where they are in the vocabulary.
        flags: ``add_bos_token``, ``add_eos_token`` and ``add_space_prefix``, where given.
        chat_template: of the model.
        name: of the model.
    """

    kind: Any
    tokens: list[str]
    types: list[int]
    scores: list[float]
    merges: list[str]
    pre: str
    ids: dict[str, int]
    flags: dict[str, bool]
    chat_template: str | None
    name: str

    @classmethod
    def read(cls, metadata: dict[str, Any]) -> Vocabulary:
        """From a file's metadata.

        Raises:
            InputError: there is no vocabulary, or a field is not what it must be.
        """
        fields = _Fields(metadata)
        tokens = fields.values("tokens", str)
        if not tokens:
            raise InputError("The GGUF file holds no vocabulary (tokenizer.ggml.tokens).")
        if (longest := max(map(len, tokens))) > MOST_CHARACTERS:
            raise InputError(
                f"The GGUF file's vocabulary has a token of {longest:,} characters; accepted are "
                f"{MOST_CHARACTERS:,} at most."
            )
        types, scores = fields.values("token_type", int), fields.values("scores", float)
        if types and len(types) != len(tokens):
            raise InputError(
                f"The GGUF file's vocabulary has {len(tokens):,} tokens and {len(types):,} types."
            )
        if not all(map(math.isfinite, scores)):
            raise InputError("The GGUF file's vocabulary has scores that are not finite numbers.")
        ids = {role: fields.one(f"{role}_token_id", int) for role in ROLES}
        flags = ("add_bos_token", "add_eos_token", "add_space_prefix")
        given = {name: fields.one(name, bool) for name in flags}
        name = metadata.get("general.name", "")
        return cls(
            kind=metadata.get("tokenizer.ggml.model"),
            tokens=tokens,
            types=types,
            scores=scores,
            merges=fields.values("merges", str),
            pre=fields.one("pre", str) or "default",
            ids={role: i for role, i in ids.items() if i is not None and 0 <= i < len(tokens)},
            flags={name: flag for name, flag in given.items() if flag is not None},
            chat_template=fields.one("chat_template", str, "tokenizer."),
            name=name if isinstance(name, str) else "",
        )

    def token(self, role: str) -> str | None:
        """The text of the token with a role."""
        index = self.ids.get(role)
        return None if index is None else self.tokens[index]


class _Fields:
    def __init__(self, metadata: dict[str, Any]) -> None:
        self.metadata = metadata

    def one(self, key: str, kind: type, prefix: str = "tokenizer.ggml.") -> Any:
        value = self.metadata.get(prefix + key)
        if value is not None and type(value) is not kind:
            raise _wrong(prefix + key, value)
        return value

    def values(self, key: str, kind: type) -> list:
        values = self.metadata.get(f"tokenizer.ggml.{key}")
        if values is None:
            return []
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise _wrong(f"tokenizer.ggml.{key}", values)
        return values


def _wrong(key: str, value: Any) -> InputError:
    text = short(value[:3] if isinstance(value, list) else value)
    return InputError(f"The GGUF file's field {key} has another type than it must have: {text}.")
