"""Tokenizers built from the vocabulary of a GGUF file."""

from __future__ import annotations

from functools import partial
from importlib import import_module
from typing import Any

from ...errors import InputError, short
from .pretokenizers import BpeRules, bpe_rules
from .vocabulary import Vocabulary

# Token types of the GGUF specification.
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6
# Tokens that end a turn, in addition to the file's EOS token.
_END_OF_TURN = (
    "<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<|endoftext|>", "<end_of_turn>",
    "<|end_of_text|>", "<|end_of_sentence|>", "<EOT>", "_<EOT>",
)  # fmt: skip
_SPACE = "\u2581"


def build_tokenizer(metadata: dict[str, Any], chat_template: str | None = None) -> Any:
    """Build mlx_lm's ``TokenizerWrapper`` from a GGUF file's metadata.

    Understands byte-level BPE (``gpt2``) and SentencePiece BPE (``llama``) vocabularies. As in
    mlx-lm, the chat template tells how the model calls tools.

    Args:
        chat_template: in place of the file's.

    Raises:
        InputError: the file has no vocabulary, or of a kind or pre-tokenizer not known here.
    """
    from mlx_lm.tokenizer_utils import (
        BPEStreamingDetokenizer,
        SPMStreamingDetokenizer,
        TokenizerWrapper,
        _infer_tool_parser,
    )
    from transformers import PreTrainedTokenizerFast

    vocabulary = Vocabulary.read(metadata)
    try:
        if vocabulary.kind == "gpt2":
            core, add_bos = _byte_level_bpe(vocabulary)
            detokenizer: Any = BPEStreamingDetokenizer
        elif vocabulary.kind == "llama":
            core, add_bos = _sentencepiece_bpe(vocabulary)
            prefixed = vocabulary.flags.get("add_space_prefix", True)
            detokenizer = partial(SPMStreamingDetokenizer, trim_space=prefixed)
        else:
            raise InputError(
                f"The GGUF file's tokenizer model is {short(vocabulary.kind)}; accepted are "
                "'gpt2' (byte-level BPE) and 'llama' (SentencePiece BPE)."
            )
        _add_special_tokens(core, vocabulary)
        _add_bos_and_eos(core, vocabulary, add_bos)
        roles = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown",
                 "pad_token": "padding"}  # fmt: skip
        names = {name: vocabulary.token(role) for name, role in roles.items()}
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=core,
            clean_up_tokenization_spaces=False,
            **{name: text for name, text in names.items() if text is not None},
        )
        tokenizer.chat_template = chat_template or vocabulary.chat_template
        options: dict[str, Any] = {"eos_token_ids": _end_ids(vocabulary)}
        if name := _infer_tool_parser(tokenizer):
            parser = import_module(f"mlx_lm.tool_parsers.{name}")
            options["tool_parser"] = parser.parse_tool_call
            options["tool_call_start"] = parser.tool_call_start
            options["tool_call_end"] = parser.tool_call_end
        return TokenizerWrapper(tokenizer, detokenizer, **options)
    except InputError:
        raise
    except Exception as error:  # tokenizers raises no narrower class
        text = " ".join(str(error).split())[:200]
        raise InputError(f"The GGUF file's vocabulary makes no tokenizer ({text}).") from error


def _byte_level_bpe(vocabulary: Vocabulary):
    from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
    from tokenizers.models import BPE

    rules: BpeRules = bpe_rules(vocabulary.pre)
    if not vocabulary.merges:
        raise InputError("The GGUF file's BPE vocabulary has no merges (tokenizer.ggml.merges).")
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    pairs = []
    for merge in vocabulary.merges:
        left, _, right = merge.partition(" ")
        if not right or left + right not in ids:
            raise InputError(
                f"The GGUF file's BPE merge {short(merge)} makes no token of its list."
            )
        if left in ids and right in ids:
            pairs.append((left, right))
    core = Tokenizer(BPE(ids, pairs, ignore_merges=rules.ignore_merges))
    if rules.nfc:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rules.patterns]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core, rules.add_bos


def _sentencepiece_bpe(vocabulary: Vocabulary):
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    tokens, scores = vocabulary.tokens, vocabulary.scores
    types = vocabulary.types or [1] * len(tokens)
    if len(scores) != len(tokens):
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
    has_prefix = vocabulary.flags.get("add_space_prefix", True)
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


def _add_special_tokens(core, vocabulary: Vocabulary) -> None:
    from tokenizers import AddedToken

    # The original Phi-3 tokenizer removes white space after its turn markers.
    name = vocabulary.name.lower()
    strips = vocabulary.kind == "llama" and ("phi-3" in name or "phi3" in name)
    found: dict[bool, list[Any]] = {True: [], False: []}
    for token, kind in zip(vocabulary.tokens, vocabulary.types):
        if kind not in (_CONTROL, _USER_DEFINED, _UNKNOWN) or not token:
            continue
        special = kind != _USER_DEFINED
        rstrip = strips and token not in ("<s>", "<unk>", "<|endoftext|>")
        added = AddedToken(token, special=special, normalized=False, rstrip=rstrip)
        found[special].append(added)
    # each call compiles all added tokens anew
    core.add_special_tokens(found[True])
    core.add_tokens(found[False])


def _add_bos_and_eos(core, vocabulary: Vocabulary, add_bos_default: bool) -> None:
    from tokenizers.processors import TemplateProcessing

    bos, eos = vocabulary.token("bos"), vocabulary.token("eos")
    add_bos = vocabulary.flags.get("add_bos_token", add_bos_default)
    add_eos = vocabulary.flags.get("add_eos_token", False)
    before = [bos] if add_bos and bos else []
    after = [eos] if add_eos and eos else []
    if not before and not after:
        return
    core.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *before, "$B", *after],
        special_tokens=[(t, vocabulary.tokens.index(t)) for t in {*before, *after}],
    )


def _end_ids(vocabulary: Vocabulary) -> list[int]:
    ids = {vocabulary.ids[role] for role in ("eos", "eot", "eom") if role in vocabulary.ids}
    endings = set(_END_OF_TURN)
    ids.update(
        i for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.types))
        if kind in (_CONTROL, _USER_DEFINED) and token in endings
    )  # fmt: skip
    return sorted(ids)
