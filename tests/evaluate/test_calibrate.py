"""Sensitivities and policies, on tiny models."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from tiny_models import shared_model, tiny_model

from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate import calibrate as module
from mlx_turbokv.evaluate.calibrate import row_sizes, shapes_of
from mlx_turbokv.evaluate.checkpoint import Journal
from mlx_turbokv.evaluate.configuration import layer_list, prepare
from mlx_turbokv.evaluate.perplexity import evaluate_windows
from mlx_turbokv.evaluate.sensitivity import Change, all_changes
from mlx_turbokv.evaluate.sensitivity import measure as measure_protected
from mlx_turbokv.model.fingerprint import weights_digest
from mlx_turbokv.policy import Protection

KLD_TOLERANCE = 1e-7  # nats a position: the same sums in another order, in float32
FORMATS = ("q8_0", "turbo4", "turbo2")
F16 = ("f16", "f16")
NONE = Protection(0, 0)  # windows here are shorter than what is protected by default
measure = partial(measure_protected, protection=NONE)
calibrate = partial(module.calibrate, protection=NONE)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", num_hidden_layers=3, head_dim=64)


@pytest.fixture(scope="module")
def windows():
    return np.random.default_rng(0).integers(0, 60, (3, 48)).astype(np.int32)


def _kld(model, windows, pairs):
    configs = [prepare(model, "f16/f16"), prepare(model, layer_list(pairs, "x", NONE))]
    return np.array(evaluate_windows(model, windows, configs).summary()[1]["kld_by_window"])


@pytest.mark.parametrize("base", [F16, ("turbo4", "turbo2")])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_one_slot_is_changed_at_a_time(model, windows, base, batch):
    base = [base] * 3
    changes = [Change(0, 0, "turbo3"), Change(2, 1, "q8_0")]
    found = measure(model, windows, base, changes, batch=batch)
    k_first, v_last = [*base], [*base]
    k_first[0] = ("turbo3", base[0][1])
    v_last[2] = (base[2][0], "q8_0")
    for change, pairs in zip(changes, (k_first, v_last)):
        assert change.applied(base) == pairs
        np.testing.assert_allclose(
            found.kld[change], _kld(model, windows, pairs), atol=KLD_TOLERANCE, rtol=1e-4
        )
    expected = _kld(model, windows, base)
    np.testing.assert_allclose(found.base_kld, expected, atol=KLD_TOLERANCE, rtol=1e-4)
    np.testing.assert_array_equal(found.predicted(base), found.base_kld)


def test_protected_tokens_are_measured_as_they_will_be_read(model):
    """In steps, with the first and the newest tokens fine, in the base as in every change."""
    windows = np.random.default_rng(3).integers(0, 60, (2, 400)).astype(np.int32)
    base, change = [("turbo4", "turbo2")] * 3, Change(1, 0, "turbo2")
    protection = Protection(32, 32)
    found = measure_protected(model, windows, base, [change], protection=protection)
    names = {"base": base, "changed": change.applied(base)}
    configs = [prepare(model, "f16/f16")]
    configs += [prepare(model, layer_list(x, name, protection)) for name, x in names.items()]
    expected = [r["kld_by_window"] for r in evaluate_windows(model, windows, configs).summary()]
    np.testing.assert_allclose(found.base_kld, expected[1], atol=KLD_TOLERANCE, rtol=1e-4)
    np.testing.assert_allclose(found.kld[change], expected[2], atol=KLD_TOLERANCE, rtol=1e-4)
    plain = measure(model, windows, base, [change])
    assert (found.base_kld < plain.base_kld).all()


def test_prediction_is_the_sum_of_what_changes_add(model, windows):
    found = measure(model, windows, [F16] * 3, all_changes([F16] * 3, FORMATS))
    pairs = [("turbo2", "q8_0"), ("f16", "turbo4"), F16]
    added = [Change(0, 0, "turbo2"), Change(0, 1, "q8_0"), Change(1, 1, "turbo4")]
    np.testing.assert_allclose(found.predicted(pairs), sum(found.kld[c] for c in added))
    assert found.table(("f16", *FORMATS)).shape == (3, 2, 4)
    assert (found.table(("f16",)) == 0).all() and np.isinf(found.table(("turbo5",))).all()


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_next"])
def test_policies_keep_their_budget(name):
    """Also where some layers are no KV layers, or have other shapes."""
    tiny = shared_model(name)
    windows = np.random.default_rng(1).integers(0, 60, (2, 24)).astype(np.int32)
    shapes = shapes_of(tiny)
    n_values = sum(s.n_values for s in shapes)
    found, assigned = calibrate(tiny, windows, ["q8_0/turbo3", "5", "99"], FORMATS)
    assert len(found.base) == len(shapes)
    for at in assigned:
        kinds = sorted({name for pair in at.pairs for name in pair})
        sizes = row_sizes(shapes, kinds)
        taken = sum(
            int(sizes[layer, part, kinds.index(fmt)])
            for layer, pair in enumerate(at.pairs)
            for part, fmt in enumerate(pair)
        )
        assert taken == at.n_bytes <= at.budget.n_bytes
        bits = prepare(tiny, layer_list(at.pairs, "x")).bits
        assert abs(8 * taken / n_values - bits) < 1e-9
    assert assigned[0].n_bytes <= row_sizes(shapes, ["q8_0", "turbo3"])[:, [0, 1], [0, 1]].sum()
    assert {f for pair in assigned[2].pairs for f in pair} == {"q8_0"}


def test_refining_starts_from_an_assignment_and_moves_one_step(model, windows):
    shapes = shapes_of(model)
    _, (start,) = calibrate(model, windows, ["5"], FORMATS)
    better = module.refine(model, windows, start, shapes, FORMATS, protection=NONE)
    assert better.n_bytes <= start.budget.n_bytes
    for one, two in zip(start.pairs, better.pairs):
        for a, b in zip(one, two):
            assert abs(FORMATS.index(a) - FORMATS.index(b)) <= 1
    np.testing.assert_allclose(
        better.predicted.mean() - _kld(model, windows, start.pairs).mean(), 0, atol=1e-2
    )


def test_measurements_are_taken_from_records(model, windows, tmp_path):
    path, changes = tmp_path / "m.jsonl", all_changes([F16] * 3, FORMATS)
    whole = measure(model, windows, [F16] * 3, changes, batch=2)

    def stop(done, total, name):
        assert total == 2 * len(changes)
        if done == len(changes) + 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records = Journal(path, {})
        measure(model, windows, [F16] * 3, changes, batch=2, records=records, progress=stop)
    steps = []
    again = measure(
        model, windows, [F16] * 3, changes, batch=2, records=Journal(path, {}),
        progress=lambda done, total, name: steps.append(name),
    )  # fmt: skip
    assert steps.count("kept") == len(changes) + 4
    for change in changes:
        np.testing.assert_array_equal(again.kld[change], whole.kld[change])


def test_logits_that_are_no_numbers_are_an_error(windows):
    broken = tiny_model("llama", num_hidden_layers=1, head_dim=64)
    broken.model.norm.weight = broken.model.norm.weight * float("nan")
    with pytest.raises(InputError, match="not finite"):
        measure(broken, windows, [F16], all_changes([F16], FORMATS))


def test_windows_whose_tokens_are_all_protected_are_refused(model):
    windows = np.zeros((1, 255), np.int32)
    with pytest.raises(InputError, match="windows of 255 are protected.* at least 256 tokens"):
        measure_protected(model, windows, [F16] * 3, [Change(0, 0, "turbo2")])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("windows", []), ("windows", 5), ("windows", np.zeros(8, np.int32)),
        ("windows", np.zeros((0, 8), np.int32)), ("windows", np.zeros((1, 8))),
        ("budgets", 5), ("budgets", "4.5"), ("budgets", [b"4"]), ("budgets", [None]),
        ("formats", 5), ("formats", "q8_0"), ("formats", [4]), ("base", 5), ("base", None),
    ],
)  # fmt: skip
def test_values_of_another_kind_are_refused_by_their_argument(model, name, value):
    given = {"windows": np.zeros((1, 8), np.int32), "budgets": ["4.5"]} | {name: value}
    with pytest.raises(InputError, match=f"{name} .* is not accepted: give"):
        calibrate(model, **given)


def test_what_is_no_model_is_refused():
    with pytest.raises(InputError, match="is not accepted as a model"):
        calibrate(5, np.zeros((1, 8), np.int32))


def test_a_model_without_kv_layers_is_refused():
    with pytest.raises(InputError, match="no KV layer"):
        calibrate(shared_model("mamba"), np.zeros((1, 8), np.int32))


def test_digests_differ_with_the_weights(model):
    other = tiny_model("llama", seed=1, num_hidden_layers=3, head_dim=64)
    same = tiny_model("llama", num_hidden_layers=3, head_dim=64)
    assert weights_digest(model) == weights_digest(same) != weights_digest(other)
