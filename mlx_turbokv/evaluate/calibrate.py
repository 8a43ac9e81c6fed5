"""A policy made for one model: measured sensitivities, and the best assignment for a budget.

The KLD of an assignment is predicted as the sum of what each slot's format adds alone
(sensitivity.py), the sum is minimised exactly under a budget of bytes (assignment.py), and the
result is then measured as a whole: interactions show as the difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
import numpy as np

from ..checked import STRING, list_of
from ..errors import InputError
from ..model.kinds import check_model
from ..model.shapes import KVShape
from ..quant.formats import FORMAT, as_format
from .assignment import assign, monotone
from .configuration import kv_shapes, prepare
from .names import check_name
from .sensitivity import PARTS, WINDOWS, Change, Pairs, Sensitivity, all_changes, measure

FORMATS = ("q8_0", "turbo6", "turbo5", "turbo4", "turbo3", "turbo2")
MOST_BITS = 128
BUDGETS = ("la-v7", "4.5", "3.6")
FORMAT_LIST = list_of("names of KV formats, such as ['q8_0', 'turbo4']", FORMAT.fits)
BUDGET_LIST = list_of(
    "bits per value or configurations, such as [4.5, 'la-v7']",
    lambda x: isinstance(x, (str, int, float)) and not isinstance(x, bool),
)
ROUNDING = 1e-6  # bytes: a budget given as a decimal number must not lose one to its last digit


@dataclass(frozen=True)
class Budget:
    """What K and V of all layers may take together.

    name: as it was given: bits per value, or a configuration whose bits are meant.
    n_bytes: bytes a token.
    """

    name: str
    n_bytes: int


@dataclass(frozen=True)
class Assigned:
    """The assignment for a budget.

    pairs: formats of K and V in each KV layer.
    n_bytes: bytes a token that it takes.
    predicted: additive prediction of its KLD, [n_windows].
    repaired: costs that were raised or lowered to fall with the bits.
    """

    budget: Budget
    pairs: list[tuple[str, str]]
    n_bytes: int
    predicted: np.ndarray
    repaired: int


def shapes_of(model: nn.Module) -> list[KVShape]:
    """Shapes of the KV layers.

    Raises: InputError if the model has none, or does not show them.
    """
    shapes = kv_shapes(model)
    if not shapes:
        raise InputError(
            "The model has no KV layer whose shape could be learnt, so there is nothing to "
            "calibrate."
        )
    return shapes


def check_budget(text: str) -> None:
    """Check a budget before any model is loaded.

    Raises: InputError for what is neither a positive number nor a configuration.
    """
    bits = _number(text)
    if bits is None:
        check_name(text)
    elif not 0 < bits <= MOST_BITS:
        raise InputError(
            f"Budget {text} is not accepted: give bits per value above 0 and at most "
            f"{MOST_BITS}, or a configuration."
        )


def check_formats(names: Sequence[str]) -> tuple[str, ...]:
    """Formats that are open to the assignment, by name, without repeats.

    Raises: InputError for an unknown one, or none at all.
    """
    found = tuple(dict.fromkeys(str(as_format(name)) for name in names))
    if not found:
        raise InputError("No format is given: at least one must be open to the assignment.")
    return found


def as_budget(model: nn.Module, shapes: Sequence[KVShape], text: str) -> Budget:
    """A budget in bytes a token: of bits per value, or of a configuration's own bits.

    Raises: InputError as `check_budget`, or for a configuration that does not fit the model.
    """
    check_budget(text)
    bits = _number(text) or prepare(model, text).bits or 0.0
    n_values = sum(shape.n_values for shape in shapes)
    return Budget(text, int(bits * n_values / 8 + ROUNDING))


def is_number(text: str) -> bool:
    """Whether a budget is bits per value, and not a configuration."""
    return _number(text) is not None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def row_sizes(shapes: Sequence[KVShape], formats: Sequence[str]) -> np.ndarray:
    """Bytes a token of each format.

    Shapes: returns [n_layers, 2, n_formats] int64.
    """
    kinds = [as_format(name) for name in formats]
    sizes = [
        s.n_kv_heads * kind.row_bytes(head_dim)
        for s in shapes
        for head_dim in (s.k_head_dim, s.v_head_dim)
        for kind in kinds
    ]
    return np.array(sizes, np.int64).reshape(len(shapes), len(PARTS), len(kinds))


def solve(
    sensitivity: Sensitivity,
    shapes: Sequence[KVShape],
    formats: Sequence[str],
    budgets: Sequence[Budget],
) -> list[Assigned]:
    """The assignment of least predicted KLD within each budget.

    Measured costs are first repaired to fall with the bits (`monotone`); predictions are made of
    the costs as they were measured.

    Raises: InputError for a budget below what the smallest formats take.
    """
    sizes = row_sizes(shapes, formats).reshape(-1, len(formats))
    # The base's own formats cost nothing more, and are choices of their slot where they are open.
    measured = sensitivity.table(formats).reshape(sizes.shape)
    costs = monotone(measured, sizes)
    smallest = int(np.where(measured < np.inf, sizes, sizes.max()).min(axis=-1).sum())
    check_room(budgets, smallest, shapes)
    found = []
    for budget, choices in zip(budgets, assign(costs, sizes, [b.n_bytes for b in budgets])):
        names: list[str] = [formats[int(i)] for i in choices]
        pairs = list(zip(names[::2], names[1::2]))
        n_bytes = int(np.take_along_axis(sizes, choices[:, None], axis=1).sum())
        repaired = int(np.sum(costs != measured))
        found.append(Assigned(budget, pairs, n_bytes, sensitivity.predicted(pairs), repaired))
    return found


def check_room(budgets: Sequence[Budget], smallest: int, shapes: Sequence[KVShape]) -> None:
    """Raises: InputError for a budget below ``smallest``, bytes a token."""
    n_values = sum(s.n_values for s in shapes)
    for budget in budgets:
        if budget.n_bytes < smallest:
            raise InputError(
                f"Budget {budget.name} is too small: the smallest formats that are open take "
                f"{8 * smallest / n_values:.3f} bits per value."
            )


def neighbours(pairs: Pairs, shapes: Sequence[KVShape], formats: Sequence[str]) -> list[Change]:
    """Every slot of an assignment in the next smaller and the next larger format."""
    sizes = row_sizes(shapes, formats)
    changes = []
    for layer, pair in enumerate(pairs):
        for part, name in enumerate(pair):
            order = [formats[int(i)] for i in np.argsort(sizes[layer, part], kind="stable")]
            at = order.index(name)
            near = order[max(0, at - 1) : at] + order[at + 1 : at + 2]
            changes += [Change(layer, part, other) for other in near]
    return changes


def refine(
    model: nn.Module,
    windows: np.ndarray,
    assigned: Assigned,
    shapes: Sequence[KVShape],
    formats: Sequence[str],
    **options: Any,
) -> Assigned:
    """The best assignment within one step of another, by costs measured around that one.

    Args:
        options: those of `sensitivity.measure`.

    Shapes: windows [n_windows, n_ctx].
    """
    changes = neighbours(assigned.pairs, shapes, formats)
    around = measure(model, windows, assigned.pairs, changes, **options)
    return solve(around, shapes, formats, [assigned.budget])[0]


def calibrate(
    model: nn.Module,
    windows: np.ndarray,
    budgets: Sequence[str | float] = BUDGETS,
    formats: Sequence[str] = FORMATS,
    base: str = "f16/f16",
    **options: Any,
) -> tuple[Sensitivity, list[Assigned]]:
    """Measure a model's sensitivities and assign formats within each budget.

    Args:
        budgets: bits per value of K and V together, or configurations whose bits are meant.
        formats: what K and V of every layer may get.
        base: the configuration of the layers that are not changed while one is.
        options: those of `sensitivity.measure`: backend, centre, batch, protection, records and
            progress.

    Shapes: windows [n_windows, n_ctx], as `cut_windows` makes them.
    Raises: InputError for a value of another kind, bad budgets or formats, and as
        `sensitivity.measure`.
    """
    check_model(model)
    WINDOWS("windows", windows)
    BUDGET_LIST("budgets", budgets)
    FORMAT_LIST("formats", formats)
    STRING("base", base)
    shapes = shapes_of(model)
    formats = check_formats(formats)
    limits = [as_budget(model, shapes, str(budget)) for budget in budgets]
    pairs = prepare(model, base, options.get("backend")).layers
    found = measure(model, windows, pairs, all_changes(pairs, formats), **options)
    return found, solve(found, shapes, formats, limits)
