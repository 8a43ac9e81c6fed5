"""The evaluation: windows, divergence, checkpoints and the command, on a tiny model."""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.models.cache import KVCache, QuantizedKVCache
from tiny_models import tiny_model

from mlx_turbokv.cli.perplexity import command
from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate import configuration, text
from mlx_turbokv.evaluate.checkpoint import Checkpoint, Journal
from mlx_turbokv.evaluate.divergence import PositionStats, Reference
from mlx_turbokv.evaluate.mlx_lm_quantized import DequantizedCache, make_quantized_caches
from mlx_turbokv.evaluate.names import check_name
from mlx_turbokv.evaluate.perplexity import evaluate_windows
from mlx_turbokv.evaluate.tables import PERPLEXITY_HEADER, Table, perplexity_rows
from mlx_turbokv.evaluate.windows import batch_logits, first_scored, scored_logits
from mlx_turbokv.model.text_windows import cut_windows

KLD_TOLERANCE = 1e-6  # nats a position: float32 sums against float64


class Words:
    """A tokenizer whose tokens are the characters' codes, modulo the vocabulary."""

    def __init__(self, adds_bos: bool = False):
        self.bos_token_id, self.adds_bos = 1, adds_bos

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        tokens = [2 + ord(c) % 50 for c in text]
        return [1, *tokens] if add_special_tokens and self.adds_bos else tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=4)


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 60, (3, 64)).astype(np.int32)


@pytest.mark.parametrize(("stride", "starts"), [(None, [0, 16]), (8, [0, 8, 16])])
def test_windows_drop_the_rest_and_score_every_token_once(stride, starts):
    """With a stride of half a window, what is scored neither overlaps nor leaves anything out."""
    found = cut_windows(Words(), list(range(35)), 16, stride=stride)
    assert found.tolist() == [list(range(at, at + 16)) for at in starts]
    scored = [w[first_scored(16) :].tolist() for w in found]
    assert stride is None or sum(scored, []) == list(range(8, 32))


def test_bos_overwrites_the_first_token_only_where_the_vocabulary_adds_it():
    with_bos = cut_windows(Words(adds_bos=True), "abcdefgh" * 4, 8)
    without = cut_windows(Words(), "abcdefgh" * 4, 8)
    assert (with_bos[:, 0] == 1).all() and not (without == 1).any()
    # The text itself begins with BOS, so everything stands one place later.
    assert with_bos[0, 1:].tolist() == without[0, :-1].tolist()


@pytest.mark.parametrize("n_ctx", [4, 5, 64, 63])
def test_scored_positions_are_those_of_llama_perplexity(model, n_ctx):
    window = np.arange(n_ctx, dtype=np.int32) % 60
    logits = scored_logits(model, window, [KVCache() for _ in model.layers])
    whole = model(mx.array(window)[None])[0]
    assert logits.shape[0] == n_ctx - n_ctx // 2 - 1
    np.testing.assert_allclose(logits, whole[n_ctx // 2 : -1], atol=1e-4)


def _log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("distance", [0.0, 1e-3, 0.1, 3.0])
@pytest.mark.parametrize("n", [1, 15, 33])
def test_divergence_agrees_with_float64(n, distance):
    rng = np.random.default_rng(n)
    a = rng.normal(0, 3, (n, 500)).astype(np.float32)
    b = (a + distance * rng.normal(size=a.shape)).astype(np.float32)
    targets = rng.integers(0, 500, n)
    reference = Reference(mx.array(a), mx.array(targets))
    found = reference.compare(mx.array(b))
    np.testing.assert_array_equal(reference.kld(mx.array(b)), found.kld)
    p, q = _log_softmax(a.astype(np.float64)), _log_softmax(b.astype(np.float64))
    rows = np.arange(n)
    kld = (np.exp(p) * (p - q)).sum(-1)
    np.testing.assert_allclose(found.kld, kld, rtol=1e-4, atol=KLD_TOLERANCE)
    np.testing.assert_allclose(found.nll, -q[rows, targets], rtol=1e-5, atol=1e-5)
    delta = np.exp(q[rows, targets]) - np.exp(p[rows, targets])
    np.testing.assert_allclose(found.delta_p, delta, atol=1e-6)
    assert (found.same_top == (a.argmax(-1) == b.argmax(-1))).all()
    assert (found.top_right == (b.argmax(-1) == targets)).all()


@pytest.mark.parametrize("vocabulary", [49_152, 151_937])
def test_long_vocabularies_lose_nothing_in_the_sum(vocabulary):
    rng = np.random.default_rng(2)
    a = rng.normal(0, 3, (8, vocabulary)).astype(np.float32)
    a[:, 7] += 14
    targets = np.full(8, 7)
    found = Reference(mx.array(a), mx.array(targets)).own_stats()
    expected = -_log_softmax(a.astype(np.float64))[:, 7]
    np.testing.assert_allclose(found.nll, expected, rtol=1e-5, atol=1e-5)


def test_divergence_of_masked_tokens_is_finite():
    a = mx.array([[0.0, 1.0, -float("inf")]])
    found = Reference(a, mx.array([1])).compare(a)
    assert found.kld.tolist() == [0.0] and np.isfinite(found.nll).all()


def test_every_position_sees_a_quantised_cache(model, windows):
    """A run whose configuration is f16 has no distance; any other has one at every window."""
    names = ["f16/f16", "q8_0/q8_0", "turbo2/turbo2+0,0", "mlx-kv4:32"]
    found = evaluate_windows(model, windows, [configuration.prepare(model, n) for n in names])
    kld = [np.mean(np.concatenate(r.of("kld"))) for r in found.results]
    assert kld[0] == 0 < kld[1] < kld[2] and kld[3] > 0
    summary = found.summary()
    assert summary[0]["delta_nll"]["mean"] == 0 and summary[0]["same_top"]["mean"] == 1
    assert summary[1]["n_predictions"] == 3 * 31
    assert summary[2]["flips"]["top"] == np.sum(~np.concatenate(found.results[2].of("same_top")))


def test_nll_is_the_same_whatever_other_configurations_run(model, windows):
    alone = evaluate_windows(model, windows, [configuration.prepare(model, "q8_0/turbo3")])
    names = ["f16/f16", "q8_0/turbo3"]
    together = evaluate_windows(model, windows, [configuration.prepare(model, n) for n in names])
    one, other = (np.array(r.of("nll")) for r in (alone.results[0], together.results[1]))
    np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("turbo4/q8_0", [("turbo4", "q8_0")] * 4),
        ("q8_0/turbo2:32", [("q8_0", "turbo2:32")] * 4),
        ("la-v7:turbo4", [("turbo4", "q8_0")] * 4),
        ("f16/turbo3@boundary:1,1", [("f16", v) for v in ("q8_0", "turbo3", "turbo3", "q8_0")]),
        ("boundary:1,0:f16", [("q8_0", v) for v in ("f16", "turbo2", "turbo2", "turbo2")]),
        ("mlx-kv4", [("affine4:64",) * 2] * 4),
    ],
)
def test_configuration_names(name, layers):
    wide = tiny_model("llama", num_hidden_layers=4, head_dim=64)
    assert configuration.prepare(wide, name).layers == layers


@pytest.mark.parametrize("name", ["mlx-kv2:32", "mlx-kv4:64", "mlx-kv8:32"])
def test_dequantised_rows_lose_what_mlx_lms_quantised_attention_loses(name, windows):
    """Against quantised matmuls, over grouped heads; the rows hold the same bytes."""
    wide = tiny_model("llama", num_hidden_layers=2, head_dim=64)
    bits, group = (int(n) for n in name.removeprefix("mlx-kv").split(":"))
    for window in windows:
        own, other = (make_quantized_caches(wide, bits, group, d) for d in (False, True))
        np.testing.assert_allclose(
            scored_logits(wide, window, other), scored_logits(wide, window, own), atol=1e-5
        )
        assert isinstance(own[0], QuantizedKVCache) and isinstance(other[0], DequantizedCache)
        assert [c.nbytes for c in other] == [c.nbytes for c in own]


def test_mlx_lms_rows_are_dequantised_only_where_nothing_is_timed(model, monkeypatch):
    monkeypatch.setattr(configuration, "needs_dequantizing", lambda: True)
    shown, timed = (configuration.prepare(model, "mlx-kv4:32", timed=t) for t in (False, True))
    assert isinstance(shown.make_caches()[0], DequantizedCache)
    assert isinstance(timed.make_caches()[0], QuantizedKVCache)
    assert "dequantised" in shown.backend and timed.backend == "mlx-lm"
    assert configuration.backend_of([timed, shown]) == "mlx-lm"
    turbo = configuration.prepare(model, "q8_0/turbo2", "reference")
    assert configuration.backend_of([timed, shown, turbo]) == "reference"


def test_bits_per_value_of_mlx_lms_cache_count_scale_and_bias():
    model = tiny_model("llama", num_hidden_layers=2, head_dim=64)
    assert configuration.prepare(model, "mlx-kv4:32").bits == 5.0
    assert configuration.prepare(model, "mlx-kv8:64").bits == 8.5
    assert configuration.prepare(model, "q8_0/turbo2").bits == (8.5 + 2.25) / 2


@pytest.mark.parametrize(
    ("name", "head_dim", "words"),
    [("mlx-kv3:64", 256, "24 words.*25"), ("mlx-kv3:64", 192, "18 words.*19"),
     ("mlx-kv8:64", 256, None), ("mlx-kv4:64", 256, None), ("mlx-kv3:64", 128, None)],
)  # fmt: skip
def test_mlx_lms_cache_is_refused_where_its_words_do_not_fit_head_dim(name, head_dim, words):
    model = tiny_model("llama", head_dim=head_dim)
    if words is None:
        caches = configuration.prepare(model, name).make_caches()
        rows = mx.random.normal((1, 2, 8, head_dim))
        caches[0].update_and_fetch(rows, rows)
        assert configuration.fitting(model, [name]) == ([name], [])
        return
    with pytest.raises(InputError, match=f"{name}.*head_dim {head_dim}.*{words}"):
        configuration.prepare(model, name)
    found, reasons = configuration.fitting(model, [name, "mlx-kv4:64"])
    assert found == ["mlx-kv4:64"] and len(reasons) == 1 and "\n" not in reasons[0]
    with pytest.raises(ValueError, match="broadcast"):  # mlx-lm's own cache, without the check
        rows = mx.random.normal((1, 2, 8, head_dim))
        QuantizedKVCache(group_size=64, bits=3).update_and_fetch(rows, rows)


@pytest.mark.parametrize("name", ["q8_0", "q9/turbo2", "a/b/c", "la-v9", "mlx-kv5", "x@la-v7"])
def test_unknown_configurations_are_named(name):
    with pytest.raises(InputError, match=r"accepted"):
        check_name(name)


def test_two_configurations_of_one_name_are_refused(model, windows):
    twice = [configuration.prepare(model, "f16/f16")] * 2
    with pytest.raises(InputError, match="given twice"):
        evaluate_windows(model, windows, twice)


def test_logits_that_are_no_numbers_are_an_error(windows):
    broken = tiny_model("llama", num_hidden_layers=1)
    broken.model.norm.weight = broken.model.norm.weight * float("nan")
    with pytest.raises(InputError, match="not finite"):
        evaluate_windows(broken, windows, [configuration.prepare(broken, "f16/f16")])


@pytest.mark.parametrize(
    ("source", "n_ctx", "chunks"),
    [("", 8, None), ("short", 8, None), ("long enough", 8, 0), ("x", 2, 1)],
)
def test_bad_texts_and_sizes(source, n_ctx, chunks):
    with pytest.raises(InputError):
        cut_windows(Words(), source, n_ctx, chunks)


def test_an_interrupted_run_goes_on_where_it_stopped(model, windows, tmp_path):
    configs = [configuration.prepare(model, n) for n in ("f16/f16", "q8_0/turbo2")]
    whole = evaluate_windows(model, windows, configs).summary()
    path, settings = tmp_path / "run.partial", {"model": "tiny"}

    def stop(done, total, name):
        if done == 5:  # the third window has begun
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_windows(model, windows, configs, Checkpoint(path, settings), stop)
    with path.open("a") as file:
        file.write('{"window": 2, "resu')  # the power went while a line was written
    resumed = Checkpoint(path, settings, resume=True)
    assert sorted(resumed.windows) == [0, 1]
    steps = []
    found = evaluate_windows(model, windows, configs, resumed, lambda *a: steps.append(a))
    assert [s[2] for s in steps] == ["kept", "kept", "f16/f16", "q8_0/turbo2"]
    assert json.dumps(found.summary()) == json.dumps(whole)
    assert sorted(Checkpoint(path, settings).windows) == [0, 1, 2]


def test_a_run_with_other_settings_is_refused(tmp_path):
    path = tmp_path / "run.partial"
    stats = PositionStats(*(np.zeros(3, np.float32),) * 3, *(np.ones(3, bool),) * 2)
    Checkpoint(path, {"model": "a", "n_ctx": 8}).put(0, {"f16/f16": (stats, 10)})
    with pytest.raises(InputError, match=r"other settings \(n_ctx\)"):
        Checkpoint(path, {"model": "a", "n_ctx": 16})
    assert Checkpoint(path, {"model": "b"}, resume=False).windows == {}
    with pytest.raises(InputError, match="no unfinished run"):
        Checkpoint(path, {"model": "b"}, resume=True)


def test_summaries_and_tables_have_one_row_a_configuration(model, windows):
    configs = [configuration.prepare(model, n) for n in ("f16/f16", "q8_0/turbo2@boundary:1,0+0,0")]
    summary = evaluate_windows(model, windows, configs).summary()
    record = summary[1]
    v = [layer[1] for layer in record["layer_bits"]]
    assert v[0] > v[1] == v[2] == v[3]
    assert np.mean(v) == pytest.approx(record["v_bits_per_value"])
    low, high = record["kld"]["intervals"]["median"]
    assert low <= record["kld"]["median"] <= high
    assert record["flips"]["rate"]["mean"] == pytest.approx(1 - record["same_top"]["mean"])
    table = Table(PERPLEXITY_HEADER, perplexity_rows(summary))
    assert len(table.text().splitlines()) == 3
    markdown = table.markdown().splitlines()
    assert len(markdown) == 4 and len({line.count("|") for line in markdown}) == 1


def test_the_sample_is_long_enough_for_several_windows():
    assert len(text.load_text("sample").text.split()) >= 2500


@pytest.mark.parametrize("content", [b"", b" \n", b"\xff\xfe\x00"])
def test_unusable_text_files(tmp_path, content):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(InputError):
        text.load_text(str(path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--text", "no-such-file.txt"],
        ["--config", "q7/turbo2"],
        ["--ctx-size", "3", "--text", "sample"],
        ["--text", "sample", "--json", "no-such-folder/out.json"],
    ],
)
def test_the_command_refuses_before_it_loads_a_model(arguments):
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, InputError)


# Sums in another order may round a near-tie of the quantiser the other way, which a few logits
# show; another window's logits differ by far more.
@pytest.mark.parametrize(("name", "atol"), [("f16/f16", 1e-5), ("q8_0/turbo3", 0.05)])
def test_several_windows_at_once_give_the_logits_of_each(model, windows, name, atol):
    caches = configuration.prepare(model, name).make_caches
    found = np.array(batch_logits(model, windows, caches()))
    alone = np.stack([scored_logits(model, window, caches()) for window in windows])
    np.testing.assert_allclose(found, alone, atol=atol)
    assert np.abs(alone[0] - alone[1]).max() > 20 * atol


def test_a_journal_line_that_lost_its_end_of_line_is_ended(tmp_path):
    path = tmp_path / "run.jsonl"
    Journal(path, {"a": 1}).add({"b": 2})
    path.write_text(path.read_text().rstrip("\n"))
    Journal(path, {"a": 1}).add({"b": 3})
    assert Journal(path, {"a": 1}).parts == [{"b": 2}, {"b": 3}]
