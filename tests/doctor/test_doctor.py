"""doctor: what it finds on a sound machine, and what it says of kernels that are not."""

from __future__ import annotations

import json
import re
import shutil
import stat
from itertools import product
from pathlib import Path

import mlx.core as mx
import ncu
import pytest
from click.testing import CliRunner
from metal_host import HostMetal

from mlx_turbokv import doctor
from mlx_turbokv.cli.doctor import command
from mlx_turbokv.cli.entry import run
from mlx_turbokv.doctor import isolate, sources
from mlx_turbokv.doctor.checks import JOBS, run_variant
from mlx_turbokv.doctor.report import as_markdown
from mlx_turbokv.doctor.variants import FORMATS, HEAD_DIMS, Variant, variant_set
from mlx_turbokv.kernels import assemble, backend, chips, reference, tuning
from mlx_turbokv.kernels.decode import MAX_QUERIES

METAL = Path(__file__).resolve().parents[2] / "metal"
SMALL = Variant("turbo4", "turbo3", 64, 64, "float16", 2, 2, "causal")
EVERY = {"pack", "decode_partial", "decode_merge", "dequantize", "read_segments"}
KERNELS_OF = {
    "pack.metal": {"pack"},
    "decode.metal": {"decode_partial"},
    "merge.metal": {"decode_merge"},
    "dequantize.metal": {"dequantize"},
    "segments.metal": {"read_segments"},
    "dequantize.h": {"dequantize", "read_segments"},
    "whole_tile.h": {"read_segments"},
    "anchor.h": {"pack", "decode_partial", "dequantize", "read_segments"},
    "attention.h": {"decode_partial", "decode_merge"},
    "hadamard.h": EVERY,
    "common.h": EVERY,
    "compat/cuda.h": EVERY,
}


@pytest.fixture
def metal_copy(tmp_path) -> Path:
    """A copy of metal/."""
    return Path(shutil.copytree(METAL, tmp_path / "metal"))


def test_whole_sources_have_no_problem(metal_copy) -> None:
    n_files, problems = sources.check_sources(metal_copy)
    assert problems == []
    # all but what the tests alone compile
    assert n_files == sum(not p.name.startswith("host") for p in METAL.rglob("*.*"))


def corrupt(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"\xfe\x01garbage{" * 50)


@pytest.mark.parametrize(
    ("file", "how"),
    [*product(KERNELS_OF, ["missing", "garbage"]), *product(sources.ENTRIES, ["empty"])],
)
def test_a_corrupted_source_names_its_kernels(metal_copy, file, how) -> None:
    corrupt(metal_copy / file, how)
    (problem,) = sources.check_sources(metal_copy)[1]
    assert (problem.file, set(problem.kernels)) == (file, KERNELS_OF[file])


def test_doctor_passes_on_the_reference_back_end(tmp_path) -> None:
    file = tmp_path / "record.json"
    args = ["--quick", "--backend", "reference", "--json", str(file)]
    result = CliRunner().invoke(command, args, standalone_mode=False)
    assert result.return_value == 0
    assert result.stdout.startswith("### mlx_turbokv doctor: PASS")
    assert "checked here: **reference**" in result.stdout
    assert "turbo4/turbo3 centred head_dim 64 float16: decode" in result.stderr
    says = next(x for x in result.output.splitlines() if x.startswith("| centred keys"))
    assert "turbo keys of 2 of 4 variants, centred by the constant part of the rows checked" in says
    record = json.loads(file.read_text())
    assert record["passed"] and len(record["variants"]) == len(variant_set("quick"))
    for variant in record["variants"]:
        assert set(variant["jobs"]) == set(JOBS)
        assert variant["times"]["decode_us"] > 0 and variant["times"]["fp16_us"] > 0


def test_doctor_fails_and_names_the_kernel_of_a_corrupted_file(metal_copy, monkeypatch) -> None:
    corrupt(metal_copy / "dequantize.metal", "garbage")
    monkeypatch.setattr(sources, "folder", lambda: metal_copy)
    args = ["--quick", "--backend", "reference", "--no-times"]
    result = CliRunner().invoke(command, args, standalone_mode=False)
    assert result.return_value == 1
    assert result.stdout.startswith("### mlx_turbokv doctor: FAIL")
    assert "- metal/dequantize.metal (**dequantize**): byte 0 is not ASCII" in result.stdout


def test_a_missing_back_end_is_bad_input(capsys) -> None:
    with pytest.raises(SystemExit) as exit_:
        run(command, ["--quick", "--backend", "cuda"])
    assert exit_.value.code == 2
    assert "'cuda' is not available" in capsys.readouterr().err


def test_every_default_variant_of_the_reference_agrees_with_float64() -> None:
    record = doctor.examine("default", "reference", times=False)
    assert record["failures"] == []


def off_by_a_percent(x):
    return x * mx.array(1.01, x.dtype)


def attention_off(few: bool):
    """The reference's attention, off by a percent for few queries, or for many."""

    def attention(queries, *rest):
        output = reference.attention(queries, *rest)
        return off_by_a_percent(output) if (queries.shape[2] <= MAX_QUERIES) == few else output

    return attention


# (jobs that must fail, what a back-end gives instead)
BROKEN = {
    "pack": (["pack"], {"pack": lambda k, v, *rest: reference.pack(off_by_a_percent(k), v, *rest)}),
    "decode": (["decode", "protected"], {"attention": attention_off(few=True)}),
    "prefill": (["dequantize", "segments"], {"attention": attention_off(few=False)}),
    "dequantize": (
        ["dequantize", "segments"],
        {"dequantize": lambda *args: [off_by_a_percent(x) for x in reference.dequantize(*args)]},
    ),
}


@pytest.mark.parametrize("which", BROKEN)
def test_numbers_that_are_off_by_a_percent_fail(which) -> None:
    jobs, operations = BROKEN[which]
    broken = backend.REFERENCE._replace(**operations)
    outcomes = [outcome for _, outcome in run_variant(SMALL, broken) if outcome]
    assert [o.job for o in outcomes if o.message] == jobs


def kernel_failures(chosen: list[Variant]) -> list[dict]:
    """What is wrong with the kernels, not with the source files."""
    record = doctor.examine(
        backend="metal", times=False, isolated=False, chosen=chosen, metal=METAL
    )
    return [failure for failure in record["failures"] if failure["file"] is None]


def test_kernels_pass_on_the_cpu_executor(metal_host, monkeypatch) -> None:
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    starts = Variant("f16", "q8_0", 72, 72, "bfloat16", 1, 1, "starts")
    centred = Variant("turbo4", "turbo3", 64, 64, "float16", 1, 1, "starts", True)
    assert kernel_failures([SMALL, starts, centred]) == []
    every = EVERY | {"decode_protected"}
    assert every <= {ncu.short_name(launch.name) for launch in metal_host.launches}


def test_kernels_that_multiply_halves_pass_where_values_cancel(metal_host, monkeypatch) -> None:
    """An H200's relative errors are 7e-3 and 4e-3 there: the outputs are small, not the sums."""
    monkeypatch.setattr(assemble, "factory", metal_host.metal_kernel)
    monkeypatch.setattr(tuning, "built_in", lambda backend: tuning.CUDA)
    names = "turbo8/turbo3:32 centred head_dim 128 float16", "q8_0/turbo5 head_dim 64 float16"
    found = [variant for variant in variant_set() if str(variant) in names]
    assert len(found) == 2 and kernel_failures(found) == []


@pytest.fixture
def planted(metal_copy, monkeypatch):
    """`planted(file, old, new)`: kernels run on the CPU from a metal/ with that change."""
    host = HostMetal()
    monkeypatch.setattr(assemble, "factory", host.metal_kernel)
    monkeypatch.setattr(assemble, "metal_folder", lambda: metal_copy)
    assemble.header_text.cache_clear()

    def plant(file: str, old: str, new: str) -> None:
        text = (metal_copy / file).read_text()
        assert old in text
        (metal_copy / file).write_text(text.replace(old, new, 1))

    yield plant
    host.close()
    assemble.header_text.cache_clear()


@pytest.mark.parametrize(
    ("file", "kernel"),
    sources.ENTRIES.items(),
)
def test_a_kernel_that_does_not_compile_is_named_alone(planted, file, kernel) -> None:
    planted(file, "TKV_FN void", "TKV_FN garbage_type")
    failures = kernel_failures([SMALL])
    both = file in doctor.FILES["protected"]
    own = [kernel] + [doctor.PROTECTED_ENTRIES.get(file, kernel)] * both
    assert [failure["kernels"] for failure in failures] == [[name] for name in own]
    assert all("garbage_type" in failure["message"] for failure in failures)


def test_a_kernel_with_wrong_numbers_is_named(planted) -> None:
    planted("merge.metal", "x[j] += factor", "x[j] += 1.01f * factor")
    failures = kernel_failures([SMALL])
    assert len(failures) == 2  # decode, and with protected tokens
    for failure in failures:
        assert "decode_merge" in failure["kernels"]
        # the factor's, give or take decode's own
        assert re.search(r"relative error (9\.\de-03|1\.[01]e-02)", failure["message"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("place.to = n_first_tokens(params, split.padding);", "place.to = 1;"),
        (
            "split.from = split.padding + n_first_tokens(params, split.padding);",
            "split.from = split.padding;",
        ),
        ("split.tail_tile = start / TILE", "split.tail_tile = 1 + start / TILE"),
    ],
)
def test_wrong_protected_tokens_are_found(planted, old, new) -> None:
    planted("decode_split.h", old, new)
    (failure,) = kernel_failures([SMALL])
    assert failure["kernels"] == ["decode_protected", "decode_merge"]


def test_a_process_of_its_own_gives_the_same_record() -> None:
    apart, here = (
        isolate.results([SMALL], "reference", print, times=False, isolated=isolated)
        for isolated in (True, False)
    )
    for record in (*apart, *here):
        for job in record["jobs"].values():
            job.pop("seconds")
    assert apart == here


@pytest.fixture
def python(tmp_path, monkeypatch):
    """`python(script)`: the process of its own runs a shell script in place of Python."""

    def replace(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(isolate.sys, "executable", str(path))

    return replace


def test_a_kernel_that_takes_the_process_with_it_fails_alone(python) -> None:
    event = json.dumps({"event": "job", "job": "decode"})
    python(f"cat > /dev/null\necho '{event}'\necho lost >&2\nkill -9 $$")
    records = isolate.results([SMALL, SMALL], "reference", print, times=False, isolated=True)
    for record in records:
        assert record["jobs"]["decode"]["message"] == "the process ended with -9\nlost"


def test_a_kernel_that_never_ends_is_stopped(python, monkeypatch) -> None:
    python("exec sleep 60")
    monkeypatch.setattr(isolate, "SECONDS_A_JOB", 0.2)
    (record,) = isolate.results([SMALL], "reference", print, times=False, isolated=True)
    assert record["jobs"]["pack"]["message"].startswith("no end after 0.2 s")


def test_a_job_that_keeps_failing_is_not_run_to_the_end(monkeypatch) -> None:
    broken = backend.REFERENCE._replace(**BROKEN["pack"][1])
    monkeypatch.setattr(isolate, "select_backend", lambda name: broken)
    records = isolate.results([SMALL] * 5, "reference", print, times=False, isolated=False)
    assert ["pack" in r["jobs"] for r in records] == [True] * 3 + [False] * 2
    assert all("decode" in r["jobs"] for r in records)


def test_the_sets_cover_what_they_say() -> None:
    default, full = variant_set("default"), variant_set("full")
    for some in (default, full):
        assert {v.k_format for v in some} == {v.v_format for v in some} == set(FORMATS)
        assert {v.k_head_dim for v in some} == set(HEAD_DIMS)
        assert {v.edge for v in some} == {"plain", "causal", "sinks", "starts"}
        assert {v.dtype for v in some} == {"float16", "bfloat16", "float32"}
        assert any(v.k_head_dim != v.v_head_dim for v in some)
    assert {(v.k_format, v.v_format) for v in full} == {(k, v) for k in FORMATS for v in FORMATS}
    each = {(f, dim) for f in FORMATS for dim in HEAD_DIMS}
    assert {(v.k_format, v.k_head_dim) for v in full} == each
    assert {(v.v_format, v.v_head_dim) for v in full} == each
    assert set(variant_set("quick")) <= set(default)


@pytest.mark.parametrize(
    ("architecture", "macos", "usable"),
    [
        ("applegpu_g17s", "26.2", True),
        ("applegpu_g17g", "26.1.1", False),
        ("applegpu_g16d", "26.4", False),
        ("applegpu_g18p", "27.0", True),
        ("x86_64", "", None),
    ],
)
def test_neural_accelerators(architecture, macos, usable) -> None:
    found = doctor.neural_accelerators(architecture, macos)
    assert (found and found[0]) is usable


def test_apple_facts_and_compiler_errors_are_reported() -> None:
    record = doctor.examine(backend="reference", times=False, chosen=[SMALL])
    record["device_info"] = {
        "architecture": "applegpu_g17s",
        "memory_size": 36 * 2**30,
        "max_recommended_working_set_size": 27 * 2**30,
    }
    record["neural_accelerators"] = (True, "generation 17, macOS 26.2")
    message = "\n".join(["RuntimeError: no", *(f"error {i}" for i in range(40))])
    failure = {"kernels": ["pack"], "file": None, "variant": str(SMALL), "message": message}
    record |= {"failures": [failure], "passed": False}
    report = as_markdown(record)
    assert "applegpu_g17s" in report and "36.0 GiB" in report and "27.0 GiB" in report
    assert "usable (generation 17, macOS 26.2)" in report
    assert "**pack**, turbo4/turbo3 head_dim 64 float16" in report
    assert "error 10" in report and "error 11" not in report


def test_times_stand_beside_what_published_bandwidth_allows() -> None:
    record = doctor.examine(backend="reference", times=False, chosen=[SMALL])
    record["device"] = "Apple M4 Max"
    jobs = ("pack", "decode", "dequantize", "fp16")
    times = {f"{job}_{unit}": 100.0 for job in jobs for unit in ("us", "gb_s")}
    record["variants"][0]["times"] = {
        **times, "shape": [8192, 8, 32], "packed_bytes": 11_141_120, "decode_speedup": 2.0,
    }  # fmt: skip
    report = as_markdown(record)
    assert "| published memory bandwidth | 410 or 546 GB/s |" in report
    assert "| decode | at 410 or 546 GB/s | × fp16 |" in report
    # 11.14 MB at 410 and at 546 GB/s
    assert "| 100 µs, 100 GB/s | 27 or 20 µs | 2.00 |" in report
    record["device"] = "some card"
    assert "published" not in as_markdown(record)


def test_published_bandwidths_grow_from_chip_to_chip() -> None:
    for generation in range(1, 6):
        names = [f"Apple M{generation}{size}" for size in ("", " Pro", " Max", " Ultra")]
        found = [chips.published(name) for name in names if name in chips.CHIPS]
        assert len(found) >= 3
        widths = [bandwidth for chip in found for bandwidth in chip.bandwidths]
        assert widths == sorted(widths) and 60 < widths[0] < widths[-1] < 1000
        assert [chip.cores for chip in found] == sorted(chip.cores for chip in found)
    assert chips.published("Apple M1 Mega") is None
