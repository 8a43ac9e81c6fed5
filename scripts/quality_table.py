"""Quality against bits on the default model: uniform pairs, presets, calibrated policies, mlx-lm.

    python scripts/quality_table.py --text FILE --json benchmarks/quality.json
    python scripts/quality_table.py --text FILE -c 2048 --chunks 8 --json quality_long.json

It is the command `perplexity` with many configurations. Several processes (--processes) take every
n-th window each; what they measured is joined window by window before anything is averaged, so the
record is the one that a single process writes. An interrupted run goes on where it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import click  # noqa: E402

from mlx_turbokv.cli import options, perplexity  # noqa: E402
from mlx_turbokv.cli.entry import run  # noqa: E402
from mlx_turbokv.cli.output import Progress, print_status, write_json  # noqa: E402
from mlx_turbokv.cli.runs import load_model  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.evaluate.checkpoint import Checkpoint, journal_path  # noqa: E402

POLICIES = "benchmarks/policies"
BUDGETS = ("la-v7", "5.25", "4.75", "4.25", "3.75", "3.5", "3.25", "3", "2.75")
CONFIGS = (
    "f16/f16",
    # one format for K and V, then K with more bits than V
    "q8_0/q8_0", "turbo6/turbo6", "turbo5/turbo5", "turbo4/turbo4", "turbo3/turbo3",
    "turbo2/turbo2",
    "q8_0/turbo5", "q8_0/turbo4", "q8_0/turbo3", "q8_0/turbo2", "turbo6/turbo5", "turbo6/turbo4",
    "turbo5/turbo4", "turbo5/turbo3", "turbo4/turbo3", "turbo4/turbo2", "turbo3/turbo2",
    # the paper's layer-adaptive modes
    "la-v5", "la-v6", "la-v7", "mode-1", "mode-2", "mode-10",
    # what calibrate found on the package's sample
    *(f"{POLICIES}/bits-{budget}.json" for budget in BUDGETS),
    # mlx-lm's kv_bits
    "mlx-kv8:32", "mlx-kv8:64", "mlx-kv4:32", "mlx-kv4:64", "mlx-kv3:32", "mlx-kv3:64",
    "mlx-kv2:32", "mlx-kv2:64",
)  # fmt: skip


def share_path(json_path: str, share: int) -> Path:
    """The journal of one process."""
    return Path(f"{json_path}.share{share}")


def journal(ready: perplexity.Run, json_path: str, share: int, shares: int) -> Checkpoint:
    """What a process has finished; another number of processes has other windows in it.

    Raises: InputError where the file belongs to another run, or to another number of processes.
    """
    return Checkpoint(share_path(json_path, share), ready.settings | {"processes": shares})


def measure_share(loaded, ready: perplexity.Run, json_path: str, share: int, shares: int) -> None:
    """Measure every ``shares``-th window from window ``share`` on into a journal."""
    from mlx_turbokv.evaluate.perplexity import evaluate_windows

    windows, kept = ready.windows[share::shares], journal(ready, json_path, share, shares)
    with Progress(len(windows) * len(ready.configs)) as progress:
        evaluate_windows(loaded.model, windows, ready.configs, kept, progress)


def join(ready: perplexity.Run, json_path: str, shares: int) -> int:
    """Put the finished windows of all processes into the journal of the whole run; their number."""
    found = {}
    for share in range(shares):
        for i, results in journal(ready, json_path, share, shares).windows.items():
            found[share + i * shares] = results
    whole = Checkpoint(journal_path("perplexity", ready.settings, json_path), ready.settings, False)
    for index in sorted(found):
        whole.add({"window": index, "results": found[index]})
    return len(found)


def run_shares(shares: int) -> bool:
    """Run one process a share with this command's arguments; True if all went well.

    Each has a folder for the kernels that it compiles, since MLX's processes cannot share one; it
    begins with what is in MLX_PTX_CACHE_DIR.
    """
    processes, compiled = [], os.environ.get("MLX_PTX_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        for share in range(shares):
            command = [sys.executable, *sys.argv, "--share", str(share)]
            cache = {"MLX_PTX_CACHE_DIR": f"{folder}/{share}"}
            if compiled and Path(compiled).is_dir():
                shutil.copytree(compiled, f"{folder}/{share}")
            processes.append(subprocess.Popen(command, env={**os.environ, **cache}))
        return not any([process.wait() for process in processes])


@click.command()
@options.combined(options.model, options.dtype, options.backend)
@click.option("--text", "-f", metavar="FILE|sample|wikitext-2")
@click.option("-c", "--ctx-size", default=512, show_default=True)
@click.option("--chunks", default=64, show_default=True)
@click.option("--config", "configs", multiple=True, help="Instead of the table's.")
@click.option("--processes", default=1, show_default=True, type=click.IntRange(1))
@click.option("--share", type=int, hidden=True)
@click.option("--json", "json_path", required=True, metavar="FILE")
def command(text, configs, ctx_size, chunks, backend, processes, share, json_path, **args) -> None:
    """Measure the table and write its record."""
    from mlx_turbokv.evaluate.tables import perplexity_table
    from mlx_turbokv.evaluate.text import load_text

    started = time.perf_counter()
    source = load_text(text)
    if share is None and processes > 1 and not run_shares(processes):
        raise InputError("A process failed; what is finished is kept: run the command again.")
    wanted = load_model(args), source, list(configs or CONFIGS), ctx_size, chunks, backend
    if processes > 1:
        ready = perplexity.make_run(*wanted)
        if share is not None:
            return measure_share(wanted[0], ready, json_path, share, processes)
        n = join(ready, json_path, processes)
        print_status(f"{n} windows were measured by {processes} processes.")
    record = perplexity.measure(*wanted, json_path, None)
    record |= {"seconds": round(time.perf_counter() - started, 1), "processes": processes}
    del record["windows_kept_from_before"]
    write_json(json_path, record)
    for i in range(processes):
        share_path(json_path, i).unlink(missing_ok=True)
    print(perplexity_table(record).text())


if __name__ == "__main__":
    run(command)
