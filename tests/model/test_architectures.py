"""Every architecture of the installed mlx-lm through packed caches."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import mlx.core as mx
import pytest
from architecture_cases import (
    NEEDS_A_GPU,
    Q8_TOLERANCE,
    SIMULATION_TOLERANCE,
    TURBO4_TOLERANCE,
    at,
    put,
)
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache
from q8_simulation import SimulatedQ8Cache, note_stored
from tiny_expected import expected
from tiny_models import (
    architectures,
    import_architecture,
    plain_ops_for_bitnet,
    run_session,
    shared_model,
    tiny_model,
)

from mlx_turbokv import TurboKVCache, attach, make_prompt_cache
from mlx_turbokv.model.caches import own_caches
from mlx_turbokv.model.kv_layers import kv_layers

pytestmark = pytest.mark.slow

ARCHITECTURES = architectures()
RUNNABLE = [name for name in ARCHITECTURES if name not in NEEDS_A_GPU]

PREFILL_CUTS = [5, 1, 17, 14]
# olmo adds its mask, the text "causal", to the scores: mlx-lm runs it only a token at a time
CUTS = {"olmo": [1] * 12}
N_DECODE = 20


@pytest.fixture(autouse=True)
def bitnet_without_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    if not mx.metal.is_available():
        layers = import_architecture("bitlinear_layers")
        monkeypatch.setattr(layers.BitLinear, "execute_matmul_kernel", plain_ops_for_bitnet)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_exactly_the_right_layers_are_compressed(name: str) -> None:
    model = shared_model(name)
    positions, reasons = expected(name)
    found = kv_layers(model)
    assert [(layer.index, layer.sub) for layer in found.layers] == positions
    assert [layer.ordinal for layer in found.layers] == list(range(len(positions)))
    assert {entry.reason for entry in found.skipped} == reasons

    own, packed = own_caches(model), make_prompt_cache(model, "q8_0", "turbo4")
    assert len(own) == len(packed)
    for position in positions:
        assert type(at(own, position)) is KVCache
        assert isinstance(at(packed, position), TurboKVCache)
    for entry in found.skipped:
        position = (entry.index, entry.sub)
        assert type(at(packed, position)) is type(at(own, position))


@pytest.mark.parametrize("name", RUNNABLE)
def test_logits_after_prefill_decode_trim_and_more(name: str) -> None:
    model = shared_model(name)
    cuts = CUTS.get(name, PREFILL_CUTS)
    positions, _ = expected(name)
    f16 = run_session(model, own_caches(model), cuts, N_DECODE)
    assert mx.all(mx.isfinite(f16)).item()
    spread = mx.std(f16).item()

    def error(logits: mx.array, reference: mx.array) -> float:
        assert logits.shape == reference.shape
        return mx.sqrt(mx.mean(mx.square(logits - reference))).item() / spread

    simulated, packed = own_caches(model), make_prompt_cache(model, "q8_0", "q8_0")
    for position in positions:
        put(simulated, position, SimulatedQ8Cache(note_stored(at(packed, position))))
    assert can_trim_prompt_cache(packed) == can_trim_prompt_cache(own_caches(model))
    q8 = run_session(model, packed, cuts, N_DECODE)
    turbo4 = run_session(model, make_prompt_cache(model, "turbo4", "turbo4"), cuts, N_DECODE)

    assert error(q8, run_session(model, simulated, cuts, N_DECODE)) < SIMULATION_TOLERANCE
    assert error(q8, f16) < Q8_TOLERANCE
    assert error(turbo4, f16) < TURBO4_TOLERANCE
    assert (error(q8, f16) > 0) == bool(positions)


MIXED = ["linear_attention", "full_attention"]
SLIDING = ["sliding_attention", "full_attention"]
# architecture -> (changes that give six KV layers, cache index of each)
SIX_KV_LAYERS: dict[str, tuple[dict, list[int]]] = {
    "qwen3_5": ({"num_hidden_layers": 12}, [1, 3, 5, 7, 9, 11]),
    "qwen3_next": ({"num_hidden_layers": 12}, [1, 3, 5, 7, 9, 11]),
    "lfm2": ({"num_hidden_layers": 12, "layer_types": MIXED * 6}, [1, 3, 5, 7, 9, 11]),
    "granitemoehybrid": (
        {"num_hidden_layers": 12, "layer_types": ["mamba", "attention"] * 6},
        [1, 3, 5, 7, 9, 11],
    ),
    "jamba": ({"num_hidden_layers": 12}, [1, 3, 5, 7, 9, 11]),
    "falcon_h1": ({"num_hidden_layers": 6}, [0, 1, 2, 3, 4, 5]),
    "gemma3": ({"num_hidden_layers": 12}, [1, 3, 5, 7, 9, 11]),
    "gpt_oss": ({"num_hidden_layers": 12, "layer_types": SLIDING * 6}, [1, 3, 5, 7, 9, 11]),
    "gemma2": ({"num_hidden_layers": 6}, [0, 1, 2, 3, 4, 5]),
    "deepseek_v3": ({"num_hidden_layers": 6}, []),
}


@pytest.mark.parametrize("name", SIX_KV_LAYERS)
def test_la_v7_protects_the_first_and_last_two_kv_ordinals(name: str) -> None:
    changes, indices = SIX_KV_LAYERS[name]
    model = attach(tiny_model(name, **changes), policy="la-v7")
    caches = model.make_cache()
    packed = {}
    for index, cache in enumerate(caches):
        for entry in getattr(cache, "caches", [cache]):
            if isinstance(entry, TurboKVCache):
                packed[index] = (str(entry.k_format), str(entry.v_format))
    v_formats = ["q8_0", "q8_0", "turbo2", "turbo2", "q8_0", "q8_0"]
    assert packed == {i: ("q8_0", v) for i, v in zip(indices, v_formats)}


def test_the_table_of_models_is_current() -> None:
    root = Path(__file__).resolve().parents[2]
    spec = importlib.util.spec_from_file_location("models_table", root / "scripts/models_table.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = json.loads((root / "benchmarks/models.json").read_text(encoding="utf-8"))
    assert found["rows"] == script.rows()
