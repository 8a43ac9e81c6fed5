"""Pre-tokenizers of byte-level BPE vocabularies by their names in ``tokenizer.ggml.pre``.

The patterns are those of the models' own tokenizers; the names are the ones llama.cpp's
converter writes into GGUF files.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import InputError, short


@dataclass(frozen=True)
class BpeRules:
    """The rules of one pre-tokenizer.

    Args:
        patterns: regular expressions applied one after the other; each match is a piece, and so
            is the text between matches.
        ignore_merges: a piece that is a token is taken as it is, without merges.
        nfc: the text is normalised to NFC first.
        add_bos: whether a BOS token is added where the file doesn't say.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False
    add_bos: bool = False


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CL100K = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_RULES = {
    "gpt-2": BpeRules((_GPT2,)),
    "default": BpeRules((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "smollm": BpeRules((r"\p{N}", _GPT2)),
    "llama-bpe": BpeRules((_CL100K,), ignore_merges=True, add_bos=True),
    "dbrx": BpeRules((_CL100K,)),
    "qwen2": BpeRules((_QWEN2,), nfc=True),
    "gpt-4o": BpeRules((_O200K,)),
    "tekken": BpeRules((_TEKKEN,), ignore_merges=True, add_bos=True),
}
_SAME_AS = {
    "phi-2": "gpt-2", "olmo": "gpt-2", "mpt": "gpt-2", "gigachat": "gpt-2", "exaone4": "gpt-2",
    "starcoder": "smollm", "exaone": "smollm", "minerva-7b": "smollm",
    "llama3": "llama-bpe", "llama-v3": "llama-bpe", "falcon3": "llama-bpe",
    "pixtral": "llama-bpe", "lfm2": "llama-bpe",
    "smaug-bpe": "dbrx",
    "deepseek-r1-qwen": "qwen2", "megrez": "qwen2",
    "llama4": "gpt-4o",
}  # fmt: skip


def bpe_rules(name: str) -> BpeRules:
    """The rules of a pre-tokenizer by its GGUF name.

    Raises:
        InputError: the name is not one of those known here.
    """
    rules = _RULES.get(_SAME_AS.get(name, name))
    if rules is None:
        known = ", ".join(sorted([*_RULES, *_SAME_AS]))
        raise InputError(
            f"The GGUF file's pre-tokenizer {short(name)} is not known; accepted are {known}."
        )
    return rules
