"""Writes the Metal text of every kernel variant to a folder, for Apple's compiler.

    python scripts/metal_texts.py FOLDER
    xcrun -sdk macosx metal -std=metal3.1 -I MLX/include -c FOLDER/NAME.metal -o /dev/null

MLX is the folder of the installed package. MLX puts its own utils.h before a kernel when it
compiles it, and so do these files. The variants are those of the kernel cases that the tests run;
nothing is launched.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "helpers")]
import kernel_cases  # noqa: E402
from metal_host import Recorder  # noqa: E402

from mlx_turbokv.kernels import assemble  # noqa: E402

PRELUDE = '#include "mlx/backend/metal/kernels/utils.h"\nusing namespace metal;\n'


def main(folder: str) -> int:
    recorder = Recorder()
    assemble.factory = recorder.metal_kernel
    for case in kernel_cases.ALL_CASES:
        kernel_cases.run_case(case, "metal")
    texts = {launch.name: launch.text for launch in recorder.launches}
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / f"{name}.metal").write_text(PRELUDE + text, encoding="ascii")
    print(f"{len(texts)} kernels in {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
