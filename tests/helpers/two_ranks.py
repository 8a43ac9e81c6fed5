"""``mlx.launch`` with two processes on this machine, ring back-end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# test processes run beside each other, and mlx.launch's own port serves one run on a machine
LAUNCH = [
    sys.executable, str(Path(sys.executable).parent / "mlx.launch"), "-n", "2", "--backend", "ring",
    "--starting-port", str(20_000 + 8 * (os.getpid() % 2_000)), "--python", sys.executable, "--",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
SECONDS = 240
