"""Keys measured at the first use of a model, remembered, and measured again where that fails."""

from __future__ import annotations

import copy
import json
import os
import stat
from unittest import mock

import mlx.core as mx
import numpy as np
import pytest
from centred_model import centred_model
from characters import Characters
from planted_mean import SINK, counted_runs, planted_model
from tiny_models import tiny_model

from mlx_turbokv import InputError, attach, log, make_prompt_cache
from mlx_turbokv.centring import calibration, first_use, references
from mlx_turbokv.centring.calibration import calibrate_keys
from mlx_turbokv.centring.first_use import N_CTX, N_WINDOWS, FirstUse
from mlx_turbokv.centring.references import save_references
from mlx_turbokv.evaluate.divergence import Reference
from mlx_turbokv.evaluate.text import load_text
from mlx_turbokv.model.text_windows import cut_windows

TOKENS = [SINK] + [(7 * i * i + 3 * i + 1) % 89 for i in range(149)]
MEASURED = ["calibrated mean and scales"] * 3


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The folder of remembered keys, of each test's own."""
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path / "cache"))
    log._given.clear()
    return tmp_path / "cache" / "keys"


@pytest.fixture
def runs(monkeypatch):
    return counted_runs(monkeypatch)


def caches(model, k="turbo3", centre="auto", **options):
    options = {"tokenizer": Characters(), "backend": "reference"} | options
    formats = {} if "policy" in options else {"k": k, "v": "f16"}
    return make_prompt_cache(model, centre=centre, **formats, **options)


def sources(held):
    return [None if c.centre is None else c.centre.source for c in held]


def divergence(model, held):
    """Mean KLD to the f16 cache."""
    exact, found = (
        model(mx.array(TOKENS)[None], cache=c)[0]
        for c in (make_prompt_cache(model, "f16", "f16"), held)
    )
    targets = mx.zeros((len(TOKENS),), mx.int32)
    return float(np.mean(Reference(exact, targets).compare(found).kld))


def test_the_first_use_measures_and_the_second_does_not(folder, runs, capfd):
    assert sources(caches(planted_model())) == MEASURED
    assert [w.shape for w in runs] == [(N_WINDOWS, N_CTX)]
    assert "Measuring the keys of the model, once" in capfd.readouterr().err
    held = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(held) == 2
    assert sources(caches(planted_model())) == MEASURED
    assert len(runs) == 1 and capfd.readouterr().err == ""
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == held


def test_references_are_those_of_calibrate_keys_on_the_same_text(folder):
    model, sample = planted_model(), load_text("sample")
    windows = cut_windows(Characters(), sample.text, N_CTX, N_WINDOWS)
    expected = calibrate_keys(model, windows, sample.sha256, scale=True)
    for _ in range(2):  # as measured, and as remembered
        for i, cache in enumerate(caches(model)):
            scales = cache.centre.scales
            assert mx.array_equal(scales.of_pairs, expected.scales[i]).item()
            assert mx.array_equal(cache.centre.mu, expected.means[i] * scales.of_dims).item()
    assert json.loads(next(folder.glob("*.json")).read_text())["record"] == expected.record


def test_measured_keys_bring_quality():
    model = planted_model()
    # protected tokens would hide what the formats do to a short text
    protects = {"sink": 0, "recent": 0}
    plain, centred = (
        divergence(model, caches(model, centre=c, **protects)) for c in (True, "auto")
    )
    assert centred < 0.1 * plain and plain > 0.02


def test_a_model_is_told_from_another_of_the_same_norms(runs):
    for seed in (0, 1):  # their norms are all ones
        caches(planted_model(seed))
    assert len(runs) == 2
    assert not np.array_equal(*(np.array(caches(planted_model(s))[0].centre.mu) for s in (0, 1)))
    assert len(runs) == 2


@pytest.mark.parametrize("k", ["q8_0", "f16"])
def test_keys_that_gain_nothing_are_not_measured(k, folder, runs):
    caches(planted_model(), k)
    caches(planted_model(), centre=True)
    caches(planted_model(), centre=False)
    caches(planted_model(), max_kv_size=64)
    assert not runs and not folder.exists()


def test_keys_with_a_bias_are_measured_too(runs):
    assert sources(caches(centred_model())) == MEASURED and len(runs) == 1
    assert sources(caches(centred_model(), centre=True)) == ["key bias"] * 3


def test_a_bias_centres_keys_that_could_not_be_measured(monkeypatch, caplog):
    monkeypatch.setattr(first_use, "calibrate_keys", mock.Mock(side_effect=IndexError("odd")))
    assert sources(caches(centred_model())) == ["key bias"] * 3 and len(caplog.records) == 1


@pytest.mark.parametrize("part", ["means", "scales"])
def test_keys_that_are_not_finite_are_not_remembered(part, folder, monkeypatch, caplog):
    def measured(*args, **options):
        found = calibrate_keys(*args, **options)
        getattr(found, part)[2] = getattr(found, part)[2] * mx.nan
        return found

    monkeypatch.setattr(first_use, "calibrate_keys", measured)
    assert sources(caches(centred_model())) == ["key bias"] * 3
    assert not folder.exists() and len(caplog.records) == 1


def test_references_that_are_given_go_first(tmp_path, runs):
    from mlx_turbokv.policy.files import write_layer_list

    model = planted_model()
    write_layer_list(tmp_path / "p.json", [("turbo4", "f16")] * 3)
    windows = np.array(TOKENS, np.int32)[None]
    save_references(tmp_path / "p.json", found := calibrate_keys(model, windows))
    held = caches(model, policy=tmp_path / "p.json")
    assert mx.array_equal(held[0].centre.mu, found.means[0]).item() and not runs


def test_a_model_without_rope_is_told_only_where_it_was_asked_for(folder, runs, caplog, capfd):
    model = tiny_model("gpt_bigcode")  # fewer positions than some offsets, and no key bias
    assert sources(caches(model, centre=FirstUse(Characters()))) == [None] * 3
    assert not caplog.records
    assert sources(caches(model)) == [None] * 3
    assert [r.message for r in caplog.records] == [
        "The keys of the model are not measured: No KV layer of this model has keys that can be "
        "centred."
    ]
    assert not runs and not folder.exists() and "Measuring" not in capfd.readouterr().err


def test_auto_needs_a_tokenizer():
    with pytest.raises(InputError, match='centre="auto" reads a text with the model: give its'):
        caches(planted_model(), tokenizer=None)
    with pytest.raises(InputError, match="give its tokenizer as tokenizer=."):
        attach(planted_model(), "turbo4", "f16", centre="auto")


def test_a_tokenizer_is_enough(runs):
    model = planted_model()
    assert sources(attach(model, "turbo4", "f16").make_cache()) == [None] * 3
    attach(model, "turbo4", "f16", tokenizer=Characters(), centre=True)
    assert sources(model.make_cache()) == [None] * 3 and not runs
    attach(model, "turbo4", "f16", tokenizer=Characters())
    assert sources(model.make_cache()) == MEASURED
    assert sources(caches(model, centre=None)) == MEASURED and len(runs) == 1


def test_attached_models_are_measured_and_copied(runs):
    model = attach(planted_model(), "turbo4", "f16", centre="auto", tokenizer=Characters())
    assert sources(model.make_cache()) == sources(copy.deepcopy(model).make_cache()) == MEASURED
    assert len(runs) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"[" * 5000, b"\xff\xfe"])
@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_damaged_file_is_measured_anew(content, ending, folder, runs, caplog):
    caches(planted_model())
    next(folder.glob(f"*.{ending}")).write_bytes(content)
    assert sources(caches(planted_model())) == MEASURED
    assert len(runs) == 2
    (message,) = [r.message for r in caplog.records]
    assert message.endswith("the keys are measured anew.") and str(folder) in message
    assert sources(caches(planted_model())) == MEASURED
    assert len(runs) == 2 and len(caplog.records) == 1


def test_a_foreign_file_is_measured_anew(folder, runs, caplog):
    caches(planted_model())
    own = {path.suffix: path for path in folder.iterdir()}
    other = tiny_model("llama", hidden_size=64, vocab_size=96)
    found = calibrate_keys(other, np.array(TOKENS, np.int32)[None])
    save_references(own[".json"], found)
    assert sources(caches(planted_model())) == MEASURED and len(runs) == 2
    assert len(caplog.records) == 1


def test_a_file_whose_other_half_is_missing(folder, runs, caplog):
    caches(planted_model())
    next(folder.glob("*.json")).unlink()  # it is written last
    assert sources(caches(planted_model())) == MEASURED
    assert len(runs) == 2 and not caplog.records and len(list(folder.iterdir())) == 2


@pytest.mark.parametrize("how", ["file", "device"])
def test_a_folder_that_cannot_be_written(how, folder, runs, caplog, monkeypatch):
    if how == "file":
        folder.parent.touch()
    else:
        monkeypatch.setenv("TURBOKV_CACHE_DIR", "/proc/mlx_turbokv")
    model = planted_model()
    centre = FirstUse(Characters())
    for _ in range(2):  # one run makes several lists of caches
        assert sources(caches(model, centre=centre)) == MEASURED
    assert len(runs) == 1
    (message,) = [r.message for r in caplog.records]
    assert "cannot be written" in message and message.endswith("measured at each start.")


def test_a_read_only_folder(folder, runs, caplog):
    if os.geteuid() == 0:
        pytest.skip("root writes anywhere")
    folder.mkdir(parents=True)
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        assert sources(caches(planted_model())) == MEASURED
    finally:
        folder.chmod(stat.S_IRWXU)
    assert len(caplog.records) == 1 and len(runs) == 1


@pytest.mark.parametrize("at", ["measuring", "writing"])
def test_an_interruption_leaves_nothing(at, folder, runs, monkeypatch):
    with monkeypatch.context() as patch:
        if at == "measuring":
            patch.setattr(calibration._Energies, "add", mock.Mock(side_effect=KeyboardInterrupt))
        else:
            patch.setattr(mx, "save_safetensors", mock.Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            caches(planted_model())
    assert not folder.exists() or not list(folder.iterdir())
    assert sources(caches(planted_model())) == MEASURED and len(runs) == 2


def test_two_processes_at_once_do_no_harm(folder, runs, monkeypatch, caplog):
    write, other = references.write_text, []

    def meanwhile(path, text):
        if not other:  # another process starts while this one has written the first file of two
            other.append(True)
            other.append(caches(planted_model()))
        write(path, text)

    monkeypatch.setattr(references, "write_text", meanwhile)
    held = [caches(planted_model()), other[1], caches(planted_model())]
    assert len(runs) == 2 and len(list(folder.iterdir())) == 2 and not caplog.records
    for one in held:
        assert all(mx.array_equal(a.centre.mu, b.centre.mu).item() for a, b in zip(one, held[0]))


def test_what_fails_while_measuring_ends_nothing(folder, monkeypatch, caplog):
    monkeypatch.setattr(first_use, "calibrate_keys", mock.Mock(side_effect=IndexError("odd")))
    assert sources(caches(planted_model())) == [None] * 3
    (message,) = [r.message for r in caplog.records]
    assert message == "The keys of the model could not be measured (IndexError: odd)."
    assert not folder.exists()


def test_a_split_model_is_not_measured(runs, monkeypatch, caplog):
    group = mock.Mock(size=lambda: 2, rank=lambda: 0)
    monkeypatch.setattr(mx.distributed, "init", lambda: group)
    assert sources(caches(planted_model())) == [None] * 3 and not runs
    assert "2 processes run, and each may have a part of it." in caplog.records[0].message
    group.rank, seen = (lambda: 1), len(caplog.records)
    log._given.clear()
    caches(planted_model())
    assert len(caplog.records) == seen == 1
