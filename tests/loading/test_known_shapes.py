"""Built-in shapes by name, and the bits of weights that configurations tell."""

from __future__ import annotations

import pytest

from mlx_turbokv.loading.known_shapes import KNOWN, closest, known_config, quantization
from mlx_turbokv.loading.model_shape import shape_from_config
from mlx_turbokv.loading.weight_bits import weight_bytes

# Billions of weights as the models' cards round them; gigabytes of mlx-community's files.
CARDS = {
    "phi-4": 14.7, "Qwen2.5-7B": 7.61, "Qwen3-4B": 4.0, "Qwen3-8B": 8.2, "Qwen3-14B": 14.8,
    "Qwen3-32B": 32.8, "Qwen3-30B-A3B": 30.5, "Llama-3.1-8B": 8.03, "Llama-3.2-3B": 3.21,
    "Llama-3.3-70B": 70.6, "gpt-oss-20b": 20.9, "gpt-oss-120b": 117, "Mistral-7B-v0.3": 7.25,
    "Mistral-Small-24B": 23.6,
}  # fmt: skip


@pytest.mark.parametrize("name", CARDS)
def test_weights_are_as_many_as_the_card_says(name) -> None:
    shape = shape_from_config(KNOWN[name], name)
    assert shape.n_parameters is not None
    assert shape.n_parameters / 1e9 == pytest.approx(CARDS[name], rel=6e-3)


def test_gpt_oss_takes_what_its_experts_in_mxfp4_take() -> None:
    """12.1 GB on the hub; 4.25 bits for each of 19.1 billion weights."""
    shape = shape_from_config(KNOWN["gpt-oss-20b"] | quantization("gpt-oss-20b"), "gpt-oss-20b")
    assert shape.weight_bytes is not None
    assert shape.weight_bytes / 1e9 == pytest.approx(12.1, abs=0.05)


def test_names_in_any_case() -> None:
    assert known_config("LLAMA-3.1-8b") is KNOWN["Llama-3.1-8B"]
    assert known_config("Llama-3.1") is None


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("mlx-community/Qwen3-8B-4bit", "Qwen3-8B"),
        ("google/gemma-3-12b-it", "Gemma-3-12B"),
        ("gpt-oss-20B", "gpt-oss-20b"),
        ("Qwen3-80B", "Qwen3-8B"),
        ("unknown/other", None),
    ],
)
def test_the_shape_that_is_most_like_a_name(given, found) -> None:
    assert closest(given) == found


def test_quantisation_by_layer_is_counted() -> None:
    """All of a config's forms: one for all, one by path, none by path, MXFP4 experts."""
    sizes = {
        "a.weight": (2, 64),
        "b.weight": (64,),
        "c.weight": (4, 64),
        "experts.d.weight": (64, 8),
    }
    assert weight_bytes(sizes, {}) == 2 * (128 + 64 + 256 + 512)
    four = {"bits": 4, "group_size": 64}
    assert weight_bytes(sizes, {"quantization": four}) == (128 + 256 + 512) * 4.5 / 8 + 2 * 64
    apart = four | {"a": {"bits": 6, "group_size": 32}, "c": False}
    assert weight_bytes(sizes, {"quantization": apart}) == (
        128 * 7 / 8 + 2 * 64 + 2 * 256 + 512 * 4.5 / 8
    )
    original = {"quantization_config": {"quant_method": "mxfp4"}}
    assert weight_bytes(sizes, original) == 2 * (128 + 64 + 256) + 512 * 4.25 / 8
