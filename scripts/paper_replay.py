#!/usr/bin/env python3
"""Replays the paper "Layer-Aware V Compression": its tables and claims, measured on a model.

    python scripts/paper_replay.py --model FILE --text FILE --json benchmarks/paper/qwen.json
    python scripts/paper_replay.py --from FILE [--needle FILE] [--bench FILE]

The first form measures. The record is written after each configuration; the same command measures
what it lacks, and configurations and lengths (-c) can be added. The second form only prints the
tables and claims of a record. V's formats have a scale per 32 values, the paper's 2.5 and 3.5 bits,
unless --group head. On a hybrid model boundaries by raw layer index, as the paper's code counts,
are measured as well as those by KV layer. No tokens are protected, and keys are not centred.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import click  # noqa: E402
import paper_keys  # noqa: E402
from pages import paper  # noqa: E402
from paper_roles import LENGTHS, choices, plan  # noqa: E402
from quality_table import CACHE_LIMIT, measure_length, start_record  # noqa: E402
from unprotected_windows import Unprotected  # noqa: E402

from mlx_turbokv.cli import bench, needle, options  # noqa: E402
from mlx_turbokv.cli.entry import run  # noqa: E402
from mlx_turbokv.cli.output import print_status, read_json  # noqa: E402
from mlx_turbokv.cli.runs import load_model  # noqa: E402
from mlx_turbokv.cli.values import refuse, refuse_all_but  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.kernels.backend import select_backend  # noqa: E402

WHAT = "the paper's claims"


def fitting_lengths(lengths: tuple[int, ...], loaded: Any) -> list[int]:
    """The lengths that a model was made for; those that are left out are said."""
    most = loaded.max_context or max(lengths)
    for n_ctx in lengths:
        if n_ctx > most:
            print_status(f"Left out windows of {n_ctx:,}: {loaded.name} was made for {most:,} "
                         "tokens.")  # fmt: skip
    return [n_ctx for n_ctx in lengths if n_ctx <= most]


def measure(
    loaded: Any, source: Any, path: Path, lengths: list[int], chunks: int | None, group: str,
    backend: str, deadline: float,
) -> dict:  # fmt: skip
    """Measure what the record lacks: figures of keys, then windows from the shortest on.

    Raises: InputError where it is of another model, text, group or number of windows.
    """
    from mlx_turbokv.files import write_text
    from mlx_turbokv.model.text_windows import cut_windows

    record = start_record(path, loaded, source, backend, WHAT, group=group)
    if record["group"] != group:
        raise InputError(f"{path} is a record with another group: give another --json.")

    def save(found: dict) -> None:
        write_text(path, json.dumps(found) + "\n")

    if "keys" not in record and time.perf_counter() < deadline:
        count, n_ctx = paper_keys.WINDOWS
        windows = cut_windows(loaded.tokenizer, source.text, n_ctx, count)
        record["keys"] = paper_keys.key_statistics(loaded.model, windows, group)
        save(record)
        print_status(f"{loaded.name}: keys of {len(windows)} windows of {n_ctx} tokens")
    found = choices(loaded.model, group)
    measurement = Unprotected(loaded, source, backend, found)
    for n_ctx in sorted(lengths):
        rows = [(name, None) for name in plan(n_ctx, group, found)]
        measure_length(
            measurement, record, n_ctx, chunks or LENGTHS.get(n_ctx, 4), rows, save, deadline
        )
    return record


def printed(record: dict, needles: dict | None, speeds: dict | None) -> str:
    """Tables and claims of one record."""
    model = paper.Measured(record["model"]["name"], needle=needles)
    model.add(record)
    return paper.report([model], speeds)


@click.command()
@options.combined(options.model, options.dtype, options.backend)
@click.option("--text", "-f", help="A file, sample, or wikitext-2 (default).")
@click.option("-c", "--ctx-size", "lengths", multiple=True, type=click.IntRange(8),
              help="Tokens a window; repeatable.  [default: 512, 2048, 8192, 16384]")  # fmt: skip
@click.option("--chunks", type=click.IntRange(1), help="Windows.  [default: 64, 16, 8 and 4]")
@click.option("--keys-only", is_flag=True, help="Measure keys by layer, and no windows.")
@click.option("--group", type=click.Choice(["32", "head"]), default="32", show_default=True)
@click.option("--time-limit", type=float, metavar="SECONDS",
              help="Start no configuration that would end later.")  # fmt: skip
@click.option("--json", "json_path", metavar="FILE", help="Measure, and keep the record there.")
@click.option("--from", "from_path", metavar="FILE", help="Print this record instead.")
@click.option("--needle", "needles", metavar="FILE", help="A needle record, to judge by.")
@click.option("--bench", "speeds", metavar="FILE", help="A bench record, to show.")
def command(
    text,
    lengths,
    chunks,
    keys_only,
    group,
    backend,
    time_limit,
    json_path,
    from_path,
    needles,
    speeds,
    **args,
) -> None:
    """Print the paper's tables and claims with what is measured here."""
    deadline = time.perf_counter() + (time_limit or 1e9)
    if (json_path is None) == (from_path is None):
        raise InputError("Give either --json FILE, to measure, or --from FILE, to print a record.")
    if from_path is not None:
        refuse_all_but(["from_path", "needles", "speeds"], "with --from")
    if keys_only:
        refuse(["lengths", "chunks"], "with --keys-only")
    needle_record = read_json(needles, needle.WHAT) if needles else None
    speed_record = read_json(speeds, bench.WHAT) if speeds else None
    if from_path is not None:
        record = read_json(from_path, WHAT)
    else:
        import mlx.core as mx

        from mlx_turbokv.evaluate.text import load_text

        source, loaded = load_text(text), load_model(args)
        backend = select_backend(backend).name
        if mx.default_device().type == mx.DeviceType.gpu:
            mx.set_cache_limit(CACHE_LIMIT)
        wanted = [] if keys_only else fitting_lengths(lengths or tuple(LENGTHS), loaded)
        suffix = ":32" if group == "32" else ""
        record = measure(loaded, source, Path(json_path), wanted, chunks, suffix, backend, deadline)
    print(printed(record, needle_record, speed_record))


if __name__ == "__main__":
    run(command)
