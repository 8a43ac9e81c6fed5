"""Quality against bits of one model: pairs, presets and other projects' caches, in one record.

    python scripts/quality_table.py --model FILE --text FILE --json quality_qwen.json

On a GPU all windows go side by side; all configurations take the same ones. The record is written
after each configuration; the same command measures what it lacks, so a run that was stopped goes
on, and configurations and lengths (-c) can be added. Turbo keys are centred and scaled as a model's
first use measures them; --keys asks for means alone, with scales, both of more windows, or for the
key bias.
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
from quality_windows import ASKED_WINDOWS, BIAS, MEAN, REFERENCE, SCALES, Measurement, Windows  # noqa: E402

from mlx_turbokv.centring import first_use  # noqa: E402
from mlx_turbokv.cli import options  # noqa: E402
from mlx_turbokv.cli.entry import run  # noqa: E402
from mlx_turbokv.cli.output import print_status, read_json  # noqa: E402
from mlx_turbokv.cli.runs import load_model  # noqa: E402
from mlx_turbokv.cli.values import refuse  # noqa: E402
from mlx_turbokv.errors import InputError  # noqa: E402
from mlx_turbokv.kernels.backend import select_backend  # noqa: E402

WHAT = "quality against bits"
PAIRS = (
    "turbo4/turbo3", "turbo3/turbo3", "turbo2/turbo2", "turbo5/turbo4", "turbo6/turbo5",
    "q8_0/q8_0", "turbo3/turbo2", "turbo4/turbo4", "q8_0/turbo3", "q8_0/turbo2", "q8_0/turbo4",
    "turbo5/turbo5", "turbo6/turbo6",
)  # fmt: skip
PRESETS = ("la-v7", "la-v5", "la-v6", "mode-2")
PEERS = ("mlx-kv8:64", "mlx-kv4:64", "mlx-kv3:64", "llama-q4_0", "llama-q5_1")
# what calibrate found for the default model
POLICIES = tuple(f"benchmarks/policies/bits-{bits}.json" for bits in ("4.25", "3.75", "3.25"))
LONG = ("turbo4/turbo3", "turbo3/turbo3", "turbo2/turbo2", "la-v7")
SCALED = ("turbo4/turbo3", "turbo3/turbo3", "turbo2/turbo2")
WINDOWS = {2048: 16, 512: 64, 8192: 4}
CACHE_LIMIT = 4 << 30


def protected(name: str, n_ctx: int) -> str:
    """A configuration with the protected tokens of windows of this length."""
    return f"{name}+32,{128 if n_ctx >= 2048 else 64}"


def plan(n_ctx: int) -> list[tuple[str, str | None]]:
    """(configuration, what keys are centred by, None for the default), the weightiest first.

    Protection is always written out: +0,0 is none.
    """
    long = n_ctx > 2048
    names = LONG if long else (*PAIRS, *PRESETS)
    found = [protected(name, n_ctx) for name in names] + [f"{name}+0,0" for name in names]
    if not long:
        found[len(PAIRS) : len(PAIRS)] = PEERS
        found += [
            name for policy in POLICIES for name in (protected(policy, n_ctx), policy + "+0,0")
        ]
    rows: list[tuple[str, str | None]] = [(name, None) for name in found]
    if n_ctx == 2048:
        rows += [(protected(name, n_ctx), keys) for name in SCALED for keys in (MEAN, SCALES)]
    return rows


def table_of(record: dict, n_ctx: int, windows: int) -> dict:
    """A record's table of windows of one length; a new one where it has none.

    Raises: InputError where it has other windows.
    """
    table = record["tables"].setdefault(str(n_ctx), {"n_windows": windows, "rows": []})
    if table["n_windows"] != windows:
        raise InputError(
            f"The record has {table['n_windows']} windows of {n_ctx} tokens, not {windows}: give "
            "another --json."
        )
    return table


def measured_elsewhere(record: dict) -> dict:
    """What a row says of this machine where its record is another's."""
    import record as environment

    here = environment.record()
    if here["device"] == record.get("device"):
        return {}
    return {key: here[key] for key in ("device", "commit", "date")}


def measure_length(run: Measurement, record: dict, n_ctx: int, chunks: int, rows: Any, save: Any,
                   deadline: float) -> None:  # fmt: skip
    """Measure what a record lacks of one length; ``save`` is called after each configuration."""
    name = run.loaded.name
    # a row is known by what was asked for
    asked = {(row["config"], row["asked_keys"])
             for row in record["tables"].get(str(n_ctx), {}).get("rows", [])}  # fmt: skip
    missing = [row for row in ((REFERENCE, None), *rows) if row not in asked]
    if not missing:
        return
    started = time.perf_counter()
    if started > deadline:
        print_status(f"{name} {n_ctx}: no time for {missing[0][0]} and what comes after it.")
        return
    windows = Windows(run, n_ctx, chunks)
    table = table_of(record, n_ctx, windows.n)
    where = measured_elsewhere(record)
    took = time.perf_counter() - started
    print_status(f"{name} {n_ctx}: {windows.n} windows, "
                 f"reference in {took:.1f} s")  # fmt: skip
    for config_name, keys in missing:
        started = time.perf_counter()
        if started + 1.5 * took > deadline:
            print_status(f"{name} {n_ctx}: no time for {config_name} and what comes after it.")
            return
        try:
            row = windows.row(*run.prepared(config_name, keys))
        except InputError as error:
            print_status(f"{name} {n_ctx}: left out {config_name}: {error}")
            continue
        seconds = time.perf_counter() - started
        # an estimate of the next one, which is new to the machine as well
        took = max(seconds, took / 2)
        asked_for = {"asked_keys": keys, "seconds": round(seconds, 2)}
        table["rows"].append(row | asked_for | where)
        save(record)
        print_status(f"{name} {n_ctx} {config_name} ({row['keys']}): KLD {row['kld']['mean']:.5f}, "
                     f"same top {row['same_top']['mean']:.4f}, {seconds:.1f} s")  # fmt: skip


def start_record(
    path: Path, loaded: Any, source: Any, backend: str | None, what: str = WHAT, **more: Any
) -> dict:
    """The record at ``path``, or a new one with ``more`` in it.

    Raises: InputError where it cannot be read, or is of another model or text, or something else.
    """
    import record as environment

    from mlx_turbokv.evaluate.record import model_record

    about = {"what": what, "model": model_record(loaded), "text": source.record()}
    if path.is_file():
        found = read_json(path, what)
        for key, value in about.items():
            if found.get(key) != value:
                raise InputError(f"{path} is a record with another {key}: give another --json.")
        return found
    return environment.record(**about, backend=backend, **more, tables={})


@click.command()
@options.combined(options.model, options.dtype, options.backend)
@click.option("--text", "-f", metavar="FILE|sample|wikitext-2")
@click.option("-c", "--ctx-size", "lengths", multiple=True, type=click.IntRange(8),
              help="Tokens a window; repeatable.  [default: 2048, 512, 8192]")  # fmt: skip
@click.option("--chunks", type=click.IntRange(1), help="Windows.  [default: 16, 64 and 4]")
@click.option("--config", "configs", multiple=True, help="Instead of the table's.")
@click.option("--keys", type=click.Choice([BIAS, MEAN, SCALES]), help="For --config.")
@click.option("--time-limit", type=float, metavar="SECONDS",
              help="Start no configuration that would end later.")  # fmt: skip
@click.option("--keys-file", metavar="NAME", help="Write the key references there, for --keys.")
@click.option("--json", "json_path", required=True, metavar="FILE")
def command(
    text, lengths, chunks, configs, keys, backend, time_limit, keys_file, json_path, **args
) -> None:
    """Measure the tables of one model."""
    import mlx.core as mx

    from mlx_turbokv.evaluate.names import check_name
    from mlx_turbokv.evaluate.text import load_text

    deadline = time.perf_counter() + (time_limit or 1e9)
    if not configs:
        refuse(["keys"], "without --config")
    for name in configs:
        check_name(name)
    source = load_text(text)
    loaded = load_model(args)
    backend = select_backend(backend).name
    if mx.default_device().type == mx.DeviceType.gpu:
        mx.set_cache_limit(CACHE_LIMIT)
    path = Path(json_path)
    calibration = {"text": "sample", "windows": first_use.N_WINDOWS, "tokens": first_use.N_CTX,
                   "windows_asked_for": ASKED_WINDOWS}  # fmt: skip
    record = start_record(path, loaded, source, backend, calibration=calibration)
    from mlx_turbokv.files import write_text

    def save(record: dict) -> None:
        write_text(path, json.dumps(record) + "\n")

    run = Measurement(loaded, source, backend)
    if keys_file:
        from mlx_turbokv.centring.references import save_references

        save_references(keys_file, run.first_use)
    for n_ctx in lengths or WINDOWS:
        rows = [(name, keys) for name in configs] if configs else plan(n_ctx)
        windows = chunks or WINDOWS.get(n_ctx, 16)
        measure_length(run, record, n_ctx, windows, rows, save, deadline)


if __name__ == "__main__":
    run(command)
