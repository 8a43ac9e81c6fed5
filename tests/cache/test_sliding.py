"""Models with sliding windows through rotating packed caches, against mlx-lm's own caches."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architecture_cases import (
    NEEDS_A_GPU,
    SIMULATION_TOLERANCE,
    TURBO4_TOLERANCE,
    at,
    put,
)
from mlx_lm import batch_generate
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import (
    KVCache,
    LRUPromptCache,
    RotatingKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from mlx_lm.models.cache import make_prompt_cache as mlx_lm_make_prompt_cache
from q8_simulation import SimulatedQ8Cache, SimulatedQ8RotatingCache, note_stored
from test_batch_generate import assert_alike, one_by_one, prompts, tokenizer
from tiny_expected import EXPECTED, WINDOW
from tiny_models import run_session, shared_model, tiny_model
from varied_models import varied_model

from mlx_turbokv import (
    InputError,
    TurboKVCache,
    TurboRotatingKVCache,
    attach,
    log,
    make_prompt_cache,
)
from mlx_turbokv.cache.rotating_batch import BatchTurboRotatingKVCache
from mlx_turbokv.evaluate.configuration import prepare
from mlx_turbokv.evaluate.perplexity import evaluate_windows
from mlx_turbokv.model.caches import own_caches
from mlx_turbokv.model.kv_layers import kv_layers

pytestmark = pytest.mark.slow

SLIDING = sorted(name for name, (_, reasons) in EXPECTED.items() if WINDOW in reasons)
RUNNABLE = [name for name in SLIDING if name not in NEEDS_A_GPU]
# longer than the tiny models' window of 16 tokens, and than all that a rotating cache holds
CUTS = [5, 1, 17, 14, 90, 40, 3, 11]
N_DECODE = 40
# gemma4's tiny model multiplies what q8_0 loses; the simulation shows that it is q8_0's alone
Q8_TOLERANCE = {"gemma4": 0.15, "gemma4_text": 0.15, "muse_glimmer": 0.08}
Q8_OTHERS = 0.03


def q8_and_simulated(model: nn.Module) -> tuple[list, list]:
    """Packed caches, and the simulation's, to be run after them."""
    packed, caches = (
        make_prompt_cache(model, "q8_0", "q8_0", compress_sliding=True),
        own_caches(model),
    )
    for layer in kv_layers(model, compress_sliding=True).layers:
        position = layer.index, layer.sub
        own, stored = at(caches, position), note_stored(at(packed, position))
        rotating = isinstance(own, RotatingKVCache)
        kind = partial(SimulatedQ8RotatingCache, own.max_size) if rotating else SimulatedQ8Cache
        put(caches, position, kind(stored=stored))
    return packed, caches


def error(logits: mx.array, reference: mx.array) -> float:
    assert logits.shape == reference.shape
    return (mx.sqrt(mx.mean(mx.square(logits - reference))) / mx.std(reference)).item()


@pytest.mark.parametrize("name", SLIDING)
def test_sliding_layers_are_packed_if_asked(name: str) -> None:
    model = shared_model(name)
    own, packed = own_caches(model), make_prompt_cache(model, compress_sliding=True)
    found = kv_layers(model, compress_sliding=True)
    assert [layer.ordinal for layer in found.layers] == list(range(len(found.layers)))
    assert WINDOW not in {entry.reason for entry in found.skipped}
    kinds = {KVCache: TurboKVCache, RotatingKVCache: TurboRotatingKVCache}
    for layer in found.layers:
        before, after = (at(caches, (layer.index, layer.sub)) for caches in (own, packed))
        assert type(after) is kinds[type(before)]
        assert layer.window == getattr(before, "max_size", None)
        if layer.window:
            assert (after.max_size, after.keep) == (16, 0)
    assert any(layer.window for layer in found.layers)
    assert {entry.reason for entry in found.skipped} | {WINDOW} == {
        entry.reason for entry in kv_layers(model).skipped
    } | {WINDOW}


@pytest.mark.parametrize("name", RUNNABLE)
def test_logits_past_the_window(name: str) -> None:
    model = shared_model(name)
    f16 = run_session(model, own_caches(model), CUTS, N_DECODE)
    packed, simulated = q8_and_simulated(model)
    q8 = run_session(model, packed, CUTS, N_DECODE)
    assert error(q8, run_session(model, simulated, CUTS, N_DECODE)) < SIMULATION_TOLERANCE
    assert 0 < error(q8, f16) < Q8_TOLERANCE.get(name, Q8_OTHERS)
    if name not in Q8_TOLERANCE:
        turbo4 = make_prompt_cache(model, "turbo4", "turbo4", compress_sliding=True)
        assert error(run_session(model, turbo4, CUTS, N_DECODE), f16) < TURBO4_TOLERANCE


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "gemma3n", "exaone4"])
def test_logits_after_a_trim_inside_the_window(name: str) -> None:
    """run_session trims where the cache allows it; here it does."""
    model = shared_model(name)
    packed, simulated = q8_and_simulated(model)
    got = run_session(model, packed, [4, 1, 3], 3)
    assert packed[0].offset == 10
    assert error(got, run_session(model, simulated, [4, 1, 3], 3)) < SIMULATION_TOLERANCE


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "gemma4_text", "baichuan_m1"])
def test_copies_and_files_go_on_alike(name: str, tmp_path: Path) -> None:
    model = shared_model(name)
    caches = make_prompt_cache(model, "q8_0", "turbo4", compress_sliding=True)
    run_session(model, caches, CUTS, 21)
    copied = copy.deepcopy(caches)
    save_prompt_cache(str(tmp_path / "a.safetensors"), caches)
    loaded = load_prompt_cache(str(tmp_path / "a.safetensors"))
    assert [type(c) for c in loaded] == [type(c) for c in caches]
    wanted = run_session(model, caches, [3, 20], 25)
    for others in (copied, loaded):
        assert mx.array_equal(run_session(model, others, [3, 20], 25), wanted).item()


SHORT_WINDOW = {
    "llama": {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2,
              "sliding_window": 24},
    "gpt_oss": {"sliding_window": 24},
    "gemma3_text": {"sliding_window": 24},
    "exaone4": {"sliding_window": 24},
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT_WINDOW)
def test_a_batch_gives_what_sequences_give_alone(name: str) -> None:
    """Left padding, a prompt longer than a step, and windows that move on while decoding."""
    model = varied_model(name, **SHORT_WINDOW[name])
    # with newest tokens protected a text depends on where the prompt was cut
    attach(model, k="q8_0", v="turbo6", compress_sliding=True, sink=32, recent=0)
    assert TurboRotatingKVCache in {type(cache) for cache in model.make_cache()}
    given = prompts([3, 90, 7, 41], seed=3)
    wanted = [one_by_one(model, prompt, 40) for prompt in given]
    response = batch_generate(
        model, tokenizer(), given, max_tokens=40, return_token_ids=True, prefill_step_size=32,
        return_prompt_caches=True,
    )  # fmt: skip
    assert_alike(model, given, response.token_ids, wanted)
    for prompt, caches in zip(given, response.caches):
        (window, *_) = [c for c in caches if type(c) is TurboRotatingKVCache]
        assert window.offset == len(prompt) + 40
    assert len({tuple(tokens) for tokens in wanted}) == 4


def test_batches_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = attach(varied_model("gpt_oss"), compress_sliding=True)
    made = []
    merge = BatchTurboRotatingKVCache.merge.__func__
    monkeypatch.setattr(
        BatchTurboRotatingKVCache,
        "merge",
        classmethod(lambda cls, caches: made.append(merge(cls, caches)) or made[-1]),
    )
    batch_generate(model, tokenizer(), prompts([30, 5]), max_tokens=3)
    assert len(made) >= 3 and {type(cache) for cache in made} == {BatchTurboRotatingKVCache}


def test_the_prompt_cache_of_the_server_reuses_windows() -> None:
    """An exact prefix is found again past the window; a longer entry is not cut back there."""
    model = attach(varied_model("gemma3_text"), k="q8_0", v="turbo6", compress_sliding=True)
    prompt = prompts([60], seed=5)[0]
    caches = model.make_cache()
    model(mx.array([prompt]), cache=caches)
    lru = LRUPromptCache()
    lru.insert_cache("model", prompt, caches)
    assert lru.nbytes == sum(cache.nbytes for cache in caches)
    found, rest = lru.fetch_nearest_cache("model", [*prompt, 7, 8])
    assert rest == [7, 8]
    assert one_by_one(model, rest, 10, found) == one_by_one(model, [*prompt, 7, 8], 10)
    assert lru.fetch_nearest_cache("model", prompt[:50]) == (None, prompt[:50])


def test_sliding_layers_count_in_order_only_if_they_are_packed() -> None:
    model = shared_model("gemma3")  # sliding and full layers in turn

    def v_formats(**options) -> list[str]:
        caches = make_prompt_cache(model, policy="boundary:1,1", **options)
        return [str(c.v_format) if hasattr(c, "v_format") else "own" for c in caches]

    assert v_formats() == ["own", "q8_0", "own", "turbo2", "own", "q8_0"]
    assert v_formats(compress_sliding=True) == ["q8_0", *["turbo2"] * 4, "q8_0"]


def test_a_list_of_formats_must_have_the_sliding_layers_too(tmp_path: Path) -> None:
    from mlx_turbokv.policy.files import write_layer_list

    model, path = shared_model("gemma3"), tmp_path / "six.json"
    write_layer_list(path, [("q8_0", "q8_0")] * 6)
    assert len(make_prompt_cache(model, policy=path, compress_sliding=True)) == 6
    with pytest.raises(InputError, match="lists 6 KV layers, but the model has 3"):
        make_prompt_cache(model, policy=path)


def test_an_evaluation_packs_windows_if_asked() -> None:
    """Every layer has its formats in the record, and the bytes at the end are fewer."""
    model, found = shared_model("gemma3"), []
    windows = np.random.default_rng(0).integers(0, 60, (2, 64)).astype(np.int32)
    for compress in (False, True):
        config = prepare(model, "q8_0/turbo2", "reference", compress_sliding=compress)
        (record,) = evaluate_windows(model, windows, [config]).summary()
        found.append(record)
    assert [len(record["layers"]) for record in found] == [3, 6]
    assert found[0]["bits_per_value"] == found[1]["bits_per_value"]
    assert found[0]["nll"]["mean"] != found[1]["nll"]["mean"]


def test_keys_of_windows_are_not_centred() -> None:
    """A window's rows have no position that a reference could be turned by."""
    model = tiny_model("gpt_oss")
    for i, layer in enumerate(model.layers):
        layer.self_attn.k_proj.bias = mx.full(layer.self_attn.k_proj.bias.shape, 5.0 + i)
    caches = make_prompt_cache(model, "turbo4", "turbo4", compress_sliding=True)
    centred = [cache.centre is not None for cache in caches]
    assert centred == [not isinstance(cache, TurboRotatingKVCache) for cache in caches]
    assert sum(centred) == 3
    caches = make_prompt_cache(model, "turbo4", "turbo4", max_kv_size=64)
    assert not any(getattr(cache, "centre", None) for cache in caches)
    with pytest.raises(InputError, match="Key references cannot be used with max_kv_size 64"):
        make_prompt_cache(model, "turbo4", centre="a.safetensors", max_kv_size=64)
    for protected in ({"sink": 32}, {"recent": 64}):
        for make in (make_prompt_cache, attach):
            with pytest.raises(InputError, match="max_kv_size 64: a window protects no tokens"):
                make(model, max_kv_size=64, **protected)
    make_prompt_cache(model, max_kv_size=64, sink=0, recent=0)


def test_windows_in_f16_are_of_one_kind_with_the_others() -> None:
    """One mask serves all windows, so mlx-lm's caches cannot stand beside packed ones."""
    model = shared_model("gemma3")

    def kinds(policy: str) -> list[str]:
        caches = make_prompt_cache(model, policy=policy, compress_sliding=True)
        return [type(cache).__name__ for cache in caches]

    assert kinds("boundary:1,1:f16/f16") == [
        "TurboRotatingKVCache", "TurboKVCache", "TurboRotatingKVCache", "TurboKVCache",
        "TurboRotatingKVCache", "KVCache",
    ]  # fmt: skip
    assert kinds("boundary:3,3:f16/f16") == ["RotatingKVCache", "KVCache"] * 3


def test_a_batch_of_windows_of_which_some_are_f16() -> None:
    model = varied_model("gpt_oss", sliding_window=24)
    attach(model, policy="boundary:1,1:f16/f16", k="q8_0", v="turbo6", compress_sliding=True)
    given = prompts([3, 60, 20], seed=4)
    wanted = [one_by_one(model, prompt, 30) for prompt in given]
    response = batch_generate(model, tokenizer(), given, max_tokens=30, return_token_ids=True)
    assert_alike(model, given, response.token_ids, wanted)


MAX_KV_SIZE = 64


class UnboundedModel(nn.Module):
    """A model without a cache factory of its own, around one that has it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def layers(self) -> list:
        return self.inner.layers

    def __call__(self, tokens: mx.array, cache: list | None = None) -> mx.array:
        return self.inner(tokens, cache=cache)


def test_max_kv_size_is_mlx_lms() -> None:
    """The oracle: mlx-lm's own caches for max_kv_size, over values that went through q8_0."""
    model = UnboundedModel(shared_model("qwen3"))
    expected = mlx_lm_make_prompt_cache(model, max_kv_size=MAX_KV_SIZE)
    ours = make_prompt_cache(model, "q8_0", "q8_0", max_kv_size=MAX_KV_SIZE)
    for a, b in zip(ours, expected, strict=True):
        assert type(a) is TurboRotatingKVCache and type(b) is RotatingKVCache
        assert (a.max_size, a.keep) == (b.max_size, b.keep) == (MAX_KV_SIZE, 4)
    oracle = [SimulatedQ8RotatingCache(MAX_KV_SIZE, 4, note_stored(cache)) for cache in ours]
    got = run_session(model, ours, CUTS, 100)
    assert error(got, run_session(model, oracle, CUTS, 100)) < SIMULATION_TOLERANCE


def test_max_kv_size_through_attach_reaches_generation() -> None:
    """Llama has a factory of its own, so what mlx-lm's functions are given doesn't reach it."""
    model = varied_model("llama")
    prompt = prompts([150], seed=9)[0]
    attach(model, "q8_0", "q8_0", max_kv_size=MAX_KV_SIZE)
    caches = mlx_lm_make_prompt_cache(model, max_kv_size=1000)
    assert {c.max_size for c in caches} == {MAX_KV_SIZE}
    oracle = [SimulatedQ8RotatingCache(MAX_KV_SIZE, 4, note_stored(cache)) for cache in caches]
    steps = generate_step(mx.array(prompt), model, max_tokens=30, prompt_cache=caches)
    limited = [int(token) for token, _ in steps]
    steps = generate_step(mx.array(prompt), model, max_tokens=30, prompt_cache=oracle)
    assert limited == [int(token) for token, _ in steps]
    row_bytes = 2 * (caches[0].layout.k_row_bytes + caches[0].layout.v_row_bytes)
    assert all(cache.nbytes <= row_bytes * (MAX_KV_SIZE + 160) for cache in caches)
    attach(model, "q8_0", "q8_0")
    assert limited != one_by_one(model, prompt, 30)  # the limit hides tokens that matter


def test_max_kv_size_leaves_own_windows_and_f16_layers_in_bounds() -> None:
    model = shared_model("gemma3")
    caches = make_prompt_cache(
        model, policy="boundary:1,1:f16/f16", max_kv_size=40, compress_sliding=False
    )
    assert [type(c).__name__ for c in caches] == [
        "RotatingKVCache", "TurboRotatingKVCache", "RotatingKVCache", "TurboRotatingKVCache",
        "RotatingKVCache", "TurboRotatingKVCache",
    ]  # fmt: skip
    assert [c.max_size for c in caches] == [16, 40, 16, 40, 16, 40]
    assert np.isfinite(np.array(run_session(model, caches, CUTS, 30))).all()
    for size in (0, 3, 4):  # the first four tokens are kept
        with pytest.raises(InputError, match=f"max_kv_size {size}"):
            attach(model, max_kv_size=size)
    (one, *_) = make_prompt_cache(shared_model("llama"), max_kv_size=5)
    assert (one.max_size, one.keep) == (5, 4)


def test_max_kv_size_that_can_do_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:

    log._given.clear()
    make_prompt_cache(shared_model("deepseek_v3"), max_kv_size=40)
    assert "max_kv_size has no effect: no layer keeps all tokens in a KV cache." in caplog.messages
