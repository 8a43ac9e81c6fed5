"""Tokenizers built from the vocabulary of a GGUF file."""

from __future__ import annotations

from functools import partial
from typing import Any

from ...errors import InputError
from .pretokenizers import BpeRules, bpe_rules

# Token types of the GGUF specification.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
# Tokens that end a turn, in addition to the file's EOS token.
_END_OF_TURN = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<end_of_turn>",
    "<|end_of_text|>", "<|end_of_sentence|>", "<EOT>", "_<EOT>",
)  # fmt: skip
_SPACE = "\u2581"


def build_tokenizer(metadata: dict[str, Any]) -> Any:
    """Build mlx_lm's ``TokenizerWrapper`` from a GGUF file's metadata.

    Understands byte-level BPE (``gpt2``) and SentencePiece BPE (``llama``) vocabularies.

    Raises:
        InputError: the file has no vocabulary, or of a kind or pre-tokenizer not known here.
    """
    from mlx_lm.tokenizer_utils import (
        BPEStreamingDetokenizer,
        SPMStreamingDetokenizer,
        TokenizerWrapper,
    )
    from transformers import PreTrainedTokenizerFast

    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise InputError("The GGUF file holds no vocabulary (tokenizer.ggml.tokens).")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        core, add_bos = _byte_level_bpe(tokens, metadata)
        detokenizer: Any = BPEStreamingDetokenizer
    elif kind == "llama":
        core, add_bos = _sentencepiece_bpe(tokens, metadata)
        prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
        detokenizer = partial(SPMStreamingDetokenizer, trim_space=prefixed)
    else:
        raise InputError(
            f"The GGUF file's tokenizer model is {kind!r}; accepted are 'gpt2' (byte-level BPE) "
            "and 'llama' (SentencePiece BPE)."
        )
    roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    names = {role: _token_at(tokens, metadata, key) for role, key in roles.items()}
    _add_special_tokens(core, tokens, metadata)
    _add_bos_and_eos(core, tokens, metadata, names, add_bos)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        clean_up_tokenization_spaces=False,
        **{role: text for role, text in names.items() if text is not None},
    )
    tokenizer.chat_template = metadata.get("tokenizer.chat_template")
    return TokenizerWrapper(tokenizer, detokenizer, eos_token_ids=_end_ids(tokens, metadata))


def _byte_level_bpe(tokens: list[str], metadata: dict[str, Any]):
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    rules: BpeRules = bpe_rules(metadata.get("tokenizer.ggml.pre") or "default")
    merges = metadata.get("tokenizer.ggml.merges")
    if not merges:
        raise InputError("The GGUF file's BPE vocabulary has no merges (tokenizer.ggml.merges).")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        if not right or left + right not in vocabulary:
            raise InputError(f"The GGUF file's BPE merge {merge!r} makes no token of its list.")
        if left in vocabulary and right in vocabulary:
            pairs.append((left, right))
    core = Tokenizer(BPE(vocabulary, pairs, ignore_merges=rules.ignore_merges))
    if rules.nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core, rules.add_bos


def _sentencepiece_bpe(tokens: list[str], metadata: dict[str, Any]):
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    scores = metadata.get("tokenizer.ggml.scores")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not scores or len(scores) != len(tokens):
        raise InputError(
            "The GGUF file's SentencePiece vocabulary needs one score a token "
            "(tokenizer.ggml.scores)."
        )
    bpe = BPE(
        {token: i for i, token in enumerate(tokens)},
        _merges_from_scores(tokens, scores, types),
        unk_token=next((t for t, kind in zip(tokens, types) if kind == _UNKNOWN), None),
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    core = Tokenizer(bpe)
    has_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    prefix = [normalizers.Prepend(_SPACE)] if has_prefix else []
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    core.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", _SPACE)])
    core.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return core, True


def _merges_from_scores(
    tokens: list[str], scores: list[float], types: list[int]
) -> list[tuple[str, str]]:
    """Every split of a token into two others, in the order SentencePiece would join them."""
    joinable = {t: s for t, s, kind in zip(tokens, scores, types) if kind in (1, _USER_DEFINED)}
    ranked = []
    for token, score in joinable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in joinable and right in joinable:
                ranked.append((-score, left, right))
    ranked.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in ranked]


def _add_special_tokens(core, tokens: list[str], metadata: dict[str, Any]) -> None:
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type") or []
    # The original Phi-3 tokenizer removes white space after its turn markers.
    name = str(metadata.get("general.name", "")).lower()
    strips = metadata.get("tokenizer.ggml.model") == "llama" and ("phi-3" in name or "phi3" in name)
    for token, kind in zip(tokens, types):
        if kind not in (_CONTROL, _USER_DEFINED, _UNKNOWN) or not token:
            continue
        special = kind != _USER_DEFINED
        rstrip = strips and token not in ("<s>", "<unk>", "<|endoftext|>")
        added = AddedToken(token, special=special, normalized=False, rstrip=rstrip)
        (core.add_special_tokens if special else core.add_tokens)([added])


def _add_bos_and_eos(core, tokens, metadata, names, add_bos_default: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    add_bos = metadata.get("tokenizer.ggml.add_bos_token", add_bos_default)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [names["bos_token"]] if add_bos and names["bos_token"] else []
    after = [names["eos_token"]] if add_eos and names["eos_token"] else []
    if not before and not after:
        return
    core.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(t, tokens.index(t)) for t in {*before, *after}],
    )


def _token_at(tokens: list[str], metadata: dict[str, Any], role: str) -> str | None:
    index = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if index is None or not 0 <= index < len(tokens):
        return None
    return tokens[index]


def _end_ids(tokens: list[str], metadata: dict[str, Any]) -> list[int]:
    ids = {
        metadata[f"tokenizer.ggml.{role}_token_id"]
        for role in ("eos", "eot", "eom")
        if _token_at(tokens, metadata, role) is not None
    }
    types = metadata.get("tokenizer.ggml.token_type") or []
    endings = set(_END_OF_TURN)
    ids.update(
        i for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (_CONTROL, _USER_DEFINED) and token in endings
    )  # fmt: skip
    return sorted(ids)
