"""Language models of mlx-vlm: what is compressed, and logits through packed caches.

scripts/models_table.py --mlx-vlm runs all of them; here are those that differ in kind.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest
from architecture_cases import (
    Q8_TOLERANCE,
    SIMULATION_TOLERANCE,
    TURBO4_TOLERANCE,
    at,
    put,
)
from q8_simulation import note_stored, simulated_like
from tiny_models import run_session
from tiny_vlm import language_models, tiny_language_model
from tiny_vlm_configs import NOT_BY_TOKENS

from mlx_turbokv import TurboKVCache, make_prompt_cache
from mlx_turbokv.model.caches import own_caches
from mlx_turbokv.model.kv_layers import CROSS, DIFFUSION, LATENT, READ, RECURRENT, kv_layers

pytest.importorskip("mlx_vlm", reason="the extra vlm is not installed")
pytestmark = pytest.mark.slow

WINDOW = "sliding window of 16 tokens"
# name -> (positions of compressed caches, reasons of those left alone), by reading its model file
EXPECTED: dict[str, tuple[list, set[str]]] = {
    "qwen2_vl": ([(0, None), (1, None), (2, None)], set()),
    "gemma3": ([(1, None), (3, None), (5, None)], {WINDOW}),
    # the last full layer before those without K and V of their own, which read its state
    "gemma3n": ([(1, None)], {WINDOW, READ}),
    "afm7": ([(0, None), (1, None)], {READ}),
    "qwen3_5": ([(1, None), (3, None), (5, None)], {RECURRENT}),
    # with an indexer that chooses two blocks of four tokens
    "qwen4_exp": ([(1, None), (3, None), (5, None)], {RECURRENT}),
    "inkling": ([(0, 0), (1, 0), (2, 0)], {RECURRENT}),
    "minimax_m3_vl": ([(0, None)], {"a cache of its own kind, MiniMaxM3KVCache"}),
    "deepseek_v3": ([], {LATENT}),
    "florence2": ([(layer, 0) for layer in range(6)], {CROSS}),
    "nemotron_parse": ([(layer, 0) for layer in range(10)], {CROSS}),
    "diffusion_gemma": ([(1, None), (3, None), (5, None)], {WINDOW}),
    "nemotron_labs_diffusion": ([(0, None), (1, None), (2, None)], set()),
    "llada2_moe": ([], {DIFFUSION}),
}
CUTS, N_DECODE = [5, 1, 17, 14], 20


@cache
def model_of(name: str):
    heads = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 32}
    return tiny_language_model(name, **(heads if name == "inkling" else {}))


@pytest.mark.parametrize("name", EXPECTED)
def test_exactly_the_right_layers_are_compressed(name: str) -> None:
    model = model_of(name)
    positions, reasons = EXPECTED[name]
    found = kv_layers(model)
    assert [(layer.index, layer.sub) for layer in found.layers] == positions
    assert {entry.reason for entry in found.skipped} == reasons
    own, packed = own_caches(model), make_prompt_cache(model, "q8_0", "turbo4")
    for position in positions:
        assert type(at(own, position)).__module__.startswith("mlx_vlm.models.")
        assert isinstance(at(packed, position), TurboKVCache)
    for entry in found.skipped:
        position = (entry.index, entry.sub)
        assert type(at(packed, position)) is type(at(own, position))


@pytest.mark.parametrize(
    "name", [n for n, (positions, _) in EXPECTED.items() if positions and n not in NOT_BY_TOKENS]
)
def test_logits_after_prefill_decode_trim_and_more(name: str) -> None:
    model, (positions, _) = model_of(name), EXPECTED[name]
    f16 = run_session(model, own_caches(model), CUTS, N_DECODE)
    spread = mx.std(f16).item()

    def error(logits: mx.array, reference: mx.array) -> float:
        return mx.sqrt(mx.mean(mx.square(logits - reference))).item() / spread

    simulated, packed = own_caches(model), make_prompt_cache(model, "q8_0", "q8_0")
    for position in positions:
        stored = note_stored(at(packed, position))
        put(simulated, position, simulated_like(at(simulated, position), stored))
    q8 = run_session(model, packed, CUTS, N_DECODE)
    turbo4 = run_session(model, make_prompt_cache(model, "turbo4", "turbo4"), CUTS, N_DECODE)
    assert error(q8, run_session(model, simulated, CUTS, N_DECODE)) < SIMULATION_TOLERANCE
    assert 0 < error(q8, f16) < Q8_TOLERANCE
    assert 0 < error(turbo4, f16) < TURBO4_TOLERANCE


def test_looking_at_a_model_leaves_it_as_it_is() -> None:
    """qwen2_vl keeps the positions of the last prompt, which the next token goes on from."""
    model = model_of("qwen2_vl")
    model(mx.array([[1, 2, 3]]), cache=own_caches(model))
    before = {name: value for name, value in vars(model).items()}
    kept = {name: mx.array(value) for name, value in model.items() if isinstance(value, mx.array)}
    make_prompt_cache(model, "turbo4", "turbo4")
    assert vars(model) == before
    assert all(mx.array_equal(model[name], value) for name, value in kept.items())


def test_the_table_has_every_language_model() -> None:
    path = Path(__file__).resolve().parents[2] / "benchmarks/models_vlm.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
    assert [row["architecture"] for row in rows] == language_models()
