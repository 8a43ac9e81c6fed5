"""Prompt caches on disk: whatever ends the process or damages a file, only whole entries count."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import disk_writer
import numpy as np
import pytest
from disk_writer import LENGTHS, entry_of, kind, same, tokens_of
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mlx_turbokv.errors import InputError
from mlx_turbokv.serve.disk import DiskCache
from mlx_turbokv.serve.folder import INDEX, Folder
from mlx_turbokv.serve.writer import MOST_WAITING, Writer

KILLS = 2


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two conversations."""
    folder = tmp_path / "cache"
    disk = DiskCache(folder)
    for seed in (1, 2):
        disk.offer(kind(), entry_of(seed, 900))
    disk.close()
    return folder


def found(disk: DiskCache, seed: int, n: int = 1300, least: int = 1):
    return disk.find(kind(), tokens_of(seed, n), least)


def test_entry_is_found_after_a_restart(folder: Path) -> None:
    disk = DiskCache(folder)
    assert same(found(disk, 1), entry_of(1, 900))
    assert same(found(disk, 2), entry_of(2, 900))
    assert found(disk, 3) is None and found(disk, 1, least=901) is None
    assert same(found(disk, 1, n=400), entry_of(1, 900))
    disk.close()


def test_a_longer_conversation_replaces_its_prefix(folder: Path) -> None:
    disk = DiskCache(folder)
    disk.offer(kind(), entry_of(1, 1300))
    assert disk.wait(60)
    assert disk.totals[0] == 2 == len(list(folder.glob("entry-*")))
    assert same(found(disk, 1), entry_of(1, 1300))
    disk.close()


def test_least_recently_used_entries_go_first(folder: Path) -> None:
    size = next(folder.glob("entry-*")).stat().st_size
    disk = DiskCache(folder, int(2.5 * size))
    assert found(disk, 1) is not None
    disk.offer(kind(), entry_of(3, 900))
    assert disk.wait(60)
    assert found(disk, 2) is None and found(disk, 1) is not None and found(disk, 3) is not None
    assert disk.counts.evictions == 1
    disk.close()
    disk = DiskCache(folder, size // 2)
    disk.offer(kind(), entry_of(4, 900))
    disk.close()  # it could never be kept, so nothing goes for it
    assert sum(path.stat().st_size for path in folder.glob("entry-*")) < 2.5 * size


@settings(deadline=None, max_examples=8)
@given(seeds=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(LENGTHS)), max_size=8))
def test_files_never_exceed_the_limit(tmp_path_factory, seeds) -> None:
    folder = tmp_path_factory.mktemp("disk")
    disk = DiskCache(folder, 700_000)
    for seed, n in seeds:
        disk.offer(kind(), entry_of(seed, n))
        assert disk.wait(60)
        files = list(folder.glob("entry-*"))
        assert sum(path.stat().st_size for path in files) <= 700_000
        assert disk.totals == (len(files), sum(path.stat().st_size for path in files))
        held = found(disk, seed, n)
        assert held is not None and np.array_equal(held.tokens[:n], tokens_of(seed, n))
    disk.close()


PLACE = st.floats(0, 1, exclude_max=True)
ON_COPIES = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@contextlib.contextmanager
def copied(folder: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(shutil.copytree(folder, Path(name) / "cache"))


@ON_COPIES
@given(flips=st.dictionaries(PLACE, st.integers(1, 255), min_size=1, max_size=1), cut=PLACE)
def test_damaged_entry_is_never_used(folder: Path, flips: dict[float, int], cut: float) -> None:
    with copied(folder) as copy:
        path = sorted(copy.glob("entry-*"))[0]
        content = bytearray(path.read_bytes())
        for place, bits in flips.items():
            content[int(place * len(content))] ^= bits
        path.write_bytes(content[: int(cut * len(content))] if cut > 0.5 else content)
        disk = DiskCache(copy)
        entries = [found(disk, seed) for seed in (1, 2)]
        assert [entry is None for entry in entries].count(True) == 1
        assert all(
            entry is None or same(entry, entry_of(i + 1, 900)) for i, entry in enumerate(entries)
        )
        assert not path.exists()
        disk.close()


@ON_COPIES
@given(place=PLACE, noise=st.binary(min_size=1, max_size=64))
@example(place=0.12109375, noise=b"\x80")  # the error's text is no UTF-8
def test_damaged_index_gives_no_wrong_entry(folder: Path, place: float, noise: bytes) -> None:
    with copied(folder) as copy:
        path = copy / INDEX
        content = bytearray(path.read_bytes())
        first = int(place * len(content))
        content[first : first + len(noise)] = noise
        path.write_bytes(content)
        disk = DiskCache(copy)
        for seed in (1, 2):
            entry = found(disk, seed)
            assert entry is None or same(entry, entry_of(seed, 900))
        disk.offer(kind(), entry_of(3, 900))
        assert disk.wait(60)
        disk.close()


def test_an_index_names_no_other_files(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    database = sqlite3.connect(folder / INDEX)
    database.execute("UPDATE entries SET file = '../mine.safetensors' WHERE id = 1")
    database.commit()
    database.close()
    disk = DiskCache(folder)
    assert found(disk, 1) is None and mine.read_bytes() == b"mine"
    disk.close()
    held = Folder(folder)
    for name in ("../mine.safetensors", "/etc/passwd", "entry-0.safetensors", ""):
        with pytest.raises(ValueError, match="no entry's file"):
            held.remove(name)
    held.close()


def test_a_folder_that_goes_is_said_and_ends_nothing(folder: Path, caplog) -> None:
    disk = DiskCache(folder)
    shutil.rmtree(folder)
    assert found(disk, 1) is None
    disk.offer(kind(), entry_of(3, 900))
    assert disk.wait(60)
    assert found(disk, 3) is None
    assert "was not written to disk" in caplog.text
    disk.close()


def test_what_a_killed_process_left_is_removed(folder: Path) -> None:
    strangers = [folder / "entry-0123456789abcdef.safetensors", folder / ".turbokv-x-1.safetensors"]
    own = [folder / "notes.txt", folder / "other.safetensors"]
    for path in [*strangers, *own]:
        path.write_bytes(b"half")
    lost = sorted(folder.glob("entry-*"))[-1]
    lost.unlink()
    disk = DiskCache(folder)
    assert not any(path.exists() for path in strangers) and all(path.exists() for path in own)
    assert disk.totals[0] == 1 or lost in strangers
    disk.close()


def test_a_folder_serves_one_server(folder: Path, tmp_path: Path) -> None:
    disk = DiskCache(folder)
    with pytest.raises(InputError, match="in use by another server"):
        DiskCache(folder)
    disk.close()
    DiskCache(folder).close()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be used"):
        DiskCache(tmp_path / "file")
    assert folder.stat().st_mode & 0o077 == 0


class Number:
    def __init__(self, n: int, of: int = 0) -> None:
        self.n, self.of = n, of

    def continues(self, other: Number) -> bool:
        return self.of == other.of and self.n > other.n


def test_writer_leaves_out_what_is_continued_and_survives_errors() -> None:
    gate, written = threading.Event(), []

    def write(job: Number) -> None:
        gate.wait(10)
        if job.n == 1:
            raise OSError("no space left")
        written.append((job.of, job.n))

    writer = Writer(write)
    writer.put(Number(1))
    while len(writer.waiting()) != 1 or writer._waiting:
        time.sleep(0.01)
    for n in (2, 3, 4):
        writer.put(Number(n))
    assert len(writer.waiting()) == 2
    for of in range(1, MOST_WAITING + 1):
        writer.put(Number(2, of))
    assert len(writer.waiting()) == 1 + MOST_WAITING and writer.skipped == 1
    gate.set()
    writer.close()
    assert written == [(of, 2) for of in range(1, MOST_WAITING + 1)]


@pytest.mark.slow
def test_killed_writers_leave_whole_entries(tmp_path: Path) -> None:
    kill_writers(tmp_path / "cache", KILLS, seed=0)


def kill_writers(folder: Path, n_kills: int, seed: int) -> tuple[int, int]:
    """Kill processes while they write; (entries that were read, writes that were cut short)."""
    rng, first, n_read, n_cut = random.Random(seed), 0, 0, 0
    for _ in range(n_kills):
        command = [sys.executable, disk_writer.__file__, str(folder), str(first)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = [process.stdout.readline() for _ in range(rng.randint(1, 4))]
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        rest = [line for line in process.communicate()[0].splitlines(True) if line.endswith("\n")]
        written = [tuple(map(int, line.split())) for line in [*said, *rest]]
        named = {path.name for path in folder.iterdir()}
        disk = DiskCache(folder)
        n_cut += named != {path.name for path in folder.iterdir()}
        for conversation in {seed for seed, _ in written}:
            longest = max(n for seed, n in written if seed == conversation)
            most = min(longest, max(LENGTHS) - 1)  # a token is left to read
            entry = disk.find(kind(), tokens_of(conversation, max(LENGTHS)), most)
            assert same(entry, entry_of(conversation, len(entry.tokens)))
            n_read += 1
        assert disk.counts.damaged == 0
        disk.close()
        first = written[-1][0] + 1
    return n_read, n_cut
