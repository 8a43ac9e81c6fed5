"""Models of mlx-vlm that take more than tokens: decoders after an encoder, and diffusion."""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from architecture_cases import SIMULATION_TOLERANCE, at, put
from q8_simulation import SimulatedQ8Cache, note_stored
from tiny_vlm import tiny_language_model

from mlx_turbokv import attach, detach, make_prompt_cache
from mlx_turbokv.cache.readable import ReadableTurboKVCache
from mlx_turbokv.errors import InputError
from mlx_turbokv.model.caches import own_caches
from mlx_turbokv.model.kv_layers import kv_layers

pytest.importorskip("mlx_vlm", reason="the extra vlm is not installed")
pytestmark = pytest.mark.slow

PROMPT = mx.array([[(7 * i * i + 3 * i + 1) % 89 for i in range(45)]])
BLOCK = mx.array([[3, 80, 80, 41, 80, 7, 80, 80, 80]])


def image_decoder(model: nn.Module, caches: list) -> mx.array:
    """nemotron_parse: tokens, after what an encoder read."""
    read = mx.random.normal((1, 12, model.config.d_model), key=mx.random.key(1))
    logits = []
    for first, last in ((0, 40), (40, 41), (41, 42), (42, 45)):
        tokens = PROMPT[:, first:last]
        output = model(decoder_input_ids=tokens, encoder_outputs=read, cache=caches)
        logits.append(output.logits)
    return mx.concatenate(logits, axis=1)


def blocks_beside_the_cache(model: nn.Module, caches: list) -> mx.array:
    """nemotron_labs_diffusion: a block that is not written, then written, then another one."""
    options = {"use_cache": False, "use_causal_mask": False}
    model(PROMPT, cache=caches)
    logits = [model(BLOCK, cache=caches, **options).logits]
    model(BLOCK + 1, cache=caches)
    logits.append(model(BLOCK, cache=caches, **options).logits)
    return mx.concatenate(logits, axis=1)


def canvases(model: nn.Module, caches: list) -> mx.array:
    """diffusion_gemma: a prompt with a canvas, which is then written, and a second canvas."""
    logits = [model(PROMPT, cache=caches, canvas_ids=BLOCK).logits]
    model.diffusion_update_cache(BLOCK + 1, cache=caches)
    logits.append(model.diffusion_decoder_logits(BLOCK, cache=caches))
    return mx.concatenate(logits, axis=1)


CALLS: dict[str, Any] = {
    "nemotron_parse": image_decoder,
    "nemotron_labs_diffusion": blocks_beside_the_cache,
    "diffusion_gemma": canvases,
}


class Simulated(SimulatedQ8Cache):
    """As decoders of mlx-vlm read it."""

    @property
    def decoder_state(self) -> tuple[mx.array, mx.array]:
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]


TURBO4_TOLERANCE = 0.5  # of logits' spread; a canvas sees little but packed rows
DIFFUSION = "nemotron_labs_diffusion", "diffusion_gemma"


@cache
def model_of(name: str) -> nn.Module:
    return tiny_language_model(name)


@pytest.mark.parametrize("name", CALLS)
def test_logits_through_packed_caches(name: str) -> None:
    model, call = model_of(name), CALLS[name]
    f16 = call(model, own_caches(model))
    spread = mx.std(f16).item()

    def error(logits: mx.array, reference: mx.array) -> float:
        return mx.sqrt(mx.mean(mx.square(logits - reference))).item() / spread

    simulated, packed = own_caches(model), make_prompt_cache(model, "q8_0", "q8_0")
    for layer in kv_layers(model).layers:
        position = layer.index, layer.sub
        put(simulated, position, Simulated(note_stored(at(packed, position))))
    q8 = call(model, packed)
    turbo4 = call(model, make_prompt_cache(model, "turbo4", "turbo4"))
    assert error(q8, call(model, simulated)) < SIMULATION_TOLERANCE
    assert 0 < error(q8, f16) < error(turbo4, f16) < TURBO4_TOLERANCE


@pytest.mark.parametrize("name", DIFFUSION)
def test_what_a_model_reads_is_none_while_there_is_nothing(name: str) -> None:
    cache = make_prompt_cache(model_of(name), "turbo4", "turbo4")[1]
    assert isinstance(cache, ReadableTurboKVCache)
    assert cache.keys is None
    assert cache.values is None
    assert cache.decoder_state == (None, None)


def test_a_diffusion_models_own_generate_uses_packed_caches(monkeypatch) -> None:
    model = model_of("nemotron_labs_diffusion")
    options = {"gen_length": 12, "block_length": 4, "steps": 4, "mask_id": 80}
    own = model.generate(PROMPT, **options)
    updates = []
    update = ReadableTurboKVCache.update_and_fetch

    def counting(self, keys: mx.array, values: mx.array):
        updates.append(keys.shape[2])
        return update(self, keys, values)

    attach(model, "q8_0", "q8_0")
    monkeypatch.setattr(ReadableTurboKVCache, "update_and_fetch", counting)
    try:
        packed = model.generate(PROMPT, **options)
    finally:
        detach(model)
    assert updates[:3] == [45] * 3
    assert sum(updates) > 3 * 45
    assert packed.tolist() == own.tolist()


def test_caches_of_a_fixed_size_stay_the_models_own() -> None:
    """Its masks are made for all of such a cache, the rows that are still empty too."""
    model = model_of("diffusion_gemma")
    attach(model, "turbo4", "turbo4")
    try:
        names = {type(cache).__name__ for cache in model.make_cache(max_size=64)}
    finally:
        detach(model)
    assert names == {"StaticPrefixKVCache"}


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusion_models_take_no_windows(name: str) -> None:
    model = model_of(name)
    with pytest.raises(InputError, match="max_kv_size 64 cannot be used with a diffusion model"):
        make_prompt_cache(model, "turbo4", "turbo4", max_kv_size=64)
    assert all(layer.window is None for layer in kv_layers(model, None, True).layers)
