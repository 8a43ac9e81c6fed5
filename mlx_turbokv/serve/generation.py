"""The thread that generates."""

from __future__ import annotations

import mlx.core as mx
from mlx_lm import server


class Generator(server.ResponseGenerator):
    """Clears its thread's streams: MLX aborts a process that ends while they exist."""

    def _run_generate(self) -> None:
        try:
            super()._run_generate()
        finally:
            mx.clear_streams()
