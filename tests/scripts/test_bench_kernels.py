"""The kernel benchmark: what it compares, how it is timed, and that a wrong result is found."""

from __future__ import annotations

import json
import shutil
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import mlx_turbokv

# isort: split
import mlx.core as mx
import pytest

ROOT = Path(__file__).resolve().parents[2]

import bench_groups as groups_of  # noqa: E402
import bench_kernels as bench  # noqa: E402
import bench_sides as sides  # noqa: E402
import bench_timing as timing  # noqa: E402
import kernel_variants as variants  # noqa: E402
from pages import kernels as pages  # noqa: E402

from mlx_turbokv.kernels import reference  # noqa: E402
from mlx_turbokv.kernels.backend import REFERENCE  # noqa: E402

CUDA = REFERENCE._replace(name="cuda")  # nothing is run on it here


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(variants, "ROTATED_BYTES", 1)
    monkeypatch.setattr(timing, "CHAIN_SECONDS", 1e-6)
    monkeypatch.setattr(timing, "STEP_CALLS", 2)


def names(part: str, lengths=groups_of.LENGTHS) -> list[tuple]:
    parts = [part, "rows"]
    found = groups_of.groups(parts, groups_of.PAIRS, lengths, CUDA)
    return [(g.heads, g.head_dim, g.tokens, name) for g in found for name in g.make]


def test_every_length_pair_and_shape_is_compared_with_fp16() -> None:
    at = (groups_of.HEADS, 128)
    for n, pair in product((2048, 8192, 32768, 131072), ("q8_0/turbo2", "turbo4/turbo3")):
        assert (*at, n, pair) in names("lengths") and (*at, n, f"{pair} rows") in names("lengths")
    for k, v in product(("q8_0", "turbo6", "turbo4", "turbo3"), ("turbo4", "turbo3", "turbo2")):
        assert (*at, 131072, f"{k}/{v}") in names("pairs")
    for shape in (((28, 4), 128), ((40, 10), 128), ((9, 3), 64), ((16, 8), 256)):
        for name in ("fp16", "q8_0/turbo2", "turbo4/turbo3"):
            assert (*shape, 131072, name) in names("shapes")
    assert (*at, 32768, "turbo4/turbo3 centred") in names("centred")
    assert {n for *_, n in names("kv_bits")} >= {"fp16", "kv_bits8", "kv_bits4"}


def test_batches_and_several_queries_are_compared_with_fp16() -> None:
    def shapes(part: str) -> set[tuple]:
        found = groups_of.groups([part], groups_of.PAIRS, groups_of.LENGTHS, CUDA)
        return {(g.heads, g.tokens, g.batch, g.queries) for g in found if len(g.make) == 3}

    batches = {((32, 8), 8192, batch, 1) for batch in (1, 4, 8, 16)}
    assert shapes("batches") == {*batches, ((40, 8), 8192, 8, 1)}
    assert shapes("queries") == {((32, 8), 32768, 1, n) for n in (2, 4, 8)}


@pytest.mark.parametrize(("part", "index"), [("batches", 1), ("queries", 1)])
def test_batches_and_several_queries_are_checked(part, index, monkeypatch) -> None:
    monkeypatch.setattr(groups_of, "HEADS", (4, 2))
    monkeypatch.setattr(groups_of, "BATCHES", (((4, 2), 1), ((4, 2), 3)))
    wanted = list(groups_of.groups([part], ["turbo4/turbo3"], [64], REFERENCE))
    _, packed = bench.bench(sides.Here(wanted), index, 1, True, 1e9)
    group = wanted[index]
    assert (packed["batch"], packed["queries"]) == (group.batch, group.queries)
    assert packed["bytes"] == group.batch * 64 * 2 * 116
    assert 0 < packed["error"] <= packed["error_allowed"]


@pytest.mark.parametrize("shape", [(1, 4), (3, 1)])
def test_a_wrong_mask_or_sequence_is_found(shape) -> None:
    def wrong(queries, packed, scale, mask=None, *rest):
        turned = packed._replace(body=packed.body[::-1])
        return REFERENCE.attention(queries, turned, scale, None, *rest)

    inputs = variants.noise((4, 2), 128, 64, *shape)
    for backend, good in ((REFERENCE, True), (REFERENCE._replace(attention=wrong), False)):
        error, allowed = variants.packed_attention("turbo4/turbo3", inputs, backend).check()
        assert (error <= allowed) is good


@pytest.mark.parametrize("n_queries", [1, 4])
def test_dequantising_first_gives_the_same(n_queries) -> None:
    def rows(packed, dtype, first, count):
        found = reference._rotated(packed.tiles[:, first : first + count], packed, first)
        return [side.astype(dtype) for side in found]

    backend = CUDA._replace(decode=REFERENCE.attention, rotated_rows=rows)
    inputs = variants.noise((4, 2), 128, 64, 1, n_queries)
    error, allowed = variants.packed_attention("q8_0/turbo2", inputs, backend, "rows").check()
    assert error <= allowed


def test_rows_say_what_was_read_and_how_wrong_it_was() -> None:
    wanted = list(groups_of.groups(["lengths"], ["turbo4/turbo3"], [64], REFERENCE))
    fp16, packed = bench.bench(sides.Here(wanted), 0, 1, True, 1e9)
    assert fp16["fp16_over_this"] == 1 and fp16["bytes"] == 64 * 8 * 128 * 4
    assert packed["bytes"] == 64 * 8 * 116  # 4.125 and 3.125 bits a value
    assert packed["us"] > 0 and packed["apart_us"] > 0 and packed["submit_us"] > 0
    assert packed["steps"] == timing.FEWEST_STEPS
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
        monkeypatch.setattr(timing, "time", clock)

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
    times, cpu_time = timing.run_steps(list(range(6)))
    assert times == [step] * 4
    assert cpu_time == 6 * encoding


def test_a_step_is_submitted_before_the_last_one_is_waited_for(monkeypatch):
    device = Device(monkeypatch, 1, 5, 0)
    timing.run_steps([0, 1, 2])
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
    ends, run = [], timing.run_steps
    monkeypatch.setattr(
        timing, "run_steps", lambda steps: run([ends.append(x) or x for x in steps])
    )
    timing.timed(variant, 2, chained=True)
    assert [i for i, _ in called] == list(
        range(8)
    )  # two steps of two calls, and one step on each side
    assert [x.item() for _, x in called] == [0, 1] * 4 if in_place else list(range(8))
    assert [x.item() for x in ends] == ([2] * 4 if in_place else [2, 4, 6, 8])


def test_calls_apart_all_get_the_start_and_a_step_ends_in_all_of_them(monkeypatch):
    variant, called = counting()
    ends, run = [], timing.run_steps
    monkeypatch.setattr(
        timing, "run_steps", lambda steps: run([ends.append(x) or x for x in steps])
    )
    timing.timed(variant, 1, chained=False)
    assert [i for i, _ in called] == list(range(6)) and all(x is called[0][1] for _, x in called)
    assert [[x.item() for x in end] for end in ends] == [[1, 1]] * 3


def test_what_is_written_in_place_is_not_copied_and_ends_each_step(monkeypatch) -> None:
    variant = variants.fp16_append(variants.noise((8, 8), 128, 512))
    sides, peaks, run = [], [], timing.run_steps

    def watched(ends: list) -> tuple[list[float], float]:
        sides.extend(side for end in ends for side in end)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = run(ends)
        peaks.append(mx.get_peak_memory() - before)
        return found

    monkeypatch.setattr(timing, "run_steps", watched)
    timing.timed(variant, 3, chained=True)
    assert len({id(side) for side in sides}) == 5 * 2  # keys and values of five steps
    assert peaks[0] < 2**20  # a side is 4 MiB


def test_a_run_s_record_makes_the_pages(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(timing, "COPY_BYTES", 2**12)
    monkeypatch.setattr(groups_of, "HEADS", (4, 2))
    monkeypatch.setattr(groups_of, "BATCHES", (((4, 2), 2),))
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
        sys,
        "argv",
        [*command, "--parts", "lengths,batches,queries,kv_bits", "--pairs", "turbo4/turbo3"],
    )
    assert bench.main() == 0
    record = json.loads(out.read_text())
    assert record["calls_a_step"] == 2 and record["processor"]
    monkeypatch.setattr(pages, "read", lambda name: record)
    page = pages.kernels()
    assert "steps of 2 calls" in page
    assert "(4, 2), 2 sequences: turbo4/turbo3" in page and "8 queries: turbo4/turbo3" in page
    assert "kv_bits=4" in pages.kv_bits()


@pytest.fixture
def other_tree(tmp_path) -> Path:
    """A copy of the package whose attention is half too large, as `git archive` leaves it."""
    tree = tmp_path / "before"
    shutil.copytree(ROOT / "mlx_turbokv", tree / "mlx_turbokv")
    (tree / "scripts").mkdir()
    (tree / "scripts" / "record.py").write_text('ARCHIVED = "abc1234"\n')
    path = tree / "mlx_turbokv" / "kernels" / "backend.py"
    sound = path.read_text()
    attention = "attention: Callable = reference.attention"
    assert attention in sound
    wrong = "attention: Callable = lambda *args: 1.5 * reference.attention(*args)"
    path.write_text(sound.replace(attention, wrong))
    return tree


def test_another_tree_is_timed_and_checked_in_turns(
    other_tree, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(timing, "COPY_BYTES", 2**12)
    out = tmp_path / "turns.json"
    options = ["--backend", "reference", "--parts", "lengths", "--lengths", "64", "--rounds", "2"]
    options += ["--pairs", "q8_0/turbo2", "--refcheck", "--out", str(out)]
    assert bench.main([*options, "--against", str(other_tree)]) == 1
    record = json.loads(out.read_text())
    assert record["against"] == {"mlx_turbokv": mlx_turbokv.__version__, "commit": "abc1234"}
    fp16, packed = record["rows"]
    assert packed["error"] <= packed["error_allowed"]
    assert packed["against"]["error"] == pytest.approx(0.5, rel=0.01)
    for row in (fp16, packed):
        assert row["against_over_this"] > 0
        assert row["against"]["low_us"] <= row["against"]["us"] <= row["against"]["high_us"]
        assert row["against"]["bytes"] == row["bytes"]
    assert "FAILED" in capsys.readouterr().err


class Side:
    """A tree whose calls take so many seconds."""

    def __init__(self, log: list, name: str, seconds: float):
        self.log, self.name, self.seconds = log, name, seconds
        self.made, self.steps = {"fp16": SimpleNamespace(n_bytes=1)}, {"fp16": 3}

    def prepare(self, index: int) -> None:
        self.group = groups_of.Group("lengths", "decode", (4, 2), 64, 32, {})

    def turn(self, name: str) -> sides.Turn:
        self.log.append(self.name)
        return sides.Turn(timing.Times(self.seconds, 0, 0), None)


def test_the_two_trees_begin_rounds_by_turns() -> None:
    log: list[str] = []
    (row,) = bench.bench(Side(log, "new", 2), 0, 3, False, 1e9, Side(log, "old", 3))
    assert log == ["new", "old", "old", "new", "new", "old"]
    assert row["us"] == 2e6 and row["against"]["us"] == 3e6 and row["against_over_this"] == 1.5


def test_protected_rows_are_compared_with_others_of_the_same_round() -> None:
    names = "fp16", "q8_0/turbo2", "q8_0/turbo2 protected"
    side = Side([], "", 0)
    side.made, side.steps = ({name: value for name in names} for value in (side.made["fp16"], 3))
    # the machine is slow in the first of three rounds, and a protected call takes twice as long
    order = [names, names[::-1], names]
    slow = iter([9.0] * 3 + [1.0] * 6)
    asked = []

    def turn(name: str) -> sides.Turn:
        asked.append(name)
        seconds = next(slow) * (2 if name.endswith("protected") else 1)
        return sides.Turn(timing.Times(seconds, 0, 0), None)

    side.turn = turn
    rows = bench.bench(side, 0, 3, False, 1e9)
    assert asked == [name for round_ in order for name in round_]
    assert [row.get("unprotected_over_this") for row in rows] == [None, None, 0.5]
    assert "0.500x unprotected" in bench.line(rows[2])


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_without_the_package_is_refused(there, tmp_path, capsys) -> None:
    folder = tmp_path if there else tmp_path / "missing"
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--backend", "reference", "--against", str(folder)])
    assert stopped.value.code == 2 and "another tree" in capsys.readouterr().err


def test_trees_keep_their_compiled_kernels_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv(sides.COMPILED, raising=False)
    (tmp_path / "metal").mkdir()
    (tmp_path / "metal" / "a.metal").write_text("one")
    one = sides.compiled_folder(tmp_path)
    (tmp_path / "metal" / "a.metal").write_text("two")
    assert sides.compiled_folder(tmp_path) != one
    monkeypatch.setenv(sides.COMPILED, "/x")
    assert sides.compiled_folder(tmp_path) == Path("/x/against")
