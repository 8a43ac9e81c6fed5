"""Tokenizers from GGUF metadata against a plain BPE written here, and known SmolLM2 ids."""

from __future__ import annotations

import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlx_turbokv.errors import InputError
from mlx_turbokv.loading.default_model import default_model_file
from mlx_turbokv.loading.gguf.pretokenizers import bpe_rules
from mlx_turbokv.loading.gguf.reader import open_gguf
from mlx_turbokv.loading.gguf.tokenizer import build_tokenizer

pytestmark = pytest.mark.slow

GPT2_PIECES = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
ORDINARY = st.text(alphabet="the cat's 1234 sat,\n  ON\tit! \u00e9\u4e2d", max_size=60)


@pytest.fixture(scope="module")
def metadata():
    return open_gguf(default_model_file()).metadata


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return build_tokenizer(metadata)


@pytest.fixture(scope="module")
def vocabulary(tokenizer) -> dict[str, int]:
    return tokenizer.get_vocab()


def _byte_letters() -> dict[int, str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


LETTERS = _byte_letters()


class PlainBpe:
    """Byte-level BPE by its definition: join the pair of lowest rank until none is left.

    Bytes that the vocabulary lacks drop out before, as in Hugging Face's tokenizers.
    """

    def __init__(self, metadata, patterns):
        self.ids = {t: i for i, t in enumerate(metadata["tokenizer.ggml.tokens"])}
        merges = metadata["tokenizer.ggml.merges"]
        self.ranks = {tuple(m.split(" ")): rank for rank, m in enumerate(merges)}
        self.patterns = [regex.compile(p) for p in patterns]

    def pieces(self, text):
        pieces = [text]
        for pattern in self.patterns:
            cut = []
            for piece in pieces:
                at = 0
                for match in pattern.finditer(piece):
                    cut += [piece[at : match.start()], match.group()]
                    at = match.end()
                cut.append(piece[at:])
            pieces = [p for p in cut if p]
        return pieces

    def encode(self, text):
        ids = []
        for piece in self.pieces(text):
            parts = [LETTERS[b] for b in piece.encode() if LETTERS[b] in self.ids]
            while len(parts) > 1:
                pairs = list(zip(parts, parts[1:]))
                best = min(pairs, key=lambda p: self.ranks.get(p, 1 << 60))
                if best not in self.ranks:
                    break
                at = pairs.index(best)
                parts[at : at + 2] = ["".join(best)]
            ids += [self.ids[p] for p in parts]
        return ids


@settings(deadline=None, max_examples=60)
@given(text=TEXT | ORDINARY)
@example(text="\x9e\U0008b000")  # the byte F2 is not in the vocabulary; its neighbours join
def test_smollm_ids_equal_plain_bpe(metadata, tokenizer, text):
    oracle = PlainBpe(metadata, [r"\p{N}", GPT2_PIECES])
    assert tokenizer.encode(text) == oracle.encode(text)


@settings(deadline=None, max_examples=60)
@given(text=TEXT | ORDINARY)
def test_decoding_gives_the_text_back(vocabulary, tokenizer, text):
    if all(letter in vocabulary for letter in map(LETTERS.get, text.encode())):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_known_smollm2_ids(tokenizer):
    assert tokenizer.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert tokenizer.encode("<|im_start|>") == [1]


def test_end_tokens_and_chat_template(tokenizer):
    assert tokenizer.eos_token_ids == {0, 2}
    assert tokenizer.has_chat_template
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_another_chat_template_and_the_tools_that_it_calls(metadata, tokenizer):
    assert not tokenizer.has_tool_calling
    template = "{{ messages[0].content }}<tool_call>{{ tool_call.name }}</tool_call>"
    other = build_tokenizer(metadata, template)
    assert other.chat_template == template and other.has_tool_calling
    assert (other.tool_call_start, other.tool_call_end) == ("<tool_call>", "</tool_call>")
    assert other.tool_parser('{"name": "f", "arguments": {"x": 1}}', None)["name"] == "f"


def test_streaming_detokenizer_gives_the_decoded_text(tokenizer):
    text = "Paris, caf\u00e9 \u4e2d\u6587 and 42 more."
    detokenizer = tokenizer.detokenizer
    for token in tokenizer.encode(text):
        detokenizer.add_token(token)
    detokenizer.finalize()
    assert detokenizer.text == text


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("llama-bpe", "It's 12345\n\nOK", ["It", "'s", " ", "123", "45", "\n\n", "OK"]),
        ("qwen2", "It's 123\n\nOK", ["It", "'s", " ", "1", "2", "3", "\n\n", "OK"]),
        ("gpt-2", "It's 12345\n\nOK", ["It", "'s", " 12345", "\n", "\n", "OK"]),
        ("smollm", "a 12", ["a", " ", "1", "2"]),
        ("gpt-4o", "HelloWorld don't", ["Hello", "World", " don't"]),
        ("tekken", "HelloWorld 12", ["Hello", "World", " ", "1", "2"]),
        ("dbrx", "x  y12345", ["x", " ", " y", "123", "45"]),
    ],
)
def test_pieces_of_each_pre_tokenizer(name, text, pieces):
    metadata = {"tokenizer.ggml.tokens": [], "tokenizer.ggml.merges": []}
    assert PlainBpe(metadata, bpe_rules(name).patterns).pieces(text) == pieces


@pytest.mark.parametrize(
    "name", ["gpt-2", "default", "smollm", "llama-bpe", "dbrx", "qwen2", "gpt-4o", "tekken"]
)
@settings(deadline=None, max_examples=20)
@given(text=ORDINARY)
def test_every_pre_tokenizer_cuts_like_its_patterns(metadata, name, text):
    if name not in _built:
        changed = {**metadata, "tokenizer.ggml.pre": name, "tokenizer.ggml.add_bos_token": False}
        _built[name] = build_tokenizer(changed)
    cut = _built[name].backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
    expected = PlainBpe(metadata, bpe_rules(name).patterns).pieces(text)
    assert [p for p, _ in cut] == ["".join(LETTERS[b] for b in p.encode()) for p in expected]


_built = {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon' is not known; accepted are"),
        ({"tokenizer.ggml.model": "bert"}, "'bert'; accepted are 'gpt2'"),
        ({"tokenizer.ggml.tokens": []}, "no vocabulary"),
        ({"tokenizer.ggml.merges": []}, "no merges"),
    ],
)
def test_vocabularies_that_cannot_be_read(metadata, changes, message):
    with pytest.raises(InputError, match=message):
        build_tokenizer({**metadata, **changes})


def test_bos_and_eos_as_the_file_says(metadata):
    both = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    ids = build_tokenizer({**metadata, **both}).encode("The")
    assert ids == [1, 504, 2]


def _sentencepiece(**extra):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = ["\u2581", "t", "h", "e", "c", "a", "th", "he", "the", "\u2581the", "\u2581c", "at"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces + words,
        "tokenizer.ggml.scores": [0.0] * len(pieces) + [-float(i) for i in range(len(words))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        **extra,
    }


def _sentencepiece_ids(text: str, metadata) -> list[int]:
    """Join the neighbours whose piece has the best score, the leftmost first."""
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {t: i for i, t in enumerate(tokens)}
    parts = list(text.replace(" ", "\u2581"))
    while True:
        joined = [
            (metadata["tokenizer.ggml.scores"][ids[a + b]], -i)
            for i, (a, b) in enumerate(zip(parts, parts[1:]))
            if a + b in ids
        ]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    result = []
    for part in parts:
        result += [ids[part]] if part in ids else [ids[f"<0x{b:02X}>"] for b in part.encode()]
    return result


@settings(deadline=None, max_examples=60)
@given(text=st.text(alphabet="the ca\u00e9\n", min_size=1, max_size=20))
def test_sentencepiece_ids_equal_greedy_joining_by_score(text):
    metadata = _sentencepiece()
    tokenizer = _built.setdefault("spm", build_tokenizer(metadata))
    assert tokenizer.encode(text) == [1, *_sentencepiece_ids(" " + text, metadata)]
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_sentencepiece_without_space_prefix():
    metadata = _sentencepiece(**{"tokenizer.ggml.add_space_prefix": False})
    assert build_tokenizer(metadata).encode("the") == [1, *_sentencepiece_ids("the", metadata)]
