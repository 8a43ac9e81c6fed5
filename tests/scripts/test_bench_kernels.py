"""The kernel benchmark: what it compares, how it is timed, and that a wrong result is found."""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parents[2]

import bench_kernels as bench  # noqa: E402
import kernel_variants as variants  # noqa: E402
from pages import kernels as pages  # noqa: E402

from mlx_turbokv.kernels.backend import REFERENCE  # noqa: E402

CUDA = REFERENCE._replace(name="cuda")  # nothing is run on it here


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(variants, "ROTATED_BYTES", 1)
    monkeypatch.setattr(bench, "CHAIN_SECONDS", 1e-6)
    monkeypatch.setattr(bench, "STEP_CALLS", 2)


def names(part: str, lengths=bench.LENGTHS) -> list[tuple]:
    parts = [part, "rows"]
    found = bench.groups(parts, bench.PAIRS, lengths, CUDA)
    return [(g.heads, g.head_dim, g.tokens, name) for g in found for name in g.make]


def test_every_length_pair_and_shape_is_compared_with_fp16() -> None:
    at = (bench.HEADS, 128)
    for n, pair in product((2048, 8192, 32768, 131072), ("q8_0/turbo2", "turbo4/turbo3")):
        assert (*at, n, pair) in names("lengths") and (*at, n, f"{pair} rows") in names("lengths")
    for k, v in product(("q8_0", "turbo6", "turbo4", "turbo3"), ("turbo4", "turbo3", "turbo2")):
        assert (*at, 131072, f"{k}/{v}") in names("pairs")
    for shape in (((28, 4), 128), ((40, 10), 128), ((9, 3), 64), ((16, 8), 256)):
        for name in ("fp16", "q8_0/turbo2", "turbo4/turbo3"):
            assert (*shape, 131072, name) in names("shapes")
    assert (*at, 32768, "turbo4/turbo3 centred") in names("centred")
    assert {n for *_, n in names("kv_bits")} >= {"fp16", "kv_bits8", "kv_bits4"}


def test_rows_say_what_was_read_and_how_wrong_it_was() -> None:
    (group,) = bench.groups(["lengths"], ["turbo4/turbo3"], [64], REFERENCE)
    fp16, packed = bench.bench(group, 1, True, 1e9)
    assert fp16["fp16_over_this"] == 1 and fp16["bytes"] == 64 * 8 * 128 * 4
    assert packed["bytes"] == 64 * 8 * 116  # 4.125 and 3.125 bits a value
    assert packed["us"] > 0 and packed["apart_us"] > 0 and packed["submit_us"] > 0
    assert packed["steps"] == bench.FEWEST_STEPS
    assert 0 < packed["error"] <= packed["error_allowed"]


@pytest.mark.parametrize(
    "make", [variants.packed_attention, variants.pack_chunk, variants.pack_token]
)
def test_a_result_that_is_a_percent_off_is_found(make) -> None:
    def off(x, *rest, **options):
        return REFERENCE.pack(x * mx.array(1.01, x.dtype), *rest, **options)

    broken = REFERENCE._replace(pack=off)
    if make is variants.packed_attention:
        broken = REFERENCE._replace(attention=lambda *args: REFERENCE.attention(*args) * 1.01)
    inputs = variants.noise((4, 2), 128, 1 if make is variants.pack_token else 32)
    for backend, good in ((REFERENCE, True), (broken, False)):
        error, allowed = make("turbo4/turbo3", inputs, backend).check()
        assert (error <= allowed) is good


class Device:
    """Takes steps as a GPU does, with its own clock: one runs while the next is encoded.

    Args:
        encoding, running: seconds that a step takes of the CPU, then of the device.
        first: seconds that the first step takes of the device in addition.
    """

    def __init__(self, monkeypatch, encoding: float, running: float, first: float):
        self.now = self.busy_until = 0.0
        self.encoding, self.running, self.first = encoding, running, first
        self.ends: dict[int, float] = {}
        self.log: list[tuple[str, int]] = []
        monkeypatch.setattr(mx, "async_eval", self.submit)
        monkeypatch.setattr(mx, "eval", self.wait)
        clock = SimpleNamespace(perf_counter=lambda: self.now, thread_time=lambda: self.now)
        monkeypatch.setattr(bench, "time", clock)

    def submit(self, step: int) -> None:
        self.log.append(("submit", step))
        self.now += self.encoding
        self.busy_until = max(self.now, self.busy_until) + self.running + self.first
        self.first, self.ends[step] = 0.0, self.busy_until

    def wait(self, step: int) -> None:
        self.log.append(("wait", step))
        self.now = max(self.now, self.ends[step])


@pytest.mark.parametrize("encoding, running, step", [(1, 5, 5), (7, 5, 7), (5, 5, 5)])
def test_steps_take_the_longer_of_encoding_and_running(monkeypatch, encoding, running, step):
    Device(monkeypatch, encoding, running, first=100)
    times, cpu_time = bench.run_steps(list(range(6)))
    assert times == [step] * 4
    assert cpu_time == 6 * encoding


def test_a_step_is_submitted_before_the_last_one_is_waited_for(monkeypatch):
    device = Device(monkeypatch, 1, 5, 0)
    bench.run_steps([0, 1, 2])
    submit, wait = "submit", "wait"
    assert device.log == [(submit, 0), (submit, 1), (wait, 0), (submit, 2), (wait, 1), (wait, 2)]


def counting(**options) -> tuple[variants.Variant, list[tuple[int, mx.array]]]:
    """A call that adds one, and what it was called with."""
    called = []

    def call(i: int, last: mx.array) -> mx.array:
        called.append((i, last))
        return last + 1

    return variants.Variant(call, lambda: mx.zeros(()), 4, **options), called


@pytest.mark.parametrize("in_place", [False, True])
def test_calls_follow_one_another_across_steps_and_are_all_made_once(monkeypatch, in_place):
    variant, called = counting(in_place=in_place)
    ends, run = [], bench.run_steps
    monkeypatch.setattr(bench, "run_steps", lambda steps: run([ends.append(x) or x for x in steps]))
    bench.timed(variant, 2, chained=True)
    assert [i for i, _ in called] == list(
        range(8)
    )  # two steps of two calls, and one step on each side
    assert [x.item() for _, x in called] == [0, 1] * 4 if in_place else list(range(8))
    assert [x.item() for x in ends] == ([2] * 4 if in_place else [2, 4, 6, 8])


def test_calls_apart_all_get_the_start_and_a_step_ends_in_all_of_them(monkeypatch):
    variant, called = counting()
    ends, run = [], bench.run_steps
    monkeypatch.setattr(bench, "run_steps", lambda steps: run([ends.append(x) or x for x in steps]))
    bench.timed(variant, 1, chained=False)
    assert [i for i, _ in called] == list(range(6)) and all(x is called[0][1] for _, x in called)
    assert [[x.item() for x in end] for end in ends] == [[1, 1]] * 3


def test_what_is_written_in_place_is_not_copied_and_ends_each_step(monkeypatch) -> None:
    variant = variants.fp16_append(variants.noise((8, 8), 128, 512))
    sides, peaks, run = [], [], bench.run_steps

    def watched(ends: list) -> tuple[list[float], float]:
        sides.extend(side for end in ends for side in end)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = run(ends)
        peaks.append(mx.get_peak_memory() - before)
        return found

    monkeypatch.setattr(bench, "run_steps", watched)
    bench.timed(variant, 3, chained=True)
    assert len({id(side) for side in sides}) == 5 * 2  # keys and values of five steps
    assert peaks[0] < 2**20  # a side is 4 MiB


def test_a_run_s_record_makes_the_pages(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bench, "COPY_BYTES", 2**12)
    monkeypatch.setattr(bench, "HEADS", (4, 2))
    out = tmp_path / "run.json"
    command = [
        "bench",
        "--backend",
        "reference",
        "--lengths",
        "64",
        "--rounds",
        "1",
        "--out",
        str(out),
    ]
    monkeypatch.setattr(
        sys, "argv", [*command, "--parts", "lengths,kv_bits", "--pairs", "turbo4/turbo3"]
    )
    assert bench.main() == 0
    record = json.loads(out.read_text())
    assert record["calls_a_step"] == 2 and record["processor"]
    monkeypatch.setattr(pages, "read", lambda name: record)
    assert "steps of 2 calls" in pages.kernels()
    assert "kv_bits=4" in pages.kv_bits()
