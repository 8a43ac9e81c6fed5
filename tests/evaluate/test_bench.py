"""Whole-model speed: random weights, filled caches, rows and the command, on tiny models."""

from __future__ import annotations

import json
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache
from tiny_models import tiny_config, tiny_model

from mlx_turbokv.cli import bench
from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate import benchmark, configuration, timed_generation
from mlx_turbokv.evaluate.benchmark import Point, Settings
from mlx_turbokv.evaluate.tables import SPEED_HEADER, Table, speed_rows
from mlx_turbokv.loading.random_model import random_model, shape_config, weight_bytes
from mlx_turbokv.model.kv_layers import kv_layers

QUICK = Settings(generation_tokens=3, num_trials=2, prefill_step_size=16, vocab_size=90)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=2, head_dim=64)


@pytest.fixture
def shape_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config("llama", num_hidden_layers=2, head_dim=64)))
    return str(path)


@pytest.mark.parametrize("name", ["llama", "qwen3_5"])
@pytest.mark.parametrize("bits", [4, 8])
def test_random_weights_are_packed_and_of_an_untrained_spread(name, bits):
    model = random_model(tiny_config(name), bits, group_size=32, dtype="float32")
    layers = [m for m in model.modules() if isinstance(m, nn.QuantizedLinear)]
    assert layers
    for layer in layers:
        w = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 32, bits))
        assert abs(w.mean()) < 0.2 * w.std()
        assert w.std() == pytest.approx(w.shape[1] ** -0.5, rel=0.1)
    logits = model(mx.array([[1, 2, 3]]))
    assert mx.all(mx.isfinite(logits)).item()


def test_random_weights_follow_from_the_seed():
    a, b, c = (random_model(tiny_config("llama"), seed=s, group_size=32) for s in (0, 0, 1))
    words = [m.layers[0].self_attn.q_proj.weight for m in (a, b, c)]
    assert mx.array_equal(words[0], words[1]) and not mx.array_equal(words[0], words[2])


def test_no_16_bit_copy_of_the_weights_is_made():
    wide = tiny_config("llama", num_hidden_layers=8, hidden_size=512, intermediate_size=2048)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = random_model(wide, 4, dtype="float16")
    peak = mx.get_peak_memory() - before
    size = weight_bytes(model)
    n_values = sum(m.weight.size * 8 for m in model.modules() if isinstance(m, nn.QuantizedLinear))
    assert size < 0.6 * n_values + 1e6  # 4.5 bits a value, and the embedding
    assert peak < 1.5 * size < 2 * n_values


def test_a_hybrid_has_its_recurrent_layers():
    config, name = shape_config("qwen3.5-27b")
    assert name and config["model_type"] == "qwen3_5"
    model = random_model(tiny_config("qwen3_5"), 4, group_size=32, dtype="float32")
    assert len(kv_layers(model).layers) < len(model.layers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "no-such-shape"], "accepted are phi-4"),
        (["--config", "q7/turbo2"], "accepted"),
        (["--model", "x"], "cannot be given together"),
    ],
)
def test_bad_options_are_named(arguments, message, shape_file):
    if arguments[0] != "--shape":
        arguments = ["--shape", shape_file, *arguments]
    error = CliRunner().invoke(bench.command, arguments).exception
    assert isinstance(error, InputError) and message in str(error)


@pytest.mark.parametrize("name", ["f16/f16", "q8_0/turbo2", "mlx-kv4:64"])
@pytest.mark.parametrize(("tokens", "step"), [(1, 8192), (100, 8192), (300, 8192), (300, 37)])
def test_a_filled_cache_holds_what_a_prompt_would(model, name, tokens, step, monkeypatch):
    monkeypatch.setattr(benchmark, "FILL_STEP", step)
    config = configuration.prepare(model, name)
    filled, prompted = config.make_caches(), config.make_caches()
    benchmark.fill(filled, kv_layers(model), tokens, mx.float32)
    mx.eval(model(mx.zeros((1, tokens), mx.int32), cache=prompted))
    assert [c.offset for c in filled] == [tokens] * 2
    # Spare rows depend on the pieces.
    assert step < tokens or [c.nbytes for c in filled] == [c.nbytes for c in prompted]


@pytest.mark.parametrize("kind", ["prompt", "context"])
@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_every_configuration_gets_every_trial_in_turn(kind, name):
    model = tiny_model(name)
    configs = [configuration.prepare(model, n) for n in ("f16/f16", "q8_0/turbo2")]
    ticks = []
    rows = benchmark.measure_point(
        model, Point(kind, 40), configs, QUICK, tick=lambda *a: ticks.append(a[2])
    )
    assert [name for name in ticks if ":" not in name] == ["f16/f16", "q8_0/turbo2"] * 3
    said = [name for name in ticks if ":" in name]  # before anything of it has run
    assert ticks[0] in said and any(name.endswith("first trial, not timed") for name in said)
    assert any("filling layer 1 of" in name for name in said) is (kind == "context")
    for row in rows:
        assert len(row["generation_tps"]["trials"]) == 2
        assert row["generation_tps"]["min"] <= row["generation_tps"]["median"]
        assert 0 < row["kv_bytes"] and 0 < row["peak_bytes_above_weights"]
        assert 0 < row["build_ms"]
        assert ("prompt_tps" in row) is (kind == "prompt")
    assert rows[0]["generation_of_first"] == 1
    assert rows[1]["kv_bytes"] < rows[0]["kv_bytes"]


BATCH = Settings(3, 2, prefill_step_size=16, vocab_size=90, batch_size=3)


@pytest.mark.parametrize("kind", ["prompt", "context"])
@pytest.mark.parametrize("name", ["llama", "qwen3_next"])
def test_a_batch_holds_every_sequence(kind, name):
    model = tiny_model(name)
    names = "f16/f16", "q8_0/turbo2"
    configs = [configuration.prepare(model, n) for n in names]
    one = benchmark.measure_point(model, Point(kind, 40), configs, QUICK)
    three = benchmark.measure_point(model, Point(kind, 40), configs, BATCH)
    for single, batch in zip(one, three):
        assert "error" not in batch and batch["batch_size"] == 3
        assert len(batch["generation_tps"]["trials"]) == 2
        # mlx-lm's buffers grow in steps of tokens
        assert 1.5 * single["kv_bytes"] < batch["kv_bytes"] <= 3 * single["kv_bytes"]


def test_speeds_are_of_all_sequences_and_a_step_is_of_one_token_of_each():
    config = configuration.Prepared("a", list)
    trial = benchmark.Trials(config, [2.0], [0.5], build_s=[0.1])
    row = benchmark._row(Point("prompt", 8), trial, trial, 3)
    assert row["step_ms"] == 500 and row["generation_tps"]["median"] == 6
    assert row["prompt_tps"]["median"] == 12


def test_a_batch_generates_what_mlx_lm_generates(model):
    """Timed steps leave the tokens in the caches that batch_generate's own generator leaves."""
    prompts = mx.random.randint(0, 90, (3, 20), key=mx.random.key(1))
    config = configuration.prepare(model, "q8_0/turbo2")
    timed = timed_generation.caches_for(config.make_caches, 3)
    timed_generation.generate(model, prompts, timed, 5, 16)
    generator = BatchGenerator(model, max_tokens=6, prefill_step_size=16)
    caches = [config.make_caches() for _ in range(3)]
    uids = generator.insert(prompts.tolist(), caches=caches)
    while responses := generator.next_generated():
        done = [r for r in responses if r.finish_reason]
        for response in done:
            row = uids.index(response.uid)
            for batch, single in zip(timed, response.prompt_cache):
                n = single.offset
                assert batch.offset[row].item() == n == 20 + 6
                for a, b in zip(batch.extract(row).keys_and_values(), single.keys_and_values()):
                    assert mx.array_equal(a[:, :, :n], b[:, :, :n])


def test_a_cache_of_one_sequence_is_an_error_of_its_row(model):
    mlx_lm = configuration.prepare(model, "mlx-kv8:64", timed=True)
    f16 = configuration.prepare(model, "f16/f16")
    rows = benchmark.measure_point(model, Point("prompt", 20), [f16, mlx_lm], BATCH)
    assert "error" not in rows[0] and "holds one sequence, not 3" in rows[1]["error"]


def test_the_command_times_batches(shape_file, tmp_path):
    out = tmp_path / "b.json"
    result = _run(shape_file, out, "-p", "20", "-b", "2")
    assert result.exception is None and "batches of 2 sequences" in result.output
    record = json.loads(out.read_text())
    assert record["batch_size"] == 2 and {row["batch_size"] for row in record["rows"]} == {2}
    other = _run(shape_file, out, "-p", "20", "-b", "3")
    assert isinstance(other.exception, InputError) and "batch_size" in str(other.exception)
    given = _run(shape_file, out, "-p", "20", "-b", "2", "--config", "mlx-kv8:64")
    assert isinstance(given.exception, InputError)
    assert "mlx-kv8:64" in str(given.exception) and "--batch-size 2" in str(given.exception)


def test_defaults_that_hold_one_sequence_are_left_out_of_batches(shape_file, tmp_path):
    out = tmp_path / "b.json"
    arguments = ["--shape", shape_file, "--dtype", "float32", "-p", "20", "-g", "2", "-n", "1"]
    result = CliRunner().invoke(bench.command, [*arguments, "-b", "2", "--json", str(out)])
    assert result.exception is None and "Left out mlx-kv8:64" in result.output
    configs = [row["config"] for row in json.loads(out.read_text())["rows"]]
    assert configs == ["f16/f16", "q8_0/turbo2", "turbo4/turbo3"]


def test_records_of_before_there_were_batches_go_on(shape_file, tmp_path):
    out = tmp_path / "b.json"
    assert _run(shape_file, out, "-p", "20").exception is None
    record = json.loads(out.read_text())
    del record["batch_size"]
    out.write_text(json.dumps(record))
    assert _run(shape_file, out, "-p", "20", "--context", "40").exception is None


def test_ratios_are_taken_trial_by_trial():
    config = configuration.Prepared("a", list)
    first = benchmark.Trials(config, generation_s=[1.0, 4.0, 2.0], build_s=[0.1])
    other = benchmark.Trials(config, generation_s=[2.0, 2.0, 2.0], build_s=[0.1])
    row = benchmark._row(Point("context", 8), other, first)
    assert row["generation_of_first"] == 1.0  # of 0.5, 2 and 1
    assert row["generation_tps"]["median"] == 0.5


class Broken(KVCache):
    def update_and_fetch(self, keys, values):
        raise NotImplementedError("no such kernel here\nand more")


def test_a_configuration_that_fails_does_not_stop_the_others(model):
    broken = configuration.Prepared("broken", lambda: [Broken() for _ in model.layers])
    rows = benchmark.measure_point(
        model, Point("prompt", 20), [configuration.prepare(model, "f16/f16"), broken], QUICK
    )
    assert "error" not in rows[0] and rows[1]["error"] == "no such kernel here"
    text = Table(SPEED_HEADER, speed_rows(rows), left=(1,)).text().splitlines()
    assert text[2].endswith("failed: no such kernel here")
    assert len(text[1]) < 150  # the message makes no column wide


def test_a_passed_deadline_leaves_one_trial(model):
    configs = [configuration.prepare(model, "f16/f16")]
    rows = benchmark.measure_point(model, Point("prompt", 20), configs, QUICK, deadline=0)
    assert len(rows[0]["generation_tps"]["trials"]) == 1


def _run(shape_file, out, *more):
    arguments = ["--shape", shape_file, "--dtype", "float32", "--config", "f16/f16", "--config",
                 "q8_0/turbo2", "-g", "2", "-n", "1", "--json", str(out), *more]  # fmt: skip
    return CliRunner().invoke(bench.command, arguments)


def test_the_command_keeps_points_that_were_measured(shape_file, tmp_path, monkeypatch):
    out = tmp_path / "b.json"
    assert _run(shape_file, out, "--context", "40").exception is None
    first = json.loads(out.read_text())
    measured = []
    real = benchmark.measure_point
    monkeypatch.setattr(
        benchmark, "measure_point", lambda m, p, *a: measured.append(p) or real(m, p, *a)
    )
    assert _run(shape_file, out, "--context", "40", "-p", "20").exception is None
    assert measured == [Point("prompt", 20)]
    both = json.loads(out.read_text())
    assert both["rows"][:2] == first["rows"] and len(both["rows"]) == 4
    other = _run(shape_file, out, "--context", "40", "-g", "3")
    assert isinstance(other.exception, InputError) and "other settings" in str(other.exception)
    anew = _run(shape_file, out, "--context", "40", "-g", "3", "--no-resume")
    assert anew.exception is None and len(json.loads(out.read_text())["rows"]) == 2


def test_rows_are_replaced_only_by_others(shape_file, tmp_path, monkeypatch):
    """One configuration failed at two points: nothing is lost until these are measured again."""
    out, points = tmp_path / "b.json", ("--context", "40", "-p", "20")
    assert _run(shape_file, out, *points).exception is None
    record = json.loads(out.read_text())
    for row in record["rows"][1::2]:
        row["error"] = "out of memory"
    out.write_text(json.dumps(record))
    _run(shape_file, out, *points, "--time-limit", "0")
    assert json.loads(out.read_text())["rows"] == record["rows"]
    real, measured = benchmark.measure_point, []

    def interrupted(model, point, *rest):
        measured.append(point)
        if len(measured) > 1:
            raise KeyboardInterrupt
        return real(model, point, *rest)

    monkeypatch.setattr(benchmark, "measure_point", interrupted)
    _run(shape_file, out, *points)
    rows = json.loads(out.read_text())["rows"]
    assert measured == [Point("context", 40), Point("prompt", 20)] and len(rows) == 4
    failed = [row["kind"] for row in rows if "error" in row]
    assert failed == ["prompt"] and record["rows"][2] in rows


def test_a_default_that_does_not_fit_the_model_is_left_out_and_said(tmp_path):
    path, out = tmp_path / "config.json", tmp_path / "b.json"
    path.write_text(json.dumps(tiny_config("llama", num_hidden_layers=1, head_dim=32)))
    arguments = ["--shape", str(path), "--dtype", "float32", "-p", "20", "-g", "2", "-n", "1"]
    result = CliRunner().invoke(bench.command, [*arguments, "--json", str(out)])
    assert result.exception is None and "Left out mlx-kv8:64" in result.output
    configs = [row["config"] for row in json.loads(out.read_text())["rows"]]
    assert configs == ["f16/f16", "q8_0/turbo2", "turbo4/turbo3"]


def test_points_after_the_time_limit_are_said(shape_file, tmp_path):
    out = tmp_path / "b.json"
    result = _run(shape_file, out, "--context", "40", "-p", "20", "--time-limit", "0")
    record = json.loads(out.read_text())
    assert record["not_measured"] == ["context 40", "prompt 20"] and record["rows"] == []
    assert "Not measured within the time limit: prompt 20" in result.output


def test_plots_and_tables_come_from_the_record_alone(shape_file, tmp_path):
    pytest.importorskip("matplotlib")
    out, png = tmp_path / "b.json", tmp_path / "b.png"
    _run(shape_file, out, "--context", "40", "--context", "64", "-p", "20")
    result = CliRunner().invoke(
        bench.command, ["--from", str(out), "--plot", str(png), "--output", "markdown"]
    )
    assert result.exception is None and png.read_bytes().startswith(b"\x89PNG")
    lines = [line for line in result.output.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6 and len({line.count("|") for line in lines}) == 1


def test_a_model_without_a_kv_cache_cannot_be_filled():
    model = tiny_model("mamba")
    with pytest.raises(InputError, match="no KV layer"):
        benchmark._Contexts(model, 10, QUICK)


def test_the_settings_of_packed_caches_reach_the_run(model):
    """What is timed is the packed attention, not a fallback through dequantised rows."""
    used = []
    config = configuration.prepare(model, "q8_0/turbo2", "reference")
    make = config.make_caches
    counted = configuration.Prepared("q8_0/turbo2", partial(_counting, make, used))
    benchmark.measure_point(model, Point("prompt", 20), [counted], QUICK)
    assert used and set(used) == {"TurboKVCache"}


def _counting(make, used):
    caches = make()
    used += [type(c).__name__ for c in caches]
    return caches
