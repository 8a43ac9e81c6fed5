"""How bench_kernels.py times a call: chains of calls, submitted in steps as generation does."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import mean, median
from typing import Any, NamedTuple

import kernel_variants as variants
import mlx.core as mx

STEP_CALLS = 32
# the timed steps of a chain take about so long, within so many steps
CHAIN_SECONDS, FEWEST_STEPS, MOST_STEPS = 8e-3, 3, 16
COPY_BYTES, COPIES, COPY_STEPS = 2**30, 10, 5


class Times(NamedTuple):
    """Seconds of one call of a chain: until it is done, to build its graph, to submit it."""

    done: float
    built: float
    submitted: float


def run_steps(ends: list[Any]) -> tuple[list[float], float]:
    """Submit steps as mlx-lm's generation does: the next one, then wait for the last one.

    The first step runs alone, and nothing is submitted while the last one runs, so times are of the
    steps between: n steps give n - 2.

    Args:
        ends: results of each step, arrays or trees of them, not evaluated; emptied on the way, so
            that no result is held longer than needed.

    Returns: seconds of each step but the first and the last, and the CPU time that submitting
        took of this thread, of all steps together. Waiting is not in it.
    """
    cpu_time, done = 0.0, []
    for i, end in enumerate(ends):
        start = time.thread_time()
        mx.async_eval(end)
        cpu_time += time.thread_time() - start
        if i > 0:
            mx.eval(ends[i - 1])
            done.append(time.perf_counter())
            ends[i - 1] = None
    mx.eval(ends.pop())
    return [after - before for before, after in pairwise(done)], cpu_time


def chain_of(
    variant: variants.Variant, starts: list[Any], n_steps: int, chained: bool
) -> list[Any]:
    """What each step of a chain ends in, not evaluated: its last call's result, or all of them.

    Args:
        starts: what calls get for a last result: one for all steps, or one for each.
        chained: whether a call gets the last one's result; if not, all get the start.
    """
    ends, last = [], None
    for step in range(n_steps):
        if step < len(starts):
            last = starts[step]
        results = []
        for i in range(step * STEP_CALLS, (step + 1) * STEP_CALLS):
            results.append(variant.call(i, last))
            if chained:
                last = results.pop()
        ends.append(last if chained else results)
    return ends


def timed(variant: variants.Variant, n_steps: int, chained: bool) -> Times:
    """Times of a chain of ``n_steps`` timed steps, between a first and a last one."""
    n_steps += 2
    n_calls = n_steps * STEP_CALLS
    starts = [variant.start() for _ in range(n_steps if variant.in_place else 1)]
    mx.eval(starts)
    begin = time.perf_counter()
    ends = chain_of(variant, starts, n_steps, chained)
    built = time.perf_counter() - begin
    del starts
    steps, submitted = run_steps(ends)
    return Times(mean(steps) / STEP_CALLS, built / n_calls, submitted / n_calls)


def steps_of(variant: variants.Variant) -> int:
    """How many timed steps make a chain of CHAIN_SECONDS; compiles what is not compiled yet."""
    timed(variant, 1, variant.chained)
    seconds = STEP_CALLS * timed(variant, FEWEST_STEPS, variant.chained).done
    return max(FEWEST_STEPS, min(MOST_STEPS, round(CHAIN_SECONDS / seconds)))


def copy_speeds() -> dict[str, float]:
    """Bytes a second, read and written, of ways to copy a large array on this device.

    Each copy reads the last one's result; they are submitted as calls are.
    """
    found = {}
    for name, dtype in (("uint8", mx.uint8), ("uint32", mx.uint32), ("float32", mx.float32)):
        x, one = mx.zeros((COPY_BYTES // dtype.size,), dtype), mx.array(1, dtype)
        mx.eval(x, one)
        n_bytes, ends = 2 * COPIES * x.nbytes, []
        for _ in range(COPY_STEPS + 2):
            for _ in range(COPIES):
                x = x + one
            ends.append(x)
        del x
        found[f"{name} + 1"] = n_bytes / median(run_steps(ends)[0])
        mx.clear_cache()
    return found
