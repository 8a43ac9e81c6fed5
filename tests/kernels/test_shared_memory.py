"""Decode's shared memory on NVIDIA: for every layout at most what a kernel may declare."""

from __future__ import annotations

import re
import subprocess

import kernel_cases
from metal_host import toolchain

from mlx_turbokv.kernels import decode, tables
from mlx_turbokv.kernels.assemble import NEEDS, metal_folder
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
  int a, b, c, d, e, f, g, h;
  while (std::scanf("%%d %%d %%d %%d %%d %%d %%d %%d", &a, &b, &c, &d, &e, &f, &g, &h) == 8)
    std::printf("%%d\\n", decode_words(a, b, c, d, e, f, g, h));
}
"""


def test_every_layout_fits(tmp_path) -> None:
    prelude = (metal_folder() / "compat" / "cuda.h").read_text()
    files = ("common.h", *NEEDS["decode.metal"])
    texts = CONSTANTS.findall("".join((metal_folder() / name).read_text() for name in files))
    # the prelude's own max_lut_words is NVIDIA's
    parts = [*CONSTANTS.findall(prelude), *(t for t in texts if "int max_lut_words" not in t)]
    (tmp_path / "words.cpp").write_text(PROGRAM % "\n".join(parts))
    program = tmp_path / "words"
    subprocess.run(
        [toolchain.gxx(), "-std=c++17", "-o", program, tmp_path / "words.cpp"], check=True
    )
    arguments = sorted(set(_variants()))
    text = "\n".join(" ".join(map(str, variant)) for variant in arguments)
    out = subprocess.run([program], input=text, capture_output=True, text=True, check=True).stdout
    words = [int(line) for line in out.split()]
    assert len(words) == len(arguments) > 1000
    size, base = map(int, re.search(ALIGNMENT, prelude).groups())
    most, variant = max(zip(words, arguments, strict=True))
    assert 4 * most + size - base <= MOST_BYTES, variant


def _variants():
    """Arguments of decode_words: K's bits and dim, V's bits, group and dim, rows, raw, centred."""
    for k_name in kernel_cases.FORMATS:
        for v_name in kernel_cases.FORMATS:
            for dims in (*kernel_cases.DIMS, (40, 40), (192, 192), (320, 320), (512, 256)):
                for dtype in ("float16", "float32"):
                    formats = KVFormat.parse(k_name), KVFormat.parse(v_name)
                    k, v = tables.tensor_parameters(KVLayout(*formats, *dims, dtype))
                    for n_rows in range(1, 65):
                        for centred in (False, True):
                            rows = decode.rows_at_once(n_rows, max(dims), centred)
                            shape = k.bits, k.dim, v.bits, v.group, v.dim
                            yield (*shape, rows, tables.RAW[dtype], int(centred))
