"""Threadgroup memory: for every layout at most what a kernel may declare, on NVIDIA and Apple."""

from __future__ import annotations

import re
import subprocess

import kernel_cases
from metal_host import toolchain
from metal_host.opencl import MAX_THREADGROUP_BYTES

from mlx_turbokv.kernels import decode, dequantize, pack, tables
from mlx_turbokv.kernels.assemble import NEEDS, metal_folder
from mlx_turbokv.kernels.tables import MAX_HEAD_DIM
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout

MOST_BYTES = 48 * 1024
# the gap before the LUTs, which aligns them to their size
ALIGNMENT = r"\(count\) \+ \((\d+) - (\d+)\)"
CONSTANTS = re.compile(
    r"(?:constant constexpr int [A-Z0-9_]+ = [^;]+;)"
    r"|(?:TKV_CONST_FN (?:int|bool) \w+\([^)]*\) \{.*?\n\})",
    re.S,
)
PROGRAM = """
#include <cstdio>
#define constant static
#define TKV_CONST_FN constexpr
%s
int main() {
  int a, b, c, d, e, f, g, h, i;
  while (std::scanf("%%d %%d %%d %%d %%d %%d %%d %%d %%d", &a, &b, &c, &d, &e, &f, &g, &h, &i) == 9)
    std::printf("%%d %%d %%d\\n", 4 * decode_words(a, b, c, d, e, f, g, h),
                4 * (pack_groups(larger(b, e)) * larger(b, e) + 2 * MAX_LEVELS) +
                    TILE * larger(b, e) + 2 * pack_scales(i, b, d, e),
                4 * dequantize_floats(b, h));
}
"""
KERNELS = ("decode", "pack", "dequantize")


def _bytes(tmp_path, parts: list[str]) -> dict[str, tuple[int, tuple]]:
    """The most bytes of threadgroup memory that each kernel declares, and for what."""
    files = ("common.h", *NEEDS["decode.metal"], "pack.metal", "dequantize.metal")
    texts = CONSTANTS.findall("".join((metal_folder() / name).read_text() for name in files))
    if parts:  # the prelude's own max_lut_words is NVIDIA's
        texts = [t for t in texts if "int max_lut_words" not in t]
    (tmp_path / "words.cpp").write_text(PROGRAM % "\n".join([*parts, *texts]))
    program = tmp_path / "words"
    subprocess.run(
        [toolchain.gxx(), "-std=c++17", "-o", program, tmp_path / "words.cpp"], check=True
    )
    arguments = sorted(set(_variants()))
    text = "\n".join(" ".join(map(str, variant)) for variant in arguments)
    out = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
    rows = [[int(x) for x in line.split()] for line in out.splitlines()]
    assert len(rows) == len(arguments) > 1000
    return {
        name: max(zip(column, arguments, strict=True))
        for name, column in zip(KERNELS, zip(*rows), strict=True)
    }


def test_every_layout_fits_on_nvidia(tmp_path) -> None:
    prelude = (metal_folder() / "compat" / "cuda.h").read_text()
    size, base = map(int, re.search(ALIGNMENT, prelude).groups())
    for name, (most, variant) in _bytes(tmp_path, CONSTANTS.findall(prelude)).items():
        gap = size - base if name == "decode" else 0
        assert most + gap <= MOST_BYTES, (name, variant)


def test_every_layout_fits_on_every_apple_gpu(tmp_path) -> None:
    for name, (most, variant) in _bytes(tmp_path, []).items():
        assert most <= MAX_THREADGROUP_BYTES, (name, variant)
    assert 8 * 4 * MAX_HEAD_DIM <= MAX_THREADGROUP_BYTES  # a merge


def test_the_program_counts_as_the_kernels_declare(tmp_path) -> None:
    """The sums above are those of the launchers' sources."""
    assert "decode_words(KB, KD, VB, VG, VD, ROWS, RAW, CENTRED) / 4" in decode.PARTIAL_SOURCE
    assert "TKV_SHARED(float4, shared, 2 * VD)" in decode.MERGE_SOURCE
    assert "dequantize_floats(KD, CENTRED) / 4" in dequantize.SOURCE
    declared = re.findall(r"TKV_SHARED\((\w+), \w+, (.*)\);", pack.SOURCE)
    assert declared == [
        ("float", "pack_groups(larger(KD, VD)) * larger(KD, VD)"),
        ("uchar", "32 * larger(KD, VD)"),
        ("ushort", "pack_scales(KG, KD, VG, VD)"),
        ("float", "2 * MAX_LEVELS"),
    ]


def _variants():
    """Arguments of decode_words, then K's group.

    K's bits and dim, V's bits, group and dim, rows, raw, centred.
    """
    for k_name in (*kernel_cases.FORMATS, "turbo8"):
        for v_name in (*kernel_cases.FORMATS, "turbo8"):
            for dims in (*kernel_cases.DIMS, (40, 40), (192, 192), (320, 320), (512, 256)):
                for dtype in ("float16", "float32"):
                    formats = KVFormat.parse(k_name), KVFormat.parse(v_name)
                    k, v = tables.tensor_parameters(KVLayout(*formats, *dims, dtype))
                    for n_rows in range(1, 65):
                        for centred in (False, True):
                            rows = decode.rows_at_once(n_rows, max(dims), centred)
                            shape = k.bits, k.dim, v.bits, v.group, v.dim
                            yield (*shape, rows, tables.RAW[dtype], int(centred), k.group)
