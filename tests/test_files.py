"""Files that are replaced when they are complete."""

from __future__ import annotations

import pytest

from mlx_turbokv.files import replacing, write_text


def test_a_file_is_replaced_with_the_mode_of_a_new_file(tmp_path):
    new = tmp_path / "new.json"
    new.touch()
    write_text(tmp_path / "a.json", "old")
    write_text(tmp_path / "a.json", "caf\u00e9")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "caf\u00e9"
    assert (tmp_path / "a.json").stat().st_mode == new.stat().st_mode
    assert len(list(tmp_path.iterdir())) == 2


def test_an_error_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1
