#!/usr/bin/env python3
"""Writes metal/SHA256SUMS, with which doctor finds a kernel source that is not what was shipped.

Run it after every change under metal/; a test fails where it was forgotten.

    python scripts/metal_manifest.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mlx_turbokv.doctor.sources import MANIFEST, manifest_text  # noqa: E402


def main() -> None:
    """Write the manifest of the checkout."""
    (ROOT / "metal" / MANIFEST).write_text(manifest_text(ROOT / "metal"), encoding="ascii")


if __name__ == "__main__":
    main()
