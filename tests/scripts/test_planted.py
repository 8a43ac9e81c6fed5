"""Planted defects: what they replace is in the files."""

from pathlib import Path

import pytest
from planted import PLANTED, Defect

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("defect", PLANTED, ids=lambda defect: defect.what)
def test_what_a_defect_replaces_occurs_once(defect: Defect) -> None:
    assert (ROOT / defect.file).read_text(encoding="utf-8").count(defect.old) == 1
