"""What else mlx-lm offers, through packed caches: draft models, sizes, files, adapters, scoring."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters
from protected import assert_protects
from test_batch_generate import same_but_for_a_tie
from tiny_configs import SLIDING, WINDOW
from varied_models import varied_model

from mlx_turbokv import attach, detach
from mlx_turbokv.cache import TurboKVCache, TurboRotatingKVCache, speculation, writing
from mlx_turbokv.cache.writing import save_prompt_cache
from mlx_turbokv.errors import InputError
from mlx_turbokv.policy import Protection

PROMPT = [(7 * i * i + 3 * i + 1) % 89 for i in range(150)]
# rows leave the protected tail at 160 tokens
PROTECTED = {"k": "q8_0", "v": "turbo6", "sink": 32, "recent": 32}
# of logits' standard deviation, root mean square
Q8_ERROR = 0.1


def greedy(model: nn.Module, n: int, caches: list | None = None, prompt: list[int] = PROMPT):
    steps = generate_step(mx.array(prompt), model, max_tokens=n, prompt_cache=caches)
    return [int(token) for token, _ in steps]


def logits(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array([PROMPT]), cache=make_prompt_cache(model)))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Root mean square difference, in standard deviations of ``b``."""
    return float(np.sqrt(np.mean((a - b) ** 2)) / b.std())


@pytest.mark.parametrize("draft_seed", [0, 1])
@pytest.mark.parametrize("num_draft_tokens", [1, 4])
def test_speculative_decoding_gives_the_same_tokens(draft_seed: int, num_draft_tokens: int) -> None:
    """A draft that is the model itself is mostly accepted, another is mostly trimmed."""
    model = attach(varied_model("llama"), **PROTECTED)
    draft = attach(varied_model("llama", seed=draft_seed), **PROTECTED)
    caches = make_prompt_cache(model) + make_prompt_cache(draft)
    assert_protects(caches, Protection(32, 32))
    steps = speculative_generate_step(
        mx.array(PROMPT),
        model,
        draft,
        num_draft_tokens=num_draft_tokens,
        max_tokens=40,
        prompt_cache=caches,
    )
    tokens, drafted = zip(*((token, from_draft) for token, _, from_draft in steps))
    same_but_for_a_tie(model, PROMPT, tokens, greedy(model, 40))
    assert (sum(drafted) > 15) == (draft_seed == 0)
    n_model = len(model.layers)
    for part in (caches[:n_model], caches[n_model:]):
        assert {type(cache) for cache in part} == {TurboKVCache}
        assert len({cache.offset for cache in part}) == 1
    assert len(PROMPT) + 38 <= caches[0].offset <= len(PROMPT) + 40


@pytest.mark.parametrize(("name", "num_draft_tokens"), [("gemma3_text", 4), ("llama", 32)])
def test_speculative_decoding_past_packed_windows(name: str, num_draft_tokens: int) -> None:
    """Rejected tokens are taken back from windows that have moved on."""
    layers = {"layer_types": SLIDING, "sliding_window": WINDOW} if name == "llama" else {}
    draft = varied_model("llama", seed=1)
    model = attach(varied_model(name, **layers), k="f16", v="q8_0", compress_sliding=True)
    caches = make_prompt_cache(model)
    assert any(isinstance(cache, TurboRotatingKVCache) for cache in caches)
    speculation.check(name, caches, make_prompt_cache(draft), num_draft_tokens)
    steps = speculative_generate_step(
        mx.array(PROMPT), model, draft, num_draft_tokens=num_draft_tokens, max_tokens=40,
        prompt_cache=caches + make_prompt_cache(draft),
    )  # fmt: skip
    tokens = [token for token, _, _ in steps]
    same_but_for_a_tie(model, PROMPT, tokens, greedy(model, 40))
    assert len({cache.offset for cache in caches}) == 1


def test_tokens_that_cannot_be_taken_back_are_an_error() -> None:
    """mlx-lm's own windows: its loop would go on from rejected tokens."""
    model, draft = varied_model("gemma3_text"), varied_model("llama", seed=1)
    with pytest.raises(InputError, match="beyond a window of 16 tokens"):
        speculation.check("it", make_prompt_cache(model), make_prompt_cache(draft), 3)
    speculation.check("it", make_prompt_cache(model), make_prompt_cache(draft), 3, 16)
    with pytest.raises(ValueError, match="cannot be taken back from RotatingKVCache"):
        list(speculative_generate_step(mx.array(PROMPT[:10]), model, draft, max_tokens=20))


@pytest.mark.parametrize("name", ["qwen3_5", "lfm2"])
def test_hybrids_are_refused(name: str) -> None:
    caches = make_prompt_cache(attach(varied_model(name)))
    with pytest.raises(InputError, match="it cannot decode speculatively"):
        speculation.check("it", caches, [], 3)


def test_a_cache_is_right_after_speculation_trimmed_it() -> None:
    model, draft = attach(varied_model("llama")), varied_model("llama", seed=1)
    caches = make_prompt_cache(model) + make_prompt_cache(draft)
    steps = speculative_generate_step(
        mx.array(PROMPT), model, draft, max_tokens=20, prompt_cache=caches
    )
    tokens = [token for token, _, _ in steps]
    own, whole = caches[: len(model.layers)], PROMPT + tokens
    trim_prompt_cache(own, max(0, own[0].offset - len(whole) + 1))
    rest = whole[own[0].offset :]
    same_but_for_a_tie(model, whole, greedy(model, 5, own, rest), greedy(model, 5, None, whole))


def test_hybrids_refuse_speculation_as_before() -> None:
    """Recurrent states cannot be trimmed, packed caches beside them or not."""
    model = attach(varied_model("qwen3_next"))
    steps = speculative_generate_step(mx.array(PROMPT), model, varied_model("llama"), max_tokens=4)
    with pytest.raises(ValueError, match="trimmable"):
        next(steps)


def test_max_kv_size_of_mlx_lms_functions_reaches_no_attached_model() -> None:
    """mlx-lm passes it to no model with a cache factory of its own; attach takes it instead."""
    model = attach(varied_model("llama"))
    caches = make_prompt_cache(model, max_kv_size=32)
    assert {type(cache) for cache in caches} == {TurboKVCache}
    limited = generate_step(mx.array(PROMPT), model, max_tokens=10, max_kv_size=32)
    assert [int(token) for token, _ in limited] == greedy(model, 10)


def test_kv_bits_leaves_packed_caches_as_they_are() -> None:
    model = attach(varied_model("llama"))
    caches = make_prompt_cache(model)
    steps = generate_step(
        mx.array(PROMPT), model, max_tokens=10, prompt_cache=caches, kv_bits=4, quantized_kv_start=0
    )
    assert [int(token) for token, _ in steps] == greedy(model, 10)
    assert {type(cache) for cache in caches} == {TurboKVCache}


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "falcon_h1", "gemma3_text"])
def test_prompt_cache_file_is_continued(name: str, tmp_path: Path) -> None:
    model = attach(varied_model(name), **PROTECTED)
    caches = make_prompt_cache(model)
    first = greedy(model, 8, caches)
    # generation runs one token ahead of what it gives, so the cache holds all that it gave
    save_prompt_cache(tmp_path / "a.safetensors", caches, {"made_by": "a test"})
    loaded, metadata = load_prompt_cache(str(tmp_path / "a.safetensors"), return_metadata=True)
    assert metadata == {"made_by": "a test"}
    assert [type(c) for c in loaded] == [type(c) for c in caches]
    assert greedy(model, 5, loaded, first[-1:]) == greedy(model, 5, caches, first[-1:])


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        save_prompt_cache(tmp_path / "no" / "a.safetensors", [TurboKVCache("q8_0", "turbo2")])
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        save_prompt_cache(tmp_path / "a.safetensors", [TurboKVCache("q8_0", "turbo2")])
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


SAVER = """
import sys
import mlx_turbokv, mlx.core as mx
from mlx_turbokv.cache.writing import save_prompt_cache
caches = [mlx_turbokv.TurboKVCache("f16", "f16", backend="reference") for _ in range(4)]
for cache in caches:
    cache.update_and_fetch(mx.zeros((1, 8, 4096, 64)), mx.zeros((1, 8, 4096, 64)))
n = 0
while True:
    for cache in caches:
        cache.update_and_fetch(mx.full((1, 8, 32, 64), n), mx.full((1, 8, 32, 64), n))
        cache.trim(32 * (n % 2))
        mx.eval(cache.state)
    n += 1
    print("saving", flush=True)
    save_prompt_cache(sys.argv[1], caches, {"n": str(n)})
    print("saved", flush=True)
"""


@pytest.mark.parametrize("delay_ms", [0, 10, 40])
def test_kill_during_a_save_leaves_the_file_whole(tmp_path: Path, delay_ms: int) -> None:
    path = tmp_path / "cache.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(path)], stdout=subprocess.PIPE, text=True
    )
    try:
        said = list(itertools.islice(process.stdout, 3))
        assert said[-1] == "saving\n"
        while not list(tmp_path.glob(".turbokv-*")):
            assert process.poll() is None
        time.sleep(delay_ms / 1000)
    finally:
        process.kill()
        process.wait()
    if delay_ms == 0:
        assert list(tmp_path.glob(".turbokv-*")), "the save was over before the kill"
    caches, metadata = load_prompt_cache(str(path), return_metadata=True)
    assert int(metadata["n"]) >= 1
    assert len({cache.offset for cache in caches}) == 1
    for cache in caches:
        keys, values = cache.keys_and_values()
        assert mx.all(mx.isfinite(keys)).item() and keys.shape == values.shape
    save_prompt_cache(path, caches)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_save_removes_what_dead_processes_left_and_nothing_else(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = writing._host()
    dead = tmp_path / f".turbokv-{host}-{ended.pid}-abc_1.safetensors"
    others = [
        f".turbokv-{host}-{os.getpid()}-abc_1.safetensors",  # alive
        f".turbokv-other_host-{ended.pid}-abc_1.safetensors",
        f".turbokv-{host}-{ended.pid}-abc.txt",
        f".turbokv-{host}-{'9' * 30}-abc.safetensors",  # no process's number
        ".turbokv-abcdefgh.safetensors",  # by an older version, which named no process
        f"turbokv-{host}-{ended.pid}-abc.safetensors",
        "mine.safetensors",
    ]
    for name in [dead.name, *others]:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / f".turbokv-{host}-{ended.pid}-folder.safetensors").mkdir()
    (tmp_path / f".turbokv-{host}-{ended.pid}-link.safetensors").symlink_to(tmp_path / others[-1])
    before = {path.name for path in tmp_path.iterdir()}
    save_prompt_cache(tmp_path / "a.safetensors", [TurboKVCache("q8_0", "turbo2")])
    after = {path.name for path in tmp_path.iterdir()}
    assert after == before - {dead.name} | {"a.safetensors"}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(bits: int) -> None:
    model = varied_model("llama")
    nn.quantize(model, group_size=32, bits=bits)
    plain = logits(model)
    attach(model, k="q8_0", v="q8_0")
    assert distance(logits(model), plain) < Q8_ERROR
    attach(model, **PROTECTED)
    assert greedy(model, 12) == greedy(model, 12, make_prompt_cache(model))


def with_lora(model: nn.Module) -> nn.Module:
    """Low-rank adapters with lively values on every attention projection."""
    linear_to_lora_layers(model, len(model.layers), {"rank": 4, "scale": 2.0, "dropout": 0.0})
    mx.random.seed(3)
    for name, value in tree_flatten(model.trainable_parameters()):
        if name.endswith("lora_b"):
            value[...] = 0.1 * mx.random.normal(value.shape)
    return model.eval()


@pytest.mark.parametrize("attach_first", [True, False])
def test_lora_adapters(tmp_path: Path, attach_first: bool) -> None:
    """Adapters may come before or after the caches are attached."""
    adapted = with_lora(varied_model("llama"))
    weights = {k: v for k, v in tree_flatten(adapted.parameters()) if "lora" in k}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    config = {
        "fine_tune_type": "lora",
        "num_layers": len(adapted.layers),
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0},
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    plain = logits(adapted)
    model = varied_model("llama")
    assert distance(logits(model), plain) > 3 * Q8_ERROR
    if attach_first:
        attach(model, k="q8_0", v="q8_0")
    load_adapters(model, str(tmp_path))
    attach(model, k="q8_0", v="q8_0")
    assert {type(cache) for cache in make_prompt_cache(model)} == {TurboKVCache}
    assert distance(logits(model), plain) < Q8_ERROR


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch):
    """mlx_lm.evaluate's model class; the harness that it plugs into is not needed to score."""
    base = type("LM", (), {"__init__": lambda self: None})
    modules = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": base},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
    }
    for name, members in modules.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    from mlx_lm.evaluate import MLXLM

    return MLXLM


def test_scoring_as_mlx_lm_evaluate_does(scorer) -> None:
    """It scores several continuations on copies of one prompt's cache."""
    scores = {}
    model = varied_model("llama")
    for form in ("f16", "q8_0"):
        (detach if form == "f16" else attach)(model, **({} if form == "f16" else {"v": "q8_0"}))
        evaluated = scorer.__new__(scorer)
        evaluated._model, evaluated._max_tokens, evaluated.use_chat_template = model, None, False
        evaluated.tokenizer = SimpleNamespace(
            encode=lambda text, add_special_tokens: [ord(c) % 89 for c in text]
        )
        pairs = [("a prompt that both share", " one end"), ("a prompt that both share", " two")]
        requests = [SimpleNamespace(args=pair) for pair in pairs]
        scores[form] = [score for score, _ in evaluated.loglikelihood(requests)]
    np.testing.assert_allclose(scores["q8_0"], scores["f16"], rtol=0.02)
    assert scores["q8_0"] != scores["f16"]
