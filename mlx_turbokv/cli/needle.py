"""``mlx_turbokv needle``: needle in a haystack by cache configuration, compared with f16."""

from __future__ import annotations

import time
from typing import Any

import click

from ..errors import InputError
from . import options
from .command import Command
from .entry import console_script
from .output import Progress, format_record, write_json, write_result
from .runs import (
    asked_centre,
    centre_of,
    config_names,
    deadline_of,
    fitting_names,
    get_record,
    load_model,
    warn_about_context,
)  # fmt: skip
from .values import COUNT, UNIT, exclude

WHAT = "needle in a haystack by cache configuration"
DEFAULT_CONTEXTS = (512, 1024, 2048, 4096)
DEFAULT_CONFIGS = ("q8_0/q8_0", "q8_0/turbo3", "q8_0/turbo2", "la-v7", "turbo4/turbo3")


@click.command("needle", cls=Command)
@options.combined(options.model, options.dtype)
@click.option(
    "--text", "-f", default="sample", metavar="FILE|sample|wikitext-2",
    help="The haystack: any UTF-8 text; one too short for a context is repeated.",
)  # fmt: skip
@click.option(
    "-c", "--context", "contexts", multiple=True, type=COUNT,
    help="Tokens of the prompt and its answer; repeatable.  [default: 512, 1024, 2048, 4096]",
)  # fmt: skip
@click.option("--depths", default=5, type=COUNT, help="How many, evenly spaced.")
@click.option(
    "--depth", "depth_list", multiple=True, type=UNIT, help="A depth from 0 to 1 instead."
)
@click.option(
    "--needle", "kinds", multiple=True, metavar="KIND",
    help="password (turbo-rainbow-42), number, or distractors (a number among four others); "
    "repeatable.  [default: all three]",
)  # fmt: skip
@click.option("-n", "--repeats", default=1, type=COUNT, help="Runs with other text.")
@options.configs(
    f"As in perplexity; repeatable; f16/f16 is put first.  [default: {', '.join(DEFAULT_CONFIGS)}]"
)
@options.combined(options.centre, options.prefill_step_size, options.backend)
@options.combined(options.time_limit, options.output, options.json)
@click.option("--plot", metavar="PNG", help="Draw a heatmap of contexts and depths there.")
@options.combined(options.resume, options.from_record)
def command(**args: Any) -> None:
    """Hide a fact in a long text and ask for it, through several caches.

    The f16 cache is always measured too, to tell misses of the model from misses of the cache.
    """
    record = get_record(args, WHAT, _measure, render, _left)
    if args["plot"] is not None:
        from ..evaluate.plots import as_png, needle_figure

        write_result(args["plot"], as_png(needle_figure(record)))


def _left(record: dict) -> list[str]:
    n_cases = int(record["not_measured"])
    return [f"{n_cases} cases"] if n_cases else []


def _measure(args: dict[str, Any]) -> dict:
    from ..evaluate.haystack import KINDS, make_cases
    from ..evaluate.text import load_text

    deadline = deadline_of(args)
    exclude("depths", "depth_list")
    names = config_names(args["configs"] or DEFAULT_CONFIGS)
    centre = asked_centre(args, names)
    depths = list(args["depth_list"]) or even_depths(args["depths"])
    contexts = list(dict.fromkeys(args["contexts"] or DEFAULT_CONTEXTS))
    cases = make_cases(contexts, depths, list(args["kinds"] or KINDS), args["repeats"])
    source = load_text(args["text"])
    loaded = load_model(args)
    warn_about_context(loaded, max(contexts))
    names = fitting_names(loaded.model, names, args)
    return measure(
        loaded, source, names, cases, args["backend"], args["json_path"], args["resume"],
        deadline, args["prefill_step_size"], centre_of(centre, loaded),
    )  # fmt: skip


def even_depths(n: int) -> list[float]:
    """``n`` depths from 0 to 1; one alone is in the middle."""
    return [0.5] if n == 1 else [i / (n - 1) for i in range(n)]


def measure(
    loaded: Any, source: Any, names: list[str], cases: list, backend: str, json_path: str | None,
    resume: bool | None, deadline: float | None = None, prefill_step_size: int = 2048,
    centre: bool | str = True,
) -> dict:  # fmt: skip
    """Run the cases with progress and a journal; write and return the record."""
    from ..evaluate.checkpoint import Journal, journal_path
    from ..evaluate.configuration import backend_of, prepare
    from ..evaluate.haystack import Haystack
    from ..evaluate.needle import run_cases, summarise
    from ..evaluate.record import checkout_commit, command_line, environment, model_record

    configs = [prepare(loaded.model, name, backend, centre=centre) for name in names]
    versions, model = environment(), model_record(loaded)
    settings = {
        "model": model["source"],
        "text_sha256": source.sha256,
        "configurations": [
            [c.name, c.layers, c.backend, c.centred, str(c.protection)] for c in configs
        ],
        "versions": {k: versions[k] for k in ("mlx_turbokv", "mlx", "mlx_lm", "device")},
    }
    journal = Journal(journal_path("needle", settings, json_path), settings, resume)
    haystack = Haystack(loaded.tokenizer, source.text)
    haystack.check(cases)
    started = time.perf_counter()
    with Progress(len(cases) * len(configs)) as progress:
        records = run_cases(
            loaded.model, haystack, cases, configs, journal, progress, deadline, prefill_step_size
        )
    if not records:
        raise InputError("The time limit was over before the first case.")
    record = {
        "what": WHAT,
        "model": model,
        "text": {"name": source.name, "sha256": source.sha256},
        "contexts": sorted({c.context for c in cases}),
        "depths": sorted({c.depth for c in cases}),
        "kinds": sorted({c.kind for c in cases}),
        "repeats": 1 + max(c.repeat for c in cases),
        "backend": backend_of(configs),
        "seconds": round(time.perf_counter() - started, 1),
        "command": command_line(),
        "commit": checkout_commit(),
        "environment": versions,
        "not_measured": len(cases) - len(records),
        "summary": summarise(records, configs),
        "cases": records,
    }
    if json_path is not None:
        write_json(json_path, record)
    if len(records) == len(cases):
        journal.done()
    return record


def render(record: dict, output: str) -> str:
    """The record as text, Markdown or JSON."""
    from ..evaluate.tables import needle_table

    return format_record(record, needle_table, output)


main = console_script(command)
