"""Assign a format to each slot at the least summed cost within a budget.

A slot is K or V of one layer, a choice one of its formats. The problem is the multiple-choice
knapsack; dynamic programming over the bytes solves it exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import InputError


def assign(costs: np.ndarray, sizes: np.ndarray, budgets: Sequence[int]) -> list[np.ndarray]:
    """The assignment of least summed cost within each budget.

    Of assignments that cost the same, one of the fewest bytes is taken.

    Args:
        costs: cost of each choice; infinite where a choice is not open to the slot.
        sizes: bytes of each choice, whole numbers.
        budgets: bytes that all slots may take together.

    Shapes:
        costs, sizes: [n_slots, n_choices]; each answer: [n_slots] indices of choices.

    Raises:
        InputError: a budget is below the smallest assignment.
        ValueError: the shapes differ, a cost is NaN, or a slot has no choice.
    """
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes, np.int64)
    if costs.ndim != 2 or costs.shape != sizes.shape:
        raise ValueError(f"costs {costs.shape} and sizes {sizes.shape} must be one 2-D shape")
    is_open = costs < np.inf
    if np.isnan(costs).any() or not is_open.any(axis=1).all():
        raise ValueError("every slot needs a choice whose cost is a number")
    smallest = np.where(is_open, sizes, np.iinfo(np.int64).max).min(axis=1)
    least = int(smallest.sum())
    for budget in budgets:
        if budget < least:
            raise InputError(
                f"A budget of {budget} bytes a token is too small: the smallest formats take "
                f"{least}."
            )
    if not len(budgets):
        return []
    # What a choice takes above its slot's smallest, in the largest unit that divides them all.
    above = np.where(is_open, sizes - smallest[:, None], 0)
    unit = int(np.gcd.reduce(above.ravel())) or 1
    above //= unit
    most = int(above.max(axis=1).sum())
    rooms = [min((int(budget) - least) // unit, most) for budget in budgets]
    best, chosen = _tables(costs, above, max(rooms))
    return [_trace(chosen, above, int(np.argmin(best[: room + 1]))) for room in rooms]


def _tables(costs: np.ndarray, above: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Least cost for each number of units used, [room + 1], and the choice of each slot."""
    best = np.full(room + 1, np.inf)
    best[0] = 0
    chosen = np.zeros((len(costs), room + 1), np.uint8)
    for slot, (slot_costs, slot_above) in enumerate(zip(costs, above)):
        after = np.full(room + 1, np.inf)
        for choice, (cost, units) in enumerate(zip(slot_costs, slot_above)):
            if units > room or cost == np.inf:
                continue
            candidate = best[: room + 1 - units] + cost
            better = candidate < after[units:]
            after[units:][better] = candidate[better]
            chosen[slot, units:][better] = choice
        best = after
    return best, chosen


def _trace(chosen: np.ndarray, above: np.ndarray, used: int) -> np.ndarray:
    """The choices that lead to `used` units."""
    choices = np.zeros(len(chosen), np.int64)
    for slot in range(len(chosen) - 1, -1, -1):
        choices[slot] = chosen[slot, used]
        used -= above[slot, choices[slot]]
    return choices


def monotone(costs: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The nearest costs, by squares, that never rise with the size (isotonic regression).

    More bits cannot hurt in expectation, but a measurement of few windows may say so. Choices of
    one size are put at one cost; a slot whose costs fall with the size is left as it is, and so is
    an infinite cost.

    Shapes:
        costs, sizes: [n_slots, n_choices]; returns [n_slots, n_choices].
    """
    costs, sizes = np.asarray(costs, np.float64), np.asarray(sizes)
    repaired = costs.copy()
    for slot, (row, widths) in enumerate(zip(costs, sizes)):
        blocks: list[list] = []  # [sum, choices], by falling size: their means must rise
        is_open = row < np.inf
        for width in sorted(set(widths[is_open].tolist()), reverse=True):
            choices = np.flatnonzero((widths == width) & is_open).tolist()
            blocks.append([sum(row[i] for i in choices), choices])
            while len(blocks) > 1 and _mean(blocks[-1]) < _mean(blocks[-2]):
                total, choices = blocks.pop()
                blocks[-1] = [blocks[-1][0] + total, blocks[-1][1] + choices]
        for block in blocks:
            repaired[slot, block[1]] = _mean(block)
    return repaired


def _mean(block: list) -> float:
    return block[0] / len(block[1])
