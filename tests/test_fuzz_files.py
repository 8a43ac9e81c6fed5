"""Seeded mutations of every kind of file that the package reads: each is used or refused.

FUZZ_MUTATIONS sets how many there are of each kind; FUZZ_KERNELS=1 runs the kernels on the CPU,
under their sanitizer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import fuzz_worker
import pytest

pytestmark = pytest.mark.slow

HELPERS = Path(fuzz_worker.__file__).parent
MUTATIONS = int(os.environ.get("FUZZ_MUTATIONS", 300))
SECONDS_EACH = 2  # on average, of a slow machine; one alone may take fuzz_worker.SECONDS


@pytest.mark.parametrize("kind", fuzz_worker.KINDS)
def test_mutated_files_are_used_or_refused_in_one_sentence(tmp_path, kind):
    paths = [HELPERS, HELPERS.parent, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    result = subprocess.run(
        [sys.executable, HELPERS / "fuzz_worker.py", kind, tmp_path, "0", str(MUTATIONS)],
        capture_output=True,
        text=True,
        timeout=60 + SECONDS_EACH * MUTATIONS,
        env={**os.environ, "PYTHONPATH": ":".join(map(str, paths)), "HF_HUB_OFFLINE": "1"},
    )
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    ended = [line for line in lines if "outcome" in line]
    assert result.returncode == 0, (lines[-1:], result.stderr[-3000:])
    assert len(ended) == MUTATIONS
    wrong = [line for line in ended if line["outcome"] not in ("used", "refused")]
    report = "\n".join(f"seed {x['seed']}: {x['outcome']}\n{x.get('text')}" for x in wrong[:5])
    assert not wrong, f"{len(wrong)} of {MUTATIONS}\n{report}"
    # a mutation that is never refused, or never used, would test nothing
    assert {"used", "refused"} == {line["outcome"] for line in ended}
    assert max(line["seconds"] for line in ended) < fuzz_worker.SECONDS
