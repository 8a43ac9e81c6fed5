"""What to type, in one sentence: the outcome of a plan."""

from __future__ import annotations

from ..evaluate.tables import bytes_text
from ..policy.settings import DEFAULT, SETTINGS
from .plan import Plan, Row

_MOST_NAMES = 3


def verdict(plan: Plan) -> str | None:
    """A sentence on the longest of a plan's contexts; None without a memory.

    It takes the first row that fits, names the rows that don't, and says where the model was made
    for fewer tokens.
    """
    free = plan.free_bytes()
    if free is None or not plan.contexts or not plan.rows:
        return None
    n = max(plan.contexts)
    found = chosen(plan)
    if found is not None:
        said = _takes(plan, found, n)
        if refused := [row.name for row in plan.rows if not plan.fits(row, n)]:
            said += f"; {_names(refused)} {'do' if len(refused) > 1 else 'does'} not fit"
    elif free <= plan.scratch(1):
        said = (
            f"{plan.model.name} does not fit: its weights take {bytes_text(plan.weight_bytes or 0)}"
            f", more than {_limit(plan)}"
        )
    else:
        said = _nothing_fits(plan, n)
    return f"{said}{_context(plan, n)}."


def chosen(plan: Plan) -> Row | None:
    """The first row that fits the longest context."""
    n = max(plan.contexts)
    return next((row for row in plan.rows if plan.fits(row, n)), None)


def _takes(plan: Plan, row: Row, n: int) -> str:
    parts = {
        "weights": plan.weight_bytes,
        "cache": row.bytes_at[n],
        "reading the prompt": plan.scratch(n),
    }
    known = {name: size for name, size in parts.items() if size}
    listed = ", ".join(f"{name} {bytes_text(size)}" for name, size in known.items())
    default = " (the default: nothing to type)" if row.policy == SETTINGS[DEFAULT] else ""
    return (
        f"Type {row.typed or row.name}{default}: with {n:,} tokens {plan.model.name} takes "
        f"{bytes_text(sum(known.values()))} of {_limit(plan)} ({listed})"
    )


def _nothing_fits(plan: Plan, n: int) -> str:
    row = min(plan.rows, key=lambda row: row.bytes_at[n])
    needed = (plan.weight_bytes or 0) + row.bytes_at[n] + plan.scratch(n)
    best = max(plan.rows, key=lambda row: row.max_tokens or 0)
    fitting = f"; {best.max_tokens:,} tokens fit with {best.typed or best.name}"
    return (
        f"{n:,} tokens of {plan.model.name} do not fit: {row.name}, the smallest, takes "
        f"{bytes_text(needed)}, more than {_limit(plan)}{fitting if best.max_tokens else ''}"
    )


def _limit(plan: Plan) -> str:
    said = f"the {bytes_text(plan.memory_bytes or 0)} that the GPU may use"
    if plan.machine_bytes is not None and plan.machine_bytes != plan.memory_bytes:
        said += f" of {bytes_text(plan.machine_bytes)}"
    return said


def _names(names: list[str]) -> str:
    shown = names[:_MOST_NAMES]
    if len(names) > _MOST_NAMES:
        return f"{', '.join(shown)} and {len(names) - _MOST_NAMES} more"
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else shown[0]


def _context(plan: Plan, n: int) -> str:
    most = plan.model.max_context
    return f"; the model was made for {most:,} tokens" if most and n > most else ""
