"""The `perplexity` command: what a packed cache costs in prediction quality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from .entry import run
from .options import (
    backend_option,
    centre_from,
    centre_options,
    dtype_option,
    load_dtype,
    model_options,
    sliding_option,
)
from .output import Progress, check_writable, note, rendered, write_json

WHAT = "perplexity and divergence by cache configuration"
DEFAULT_CTX = 512


@click.command("perplexity")
@model_options
@dtype_option
@click.option(
    "--text",
    "-f",
    metavar="FILE|sample|wikitext-2",
    help="A UTF-8 text file, the package's own sample, or wikitext-2-raw's test split (default).",
)
@click.option("-c", "--ctx-size", default=DEFAULT_CTX, show_default=True, help="Tokens a window.")
@click.option("--chunks", type=int, help="Windows to score.  [default: all of the text]")
@click.option(
    "--config",
    "configs",
    multiple=True,
    metavar="CONFIG",
    help="K/V (q8_0/turbo3), a policy (la-v7 or a JSON file), K/V@POLICY, POLICY:K, or "
    "mlx-kvN:GROUP for mlx-lm's own quantised cache; repeatable. f16/f16 is put first, as the "
    "reference. Without it: a table of eleven.",
)
@centre_options
@backend_option
@sliding_option
@click.option(
    "--output",
    type=click.Choice(["text", "markdown", "json"]),
    default="text",
    show_default=True,
    help="How the results are printed.",
)
@click.option("--markdown", is_flag=True, help="The same as --output markdown.")
@click.option("--json", "json_path", metavar="FILE", help="Write the whole record to this file.")
@click.option(
    "--resume/--no-resume",
    default=None,
    help="Demand, or forget, the finished windows of an interrupted run; by default they are "
    "taken where the settings are the same.",
)
def command(
    model: str | None,
    adapter_path: str | None,
    trust_remote_code: bool,
    dtype: str | None,
    text: str | None,
    ctx_size: int,
    chunks: int | None,
    configs: tuple[str, ...],
    keys: str | None,
    no_centre: bool,
    backend: str,
    compress_sliding: bool,
    output: str,
    markdown: bool,
    json_path: str | None,
    resume: bool | None,
) -> None:
    """Perplexity and divergence of cache configurations over the same windows of a text.

    Follows llama-perplexity: windows that do not overlap, the second half of each scored, K and V
    quantised on write.
    """
    # MLX is imported by models, after the CPU's BLAS was looked for.
    from ..evaluate import configuration
    from ..evaluate.text import load_text
    from ..loading.models import load

    names = _with_reference(configs or configuration.DEFAULT_CONFIGS, configuration.REFERENCE)
    for name in names:
        configuration.check_name(name)
    centre = centre_from(keys, no_centre)
    _check_sizes(ctx_size, chunks)
    check_writable(json_path)
    source = load_text(text)
    loaded = load(
        model,
        adapter_path=adapter_path,
        trust_remote_code=trust_remote_code,
        **load_dtype(dtype),
    )
    _warn_about_context(loaded, ctx_size)
    record = measure(
        loaded, source, names, ctx_size, chunks, backend, json_path, resume, centre,
        compress_sliding,
    )  # fmt: skip
    print(_render(record, "markdown" if markdown else output))


@dataclass(frozen=True)
class Run:
    """Windows and configurations made ready, and what the record says of them.

    settings: what two runs must share for their windows to belong together.
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
    """Cut the windows of a text and make the configurations ready."""
    from ..evaluate.configuration import prepare
    from ..evaluate.perplexity import settings_of
    from ..evaluate.record import environment, model_record
    from ..evaluate.windows import cut_windows

    windows = cut_windows(loaded.tokenizer, source.text, ctx_size, chunks)
    if chunks is not None and len(windows) < chunks:
        note(f"The text has {len(windows)} windows of {ctx_size}; all of them are scored.")
    configs = [
        prepare(loaded.model, name, backend, centre=centre, compress_sliding=compress_sliding)
        for name in names
    ]
    versions, model = environment(), model_record(loaded)
    settings = settings_of(windows, configs, model["source"], source.sha256, versions)
    return Run(windows, configs, model, versions, settings)


def measure(
    loaded: Any,
    source: Any,
    names: list[str],
    ctx_size: int,
    chunks: int | None,
    backend: str,
    json_path: str | None,
    resume: bool | None,
    centre: bool | str = True,
    compress_sliding: bool = False,
) -> dict:
    """Run the evaluation with progress and checkpoints; write and return its record."""
    from ..evaluate.checkpoint import Checkpoint, journal_path
    from ..evaluate.configuration import backend_of
    from ..evaluate.perplexity import evaluate_windows
    from ..evaluate.record import command_line

    run = make_run(loaded, source, names, ctx_size, chunks, backend, centre, compress_sliding)
    path = journal_path("perplexity", run.settings, json_path)
    checkpoint = Checkpoint(path, run.settings, resume)
    if kept := sum(i < len(run.windows) for i in checkpoint.windows):
        note(f"{kept} of {len(run.windows)} windows were finished before ({path}).")
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
    checkpoint.done()
    return record


def _with_reference(names: tuple[str, ...], reference: str) -> list[str]:
    """The names without repeats, f16/f16 in front: the figures are distances from it."""
    return list(dict.fromkeys([reference, *names]))


def _render(record: dict, output: str) -> str:
    from ..evaluate.tables import perplexity_table

    return rendered(record, perplexity_table, output)


def _check_sizes(ctx_size: int, chunks: int | None) -> None:
    from ..evaluate.windows import check_sizes

    check_sizes(ctx_size, chunks)


def _warn_about_context(loaded: Any, ctx_size: int) -> None:
    if loaded.max_context and ctx_size > loaded.max_context:
        note(
            f"Warning: a context of {ctx_size} is above the {loaded.max_context} tokens that "
            f"{loaded.name} was made for."
        )


def main() -> None:
    """Console script ``mlx_turbokv.perplexity``."""
    run(command)
