"""Threadgroup memory: for every layout at most what a kernel may declare, on NVIDIA and Apple."""

from __future__ import annotations

import re
import subprocess

import kernel_cases
import pytest
from metal_host import toolchain
from metal_host.opencl import MAX_THREADGROUP_BYTES

from mlx_turbokv.kernels import (
    assemble,
    decode_launch,
    dequantize,
    pack,
    segment_rows,
    tables,
    tuning,
)
from mlx_turbokv.kernels.assemble import metal_folder
from mlx_turbokv.kernels.tables import MAX_HEAD_DIM
from mlx_turbokv.quant.formats import KVFormat
from mlx_turbokv.quant.layout import KVLayout, protected_layout

MOST_BYTES = 48 * 1024
# the gap before the LUTs, which aligns them to their size
ALIGNMENT = r"\(count\) \+ \((\d+) - (\d+)\)"
FORMATS = (*kernel_cases.FORMATS, "turbo8")
DIMS = ((128, 128), (64, 64), (40, 40), (80, 80), (192, 192), (192, 128), (256, 256), (512, 512))
PROGRAM = """
#include <cstdio>
#include "compat/host.h"
#define constant
#define threadgroup
{text}
int main() {{
{lines}
}}
"""
_DECODE = (
    "DecodeMemory<DecodeConfig<float, {k}, {v}, {{raw}}, {{rows}}, {{centred}}, false, {step},"
    " {{cut.simd_groups}}, {{cut.key_columns}}, {{lut_kib}}, {{prefetch}}, {{half2}}, {reads}, 1>>"
    "::END"
)
_ALL = {"k": "{k}", "v": "{v}", "step": "{step}", "reads": "READS_ALL"}
_PROTECTED = {"k": "{fine_k}", "v": "{fine_v}", "step": "{fine_step}", "reads": "READS_PROTECTED"}
# bytes of each kernel, as its source declares them
DECLARED = {
    "decode.metal": f"16 * (larger({_DECODE.format(**_ALL)}, {_DECODE.format(**_PROTECTED)}) / 4)",
    "pack.metal": (
        "4 * (pack_groups({widest}) * {widest} + 2 * MAX_LEVELS) + 32 * {widest} +"
        " 2 * (pack_scales<{k}, {v}>())"
    ),
    "dequantize.metal": "16 * (dequantize_floats({k_dim}, {centred}) / 4)",
    "segments.metal": "16 * (segments_floats({k_dim}, {centred}) / 4)",
}


def _tensor(t: tables.TensorParameters) -> str:
    return f"Tensor<{t.bits}, {t.group}, {t.dim}, {t.width}>"


def _variants(cut: tuning.Tuning):
    """What the expressions above are made of, for every layout and number of rows."""
    for k_name in FORMATS:
        for v_name in FORMATS:
            for dims in DIMS:
                for dtype in ("float16", "float32"):
                    layout = KVLayout(KVFormat.parse(k_name), KVFormat.parse(v_name), *dims, dtype)
                    k, v = tables.tensor_parameters(layout)
                    fine = tables.tensor_parameters(protected_layout(layout))
                    for centred in (False, True):
                        rows = {cut.rows_at_once(n, max(dims)) for n in range(1, 65)}
                        for most in rows if k_name in ("turbo4", "q8_0") else {max(rows)}:
                            yield {
                                "k": _tensor(k),
                                "v": _tensor(v),
                                "fine_k": _tensor(fine[0]),
                                "fine_v": _tensor(fine[1]),
                                "fine_step": cut.tiles_at_once(
                                    most, v.dim, centred and fine[0].bits == 8
                                ),
                                "raw": tables.RAW[dtype],
                                "rows": most,
                                "centred": str(centred).lower(),
                                "step": cut.tiles_at_once(most, v.dim, centred and k.bits == 8),
                                "cut": cut,
                                "lut_kib": cut.lut_words // 256,
                                "prefetch": str(cut.prefetch).lower(),
                                "half2": str(cut.half2).lower(),
                                "widest": max(dims),
                                "k_dim": k.dim,
                            }


def _most_bytes(tmp_path, file: str, cut: tuning.Tuning) -> tuple[int, str]:
    """The most bytes of threadgroup memory that a kernel declares, and the expression."""
    wanted = sorted({DECLARED[file].format(**variant) for variant in _variants(cut)})
    lines = "\n".join(f'  std::printf("%d\\n", int({expression}));' for expression in wanted)
    source = tmp_path / f"{file}.cpp"
    text = re.sub(r"^#pragma METAL.*$", "", assemble.header_text(file, "metal"), flags=re.M)
    source.write_text(PROGRAM.format(text=text, lines=lines))
    program = tmp_path / file
    flags = ["-std=c++17", "-O0", "-w", f"-I{metal_folder()}", "-c", "-o", f"{program}.o"]
    subprocess.run([toolchain.gxx(), *flags, source], check=True)
    link = [toolchain.gxx(), "-o", program, f"{program}.o", "-Wl,--unresolved-symbols=ignore-all"]
    subprocess.run(link, check=True)
    out = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    sizes = [int(x) for x in out.split()]
    assert len(sizes) == len(wanted) > 1
    return max(zip(sizes, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("file", list(DECLARED))
def test_every_layout_fits_on_nvidia(tmp_path, file: str) -> None:
    prelude = (metal_folder() / "compat" / "cuda.h").read_text()
    size, base = map(int, re.search(ALIGNMENT, prelude).groups())
    most, expression = _most_bytes(tmp_path, file, tuning.CUDA)
    gap = size - base if file == "decode.metal" else 0
    assert most + gap <= MOST_BYTES, expression


@pytest.mark.slow
@pytest.mark.parametrize("file", list(DECLARED))
def test_every_layout_fits_on_every_apple_gpu(tmp_path, file: str) -> None:
    most, expression = _most_bytes(tmp_path, file, tuning.APPLE)
    assert most <= MAX_THREADGROUP_BYTES, expression
    assert 8 * 4 * MAX_HEAD_DIM <= MAX_THREADGROUP_BYTES  # a merge


def test_the_program_counts_as_the_kernels_declare() -> None:
    """The expressions above are those of the launchers' sources."""
    assert "TKV_SHARED_ALIGNED(float4, shared, DecodeMemory<Config>::END / 4)" in (
        decode_launch.PARTIAL_SOURCE
    )
    largest = "larger(DecodeMemory<Body>::END, DecodeMemory<Protected>::END) / 4)"
    assert largest in decode_launch.PROTECTED_SOURCE
    assert "TKV_SHARED(float4, shared, 2 * VD)" in decode_launch.MERGE_SOURCE
    assert "TKV_SHARED(float4, shared, dequantize_floats(KD, CENTRED) / 4)" in dequantize.SOURCE
    assert "TKV_SHARED(float4, shared, segments_floats(KD, CENTRED) / 4)" in segment_rows.SOURCE
    declared = re.findall(r"TKV_SHARED\((\w+), \w+, (.*)\);", pack.SOURCE)
    assert declared == [
        ("float", "pack_groups(larger(KD, VD)) * larger(KD, VD)"),
        ("uchar", "32 * larger(KD, VD)"),
        ("ushort", "(pack_scales<K, V>())"),
        ("float", "2 * MAX_LEVELS"),
    ]
