"""``mlx_turbokv perplexity``: prediction quality by cache configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from . import options
from .command import Command
from .entry import console_script
from .output import Progress, check_writable, format_record, print_status, write_json
from .runs import (
    asked_centre,
    centre_of,
    config_names,
    load_model,
    print_record,
    warn_about_context,
)  # fmt: skip
from .values import COUNT

WHAT = "perplexity and divergence by cache configuration"
DEFAULT_CTX = 512


@click.command("perplexity", cls=Command)
@options.combined(options.model, options.dtype)
@click.option(
    "--text", "-f", metavar="FILE|sample|wikitext-2",
    help="A UTF-8 text file, the package's own sample, or wikitext-2-raw's test split (default).",
)  # fmt: skip
@click.option("-c", "--ctx-size", default=DEFAULT_CTX, type=COUNT, help="Tokens a window.")
@click.option("--chunks", type=COUNT, help="Windows to score.  [default: all of the text]")
@options.configs(
    "K/V (q8_0/turbo3), a setting or policy (balanced, la-v7, a JSON file), K/V@POLICY, POLICY:K, "
    "or mlx-kvN:GROUP for mlx-lm's own quantised cache; repeatable. f16/f16 is put first, as the "
    "reference. Without it: a table of eleven."
)
@options.combined(options.centre, options.backend, options.compress_sliding)
@options.combined(options.output, options.markdown, options.json, options.resume)
def command(**args: Any) -> None:
    """Perplexity and divergence of cache configurations over the same windows of a text.

    Follows llama-perplexity: windows that do not overlap, the second half of each scored, K and V
    quantised on write.
    """
    from ..evaluate.names import DEFAULT_CONFIGS
    from ..evaluate.tables import perplexity_table
    from ..evaluate.text import load_text
    from ..model.text_windows import check_sizes

    names = config_names(args["configs"] or DEFAULT_CONFIGS)
    output = options.check_output(args["output"], args["markdown"])
    centre = asked_centre(args, names)
    ctx_size, chunks, json_path = args["ctx_size"], args["chunks"], args["json_path"]
    check_sizes(ctx_size, chunks)
    check_writable(json_path)
    source = load_text(args["text"])
    loaded = load_model(args)
    warn_about_context(loaded, ctx_size)
    print_record(
        lambda: measure(
            loaded, source, names, ctx_size, chunks, args["backend"], json_path, args["resume"],
            centre_of(centre, loaded), args["compress_sliding"],
        ),
        lambda record: format_record(record, perplexity_table, output),
    )  # fmt: skip


@dataclass(frozen=True)
class Run:
    """Windows and prepared configurations of one run.

    settings: what two runs must share for their windows to be joined.
    """

    windows: Any
    configs: list[Any]
    model: dict
    versions: dict
    settings: dict


def make_run(
    loaded: Any, source: Any, names: list[str], ctx_size: int, chunks: int | None, backend: str,
    centre: bool | str = True, compress_sliding: bool = False,
) -> Run:  # fmt: skip
    """Cut the windows of a text and prepare the configurations."""
    from ..evaluate.configuration import prepare
    from ..evaluate.perplexity import settings_of
    from ..evaluate.record import environment, model_record
    from ..evaluate.windows import short_windows
    from ..model.text_windows import cut_windows

    windows = cut_windows(loaded.tokenizer, source.text, ctx_size, chunks)
    if chunks is not None and len(windows) < chunks:
        print_status(f"The text has {len(windows)} windows of {ctx_size}; all of them are scored.")
    configs = [
        prepare(loaded.model, name, backend, centre=centre, compress_sliding=compress_sliding)
        for name in names
    ]
    if said := short_windows({c.name: c.protection for c in configs}, ctx_size):
        print_status(said)
    versions, model = environment(), model_record(loaded)
    settings = settings_of(windows, configs, model["source"], source.sha256, versions)
    return Run(windows, configs, model, versions, settings)


def measure(
    loaded: Any, source: Any, names: list[str], ctx_size: int, chunks: int | None, backend: str,
    json_path: str | None, resume: bool | None, centre: bool | str = True,
    compress_sliding: bool = False,
) -> dict:  # fmt: skip
    """Run the evaluation with progress and checkpoints; write and return its record."""
    from ..evaluate.checkpoint import Checkpoint, journal_path
    from ..evaluate.configuration import backend_of
    from ..evaluate.perplexity import evaluate_windows
    from ..evaluate.record import command_line

    run = make_run(loaded, source, names, ctx_size, chunks, backend, centre, compress_sliding)
    path = journal_path("perplexity", run.settings, json_path)
    checkpoint = Checkpoint(path, run.settings, resume)
    if kept := sum(i < len(run.windows) for i in checkpoint.windows):
        print_status(
            f"{kept} of {len(run.windows)} windows were finished before ({checkpoint.found_in})."
        )
    with Progress(len(run.windows) * len(names)) as progress:
        evaluation = evaluate_windows(loaded.model, run.windows, run.configs, checkpoint, progress)
    record = {
        "what": WHAT,
        "model": run.model,
        "text": {"name": source.name, "sha256": source.sha256},
        "n_ctx": ctx_size,
        "n_windows": evaluation.n_windows,
        "reference": names[0],
        "compress_sliding": compress_sliding,
        "backend": backend_of(run.configs),
        "seconds": round(evaluation.seconds, 1),
        "windows_kept_from_before": kept,
        "command": command_line(),
        "environment": run.versions,
        "results": evaluation.summary(),
    }
    if json_path is not None:
        write_json(json_path, record)
    checkpoint.done(keep=json_path is not None)
    return record


main = console_script(command)
