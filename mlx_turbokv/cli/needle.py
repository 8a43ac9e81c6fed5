"""``mlx_turbokv needle``: a needle in a haystack, through packed caches and through f16."""

from __future__ import annotations

import time
from typing import Any

import click

from ..errors import InputError
from .entry import run
from .options import (
    BACKENDS,
    centre_from,
    centre_options,
    dtype_option,
    load_dtype,
    model_options,
)
from .output import Progress, check_writable, note, read_json, rendered, write_json

WHAT = "needle in a haystack by cache configuration"
DEFAULT_CONTEXTS = (512, 1024, 2048, 4096)
DEFAULT_CONFIGS = ("q8_0/q8_0", "q8_0/turbo3", "q8_0/turbo2", "la-v7", "turbo4/turbo3")
_OPEN = {"show_default": True}


@click.command("needle")
@model_options
@dtype_option
@click.option(
    "--text", "-f", default="sample", metavar="FILE|sample|wikitext-2",
    help="The haystack: any UTF-8 text; one too short for a context is repeated.", **_OPEN,
)  # fmt: skip
@click.option(
    "-c", "--context", "contexts", multiple=True, type=click.IntRange(1),
    help="Tokens of the prompt and its answer; repeatable.  [default: 512, 1024, 2048, 4096]",
)  # fmt: skip
@click.option(
    "--depths", default=5, type=click.IntRange(1), help="How many, spread evenly.", **_OPEN
)
@click.option(
    "--depth", "depth_list", multiple=True, type=float, help="A depth from 0 to 1 instead."
)
@click.option(
    "--needle", "kinds", multiple=True, metavar="KIND",
    help="password (turbo-rainbow-42), number, or distractors (a number beside four others); "
    "repeatable.  [default: all three]",
)  # fmt: skip
@click.option(
    "-n", "--repeats", default=1, type=click.IntRange(1), help="With other text.", **_OPEN
)
@click.option(
    "--config", "configs", multiple=True, metavar="CONFIG",
    help="As in perplexity; repeatable; f16/f16 is put first.  "
    f"[default: {', '.join(DEFAULT_CONFIGS)}]",
)  # fmt: skip
@centre_options
@click.option("--prefill-step-size", default=2048, type=click.IntRange(1), **_OPEN)
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", **_OPEN)
@click.option(
    "--time-limit", type=click.FloatRange(0), metavar="SECONDS", help="Start no case after this."
)
@click.option(
    "--output", type=click.Choice(["text", "markdown", "json"]), default="text",
    help="How the results are printed.", **_OPEN,
)  # fmt: skip
@click.option("--json", "json_path", metavar="FILE", help="Write the whole record there.")
@click.option("--plot", metavar="PNG", help="Draw a heatmap of contexts and depths there.")
@click.option(
    "--resume/--no-resume", default=None,
    help="Demand, or forget, the finished cases of an interrupted run; by default they are taken "
    "where the settings are the same.",
)  # fmt: skip
@click.option("--from", "from_path", metavar="FILE", help="Show this record; measure nothing.")
def command(**options: Any) -> None:
    """Hide a fact in a long text and ask for it, through several caches.

    The f16 cache always runs beside, so that a miss of the model is not a miss of the cache.
    """
    check_writable(options["json_path"])
    check_writable(options["plot"])
    if options["from_path"] is not None:
        record = read_json(options["from_path"], WHAT)
    else:
        if options["plot"] and not options["json_path"]:
            from ..evaluate.plots import require_matplotlib

            require_matplotlib()  # refused now, since nothing would be kept of the run
        record = _measured(options)
    print(render(record, options["output"]))
    if record["not_measured"]:
        note(f"Not measured within the time limit: {record['not_measured']} cases.")
    if options["plot"]:
        from ..evaluate.plots import plot_needle

        plot_needle(record, options["plot"])


def _measured(options: dict[str, Any]) -> dict:
    started = time.perf_counter()
    centre = centre_from(options["keys"], options["no_centre"])
    # MLX is imported by models, after the CPU's BLAS was looked for.
    from ..evaluate import configuration
    from ..evaluate.haystack import KINDS, make_cases
    from ..evaluate.text import load_text
    from ..loading.models import load

    names = list(dict.fromkeys([configuration.REFERENCE, *(options["configs"] or DEFAULT_CONFIGS)]))
    for name in names:
        configuration.check_name(name)
    depths = list(options["depth_list"]) or even_depths(options["depths"])
    contexts = list(dict.fromkeys(options["contexts"] or DEFAULT_CONTEXTS))
    kinds = list(options["kinds"] or KINDS)
    cases = make_cases(contexts, depths, kinds, options["repeats"])
    source = load_text(options["text"])
    loaded = load(
        options["model"],
        adapter_path=options["adapter_path"],
        trust_remote_code=options["trust_remote_code"],
        **load_dtype(options["dtype"]),
    )
    if loaded.max_context and max(contexts) > loaded.max_context:
        note(
            f"Warning: a context of {max(contexts)} is above the {loaded.max_context} tokens that "
            f"{loaded.name} was made for."
        )
    if not options["configs"]:
        names, reasons = configuration.fitting(loaded.model, names, options["backend"])
        for reason in reasons:
            note(reason)
    limit = options["time_limit"]
    return measure(
        loaded, source, names, cases, options["backend"], options["json_path"], options["resume"],
        None if limit is None else started + limit, options["prefill_step_size"],
        centre,
    )  # fmt: skip


def even_depths(n: int) -> list[float]:
    """``n`` depths from 0 to 1; one alone is in the middle."""
    return [0.5] if n == 1 else [i / (n - 1) for i in range(n)]


def measure(
    loaded: Any,
    source: Any,
    names: list[str],
    cases: list,
    backend: str,
    json_path: str | None,
    resume: bool | None,
    deadline: float | None = None,
    prefill_step_size: int = 2048,
    centre: bool | str = True,
) -> dict:
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
        "configurations": [[c.name, c.layers, c.backend, c.centred] for c in configs],
        "versions": {k: versions[k] for k in ("mlx_turbokv", "mlx", "mlx_lm", "device")},
    }
    journal = Journal(journal_path("needle", settings, json_path), settings, resume)
    haystack = Haystack(loaded.tokenizer, source.text)
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
    from ..evaluate.tables import needle_table

    return rendered(record, needle_table, output)


def main() -> None:
    """Console script ``mlx_turbokv.needle``."""
    run(command)
