"""Files that are replaced when they are complete, and files that are read."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from mlx_turbokv.cli.output import read_json
from mlx_turbokv.errors import InputError
from mlx_turbokv.evaluate.text import load_text
from mlx_turbokv.files import parse_json, read_bytes, read_text, replacing, write_text
from mlx_turbokv.loading.config import read_config
from mlx_turbokv.policy import load_policy


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


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_an_existing_file_keeps_its_mode(tmp_path, mode):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(mode)
    write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == mode


def test_a_private_file_is_never_readable_by_others(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o400)
    with replacing(path) as temporary:
        assert temporary.stat().st_mode & 0o777 == 0o600
        temporary.write_text("new")
    assert path.stat().st_mode & 0o777 == 0o400 and path.read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_a_new_file_follows_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "new")
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("exists", [True, False])
def test_a_symbolic_link_stays_and_its_target_is_written(tmp_path, exists):
    there = tmp_path / "there"
    there.mkdir()
    target, link, second = there / "target.txt", tmp_path / "link.txt", tmp_path / "second.txt"
    if exists:
        target.write_text("old")
    link.symlink_to(os.path.join("there", "target.txt"))
    second.symlink_to(link)
    write_text(second, "new")
    assert link.is_symlink() and second.is_symlink()
    assert target.read_text() == "new" and not target.is_symlink()
    assert os.listdir(there) == ["target.txt"]


def test_only_files_are_replaced(tmp_path):
    fifo, loop = tmp_path / "fifo", tmp_path / "loop"
    os.mkfifo(fifo)
    loop.symlink_to(loop)
    for path in (fifo, loop, tmp_path, "/dev/null"):
        with pytest.raises(OSError):
            write_text(path, "new")
    assert fifo.is_fifo() and loop.is_symlink() and os.path.exists("/dev/null")
    assert sorted(os.listdir(tmp_path)) == ["fifo", "loop"]


@pytest.mark.parametrize("read", [read_bytes, read_text])
def test_only_files_are_read(tmp_path, read):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (fifo, "/dev/zero", tmp_path):
        with pytest.raises(OSError, match="not a regular file|directory"):
            read(path)
    with pytest.raises(OSError) as missing:
        read(tmp_path / "none")
    assert missing.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    "read",
    [
        load_text,
        lambda path: read_json(path, "x"),
        lambda path: read_config(Path(path), path),
        load_policy,
    ],
    ids=["text", "record", "config", "policy"],
)
def test_inputs_of_commands_are_files(tmp_path, read):
    fifo = tmp_path / "fifo.json"
    os.mkfifo(fifo)
    with pytest.raises(InputError, match="not a regular file"):
        read(str(fifo))


def test_text_is_utf_8_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9")
    assert read_text(path) == "caf\u00e9"
    path.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError):
        read_text(path)


def test_json_that_is_nested_too_deeply_is_a_value_error():
    assert parse_json('[{"a": 1}]') == [{"a": 1}]
    for text in ("[" * 200_000, '{"a":' * 200_000, "{", "1" * 5000):
        with pytest.raises(ValueError):
            parse_json(text)
