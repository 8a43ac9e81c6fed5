"""What people ask `plan`, with its arithmetic done by hand.

A token's row in q8_0 is head_dim × 34 / 32 bytes, in turboN head_dim × N / 8 and 2 bytes for each
128 values, in f16 head_dim × 2. Of n tokens with the newest 128 protected, n - 128 are not (all n
here are multiples of 32), and 128 + 32 are, at head_dim × 34 / 32. Weights have 4.5 bits, norms 16.
Reading a prompt takes 129 MiB, and for each of 2,048 tokens a byte for each token of the context
and the activations: (4 × hidden_size + 3 × the widest projection) × 2 × 2 bytes.
"""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from mlx_turbokv.cli.plan import command
from mlx_turbokv.loading.memory import apple_gpu_bytes
from mlx_turbokv.policy.settings import DEFAULT

GIB, MIB = 1 << 30, 1 << 20
K = 1024


def ask(*args: str) -> dict:
    result = CliRunner().invoke(command, [*args, "--output", "json"], catch_exceptions=False)
    assert result.exit_code == 0
    return json.loads(result.stdout)


def scratch(n_tokens: int, activations: int) -> int:
    return 129 * MIB + 2048 * (n_tokens + activations)


def weights(n: int, in_16_bits: int) -> int:
    return (n - in_16_bits) * 9 // 16 + 2 * in_16_bits


# Parameters as the hub counts them, and those of norms and biases.
QWEN3_8B = weights(8_190_735_360, 36 * (2 * 4096 + 2 * 128) + 4096)
LLAMA_8B = weights(8_030_261_248, 65 * 4096)
LLAMA_3B = weights(3_212_749_824, 57 * 3072)
LLAMA_70B = weights(70_553_706_496, 161 * 8192)
GEMMA_27B = weights(27_009_002_240, 62 * (4 * 5376 + 2 * 128) + 5376)
# gpt-oss-20b: 24 layers of 32 experts of three matrices in 4.25 bits, the rest in 8.5
EXPERTS = 24 * 32 * 3 * 2880**2
SMALL = 24 * (64 + 4096 + 2 * 512 + 2880 + 32 * 3 * 2880 + 32 + 2 * 2880) + 2880
GPT_OSS = EXPERTS * 17 // 32 + (20_914_757_184 - EXPERTS - SMALL) * 17 // 16 + 2 * SMALL
FITS = [
    # 36 layers of 8 heads of 128: turbo5/turbo4 82 + 66 bytes a head
    (
        "Qwen3-8B", "16GB", "128K", "--policy near-lossless",
        QWEN3_8B + (128 * K - 128) * 36 * 8 * 148 + 160 * 36 * 8 * 272,
        scratch(128 * K, (4 * 4096 + 3 * 12288) * 4), 16 * GIB * 2 // 3,
    ),
    # f16: 256 + 256
    (
        "Qwen3-8B", "24GB", "40K", "-ctk f16 -ctv f16",
        QWEN3_8B + 40 * K * 36 * 8 * 512,
        scratch(40 * K, (4 * 4096 + 3 * 12288) * 4), 16 * GIB,
    ),
    # 32 layers of 8 heads of 128: q8_0/q8_0 136 + 136
    (
        "Llama-3.1-8B", "16GB", "64K", "-ctk q8_0 -ctv q8_0",
        LLAMA_8B + 64 * K * 32 * 8 * 272,
        scratch(64 * K, (4 * 4096 + 3 * 14336) * 4), 16 * GIB * 2 // 3,
    ),
    # 28 layers of 8 heads of 128: turbo3/turbo3 50 + 50
    (
        "Llama-3.2-3B", "8GB", "128K", "-ctk turbo3 -ctv turbo3",
        LLAMA_3B + (128 * K - 128) * 28 * 8 * 100 + 160 * 28 * 8 * 272,
        scratch(128 * K, (4 * 3072 + 3 * 8192) * 4), 8 * GIB * 2 // 3,
    ),
    # 80 layers of 8 heads of 128: turbo6/turbo5 98 + 82; of more than 32 GB, three quarters
    (
        "Llama-3.3-70B", "64GB", "64K", "-ctk turbo6 -ctv turbo5",
        LLAMA_70B + (64 * K - 128) * 80 * 8 * 180 + 160 * 80 * 8 * 272,
        scratch(64 * K, (4 * 8192 + 3 * 28672) * 4), 48 * GIB,
    ),
    # 10 layers of 62 see all tokens: 16 heads of 128 in f16; 52 keep windows of 1,024
    (
        "Gemma-3-27B", "32GB", "32K", "-ctk f16 -ctv f16",
        GEMMA_27B + (32 * K * 10 + 1024 * 52) * 16 * 512,
        scratch(32 * K, (4 * 5376 + 3 * 21504) * 4), 32 * GIB * 2 // 3,
    ),
    # 12 layers of 24 see all tokens: 8 heads of 64; 12 keep windows of 128. A token has 4 experts,
    # and the widest projection is Q's 4,096.
    (
        "gpt-oss-20b", "24GB", "128K", "-ctk f16 -ctv f16",
        GPT_OSS + (128 * K + 128) * 12 * 8 * 256,
        scratch(128 * K, (4 * 2880 + 3 * 4096 * 4) * 4), 16 * GIB,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("model", "memory", "context", "typed", "held", "reading", "gpu"), FITS,
    ids=[f"{model} in {memory} at {context}" for model, memory, context, *_ in FITS],
)  # fmt: skip
def test_what_to_type(model, memory, context, typed, held, reading, gpu) -> None:
    plan = ask("--model", model, "--memory", memory, "-c", context)
    (n,) = plan["f16_bytes"]
    row = next(row for row in plan["rows"] if row["name"] == plan["chosen"])
    assert plan["weight_bytes"] + row["bytes"][n] == pytest.approx(held, abs=4)
    assert plan["scratch_bytes"][n] == reading
    assert plan["memory_bytes"] == gpu
    assert held + reading <= gpu
    total = (held + reading) / GIB
    sentence = f"Type {typed}: with {int(n):,} tokens {model} takes {total:.2f} GiB of the "
    assert plan["verdict"].startswith(sentence + f"{gpu / GIB:.2f} GiB that the GPU may use")
    passed = int(n) > plan["max_context"]
    assert ("the model was made for" in plan["verdict"]) == passed
    before = plan["rows"][: plan["rows"].index(row)]
    assert all(plan["weight_bytes"] + x["bytes"][n] + reading > gpu for x in before)


def test_the_question_of_the_help_ends_in_the_sentence_to_type() -> None:
    args = ["--model", "qwen3-8b", "--memory", "16GB", "-c", "128K"]
    last = CliRunner().invoke(command, args).stdout.splitlines()[-1]
    assert last == (
        "Type --policy near-lossless: with 131,072 tokens Qwen3-8B takes "
        "10.28 GiB of the 10.67 GiB that the GPU may use of 16.00 GiB (weights 4.29 GiB, cache "
        "5.21 GiB, reading the prompt 801.00 MiB); f16/f16, q8_0/q8_0, turbo6/turbo5 and 1 "
        "more do not fit; the model was made for 40,960 tokens."
    )


def test_the_default_needs_no_typing() -> None:
    args = ["--model", "Qwen3-8B", "--memory", "16GB", "-c", "128K", "--config", "compact"]
    assert ask(*args)["verdict"].startswith("Type --policy compact: with")
    args += ["--config", DEFAULT, "--config", f"{DEFAULT}+0,0"]
    plan = ask(*args[:6], *args[8:])
    said = f"Type --policy {DEFAULT} (the default: nothing to type): with"
    assert plan["verdict"].startswith(said) and plan["chosen"] == DEFAULT


def test_weights_that_do_not_fit() -> None:
    plan = ask("--model", "gpt-oss-20b", "--memory", "16GB", "-c", "4K")
    assert plan["chosen"] is None
    assert plan["verdict"] == (
        "gpt-oss-20b does not fit: its weights take 11.25 GiB, more than the 10.67 GiB that the "
        "GPU may use of 16.00 GiB."
    )


def test_a_context_that_does_not_fit_says_which_does() -> None:
    """8 heads of 128 in 32 layers: turbo3/turbo2 takes 50 + 34 bytes a head."""
    plan = ask("--model", "Mistral-7B-v0.3", "--memory", "8GB", "-c", "48K")
    free = 8 * GIB * 2 // 3 - plan["weight_bytes"] - scratch(0, (4 * 4096 + 3 * 14336) * 4)
    row = 32 * 8 * 84
    # of n tokens at most 128 + 127 + 32 are protected, while n - 128 are not
    n = (free + 128 * row - 287 * 32 * 8 * 272) // (row + 2048)
    assert plan["verdict"].endswith(
        f"; {n:,} tokens fit with --policy compact; the model was made for 32,768 tokens."
    )
    assert plan["verdict"].startswith("49,152 tokens of Mistral-7B-v0.3 do not fit: compact")


def test_smaller_steps_leave_room() -> None:
    args = ["--model", "Qwen3-8B", "--gpu-memory", "11GB", "-c", "128K"]
    large, small = ask(*args), ask(*args, "--prefill-step-size", "512")
    assert small["scratch_bytes"]["131072"] == 129 * MIB + 512 * (128 * K + 212_992)
    assert small["rows"][0]["max_tokens"] > large["rows"][0]["max_tokens"]


@pytest.mark.parametrize(
    ("memory", "gpu"),
    [("8GB", "5.33"), ("16", "10.67"), ("16GiB", "10.67"), ("24576MB", "16.00"), ("32g", "21.33"),
     ("36 GB", "27.00"), ("0.125TB", "96.00")],
)  # fmt: skip
def test_memory_as_people_write_it(memory, gpu) -> None:
    """What macOS told on Macs of 8 to 36 GB, and three quarters."""
    plan = ask("--model", "Qwen3-4B", "--memory", memory, "-c", "4096")
    assert f"{plan['memory_bytes'] / GIB:.2f}" == gpu


@pytest.mark.parametrize(
    ("given", "tokens"), [("4k", 4096), ("128K", 131072), ("1M", 1 << 20), ("1.5K", 1536)]
)
def test_contexts_as_people_write_them(given, tokens) -> None:
    assert list(ask("--model", "Qwen3-4B", "-c", given)["f16_bytes"]) == [str(tokens)]


def test_default_contexts_end_where_the_model_does() -> None:
    assert list(ask("--model", "Qwen3-8B")["f16_bytes"]) == ["4096", "32768"]
    assert list(ask("--model", "Llama-3.1-8B")["f16_bytes"]) == ["4096", "32768", "131072"]


def test_two_thirds_up_to_32_gib() -> None:
    assert apple_gpu_bytes(32 * GIB) == 32 * GIB * 2 // 3
    assert apple_gpu_bytes(36 * GIB) == 27 * GIB


def test_without_a_memory_there_is_no_verdict() -> None:
    assert ask("--kv-layers", "2")["verdict"] is None
