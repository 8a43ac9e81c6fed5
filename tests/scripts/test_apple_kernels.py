"""What scripts/apple_kernels.py reads from Mesa's compiler, and which variants it compiles."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import agx
import apple_kernels
import pytest
from apple_variants import ATTENTION, KERNELS, ROOT, SHORT_PAIRS, variants
from metal_host.opencl import compiled_source

STATISTICS = (
    "MESA_SHADER_COMPUTE shader: 19 inst, 12 alu, 12 fscib, 3 ic, 90 bytes, 47 regs, 8 uniforms, "
    "12 scratch, 896 threads, 2 loops, 5:7 spills:fills"
)
# before registers are allocated, after it, and the preamble; blocks 1 to 3 are a loop, and so is 2
LISTING = f"""
block0 {{
   1 = mov_imm #1
}} -> block1

block1 {{
   2 = phi 1, 3
}} -> block1 block2  from block0 block1

block0 {{
   r0 = mov_imm #1
}} -> block1

block1 {{
   r1 = iadd r0, #1, #0
   r2 = fadd r1, r1
}} -> block2  from block0 block3

block2 {{
   r3 = fmul r2, r2
   wait #0, slot 0
   jmp_exec_any #55
}} -> block2 block3  from block1 block2

block3 {{
   jmp_exec_any #44
}} -> block1 block4  from block2

block4 {{
   stop
}} from block3

block0 {{
   uniform_store 3d, #44, x, #0
   stop
}}

{json.dumps({"file": "k.spv", "stats": STATISTICS, "half_registers": 48, "threads": 896,
             "preamble_half_registers": 2, "uniforms": 8, "scratch": 16, "local": 640,
             "main_bytes": 64, "bytes": 90})}
"""  # fmt: skip
MESSAGES = "SPIR-V WARNING:\nAGX-DEMAND 51\n"


def test_every_decode_variant_of_the_record_fits_into_registers() -> None:
    record = json.loads((ROOT / "benchmarks/apple_kernels.json").read_text(encoding="utf-8"))
    rows = [row for row in record["rows"] if row["kernel"] in ATTENTION]
    assert [row["variant"] for row in rows if "error" in row or row["spills"]] == []
    main = [row for row in rows if row["head_dim"] == 128]
    assert [row["variant"] for row in main if row["threads_a_core"] < 512] == []


def jump(offset: int) -> bytes:
    return b"\x00\xc0" + struct.pack("<i", offset)


# the inner loop from byte 20 to 36, the outer one from 8 to 42
BINARY = bytes(30) + jump(-10) + jump(-28) + bytes(22)


def test_statistics_and_loops_are_read() -> None:
    assert agx.parsed(LISTING, MESSAGES, BINARY) == {
        "instructions": 19, "scratch_bytes": 12, "threads_a_core": 896, "spills": 5, "fills": 7,
        "demand": 51, "registers": 48, "threadgroup_bytes": 640, "code_bytes": 64,
        "loops": [{"instructions": 6, "bytes": 34, "at": 8},
                  {"instructions": 3, "bytes": 16, "at": 20}],
    }  # fmt: skip


def test_loops_that_the_machine_code_lacks_are_an_error() -> None:
    with pytest.raises(ValueError, match="2 loops in the listing, 1 in the machine code"):
        agx.parsed(LISTING, MESSAGES, BINARY[:36] + bytes(28))


def short(head_dim: int = 128) -> list:
    return list(variants(SHORT_PAIRS[:1], (head_dim,), (1, 8)))


def test_every_kernel_is_compiled_centred_and_not() -> None:
    found = short()
    assert {v.kernel for v in found} == set(KERNELS)
    assert {(v.kernel, v.centred) for v in found} == {
        (kernel, centred) for kernel in KERNELS for centred in (False, True)
    } - {("decode_merge", True)}
    assert {v.rows for v in found if v.kernel == "decode_partial"} == {1, 8}
    assert len({v.name for v in found}) == len(found)


def test_a_text_comes_once_for_a_number_of_rows() -> None:
    found = [(v.launch.text, v.rows) for v in short(64)]
    assert len(set(found)) == len(found)


def test_instructions_of_a_token_count_each_loop_by_its_trips() -> None:
    variant = next(v for v in short() if v.name.endswith("rows8-split"))
    inner = [{"instructions": 100}, {"instructions": 1000}]
    found = {
        n: apple_kernels._a_token(variant, {"instructions": 1100 + n}, inner) for n in (0, 5040)
    }
    ratios = [passes / step for passes in (1, 2, 4, 8) for step in (1, 2)]
    assert (found[5040] - found[0]) / 5040 in ratios
    assert apple_kernels._a_token(variant, {"instructions": 9}, inner * 2) is None


def test_attributes_become_the_work_items_of_opencl() -> None:
    launch = short()[0].launch
    source = compiled_source(launch.text, launch.name, 256)
    assert "reqd_work_group_size(256, 1, 1)" in source
    assert "[[" not in source
    assert "thread_index_in_simdgroup = get_sub_group_local_id();" in source


def refused(monkeypatch, capsys, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["apple_kernels.py", *words])
    with pytest.raises(SystemExit) as status:
        apple_kernels.main()
    assert status.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_bad_input_is_refused_before_the_work(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setenv("AGX_HOME", str(tmp_path))
    assert "holds no agx.h" in refused(monkeypatch, capsys, str(tmp_path))
    assert "'(' is no regular" in refused(monkeypatch, capsys, str(tmp_path), "--pattern", "(")
    gone = str(tmp_path / "gone/record.json")
    assert "there is no folder" in refused(monkeypatch, capsys, str(tmp_path), "--out", gone)
    for name in (*agx.FILES, "setup.sh"):
        (tmp_path / name).write_text(name)
    assert "setup.sh first" in refused(monkeypatch, capsys, str(tmp_path))
    chroot = tmp_path / "root/agx"
    chroot.mkdir(parents=True)
    for name in (*agx.FILES, agx.BUILT):
        (chroot / name).write_text(name)
    (chroot / "agx.h").write_text("older")
    assert "make the chroot anew" in refused(monkeypatch, capsys, str(tmp_path))
    (chroot / "agx.h").write_text("agx.h")
    (chroot / "mesa").mkdir()
    (chroot / "mesa/VERSION").write_text("25.0.7\n")
    words = str(tmp_path), "--short", "--pattern", "rows3"
    assert "matches none of" in refused(monkeypatch, capsys, *words)


def test_what_is_known_is_not_compiled_again(tmp_path: Path, monkeypatch) -> None:
    chroot = tmp_path / "root/agx"
    (chroot / "mesa").mkdir(parents=True)
    (chroot / "mesa/VERSION").write_text("25.0.7\n")
    for name in (*agx.FILES, agx.BUILT, "setup.sh"):
        (tmp_path / name).write_text(name)
        (chroot / name).write_text(name)
    compiler = agx.Compiler(tmp_path, tmp_path)
    calls: list[str] = []
    monkeypatch.setattr(agx.Compiler, "_compile", lambda self, source, key: calls.append(key) or {})
    assert compiler.statistics("a") == compiler.statistics("a") == {}
    compiler.statistics("b")
    assert len(calls) == 2
    (chroot / agx.BUILT).write_text("another build")
    agx.Compiler(tmp_path, tmp_path).statistics("a")
    assert len(set(calls)) == 3
