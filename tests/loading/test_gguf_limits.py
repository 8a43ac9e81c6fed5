"""Well-formed GGUF files that declare what they don't have, or hold values of the wrong type."""

from __future__ import annotations

import resource
import time
from pathlib import Path

import gguf_edit
import pytest
from gguf_edit import ARRAY, BOOL, F32, I32, STRING, U32, U64, Parts
from gguf_files import LAYERS, TOKENS, logits, write_small_gguf

from mlx_turbokv import InputError
from mlx_turbokv.loading import models
from mlx_turbokv.loading.gguf.hyperparameters import config_from_gguf
from mlx_turbokv.loading.gguf.reader import open_gguf


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> bytes:
    return write_small_gguf(tmp_path_factory.mktemp("gguf")).read_bytes()


@pytest.fixture
def path(tmp_path, intact) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(intact)
    return path


def set_field(key: str, kind: int, value):
    return lambda parts: parts.fields.__setitem__(key.encode(), (kind, value))


def refused(path: Path, *words: str) -> None:
    """Loading is one sentence; so is the configuration, if it is wrong already."""
    with pytest.raises(InputError) as raised:
        models.load(path)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 600
    assert all(word in message for word in words), message


def test_parts_are_written_as_they_were(path, intact):
    gguf_edit.edit(path, lambda parts: None)
    assert path.read_bytes() == intact


@pytest.mark.parametrize("n", [LAYERS + 1, 1000, 60_000, 2**31 - 1])
def test_layers_that_a_file_does_not_have_are_refused_at_once(path, n):
    gguf_edit.edit(path, set_field("llama.block_count", U32, n))
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match=f"declares {n:,} layers and has tensors of {LAYERS}"):
        config_from_gguf(open_gguf(path))
    refused(path, "layers")
    assert time.process_time() - start < 5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize(
    "key",
    ["embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv",
     "attention.key_length"],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, 1, 7, 1 << 20, 2**31 - 1])
def test_sizes_that_the_tensors_do_not_have_are_refused(path, key, value):
    gguf_edit.edit(path, set_field(f"llama.{key}", U32, value))
    with pytest.raises(InputError):
        config_from_gguf(open_gguf(path))
    refused(path)


WRONG = [
    ("llama.block_count", STRING, b"2"),
    ("llama.block_count", F32, 2.0),
    ("llama.block_count", ARRAY, (U32, [])),
    ("llama.block_count", BOOL, True),
    ("llama.block_count", I32, -2),
    ("llama.embedding_length", ARRAY, (STRING, [b"a", b"b"])),
    ("llama.context_length", U64, 2**63),
    ("llama.context_length", U32, 0),
    ("llama.attention.layer_norm_rms_epsilon", F32, float("nan")),
    ("llama.attention.layer_norm_rms_epsilon", F32, float("inf")),
    ("llama.attention.layer_norm_rms_epsilon", STRING, b"1e-5"),
    ("llama.rope.freq_base", F32, -1.0),
    ("llama.rope.freq_base", F32, 0.0),
    ("llama.rope.freq_base", F32, float("nan")),
    ("llama.rope.dimension_count", U32, 3),
    ("llama.rope.dimension_count", STRING, b"16"),
    ("llama.rope.scaling.type", U32, 1),
    ("llama.attention.head_count_kv", ARRAY, (U32, [2, 1])),
    ("llama.attention.head_count_kv", U32, 3),
    ("llama.attention.value_length", U32, 8),
    ("general.architecture", U32, 3),
    ("general.architecture", ARRAY, (STRING, [b"llama"])),
    ("general.alignment", STRING, b"32"),
    ("general.alignment", U32, 0),
    ("general.alignment", U32, 3),
    ("tokenizer.ggml.model", U32, 1),
    ("tokenizer.ggml.model", ARRAY, (STRING, [b"gpt2"])),
    ("tokenizer.ggml.pre", U32, 1),
    ("tokenizer.ggml.tokens", STRING, b"abc"),
    ("tokenizer.ggml.tokens", ARRAY, (U32, list(range(100)))),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, [b"a", b"\xff"])),
    ("tokenizer.ggml.tokens", ARRAY, (STRING, [b"%d" % i for i in range(200)])),
    ("tokenizer.ggml.merges", STRING, b"t h"),
    ("tokenizer.ggml.merges", ARRAY, (U32, [1, 2])),
    ("tokenizer.ggml.merges", ARRAY, (STRING, [b"t h", b"h"])),
    ("tokenizer.ggml.token_type", U32, 1),
    ("tokenizer.ggml.token_type", ARRAY, (STRING, [b"1"] * len(TOKENS))),
    ("tokenizer.ggml.token_type", ARRAY, (I32, [1])),
    ("tokenizer.ggml.eos_token_id", STRING, b"<|end|>"),
    ("tokenizer.ggml.eos_token_id", ARRAY, (U32, [0])),
    ("tokenizer.ggml.bos_token_id", F32, 1.0),
    ("tokenizer.ggml.eot_token_id", STRING, b"1"),
    ("tokenizer.ggml.add_bos_token", STRING, b"yes"),
    ("tokenizer.chat_template", U32, 1),
    ("tokenizer.chat_template", ARRAY, (STRING, [b"a"])),
]


@pytest.mark.parametrize(
    ("key", "kind", "value"), WRONG, ids=[f"{key}-{i}" for i, (key, *_) in enumerate(WRONG)]
)
def test_a_value_of_the_wrong_type_is_one_sentence(path, key, kind, value):
    gguf_edit.edit(path, set_field(key, kind, value))
    refused(path)


SENTENCEPIECE = {
    "tokenizer.ggml.model": (STRING, b"llama"),
    "tokenizer.ggml.scores": (ARRAY, (F32, [0.0] * len(TOKENS))),
}


@pytest.mark.parametrize(
    ("key", "kind", "value"),
    [
        ("tokenizer.ggml.scores", F32, 1.0),
        ("tokenizer.ggml.scores", ARRAY, (STRING, [b"a"] * len(TOKENS))),
        ("tokenizer.ggml.scores", ARRAY, (F32, [float("nan")] * len(TOKENS))),
        ("tokenizer.ggml.scores", ARRAY, (F32, [0.0])),
        ("tokenizer.ggml.add_space_prefix", STRING, b"no"),
        (
            "tokenizer.ggml.tokens", ARRAY,
            (STRING, [b"a" * 200_000, *(b"%d" % i for i in range(len(TOKENS) - 1))]),
        ),
    ],
)  # fmt: skip
def test_scores_of_the_wrong_type_are_one_sentence(path, key, kind, value):
    def change(parts: Parts) -> None:
        parts.fields |= {name.encode(): field for name, field in SENTENCEPIECE.items()}
        set_field(key, kind, value)(parts)

    gguf_edit.edit(path, change)
    refused(path)


def test_tensors_that_share_their_bytes_are_refused(path):
    def overlap(parts: Parts) -> None:
        for tensor in parts.tensors:
            tensor.offset = 0

    gguf_edit.edit(path, overlap)
    refused(path, "overlap")


@pytest.mark.parametrize("dims", [[2**32, 2**32], [2**63, 2], [0, 4], [2**40], [4, 4, 4, 4, 4]])
def test_a_tensor_of_more_than_the_file_has_is_refused(path, dims):
    gguf_edit.edit(path, lambda parts: setattr(parts.tensors[0], "dims", dims))
    refused(path)


@pytest.mark.parametrize("what", ["n_fields", "n_tensors"])
@pytest.mark.parametrize("n", [0, 1, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_numbers_of_fields_and_tensors_are_checked(path, what, n):
    start = time.process_time()
    gguf_edit.edit(path, lambda parts: setattr(parts, what, n))
    refused(path)
    assert time.process_time() - start < 5


def many(n: int, kind: int):
    """A vocabulary with n more tokens, all of one type, and an embedding of as many rows."""

    def change(parts: Parts) -> None:
        tokens = [token.encode() for token in TOKENS] + [b"<%d>" % i for i in range(n)]
        parts.fields[b"tokenizer.ggml.tokens"] = ARRAY, (STRING, tokens)
        types = [3, 3] + [1] * (len(TOKENS) - 2) + [kind] * n
        parts.fields[b"tokenizer.ggml.token_type"] = ARRAY, (I32, types)
        for tensor in parts.tensors:
            if tensor.name in (b"token_embd.weight", b"output.weight"):
                size = 4 * tensor.dims[0] * len(tokens)
                tensor.dims[1], tensor.offset = len(tokens), len(parts.data)
                parts.data += bytes(size)

    return change


@pytest.mark.slow
@pytest.mark.parametrize("kind", [1, 3, 4], ids=["normal", "control", "user-defined"])
def test_100_000_strings_are_read_quickly(path, kind):
    gguf_edit.edit(path, many(100_000, kind))
    start = time.process_time()
    loaded = models.load(path)
    assert time.process_time() - start < 5
    assert loaded.tokenizer.vocab_size == len(TOKENS) + 100_000
    assert logits(loaded.model, 2).shape[-1] == len(TOKENS) + 100_000


def test_arrays_of_millions_are_refused(path):
    wide = {b"general.tags": (ARRAY, (U32, [0] * ((1 << 22) + 1)))}
    gguf_edit.edit(path, lambda parts: parts.fields.update(wide))
    refused(path, "arrays of")


def test_a_vocabulary_larger_than_the_embedding_is_refused(path):
    def more(parts: Parts) -> None:
        tokens = [token.encode() for token in TOKENS] + [b"another"]
        parts.fields[b"tokenizer.ggml.tokens"] = ARRAY, (STRING, tokens)
        parts.fields[b"tokenizer.ggml.token_type"] = ARRAY, (I32, [1] * len(tokens))

    gguf_edit.edit(path, more)
    refused(path, f"{len(TOKENS) + 1} tokens")
