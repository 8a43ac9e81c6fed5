"""Fixtures that several test files share."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

# tests compare kernels themselves; those of the self-check turn it on
os.environ.setdefault("TURBOKV_SELFCHECK", "0")

import mlx_turbokv  # noqa: E402, F401 - before mlx.core, so that OpenBLAS is used

# isort: split
import pytest
from hypothesis import settings
from metal_host import HostMetal
from metal_host.coverage import FileCoverage, collect, report, session_folder

from mlx_turbokv.files import CACHE_VARIABLE, cache_dir

# A script's background processes ignore Ctrl-C, and so would what the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A slow machine is no failure.
settings.register_profile("mlx_turbokv", deadline=None)
settings.load_profile("mlx_turbokv")


@pytest.fixture(scope="session")
def metal_host() -> Iterator[HostMetal]:
    """Runs Metal kernels on the CPU, and counts the lines of metal/ that run."""
    host = HostMetal(coverage=session_folder())
    yield host
    host.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test that is not marked slow is fast."""
    for item in items:
        if item.get_closest_marker("slow") is None:
            item.add_marker(pytest.mark.fast)


# files that are fetched once
FETCHED = ("SmolLM2-135M-Instruct.Q4_1.gguf", "wikitext-2-raw-test.txt")
_found: dict[str, FileCoverage] = {}  # lines of metal/, once a run has ended
_missed: list[str] = []  # why a run failed in which no test did


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node) -> None:
    """The processes of `pytest -n` count in one folder: gcov's counters are added under a lock."""
    node.workerinput["metal_host_coverage"] = str(session_folder())


def pytest_configure(config: pytest.Config) -> None:
    """In a process of `pytest -n`, counts where the others do, and uses their cache folder."""
    if hasattr(config, "workerinput"):
        os.environ["METAL_HOST_COVERAGE"] = config.workerinput["metal_host_coverage"]
    else:
        os.environ[CACHE_VARIABLE] = _session_cache(config)


def _session_cache(config: pytest.Config) -> str:
    """A cache folder of this run alone, in which a model's keys are measured once.

    Fetched files stay in the user's folder: links, which lead nowhere until then, are followed.
    """
    users, folder = cache_dir(), tempfile.mkdtemp(prefix="mlx_turbokv-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    with contextlib.suppress(OSError):
        users.mkdir(parents=True, exist_ok=True)
        for name in FETCHED:
            (Path(folder) / name).symlink_to(users.resolve() / name)
    return folder


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A run of all tests fails where a line of metal/ never ran on the CPU."""
    if hasattr(session.config, "workerinput") or session_folder.cache_info().currsize == 0:
        return
    _found.update(collect(session_folder()))
    if "METAL_HOST_COVERAGE" not in os.environ:
        shutil.rmtree(session_folder())
    option = session.config.option
    by_name = session.config.args_source is pytest.Config.ArgsSource.ARGS
    some = by_name or option.keyword or option.markexpr
    if not some and session.exitstatus == 0 and any(c.missed for c in _found.values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        _missed.append("Error: a run of all tests must run every line of metal/.")


def pytest_terminal_summary(terminalreporter) -> None:
    """Prints which lines of metal/ ran on the CPU, if any did."""
    if any(c.ran for c in _found.values()):
        terminalreporter.section("lines of metal/ that ran on the CPU")
        terminalreporter.write_line(report(_found))
    for sentence in _missed:
        terminalreporter.write_line(sentence)
