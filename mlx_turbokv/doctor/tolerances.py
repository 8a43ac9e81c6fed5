"""What the checks accept."""

from __future__ import annotations

from ..kernels.agreement import CODES_SHARE, SCALE_ULPS

# relative error (root mean square) of attention over the same packed rows, by the output's dtype:
# decode multiplies pairs of halves unless the model is in float32
ATTENTION = {"float16": 3e-3, "bfloat16": 6e-3, "float32": 1e-4}
# more queries than decode takes go through half rows and MLX's attention: relative error
MANY_QUERIES = 16
THROUGH_ROWS = {"float16": 3e-3, "bfloat16": 1e-2, "float32": 3e-3}
# largest error of a row value over the largest value, by the rows' type
ROWS = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}
DECODE = (
    "relative error "
    + ", ".join(f"{t:.0e} {d}" for d, t in ATTENTION.items())
    + ", or each row within the bound that a kernel's roundings give"
)
LARGEST = f"{ROWS['float32']:.0e} of the largest value"
MANY = f"; attention of {MANY_QUERIES} queries over the rows: relative error "
MANY += ", ".join(f"{t:.0e} {d}" for d, t in THROUGH_ROWS.items())
TOLERANCES = {
    "pack": f"at most {CODES_SHARE:.0e} of the codes off by one level (values at a decision "
    f"boundary), f16 rows equal, scales within {SCALE_ULPS} ulp, free rows zero",
    "decode": DECODE,
    "protected": DECODE,
    "dequantize": LARGEST + MANY,
    "segments": f"{LARGEST}, in half {ROWS['float16']:.0e}{MANY}",
}
