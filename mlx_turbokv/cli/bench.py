"""``mlx_turbokv bench``: speed and memory of whole models by cache configuration."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from ..errors import InputError
from . import options
from .bench_rows import add_rows, finished, point_of
from .command import Command
from .entry import console_script
from .output import (
    Progress,
    format_record,
    print_status,
    try_write_json,
    write_json,
    write_result,
)  # fmt: skip
from .runs import (
    asked_centre,
    centre_of,
    config_names,
    deadline_of,
    fitting_names,
    get_record,
    load_model,
)
from .values import COUNT, SEED, refuse

WHAT = "speed and memory by cache configuration"
DEFAULT_CONFIGS = ("f16/f16", "mlx-kv8:64", "q8_0/turbo2", "turbo4/turbo3")
FAILED_STATUS = 1
WEIGHT_BITS = ("2", "3", "4", "5", "6", "8", "16")


@click.command("bench", cls=Command)
@options.model
@click.option(
    "--shape", metavar="NAME|FILE",
    help="In place of a model: random weights of one of plan's built-in shapes, such as "
    "Llama-3.1-8B, or of a config.json.",
)  # fmt: skip
@click.option(
    "--weight-bits", default="4", type=click.Choice(WEIGHT_BITS),
    help="Of random weights; 16: not quantised.",
)  # fmt: skip
@click.option(
    "--dtype", type=click.Choice(options.DTYPES),
    help="The type to run in, a model's weights dequantised.  [default: as the model is, random "
    "weights in bfloat16]",
)  # fmt: skip
@click.option("--seed", default=0, type=SEED, help="Of random weights and prompts.")
@click.option(
    "-p", "--prompt-tokens", multiple=True, type=COUNT,
    help="Length of a random prompt; repeatable.  [default: 512, if there is no --context]",
)  # fmt: skip
@click.option(
    "--context", "contexts", multiple=True, type=COUNT,
    help="Time generation alone after so many tokens; repeatable. The cache is filled with random "
    "K and V, packed by the cache itself, without running the model.",
)  # fmt: skip
@click.option(
    "-b", "--batch-size", default=1, type=COUNT,
    help="Sequences at once, each with a prompt or context of that length; speeds are of all.",
)  # fmt: skip
@click.option("-g", "--generation-tokens", default=128, type=COUNT, help="Generated.")
@click.option("-n", "--num-trials", default=5, type=COUNT, help="Timed trials.")
@options.prefill_step_size
@options.configs(
    "As in perplexity; repeatable. The first is what the others are compared with.  "
    f"[default: {', '.join(DEFAULT_CONFIGS)}]"
)
@options.combined(options.centre, options.backend, options.time_limit, options.output)
@click.option(
    "--json", "json_path", metavar="FILE",
    help="Write the record there, point by point; points that it has are not measured again.",
)  # fmt: skip
@click.option("--no-resume", is_flag=True, help="Measure everything anew.")
@click.option("--plot", metavar="PNG", help="Draw speed and memory against context there.")
@options.from_record
def command(**args: Any) -> int:
    """Prompt and generation speed and peak memory through several caches.

    As mlx_lm.benchmark, but trials of the configurations alternate within one run.
    """
    record = get_record(args, WHAT, _measure, render, lambda record: list(record["not_measured"]))
    if args["plot"] is not None:
        from ..evaluate.plots import as_png, speed_figure

        write_result(args["plot"], as_png(speed_figure(record)))
    return FAILED_STATUS if any("error" in row for row in record["rows"]) else 0


def _measure(args: dict[str, Any]) -> dict:
    from ..loading import blas

    blas.require_mlx()
    from ..evaluate.benchmark import Point, Settings

    deadline = deadline_of(args)
    names = config_names(args["configs"] or DEFAULT_CONFIGS, reference=False)
    _check_options(args)
    names = _batched_names(names, args)
    centre = asked_centre(args, names)
    options.check_backend(args["backend"])
    prompts = args["prompt_tokens"] or (() if args["contexts"] else (512,))
    points = [Point("context", n) for n in args["contexts"]]
    points += [Point("prompt", n) for n in prompts]
    model, about, vocab_size, loaded = _model(args)
    names = fitting_names(model, names, args)
    settings = Settings(
        args["generation_tokens"], args["num_trials"], args["prefill_step_size"],
        vocab_size, args["batch_size"],
    )  # fmt: skip
    return measure(
        model, about, names, list(dict.fromkeys(points)), settings, args["backend"],
        args["json_path"], not args["no_resume"], args["seed"], deadline, centre_of(centre, loaded),
    )  # fmt: skip


def _check_options(args: dict[str, Any]) -> None:
    """Raises: InputError for options that contradict each other or would change nothing."""
    from ..loading.random_model import shape_config

    if args["shape"] is None:
        refuse(["weight_bits"], "without --shape")
    else:
        if args["model"] is not None:
            raise InputError("--model and --shape cannot be given together.")
        refuse(["adapter_path", "trust_remote_code"], "with --shape")
        shape_config(args["shape"])
    if args["json_path"] is None:
        refuse(["no_resume"], "without --json")
    if args["contexts"] and not args["prompt_tokens"]:
        refuse(["prefill_step_size"], "without --prompt-tokens")


def _batched_names(names: list[str], args: dict[str, Any]) -> list[str]:
    """The configurations that hold a batch; of the defaults, others are left out with a sentence.

    Raises: InputError for one that was given and holds one sequence.
    """
    from ..evaluate.names import is_peer

    single = [name for name in names if is_peer(name)] if args["batch_size"] > 1 else []
    if single and args["configs"]:
        raise InputError(
            f"Configuration {single[0]!r} holds one sequence, as mlx-lm's quantised cache does: "
            f"with --batch-size {args['batch_size']} accepted are all but mlx-kvN."
        )
    for name in single:
        print_status(f"Left out {name}: mlx-lm's quantised cache holds one sequence.")
    return [name for name in names if name not in single]


def measure(
    model: Any, about: dict, names: list[str], points: list, settings: Any, backend: str,
    json_path: str | None, resume: bool = True, seed: int = 0, deadline: float | None = None,
    centre: bool | str = True,
) -> dict:  # fmt: skip
    """Measure points that the JSON file does not have yet; write and return the record.

    Args:
        about: what the record says of the model: ``model``, ``weights`` and ``weight_bytes``.
    """
    from ..evaluate.benchmark import measure_point
    from ..evaluate.configuration import prepare

    configs = [prepare(model, name, backend, centre=centre, timed=True) for name in names]
    record = _record(about, names, configs, settings, seed, backend)
    if resume:
        add_rows(record, json_path, points)
    done = finished(record["rows"])
    steps = (settings.num_trials + 1) * len(configs)
    kept = "the same command goes on after the last whole point"
    kept = kept if json_path is not None else "nothing is kept without --json"
    with Progress(steps * len(points), interrupted=kept) as progress:
        for i, point in enumerate(points):
            label = f"{point.kind} {point.tokens:,}"
            if (point.kind, point.tokens) in done:
                print_status(f"{label}: kept from {json_path}")
                continue
            if deadline is not None and time.perf_counter() > deadline:
                record["not_measured"].append(label)
                continue

            def tick(step: int, _all: int, name: str, i: int = i, label: str = label) -> None:
                progress(i * steps + step, len(points) * steps, f"{label} {name}")

            others = [r for r in record["rows"] if point_of(r) != (point.kind, point.tokens)]
            record["rows"] = others + measure_point(model, point, configs, settings, deadline, tick)
            if json_path is not None:
                try_write_json(json_path, record)
    if json_path is not None:
        write_json(json_path, record)
    return record


def _model(args: dict[str, Any]) -> tuple[Any, dict, int, Any]:
    """(model, what the record says of it, size of its vocabulary, what was loaded if it was)."""
    import mlx.core as mx

    from ..evaluate.record import model_record
    from ..loading import random_model

    dtype, shape, loaded = args["dtype"], args["shape"], None
    if shape is None:
        loaded = load_model(args)
        mx.random.seed(args["seed"])
        model, config = loaded.model, loaded.config
        about = {"model": model_record(loaded), "weights": "its own weights"}
    else:
        config, name = random_model.shape_config(shape)
        bits, dtype = int(args["weight_bits"]), dtype or "bfloat16"
        print_status(f"Drawing random weights of {name}.")
        model = random_model.random_model(config, bits, dtype=dtype, seed=args["seed"])
        about = {
            "model": {"name": name, "source": os.path.basename(shape), "dtype": dtype},
            "weights": f"random weights of {bits} bits, activations in {dtype}",
        }
    about["weight_bytes"] = random_model.weight_bytes(model)
    return model, about, random_model.vocabulary_size(config), loaded


def _record(
    about: dict, names: list[str], configs: list, settings: Any, seed: int, backend: str
) -> dict:
    from ..evaluate.configuration import backend_of
    from ..evaluate.record import checkout_commit, command_line, environment
    from ..kernels import tuned
    from ..kernels.backend import select_backend

    return {
        "what": WHAT,
        **about,
        "configs": names,
        "centred": {c.name: c.centred for c in configs},
        "protected": {c.name: str(c.protection) if c.protection else None for c in configs},
        "backend": backend_of(configs),
        "tuning": tuned.summary(select_backend(backend).name),
        "generation_tokens": settings.generation_tokens,
        "num_trials": settings.num_trials,
        "prefill_step_size": settings.prefill_step_size,
        "batch_size": settings.batch_size,
        "seed": seed,
        "context_points": "the cache is filled with random K and V through update_and_fetch, "
        "without running the model; recurrent states stay empty",
        "command": command_line(),
        "commit": checkout_commit(),
        "environment": environment(),
        "not_measured": [],
        "rows": [],
    }


def render(record: dict, output: str) -> str:
    """The record as text, Markdown or JSON."""
    from ..evaluate.tables import speed_table

    return format_record(record, speed_table, output)


main = console_script(command)
