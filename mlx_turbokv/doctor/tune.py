"""``mlx_turbokv doctor --tune``: finds the tuning of decode that is fastest on this machine.

A search by coordinates: each number of the tuning is tried with the others as they are, candidate
and best in turns, and kept where it is faster. A candidate's kernels pass their self-check before
they are timed, or it is refused.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import cycle
from statistics import median
from typing import Any

import mlx.core as mx

from ..evaluate.record import command_line, environment
from ..kernels import decode, trust, tuned, tuning
from ..kernels.backend import select_backend
from ..kernels.packed import PackedKV, empty_tiles
from ..kernels.trust import UntrustedKernelError
from ..kernels.tuned import Range, Shape
from ..kernels.tuning import Tuning
from ..quant.layout import KVLayout
from .timing import copies, noise

# tokens that are timed, and the most that the tuning found there is for
POINTS = ((2048, 4096), (8192, 16384), (32768, 2**31 - 1))
# what is tried of each number, those that change most first; others are left out
CANDIDATES: dict[str, tuple] = {
    "most_rows": (1, 2, 4, 8, 16),
    "wide_head": (64, 128, 256, 512),
    "step": (1, 2),
    "simd_groups": (4, 8),
    "prefetch": (False, True),
    "half2": (False, True),
    "key_columns": (32, 64),
    "lut_words": (1024, 2048, 4096),
    "threadgroups_per_core": (1, 2, 3, 4, 6, 8),
    "whole_tiles": (16, 32, 64, 128),
    "whole_rows": (0, 16, 32, 64, 128),
    "min_split_tiles": (2, 4, 8),
}
# a candidate is kept where it takes less than this of the best one's time
GAIN = 0.98
ROUNDS, LAST_ROUNDS, MOST_PASSES = 5, 15, 3
CHAIN_SECONDS, FEWEST_CALLS, MOST_CALLS = 4e-3, 4, 64
Compare = Callable[[Tuning, Tuning, int], tuple[float, float]]


@dataclass
class Found:
    """The search at one number of tokens.

    Args:
        best: the fastest tuning, and built_in where nothing is faster.
        before_us, after_us: microseconds of a call with the built-in tuning and with the best.
        tried: candidates that were timed.
        refused: candidates whose kernels failed their self-check, and why.
        not_tried: candidates that were left at the time limit.
    """

    tokens: int
    most_tokens: int
    best: Tuning
    before_us: float = 0.0
    after_us: float = 0.0
    tried: int = 0
    refused: list[str] = field(default_factory=list)
    not_tried: int = 0


class Timed:
    """Times of decode with two tunings in turns, over rows of noise.

    Args:
        heads: query heads, KV heads.
    """

    def __init__(self, layout: KVLayout, heads: tuple[int, int], tokens: int, backend: str):
        dtype, self.backend = getattr(mx, layout.dtype), backend
        self.layout, self.n_kv_heads, self.tokens = layout, heads[1], tokens
        dims = layout.k_head_dim, layout.v_head_dim
        keys, values = (noise((1, heads[1], tokens, dim), dtype) for dim in dims)
        self.queries = noise((1, heads[0], 1, dims[0]), dtype)
        self.chained, self.scale = dims[0] == dims[1], dims[0] ** -0.5
        tiles = select_backend(backend).pack(keys, values, layout)
        mx.eval(tiles)
        packed = PackedKV(layout, tiles, tokens, empty_tiles(), 0)
        self.turns = cycle([packed._replace(body=body) for (body,) in copies(MOST_CALLS, tiles)])
        self.n_calls = FEWEST_CALLS

    def launch(self, cut: Tuning) -> tuple:
        """What a tuning makes of a call: two that make the same need not be compared."""
        n_rows = self.queries.shape[1] // self.n_kv_heads
        widest = max(self.layout.k_head_dim, self.layout.v_head_dim)
        rows, splits = tuning.rows_and_splits(
            cut, self.backend, n_rows, widest, self.n_kv_heads, self.tokens
        )
        own = replace(cut, most_rows=0, wide_head=0, threadgroups_per_core=0, min_split_tiles=0,
                      whole_tiles=0, whole_rows=0)  # fmt: skip
        return rows, splits, own

    def __call__(self, one: Tuning, other: Tuning, rounds: int) -> tuple[float, float]:
        """Median seconds of a call with each tuning.

        Raises:
            UntrustedKernelError: a kernel of one of them fails its self-check.
        """
        for cut in (one, other):
            self._seconds(cut)  # compiles
        self.n_calls = FEWEST_CALLS
        self.n_calls = int(max(FEWEST_CALLS, min(MOST_CALLS, CHAIN_SECONDS / self._seconds(one))))
        times: tuple[list[float], list[float]] = [], []
        for i in range(rounds):
            for j in (0, 1) if i % 2 else (1, 0):
                times[j].append(self._seconds((one, other)[j]))
        return median(times[0]), median(times[1])

    def _seconds(self, cut: Tuning) -> float:
        start, queries, ends = time.perf_counter(), self.queries, []
        for _ in range(self.n_calls):
            output = decode.decode(
                queries, next(self.turns), self.scale, backend=self.backend, cut=cut
            )
            ends.append(output)
            queries = output if self.chained else queries
        mx.eval(ends[-1] if self.chained else ends)
        return (time.perf_counter() - start) / self.n_calls


def search(
    start: Tuning, compare: Compare, found: Found, deadline: float, say: Callable[[str], None]
) -> None:
    """Look for a tuning that is faster than ``start``; ``found`` gets the best and what was tried.

    Passes over all numbers, until one changes nothing, at most MOST_PASSES, or the time is up.
    """
    launch = getattr(compare, "launch", lambda cut: cut)
    best, seen, refused = start, {launch(start)}, set()
    for _ in range(MOST_PASSES):
        before = best
        for name, value in _choices():
            candidate = replace(best, **{name: value})
            if launch(candidate) in seen or (name, value) in refused:
                continue
            if time.perf_counter() > deadline:
                found.not_tried += 1
                continue
            seen.add(launch(candidate))
            what = changes(best, candidate)
            try:
                base, seconds = compare(best, candidate, ROUNDS)
            except UntrustedKernelError as error:
                refused.add((name, value))
                found.refused.append(f"{what}: {error}")
                say(f"{what}: refused, it fails its check")
                continue
            found.tried += 1
            say(f"{what}: {seconds * 1e6:.1f} us, best {base * 1e6:.1f}")
            if seconds < GAIN * base:
                best = candidate
        if best == before or time.perf_counter() > deadline:
            break
    base, seconds = compare(start, best, LAST_ROUNDS)
    if not seconds < GAIN * base:
        best, seconds = start, base
    found.best, found.before_us, found.after_us = best, 1e6 * base, 1e6 * seconds


def _choices() -> Iterator[tuple[str, Any]]:
    """A number of the tuning, and a value to try."""
    names = {f.name for f in fields(Tuning)}
    for name, values in CANDIDATES.items():
        for value in values if name in names else ():
            yield name, value


def changes(before: Tuning, after: Tuning) -> str:
    """The numbers that differ, in words."""
    new, old = asdict(after), asdict(before)
    found = [f"{name} {old[name]} to {value}" for name, value in new.items() if value != old[name]]
    return ", ".join(found) or "as built in"


def tune(
    shapes: Sequence[tuple[KVLayout, tuple[int, int]]],
    backend: str,
    seconds: float,
    progress: Callable[[str], None] = lambda line: None,
    timed: Callable[[KVLayout, tuple[int, int], int, str], Compare] = Timed,
) -> dict:
    """Find the best tunings and remember them; returns the record that ``as_markdown`` formats.

    Args:
        shapes: layouts, each with its query heads and KV heads.
        seconds: about when to end; each search gets its share.
        timed: makes what compares two tunings on a layout, heads and tokens.

    Raises:
        OSError: the cache folder cannot be written.
        UntrustedKernelError: the built-in tuning's kernels fail their self-check.
    """
    end = time.perf_counter() + seconds
    left = len(shapes) * len(POINTS)
    start, rows, path = tuning.built_in(backend), [], None
    with trust.checked():
        for layout, heads in shapes:
            shape, ranges = Shape.of(layout, heads[0] // heads[1]), []
            for tokens, most_tokens in POINTS:
                deadline = time.perf_counter() + (end - time.perf_counter()) / left
                found = Found(tokens, most_tokens, start)
                name = f"{shape}, {tokens:,} tokens"
                search(start, timed(layout, heads, tokens, backend), found, deadline,
                       lambda line, name=name: progress(f"{name}: {line}"))  # fmt: skip
                ranges.append(Range(most_tokens, found.best))
                rows.append(_row(shape, heads, start, found))
                left -= 1
                mx.clear_cache()
            better = any(r.cut != start for r in ranges)
            path = tuned.store(backend, shape, ranges if better else ())
    return {
        "command": command_line(), **environment(), "backend": backend, "built_in": asdict(start),
        "file": path and path.name, "rows": rows,
    }  # fmt: skip


def _row(shape: Shape, heads: tuple[int, int], start: Tuning, found: Found) -> dict:
    return {
        "shape": str(shape), "heads": list(heads), "tokens": found.tokens,
        "most_tokens": found.most_tokens, "before_us": round(found.before_us, 2),
        "after_us": round(found.after_us, 2), "changes": changes(start, found.best),
        "tuning": asdict(found.best), "tried": found.tried, "refused": found.refused,
        "not_tried": found.not_tried,
    }  # fmt: skip


def as_markdown(record: dict[str, Any]) -> str:
    """A record of ``tune`` as Markdown."""
    from ..evaluate.tables import Table

    rows = [
        [r["shape"], f"{r['tokens']:,}", f"{r['before_us']:.1f}", f"{r['after_us']:.1f}",
         f"{r['before_us'] / r['after_us']:.2f}", r["changes"]]
        for r in record["rows"]
    ]  # fmt: skip
    head = ["shape", "tokens", "µs before", "µs after", "×", "changed"]
    tried, missing = (sum(r[key] for r in record["rows"]) for key in ("tried", "not_tried"))
    refused = [line for r in record["rows"] for line in r["refused"]]
    parts = [
        "### mlx_turbokv doctor --tune",
        f"{record['device']}, mlx {record['mlx']}, mlx_turbokv {record['mlx_turbokv']}, back-end "
        f"{record['backend']}; one query, `{record['command']}`",
        Table(head, rows, left=(0, 5)).markdown(),
        f"{tried} candidates were timed, {len(refused)} failed their self-check"
        + (f", and {missing} were left at the time limit." if missing else "."),
        *([f"- {line}" for line in refused]),
        f"Remembered in `{record['file']}` in the cache folder and used from now on; without that "
        "file, or with another version, the built-in tuning is used.",
    ]
    return "\n\n".join(parts)
