"""``mlx_turbokv bench``: speed and memory of whole models, packed caches beside f16."""

from __future__ import annotations

import os
import time
from typing import Any

import click

from ..errors import InputError
from .entry import run
from .options import BACKENDS, centre_from, centre_options, load_dtype, model_options
from .output import Progress, check_writable, note, read_json, rendered, write_json

WHAT = "speed and memory by cache configuration"
DEFAULT_CONFIGS = ("f16/f16", "mlx-kv8:64", "q8_0/turbo2", "turbo4/turbo3")
FAILED_STATUS = 1
_OPEN = {"show_default": True}
_COUNT = click.IntRange(1)


@click.command("bench")
@model_options
@click.option(
    "--shape", metavar="NAME|FILE",
    help="In place of a model: random weights of phi-4, Qwen2.5-7B, Llama-3.1-8B, Qwen3.5-27B or "
    "a config.json.",
)  # fmt: skip
@click.option(
    "--weight-bits", default=4, help="Of random weights: 2 to 8, or 16 for none packed.", **_OPEN
)
@click.option(
    "--dtype", metavar="TYPE",
    help="The type to run in, a model's weights dequantised.  [default: as the model is, random "
    "weights in bfloat16]",
)  # fmt: skip
@click.option("--seed", default=0, help="Of random weights and prompts.", **_OPEN)
@click.option(
    "-p", "--prompt-tokens", multiple=True, type=_COUNT,
    help="Length of a random prompt; repeatable.  [default: 512, if there is no --context]",
)  # fmt: skip
@click.option(
    "--context", "contexts", multiple=True, type=_COUNT,
    help="Time generation alone after so many tokens; repeatable. The cache is filled with random "
    "K and V, packed by the cache itself, without running the model.",
)  # fmt: skip
@click.option("-g", "--generation-tokens", default=128, type=_COUNT, help="To generate.", **_OPEN)
@click.option("-n", "--num-trials", default=5, type=_COUNT, help="Timed trials.", **_OPEN)
@click.option(
    "--prefill-step-size", default=2048, type=_COUNT, help="Prompt tokens at a time.", **_OPEN
)
@click.option(
    "--config", "configs", multiple=True, metavar="CONFIG",
    help="As in perplexity; repeatable. The first is what the others are compared with.  "
    f"[default: {', '.join(DEFAULT_CONFIGS)}]",
)  # fmt: skip
@centre_options
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", **_OPEN)
@click.option(
    "--time-limit", type=click.FloatRange(0), metavar="SECONDS",
    help="Start no trial after this time; what was not measured is said.",
)  # fmt: skip
@click.option(
    "--output", type=click.Choice(["text", "markdown", "json"]), default="text",
    help="How the results are printed.", **_OPEN,
)  # fmt: skip
@click.option(
    "--json", "json_path", metavar="FILE",
    help="Write the record there, point by point; points that it has are not measured again.",
)  # fmt: skip
@click.option("--no-resume", is_flag=True, help="Measure everything anew.")
@click.option("--plot", metavar="PNG", help="Draw speed and memory against context there.")
@click.option("--from", "from_path", metavar="FILE", help="Show this record; measure nothing.")
def command(**options: Any) -> int:
    """Prompt and generation speed and peak memory through several caches.

    As mlx_lm.benchmark, but trials of the configurations take turns within one run.
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
    for line in record["not_measured"]:
        note(f"Not measured within the time limit: {line}.")
    if options["plot"]:
        from ..evaluate.plots import plot_speed

        plot_speed(record, options["plot"])
    return FAILED_STATUS if any("error" in row for row in record["rows"]) else 0


def _measured(options: dict[str, Any]) -> dict:
    from ..loading import blas

    blas.require_mlx()
    from ..evaluate import configuration
    from ..evaluate.benchmark import Point, Settings

    started = time.perf_counter()
    centre = centre_from(options["keys"], options["no_centre"])
    names = list(dict.fromkeys(options["configs"] or DEFAULT_CONFIGS))
    for name in names:
        configuration.check_name(name)
    prompts = options["prompt_tokens"] or (() if options["contexts"] else (512,))
    points = [Point("context", n) for n in options["contexts"]]
    points += [Point("prompt", n) for n in prompts]
    model, about, vocab_size = _model(options)
    if not options["configs"]:
        names, reasons = configuration.fitting(model, names, options["backend"])
        for reason in reasons:
            note(reason)
    settings = Settings(
        options["generation_tokens"], options["num_trials"], options["prefill_step_size"],
        vocab_size,
    )  # fmt: skip
    limit = options["time_limit"]
    return measure(
        model, about, names, list(dict.fromkeys(points)), settings, options["backend"],
        options["json_path"], not options["no_resume"], options["seed"],
        None if limit is None else started + limit, centre,
    )  # fmt: skip


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
    record = _record(about, names, configs, settings, seed)
    if resume:
        _keep(json_path, record, points)
    done = {(row["kind"], row["tokens"]) for row in record["rows"]}
    steps = (settings.num_trials + 1) * len(configs)
    with Progress(steps * len(points)) as progress:
        for i, point in enumerate(points):
            label = f"{point.kind} {point.tokens:,}"
            if (point.kind, point.tokens) in done:
                note(f"{label}: kept from {json_path}")
                continue
            if deadline is not None and time.perf_counter() > deadline:
                record["not_measured"].append(label)
                continue

            def tick(step: int, _all: int, name: str, i: int = i, label: str = label) -> None:
                progress(i * steps + step, len(points) * steps, f"{label} {name}")

            record["rows"] += measure_point(model, point, configs, settings, deadline, tick)
            if json_path is not None:
                write_json(json_path, record)
    if json_path is not None:
        write_json(json_path, record)
    return record


def _model(options: dict[str, Any]) -> tuple[Any, dict, int]:
    """(model, what the record says of it, size of its vocabulary)."""
    import mlx.core as mx

    from ..evaluate.record import model_record
    from ..loading import models, random_model

    if options["shape"] is None:
        if options["dtype"] not in (None, *random_model.DTYPES):
            raise InputError(
                f"Type {options['dtype']!r} is not accepted: give one of "
                f"{', '.join(random_model.DTYPES)}."
            )
        loaded = models.load(
            options["model"],
            adapter_path=options["adapter_path"],
            trust_remote_code=options["trust_remote_code"],
            **load_dtype(options["dtype"]),
        )
        mx.random.seed(options["seed"])
        model, about = loaded.model, {"model": model_record(loaded), "weights": "its own weights"}
        config = loaded.config
    else:
        if options["model"] is not None:
            raise InputError("--model and --shape cannot be given together.")
        config, name = random_model.shape_config(options["shape"])
        bits, dtype = options["weight_bits"], options["dtype"] or "bfloat16"
        model = random_model.random_model(config, bits, dtype=dtype, seed=options["seed"])
        about = {
            "model": {"name": name, "source": os.path.basename(options["shape"]), "dtype": dtype},
            "weights": f"random weights of {bits} bits, activations in {dtype}",
        }
    text = config.get("text_config") or config
    about["weight_bytes"] = random_model.weight_bytes(model)
    return model, about, int(text.get("vocab_size") or 256)


def _record(about: dict, names: list[str], configs: list, settings: Any, seed: int) -> dict:
    from ..evaluate.configuration import backend_of
    from ..evaluate.record import checkout_commit, command_line, environment

    return {
        "what": WHAT,
        **about,
        "configs": names,
        "centred": {c.name: c.centred for c in configs},
        "backend": backend_of(configs),
        "generation_tokens": settings.generation_tokens,
        "num_trials": settings.num_trials,
        "prefill_step_size": settings.prefill_step_size,
        "seed": seed,
        "context_points": "the cache is filled with random K and V through update_and_fetch, "
        "without running the model; recurrent states stay empty",
        "command": command_line(),
        "commit": checkout_commit(),
        "environment": environment(),
        "not_measured": [],
        "rows": [],
    }


def _keep(path: str | None, record: dict, points: list) -> None:
    """Put the finished rows of an earlier run with the same settings into the record.

    Raises: InputError if the file holds another run.
    """
    if path is None or not os.path.exists(path):
        return
    found = read_json(path, WHAT)
    same = ("model", "weights", "configs", "centred", "generation_tokens", "num_trials", "prefill_step_size",
            "seed", "environment")  # fmt: skip
    differ = [key for key in same if found.get(key) != record[key]]
    if differ:
        raise InputError(
            f"{path} holds a run with other settings ({', '.join(differ)}); --no-resume starts "
            "anew."
        )
    failed = {(r["kind"], r["tokens"]) for r in found["rows"] if "error" in r}
    kept = [r for r in found["rows"] if (r["kind"], r["tokens"]) not in failed]
    record["rows"] = kept
    if {(p.kind, p.tokens) for p in points} <= {(r["kind"], r["tokens"]) for r in kept}:
        # Nothing is measured now: the command and commit are those of the run that did.
        record |= {key: found[key] for key in ("command", "commit")}


def render(record: dict, output: str) -> str:
    from ..evaluate.tables import speed_table

    return rendered(record, speed_table, output)


def main() -> None:
    """Console script ``mlx_turbokv.bench``."""
    run(command)
