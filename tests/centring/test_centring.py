"""Where centres come from, and what they do for a model whose keys need them."""

import json
import logging
from functools import cache

import mlx.core as mx
import numpy as np
import pytest
from centred_model import centred_model
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache, trim_prompt_cache
from tiny_models import architectures, tiny_model

import mlx_turbokv.cache.factory as api
from mlx_turbokv import log
from mlx_turbokv.cache import TurboKVCache, attach, detach, make_prompt_cache
from mlx_turbokv.centring.bias import key_biases
from mlx_turbokv.centring.calibration import calibrate_keys
from mlx_turbokv.centring.centre import Centre
from mlx_turbokv.centring.references import (
    References,
    load_references,
    save_references,
    set_references,
)
from mlx_turbokv.centring.rope import find_rope_frequencies
from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate.divergence import Reference
from mlx_turbokv.model.caches import own_caches, put_cache
from mlx_turbokv.model.kv_layers import kv_layers
from mlx_turbokv.model.probing import RecordingCache
from mlx_turbokv.policy import Uniform

COLLAPSED, KEPT = 1.0, 0.02  # KLD in nats
# float32 sums in another order
ROWS_RTOL = 1e-5
TOKENS = [(7 * i * i + 3 * i + 1) % 89 for i in range(150)]
N_TOKENS = len(TOKENS)


@cache
def model():
    return centred_model()


@cache
def exact(n=N_TOKENS):
    return model()(mx.array(TOKENS[:n])[None], cache=make_prompt_cache(model(), "f16", "f16"))[0]


def caches(centre=True, k="turbo4"):
    """No tokens are protected: they hide what the formats do to short texts."""
    options = {"backend": "reference", "centre": centre, "sink": 0, "recent": 0}
    return make_prompt_cache(model(), k, "f16", **options)


def feed(held, start, stop):
    logits = model()(mx.array(TOKENS[start:stop])[None], cache=held)[0]
    mx.eval(logits)
    return logits


def divergence(logits, start):
    """Mean KLD of logits of the positions from ``start`` on."""
    reference = exact()[start : start + len(logits)]
    targets = mx.zeros((len(logits),), mx.int32)
    return float(np.mean(Reference(reference, targets).compare(logits).kld))


def test_keys_collapse_without_centring_and_do_not_with_it():
    assert divergence(feed(caches(centre=False), 0, 150), 0) > COLLAPSED
    assert divergence(feed(caches(), 0, 150), 0) < KEPT


def test_decode_token_by_token():
    for centre, check in ((True, lambda x: x < KEPT), (False, lambda x: x > COLLAPSED)):
        held = caches(centre)
        feed(held, 0, 90)
        logits = mx.concatenate([feed(held, i, i + 1) for i in range(90, 150)])
        assert check(divergence(logits, 90))


def test_a_prompt_cut_anywhere_gives_the_same_cache():
    whole = caches()
    feed(whole, 0, 80)
    expected = np.array(whole[-1].keys_and_values()[0])
    for cut in range(1, 80):
        held = caches()
        first = feed(held, 0, cut)
        rest = feed(held, cut, 80)
        assert divergence(mx.concatenate([first, rest]), 0) < KEPT
        # the last layer's inputs differ by what sums in another order do to a code now and then
        close = np.isclose(np.array(held[-1].keys_and_values()[0]), expected, rtol=1e-3, atol=1e-3)
        assert close.all(axis=-1).mean() > 0.95
        first_layer = [np.array(c[0].keys_and_values()[0]) for c in (held, whole)]
        assert np.isclose(*first_layer, rtol=ROWS_RTOL, atol=1e-3).all(axis=-1).mean() > 0.95


def test_trimmed_and_rolled_back():
    held = caches()
    feed(held, 0, 110)
    trim_prompt_cache(held, 70)
    assert divergence(feed(held, 40, 150), 40) < KEPT
    for _ in range(20):  # as speculative decoding does: eight tokens, five of them taken back
        trim_prompt_cache(held, 8)
        feed(held, held[0].offset, held[0].offset + 3)
        trim_prompt_cache(held, 2)
        held_to = held[0].offset
        assert divergence(feed(held, held_to, held_to + 7), held_to) < KEPT


def test_saved_and_loaded(tmp_path):
    held = caches()
    feed(held, 0, 77)
    save_prompt_cache(str(tmp_path / "c.safetensors"), held)
    held = load_prompt_cache(str(tmp_path / "c.safetensors"))
    assert all(c.centre is not None for c in held)
    assert divergence(feed(held, 77, 150), 77) < KEPT


def test_sequences_of_a_batch():
    """Left-padded: a sequence of 90 tokens and one of 37, each at its own positions."""
    singles = [caches(), caches()]
    for held, n in zip(singles, (90, 37)):
        feed(held, 0, n)
    batch = [TurboKVCache.merge(list(pair)) for pair in zip(*singles)]
    rows = mx.array([TOKENS[90:120], TOKENS[37:67]])
    logits = model()(rows, cache=batch)
    assert divergence(logits[0], 90) < KEPT and divergence(logits[1], 37) < KEPT
    step = model()(mx.array([[TOKENS[120]], [TOKENS[67]]]), cache=batch)
    assert divergence(step[0], 120) < KEPT and divergence(step[1], 67) < KEPT


def test_attached_to_all_of_mlx_lm():
    from mlx_lm.models.cache import make_prompt_cache as of_mlx_lm

    attach(model(), "turbo4", "f16", backend="reference", sink=0, recent=0)
    try:
        assert divergence(feed(of_mlx_lm(model()), 0, 150), 0) < KEPT
    finally:
        detach(model())


@pytest.mark.parametrize("name", architectures())
def test_rope_frequencies_are_those_of_the_model(name):
    """Keys of one token at two positions: the angles between them."""
    tiny = tiny_model(name)
    layers = kv_layers(tiny).layers
    ropes = find_rope_frequencies(tiny, layers)
    layers = [layer for layer in layers if layer.ordinal in ropes]
    at = {}
    for offset in (0, 5) if layers else ():
        held, recording = own_caches(tiny), [RecordingCache(offset) for _ in layers]
        for layer, recorded in zip(layers, recording):
            put_cache(held, layer.index, layer.sub, recorded)
        tiny(mx.zeros((1, 1), mx.int32), cache=held)
        at[offset] = [np.array(cache.keys[0, :, 0], np.float64) for cache in recording]
    for i, layer in enumerate(layers):
        rope = ropes[layer.ordinal]
        first, second = rope.pairs()
        angles = 5 * np.array(rope.angles)
        x, y = at[0][i][:, first], at[0][i][:, second]
        expected = np.empty_like(at[0][i])
        expected[:, first] = x * np.cos(angles) - y * np.sin(angles)
        expected[:, second] = x * np.sin(angles) + y * np.cos(angles)
        assert np.allclose(at[5][i], expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


UNDERSTOOD = {
    "qwen2": True, "gpt_neox": True, "qwen": True, "phi3small": True, "gpt_oss": True,
    "llama": False, "qwen3": False, "phi3": False,
}  # fmt: skip


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_biases_of_separate_and_fused_projections(name):
    tiny = tiny_model(name)
    layers = kv_layers(tiny).layers
    biases = key_biases(tiny, layers)
    assert len(biases) == (len(layers) if UNDERSTOOD[name] else 0)
    if name == "qwen2":
        for layer, bias in zip(tiny.layers, biases.values()):
            assert mx.array_equal(bias.reshape(-1), layer.self_attn.k_proj.bias).item()


def test_normalised_keys_have_no_constant_part():
    tiny = tiny_model("qwen3")
    for layer in tiny.layers:
        layer.self_attn.k_proj.bias = mx.ones(layer.self_attn.k_proj.weight.shape[:1])
    assert key_biases(tiny, kv_layers(tiny).layers) == {}


def windows(n=3, length=120):
    return np.array(TOKENS[:length] * n, np.int32).reshape(n, length)


def test_calibrated_means_are_means_of_keys_before_rope():
    found = calibrate_keys(model(), windows(1), skip=4)
    attention = model().layers[0].self_attn
    x = model().model.embed_tokens(mx.array(TOKENS[4:120]))
    keys = attention.k_proj(model().layers[0].input_layernorm(x)).reshape(116, 2, -1)
    expected = np.array(keys.mean(axis=0))
    assert np.allclose(np.array(found.means[0]), expected, rtol=1e-4, atol=2e-2)
    assert found.without_rope == frozenset() and found.record["tokens"] == 116


def test_layers_without_rope_are_centred_by_a_plain_mean():
    tiny = tiny_model("smollm3", no_rope_layer_interval=2, no_rope_layers=[1, 0, 1])
    found = calibrate_keys(tiny, windows())
    assert found.without_rope == frozenset({1})
    held = make_prompt_cache(tiny, "turbo4", "f16", backend="reference", centre=found)
    assert [c.centre.source for c in held] == ["calibrated mean"] * 3
    assert not any(held[1].centre.rope.angles)


def test_calibrated_means_centre_models_without_biases(tmp_path):
    found = calibrate_keys(model(), windows())
    save_references(tmp_path / "p.json", found)
    held = caches(tmp_path / "p.keys.json")
    assert [c.centre.source for c in held] == ["calibrated mean"] * 3
    assert divergence(feed(held, 0, 150), 0) < KEPT


def test_references_beside_a_policy_file_are_found(tmp_path):
    from mlx_turbokv.policy.files import write_layer_list

    write_layer_list(tmp_path / "p.json", [("turbo4", "f16")] * 3)
    held = make_prompt_cache(model(), policy=tmp_path / "p.json", backend="reference")
    assert [c.centre.source for c in held] == ["key bias"] * 3
    save_references(tmp_path / "p.json", calibrate_keys(model(), windows()))
    held = make_prompt_cache(model(), policy=tmp_path / "p.json", backend="reference")
    assert [c.centre.source for c in held] == ["calibrated mean"] * 3


def test_references_given_to_a_model_are_found():
    set_references(model(), calibrate_keys(model(), windows()))
    try:
        assert [c.centre.source for c in caches()] == ["calibrated mean"] * 3
    finally:
        set_references(model(), None)
    assert [c.centre.source for c in caches()] == ["key bias"] * 3


def test_references_are_checked(tmp_path):
    found = calibrate_keys(model(), windows())
    save_references(tmp_path / "p", found)
    loaded = load_references(tmp_path / "p", model())
    assert loaded.record == found.record
    assert all(mx.array_equal(loaded.means[i], found.means[i]).item() for i in range(3))
    with pytest.raises(InputError, match="belong to another model"):
        load_references(tmp_path / "p", tiny_model("llama"))
    with pytest.raises(InputError, match="no key references at"):
        load_references(tmp_path / "q", model())
    (tmp_path / "p.keys.json").write_text("{}")
    with pytest.raises(InputError, match="no key references that can be read"):
        load_references(tmp_path / "p", model())
    with pytest.raises(InputError, match="cannot be written"):
        save_references(tmp_path / "missing" / "p", found)
    with pytest.raises(InputError, match="at least one of more than 4 tokens"):
        calibrate_keys(model(), np.zeros((1, 4), np.int32))


REFERENCES = [
    ("a list", lambda record: [record]),
    ("no layers", lambda record: record | {"layers": []}),
    ("layers of text", lambda record: record | {"layers": ["0"]}),
    ("a layer twice", lambda record: record | {"layers": [0, 0, 1, 2]}),
    ("a negative layer", lambda record: record | {"layers": [-1, 0, 1]}),
    ("another layer", lambda record: record | {"layers": [0, 1, 2, 3]}),
    ("unturned of a number", lambda record: record | {"unturned": 1}),
    ("unturned of others", lambda record: record | {"unturned": [7]}),
    ("a model of a number", lambda record: record | {"model": 3}),
    ("a record of text", lambda record: record | {"record": "text"}),
    ("version true", lambda record: record | {"version": True}),
    ("no maker", lambda record: {k: v for k, v in record.items() if k != "maker"}),
]


@pytest.mark.parametrize("change", [x[1] for x in REFERENCES], ids=[x[0] for x in REFERENCES])
def test_references_with_wrong_values_are_refused(tmp_path, change):
    save_references(tmp_path / "p", calibrate_keys(model(), windows()))
    file = tmp_path / "p.keys.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match="no key references that can be read"):
        load_references(tmp_path / "p", model())


@pytest.mark.parametrize(
    "mean",
    [
        mx.full((2, 32), float("nan")),
        mx.full((2, 32), -float("inf")),
        mx.ones((2, 32), mx.int32),
        mx.ones((64,)),
        mx.ones((2, 31)),
        mx.ones((0, 32)),
    ],
    ids=["nan", "inf", "integers", "flat", "odd", "empty"],
)
def test_references_whose_means_are_wrong_are_refused(tmp_path, mean):
    found = calibrate_keys(model(), windows())
    save_references(tmp_path / "p", References({**found.means, 1: mean}, frozenset(), found.model))
    with pytest.raises(InputError, match="the mean of layer 1"):
        load_references(tmp_path / "p", model())


def test_references_are_written_whole_or_not_at_all(tmp_path):
    found = calibrate_keys(model(), windows())
    (tmp_path / "there").mkdir()
    for name in ("p.keys.json", "p.keys.safetensors"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    save_references(tmp_path / "p", found)
    assert all((tmp_path / name).is_symlink() for name in ("p.keys.json", "p.keys.safetensors"))
    assert load_references(tmp_path / "p", model()).means.keys() == found.means.keys()
    assert len(list((tmp_path / "there").iterdir())) == 2


def test_references_of_other_heads_are_left_out():
    found = calibrate_keys(model(), windows())
    wide = References({i: mx.zeros((4, 32)) for i in range(3)}, frozenset(), found.model)
    factory = api.CacheFactory(
        model(), Uniform("turbo4", "f16"), "reference", centre=wide
    )  # fmt: skip
    assert factory.centring.summary() == "keys centred by key bias (3 layers)"
    assert any("do not fit the KV heads of layers 0-2" in note for note in factory.centring.notes)


def test_large_biases_that_stay_are_named(caplog):
    log._given.clear()
    with caplog.at_level(logging.WARNING, "mlx_turbokv"):
        caches(centre=False)
    norm = max(
        np.linalg.norm(np.array(x.self_attn.k_proj.bias).reshape(2, -1), axis=-1).max()
        for x in model().layers
    )
    assert f"large bias (norm up to {norm:,.0f}, layers 0-2)" in caplog.text
    log._given.clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "mlx_turbokv"):
        caches(), caches(False, "q8_0")
    assert "bias" not in caplog.text


def test_only_turbo_keys_get_a_centre():
    assert all(c.centre is None for c in caches(k="q8_0"))
    assert all(type(c.centre) is Centre for c in caches(k="turbo2"))


@pytest.mark.parametrize("edge", ["single", "padded batch"])
def test_kernels_keep_the_model_too(edge, metal_host, monkeypatch):
    """Prefill and decode through pack, dequantize and decode, run on the CPU."""
    from mlx_turbokv.kernels import assemble

    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    held = make_prompt_cache(model(), "turbo4", "turbo6", backend="metal", sink=0, recent=0)
    if edge == "single":
        logits = [feed(held, 0, 35), feed(held, 35, 36), feed(held, 36, 39)]
        assert divergence(mx.concatenate(logits), 0) < KEPT
        return
    other = make_prompt_cache(model(), "turbo4", "turbo6", backend="metal", sink=0, recent=0)
    feed(held, 0, 35), feed(other, 0, 12)
    batch = [TurboKVCache.merge(list(pair)) for pair in zip(held, other)]
    logits = model()(mx.array([[TOKENS[35]], [TOKENS[12]]]), cache=batch)
    assert divergence(logits[0], 35) < KEPT and divergence(logits[1], 12) < KEPT


def test_options_of_the_commands(tmp_path):
    from mlx_turbokv.cli.options import centre_from

    assert centre_from() == "auto" and centre_from(no_centre=True) is False
    assert centre_from(no_calibrate=True) is True
    for name in ("means.keys.json", "means.keys.safetensors"):
        (tmp_path / name).touch()
    assert centre_from(str(tmp_path / "means.keys.json")) == str(tmp_path / "means.keys.json")
    with pytest.raises(InputError, match="--keys and --no-centre cannot be given together"):
        centre_from("means.keys.json", True)


def test_the_closing_line_says_what_is_centred():
    from mlx_turbokv.cache.summary import summarize

    held = caches()
    feed(held, 0, 5)
    found = summarize(held)
    said = "turbo4/f16 layers), 0 tokens protected, keys centred by key bias (3 layers), reference"
    assert said in found.line("p")
    # per cent of f16 and bits per value are one number, and count what centring takes
    assert found.bits_per_value == pytest.approx(16 * found.row_bytes / found.f16_bytes)
    held = caches(centre=False)
    feed(held, 0, 5)
    without = summarize(held)
    assert "turbo4/f16 layers), 0 tokens protected, keys not centred" in without.line("p")
    assert found.bits_per_value > without.bits_per_value
    held = caches(k="q8_0")
    feed(held, 0, 5)
    assert "centred" not in summarize(held).line("p")


def test_plans_say_what_is_centred(tmp_path):
    from mlx_turbokv.loading.known_shapes import KNOWN
    from mlx_turbokv.loading.model_shape import shape_from_config
    from mlx_turbokv.policy import Uniform, load_policy
    from mlx_turbokv.policy.files import write_layer_list
    from mlx_turbokv.report.plan import make_plan

    def notes(name, policy=None, centre=True):
        policy = policy or Uniform("turbo4", "turbo3")
        shape = shape_from_config(KNOWN[name], name)
        return " ".join(make_plan(shape, [("row", policy)], [4096], centre=centre).rows[0].notes)

    assert "row: the turbo keys of 28 layers are centred by the bias" in notes("Qwen2.5-7B")
    assert "are not centred: the model has no key bias" in notes("Llama-3.1-8B")
    assert "measured at the model's first use" in notes("Llama-3.1-8B", centre="auto")
    assert "measured at the model's first use" in notes("Qwen2.5-7B", centre="auto")
    assert "(--no-centre), although the key projection has a bias" in notes(
        "Qwen2.5-7B", centre=False
    )
    assert "by the calibrated means in m.keys.json" in notes("Llama-3.1-8B", centre="m.keys.json")
    assert "turbo keys" not in notes("Qwen2.5-7B", Uniform("q8_0", "turbo2"))
    write_layer_list(tmp_path / "p.json", [("turbo4", "turbo3")] * 32)
    (tmp_path / "p.keys.json").write_text("{}")
    assert "means in p.keys.json" in notes("Llama-3.1-8B", load_policy(tmp_path / "p.json"))
