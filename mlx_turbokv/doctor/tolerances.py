"""What the checks accept: tolerances, and the comparison of packed rows."""

from __future__ import annotations

import numpy as np

from ..quant.formats import KVFormat

# codes may differ by one where a value lies at a decision boundary: this share of them
CODES_SHARE = 1e-3
SCALE_ULPS = 1
# relative error (root mean square) of attention over the same packed rows, by the output's dtype:
# decode multiplies pairs of halves unless the model is in float32
ATTENTION = {"float16": 3e-3, "bfloat16": 6e-3, "float32": 1e-4}
# more queries than decode takes go through half rows and MLX's attention: relative error
MANY_QUERIES = 16
THROUGH_ROWS = {"float16": 3e-3, "bfloat16": 1e-2, "float32": 3e-3}
# largest error of a row value over the largest value
ROWS = 1e-5
TOLERANCES = {
    "pack": f"at most {CODES_SHARE:.0e} of the codes off by one level (values at a decision "
    f"boundary), f16 rows equal, scales within {SCALE_ULPS} ulp, free rows zero",
    "decode": "relative error " + ", ".join(f"{t:.0e} {d}" for d, t in ATTENTION.items()),
    "dequantize": f"{ROWS:.0e} of the largest value; attention of {MANY_QUERIES} queries over the "
    "rows: relative error " + ", ".join(f"{t:.0e} {d}" for d, t in THROUGH_ROWS.items()),
}


class CheckError(Exception):
    """A comparison that did not hold."""


def compare_rows(
    side: str, fmt: KVFormat, codes: np.ndarray, scales: np.ndarray, wanted: np.ndarray,
    wanted_scales: np.ndarray,
) -> float:  # fmt: skip
    """The share of codes that differ.

    Raises:
        CheckError: more than rounding explains.
    """
    off = np.abs(codes - wanted)
    share = float((off > 0).mean())
    if fmt.is_f16:
        if share:
            raise CheckError(f"{side}: {share:.1%} of the f16 values differ")
        return 0.0
    if off.max() > 1 or share > CODES_SHARE:
        raise CheckError(f"{side}: {share:.1%} of the codes differ, by up to {off.max()} levels")
    ulps = np.abs(scales.view(np.uint16).astype(int) - wanted_scales.view(np.uint16).astype(int))
    ulps[off.any(axis=-1)] = 0  # another code has another scale
    if ulps.max() > SCALE_ULPS:
        raise CheckError(f"{side}: scales differ by up to {ulps.max()} ulps")
    return share
