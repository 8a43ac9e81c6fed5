"""A tiny vision model of mlx-vlm, and what its generation and its server do with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

IMAGE_TOKEN, N_IMAGE_TOKENS, IMAGE_SIZE, WINDOW = 95, 4, 56, 16


def tiny_gemma3(seed: int = 0) -> nn.Module:
    """Gemma 3 with its vision tower: layers 1 and 3 see all tokens, the others a window."""
    from mlx_vlm.models import gemma3

    mx.random.seed(seed)
    text = gemma3.TextConfig(
        model_type="gemma3", hidden_size=64, num_hidden_layers=4, intermediate_size=96,
        num_attention_heads=4, head_dim=32, vocab_size=96, num_key_value_heads=2,
        sliding_window=WINDOW, mm_tokens_per_image=N_IMAGE_TOKENS, sliding_window_pattern=2,
        query_pre_attn_scalar=32,
    )  # fmt: skip
    vision = gemma3.VisionConfig(
        model_type="siglip_vision_model", num_hidden_layers=2, hidden_size=32,
        intermediate_size=64, num_attention_heads=2, patch_size=14, image_size=IMAGE_SIZE,
    )  # fmt: skip
    config = gemma3.ModelConfig(
        text_config=text, vision_config=vision, model_type="gemma3", vocab_size=96,
        image_token_index=IMAGE_TOKEN, hidden_size=64, eos_token_id=[-1],
    )  # fmt: skip
    model = gemma3.Model(config)
    mx.eval(model.parameters())
    return model.eval()


def prompt(n: int, first: int = 0) -> list[int]:
    """A prompt of text."""
    return [(7 * i * i + 3 * i + first) % 89 for i in range(n)]


def with_image(n: int) -> tuple[mx.array, mx.array, mx.array]:
    """Tokens of a prompt with an image, the image, and the mask: [1, n], [1, 3, H, W], [1, n]."""
    tokens = [1, 2, *[IMAGE_TOKEN] * N_IMAGE_TOKENS, *prompt(n - 2 - N_IMAGE_TOKENS)]
    image = mx.random.normal((1, 3, IMAGE_SIZE, IMAGE_SIZE), key=mx.random.key(3))
    return mx.array([tokens]), image, mx.ones((1, n), mx.int32)


class Whole:
    """A language model as the part of a whole model that ``Batches`` asks for."""

    def __init__(self, language_model: nn.Module) -> None:
        self.language_model = language_model


def greedy_answer(model: nn.Module, tokens: list[int], n: int) -> list[int]:
    """A language model's answer of ``n`` tokens to one prompt, through its caches."""
    caches, answer = model.make_cache(), []
    for _ in range(n):
        logits = model(mx.array([tokens]), cache=caches).logits
        tokens = [mx.argmax(logits[0, -1]).item()]
        answer += tokens
    return answer


class _NeverStops:
    def add_eos_token_ids(self, ids: Any) -> None:
        pass

    def __call__(self, token: int) -> bool:
        return False


class Batches:
    """mlx-vlm's generator of batches, as its server uses it."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        from mlx_vlm.generate.ar import BatchGenerator

        self.model = model
        processor = SimpleNamespace(stopping_criteria=_NeverStops())
        self.generator = BatchGenerator(model.language_model, processor, **options)

    def answers(self, prompts: list[list[int]], n: int, later: int = 0) -> list[list[int]]:
        """Greedy answers of ``n`` tokens; the last prompt comes ``later`` steps afterwards."""
        first = prompts[:-1] if later else prompts
        found = {uid: [] for uid in self._insert(first, n)}
        for step in range(10_000):
            if later and step == later:
                found.update({uid: [] for uid in self._insert(prompts[-1:], n)})
            elif not self.generator.has_work:
                break
            for response in self.generator.next()[1]:
                found[response.uid].append(response.token)
        return [found[uid] for uid in sorted(found)]

    def _insert(self, prompts: list[list[int]], n: int) -> list[int]:
        embeds = self.model.language_model.model.embed_tokens
        kwargs = [{"inputs_embeds": embeds(mx.array([tokens]))} for tokens in prompts]
        return self.generator.insert(prompts, n, prompt_kwargs=kwargs)
