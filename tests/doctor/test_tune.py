"""`doctor --tune`: what it tries, keeps, refuses and remembers. Times are made up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace

import mlx.core as mx
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from metal_host import HostMetal

from mlx_turbokv.cli import doctor as command
from mlx_turbokv.doctor import report, tune
from mlx_turbokv.errors import InputError
from mlx_turbokv.kernels import assemble, backend, decode, reference, trust, tuned, tuning
from mlx_turbokv.kernels.packed import PackedKV, empty_tiles
from mlx_turbokv.kernels.trust import UntrustedKernelError
from mlx_turbokv.kernels.tuned import Range, Shape
from mlx_turbokv.kernels.tuning import Tuning
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout

LAYOUT = KVLayout(KVFormat.parse("q8_0"), KVFormat.parse("turbo2"), 128, 128)
OTHER = KVLayout(KVFormat.parse("turbo4"), KVFormat.parse("turbo3"), 128, 128)
HEADS = (32, 8)
BUILT_IN = tuning.built_in("metal")
BEST = {name: values[-1] if getattr(BUILT_IN, name) == values[0] else values[0]
        for name, values in tune.CANDIDATES.items()}  # fmt: skip


@pytest.fixture(autouse=True)
def own_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TURBOKV_CACHE_DIR", str(tmp_path / "cache"))
    tuned.forget()
    yield tmp_path / "cache" / tuned.FILE_NAME
    tuned.forget()


def cost(cut: Tuning, best: dict, tokens: int = 0) -> float:
    """A tuning is slower by a tenth for each number that is not the best one."""
    wrong = sum(getattr(cut, name) != value for name, value in best.items())
    return 1e-4 * 1.1**wrong


def comparing(
    best: dict, refused: Callable[[Tuning], bool] = lambda cut: False, calls: list | None = None
):
    def timed(layout, heads, tokens, name):
        def compare(one, other, rounds):
            if calls is not None:
                calls.append((tokens, one, other))
            for cut in (one, other):
                if refused(cut):
                    raise UntrustedKernelError("The metal kernel differs.")
            return cost(one, best), cost(other, best)

        return compare

    return timed


def run(timed, seconds=60.0, shapes=((LAYOUT, HEADS),)) -> dict:
    return tune.tune(shapes, "metal", seconds, timed=timed)


def cut(tokens: int, layout=LAYOUT, n_rows=4) -> Tuning:
    return tuned.cut_for("metal", layout, n_rows, tokens)


@given(st.fixed_dictionaries({n: st.sampled_from(v) for n, v in tune.CANDIDATES.items()}))
def test_the_fastest_tuning_is_found_wherever_it_is(best) -> None:
    found = tune.Found(2048, 4096, BUILT_IN)
    compare = comparing(best)(LAYOUT, HEADS, 2048, "metal")
    tune.search(BUILT_IN, compare, found, float("inf"), lambda line: None)
    assert found.best == replace(BUILT_IN, **best)
    assert found.after_us <= found.before_us and not found.not_tried and not found.refused


def test_candidates_are_numbers_of_the_tuning_and_hold_what_is_built_in() -> None:
    names = {field.name for field in fields(Tuning)}
    assert set(tune.CANDIDATES) == names - {"protected_step"}  # of rows not timed
    for name, values in tune.CANDIDATES.items():
        for own in ("metal", "cuda"):
            assert getattr(tuning.built_in(own), name) in values, name


def test_what_is_found_is_used_from_then_on(own_folder) -> None:
    assert cut(100) == BUILT_IN and tuned.summary("metal") == "built in"
    record = run(comparing(BEST))
    best = replace(BUILT_IN, **BEST)
    assert [row["tuning"] for row in record["rows"]] == [asdict(best)] * 3
    for tokens in (1, 4096, 4097, 10**6):
        assert cut(tokens) == best
    assert cut(100, OTHER) == cut(100, n_rows=8) == BUILT_IN
    assert "q8_0/turbo2, head_dim 128, 4 query rows" in tuned.summary("metal")
    assert tuned.cut_for("cuda", LAYOUT, 4, 100) == tuning.built_in("cuda")
    text = tune.as_markdown(record)
    assert "step 2 to 1" in text and own_folder.name in text and "µs before" in text


def test_each_range_of_tokens_has_its_own(monkeypatch) -> None:
    def timed(layout, heads, tokens, name):
        best = {"step": 1} if tokens < 10_000 else {"prefetch": True}
        return comparing(best)(layout, heads, tokens, name)

    run(timed)
    short, long = replace(BUILT_IN, step=1), replace(BUILT_IN, prefetch=True)
    assert (cut(4096), cut(16384), cut(16385)) == (short, short, long)


def test_nothing_is_kept_that_is_hardly_faster(own_folder) -> None:
    def timed(*_):
        return lambda one, other, rounds: (1e-4, 0.985e-4)

    record = run(timed)
    assert {row["changes"] for row in record["rows"]} == {"as built in"}
    assert cut(100) == BUILT_IN and tuned.summary("metal") == "built in"


def test_what_was_faster_by_chance_is_dropped_in_the_end() -> None:
    def timed(*_):
        def compare(one, other, rounds):
            return (1e-4, 0.5e-4) if rounds == tune.ROUNDS else (1e-4, 1.01e-4)

        return compare

    record = run(timed)
    assert {row["changes"] for row in record["rows"]} == {"as built in"}
    assert all(row["before_us"] == row["after_us"] for row in record["rows"])


def test_a_tuning_that_fails_its_check_is_never_chosen() -> None:
    record = run(comparing({**BEST, "step": 1}, refused=lambda c: c.step == 1))
    assert all(row["tuning"]["step"] == 2 for row in record["rows"])
    assert cut(100) == replace(BUILT_IN, **{**BEST, "step": 2})
    for row in record["rows"]:
        assert row["refused"] and all("step 2 to 1" in line for line in row["refused"])
    assert "failed their self-check" in tune.as_markdown(record)


def test_the_time_limit_is_said() -> None:
    calls: list = []
    record = run(comparing(BEST, calls=calls), seconds=0)
    assert all(row["not_tried"] > 10 and row["tried"] == 0 for row in record["rows"])
    assert len(calls) == 3  # before and after
    assert "left at the time limit" in tune.as_markdown(record)


def test_progress_names_shape_candidate_and_times() -> None:
    lines: list[str] = []
    tune.tune([(LAYOUT, HEADS)], "metal", 60, lines.append, comparing(BEST))
    assert any(
        line.startswith("q8_0/turbo2, head_dim 128, 4 query rows a KV head, 2,048 tokens: ")
        and "us, best" in line for line in lines
    )  # fmt: skip


@pytest.mark.parametrize("heads", [(32, 8), (8, 8)])
def test_what_makes_the_same_launch_is_not_timed(heads, monkeypatch) -> None:
    """A number that this shape does not show must not change by chance."""
    monkeypatch.setattr(assemble, "factory", lambda **_: lambda output_shapes, output_dtypes, **_: [
        mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes)])  # fmt: skip
    timed = tune.Timed(LAYOUT, heads, 2048, "metal")
    launches = [timed.launch(BUILT_IN)]

    def compare(one, other, rounds):
        if rounds == tune.ROUNDS:
            assert timed.launch(other) not in launches
            launches.append(timed.launch(other))
        return 1e-4, 1e-4

    compare.launch = timed.launch
    found = tune.Found(2048, 4096, BUILT_IN)
    tune.search(BUILT_IN, compare, found, float("inf"), lambda line: None)
    rows = [launch[0] for launch in launches]
    assert set(rows) == ({1, 2, 4} if heads == (32, 8) else {1})
    assert found.best == BUILT_IN and found.tried == len(launches) - 1


def test_a_second_run_replaces_the_first_and_shapes_are_apart() -> None:
    run(comparing({"step": 1}), shapes=((LAYOUT, HEADS), (OTHER, HEADS)))
    assert cut(100).step == cut(100, OTHER).step == 1
    run(comparing({"prefetch": True}))
    assert cut(100) == replace(BUILT_IN, prefetch=True) and cut(100, OTHER).step == 1
    run(comparing({}))
    assert cut(100) == BUILT_IN and cut(100, OTHER).step == 1


@pytest.mark.parametrize("what", ["machine", "text"])
def test_another_machine_or_text_has_the_built_in_tuning(what, monkeypatch) -> None:
    run(comparing(BEST))
    name = "_machine" if what == "machine" else "digest"
    monkeypatch.setattr(trust, name, lambda *_: "another")
    tuned.forget()
    assert cut(100) == BUILT_IN


def _entry(**changed) -> list:
    return [{"most_tokens": 4096, "tuning": {**asdict(BUILT_IN), "step": 1}, **changed}]


@pytest.mark.parametrize(
    "entries",
    [
        None, 3, [3], [{}], _entry(most_tokens="x"), _entry(tuning=None),
        _entry(tuning={"step": 1}), _entry(tuning={**asdict(BUILT_IN), "step": "1"}),
        _entry(tuning={**asdict(BUILT_IN), "prefetch": 1}),
        _entry(tuning={**asdict(BUILT_IN), "step": -1}),
        _entry(tuning={**asdict(BUILT_IN), "more": 1}),
    ],
)  # fmt: skip
def test_a_damaged_entry_is_as_none(entries, own_folder) -> None:
    def written(entries) -> None:
        machine = trust.machine_name("decode", "metal")
        own_folder.parent.mkdir(exist_ok=True)
        own = {str(Shape.of(LAYOUT, 4)): entries}
        own_folder.write_text(json.dumps({"tuned": {machine: own}}))
        tuned.forget()

    written(_entry())
    assert cut(100).step == 1
    written(entries)
    assert cut(100) == BUILT_IN
    run(comparing({"step": 1}))
    assert cut(100).step == 1


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff", b"[]", b'{"tuned": 3}', b"[" * 100_000])
def test_a_damaged_file_is_as_none(damage, own_folder) -> None:
    own_folder.parent.mkdir()
    own_folder.write_bytes(damage)
    assert cut(100) == BUILT_IN


def _packed(n: int = 40) -> PackedKV:
    rows = mx.random.normal((1, 2, n, 128), key=mx.random.key(0)).astype(mx.float16)
    return PackedKV(LAYOUT, empty_tiles(), 0, reference.pack(rows, rows, LAYOUT), n)


def test_decode_launches_with_it(monkeypatch) -> None:
    seen: list[dict] = []

    def metal_kernel(**_):
        def kernel(template, output_shapes, output_dtypes, **_):
            seen.append(dict(template))
            return [mx.zeros(s, t) for s, t in zip(output_shapes, output_dtypes)]

        return kernel

    monkeypatch.setattr(assemble, "factory", metal_kernel)
    queries = mx.zeros((1, 8, 1, 128), mx.float16)
    decode.decode(queries, _packed(), 0.1)
    tuned.store("metal", Shape.of(LAYOUT, 4), [Range(64, replace(BUILT_IN, simd_groups=8))])
    decode.decode(queries, _packed(), 0.1)
    decode.decode(queries, _packed(80), 0.1)
    groups = [t["SIMD_GROUPS"] for t in seen if "SIMD_GROUPS" in t]
    assert groups == [BUILT_IN.simd_groups, 8, BUILT_IN.simd_groups]


def test_the_built_in_tuning_takes_over_from_one_that_fails(monkeypatch, caplog) -> None:
    monkeypatch.setattr("mlx_turbokv.log._given", set())
    monkeypatch.setattr(assemble, "factory", lambda **_: lambda output_shapes, output_dtypes, **_: [
        mx.ones(s, t) for s, t in zip(output_shapes, output_dtypes)])  # fmt: skip
    monkeypatch.setenv(trust.VARIABLE, "1")
    monkeypatch.setattr(trust, "checker", lambda k: "is off." if k.cut.simd_groups == 8 else None)
    tuned.store("metal", Shape.of(LAYOUT, 4), [Range(64, replace(BUILT_IN, simd_groups=8))])
    queries = mx.zeros((1, 8, 1, 128), mx.float16)
    output = backend.select_backend("metal").decode(queries, _packed(), 0.1)
    assert (output == 1).all().item()
    (line,) = caplog.messages
    assert "is off" in line and "The built-in tuning takes over" in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tune", "--backend", "reference"], "nothing to tune on the reference"),
        (["--tune", "--shape", "32,8"], "'32,8': accepted is HEADS,KV_HEADS,HEAD_DIM"),
        (["--tune", "--shape", "32,5,128"], "a multiple of KV_HEADS"),
        (["--tune", "--shape", "0,0,0"], "accepted is"),
        (["--tune", "--shape", "8,2,7"], "7"),
        (["--tune", "--pair", "q8_0"], "'q8_0': accepted is K/V"),
        (["--tune", "--pair", "q8_0/q9"], "q9"),
        (["--tune", "--quick"], "--quick has no effect with --tune"),
        (["--shape", "32,8,128"], "--shape has no effect without --tune"),
    ],
)
def test_bad_options_are_named(arguments, said) -> None:
    error = CliRunner().invoke(command.command, arguments).exception
    assert isinstance(error, InputError) and said in str(error)


def test_the_command_tunes_and_the_report_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(assemble, "factory", lambda **_: None)
    monkeypatch.setattr(tune, "Timed", comparing({"step": 1}))
    monkeypatch.setattr(tune.tune, "__defaults__", (tune.tune.__defaults__[0], tune.Timed))
    out = tmp_path / "record.json"
    arguments = ["--tune", "--backend", "metal", "--pair", "q8_0/turbo2", "--json", str(out)]
    result = CliRunner().invoke(command.command, arguments)
    assert result.exception is None and "step 2 to 1" in result.output
    assert len(json.loads(out.read_text())["rows"]) == 3
    facts = dict(report._facts({
        "device_info": {}, "device": "x", "neural_accelerators": None, "os": "", "python": "",
        "mlx_turbokv": "", "mlx": "", "mlx_lm": "", "backends": [], "backend": "metal",
        "tuning": tuned.summary("metal"), "source_files": 1, "failures": [], "variants": [],
        "command": "",
    }))  # fmt: skip
    assert "doctor --tune" in facts["tuning of decode"]


@pytest.mark.slow
def test_a_wrong_kernel_is_refused_on_the_cpu(monkeypatch) -> None:
    """Real launches: kernels of one candidate are wrong, and it is faster for that."""
    host = HostMetal(runs=(("asan", "forward", 0),))

    def metal_kernel(**build):
        sound = host.metal_kernel(**build)

        def kernel(template, **call):
            outputs = sound(template=template, **call)
            return [x * 1.5 for x in outputs] if dict(template).get("STEP") == 1 else outputs

        return kernel

    monkeypatch.setattr(assemble, "factory", metal_kernel)
    monkeypatch.setattr(tune, "POINTS", ((64, 2**31 - 1),))
    monkeypatch.setattr(tune, "CANDIDATES", {"step": (1, 2), "key_columns": (64,)})
    monkeypatch.setattr(tune, "FEWEST_CALLS", 1)
    monkeypatch.setattr(tune, "MOST_CALLS", 1)
    monkeypatch.setattr(tune, "ROUNDS", 1)
    monkeypatch.setattr(tune, "LAST_ROUNDS", 1)
    trust._found.clear()
    layout = KVLayout(KVFormat.parse("q8_0"), KVFormat.parse("turbo2"), 64, 64)
    record = tune.tune([(layout, (2, 1))], "metal", 300)
    (row,) = record["rows"]
    assert row["tuning"]["step"] == BUILT_IN.step == 2
    (line,) = row["refused"]
    assert line.startswith("step 2 to 1: The metal kernel decode of K q8_0 with V turbo2")
    assert "off by" in line and row["tried"] == 1
    host.close()
    trust._found.clear()
