"""``mlx_turbokv plan``: size of a model's cache by format, from its configuration alone."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from ..errors import InputError
from . import options
from .command import Command
from .entry import console_script
from .values import Number, refuse

DEFAULT_CONTEXTS = (4096, 32768, 131072)
# Rows shown by default: the uniform steps, Boundary V, and its wider form.
COMPARED = ("f16/f16", "q8_0/q8_0", "q8_0/turbo3", "q8_0/turbo2", "la-v7", "mode-10")
_SIZE = click.IntRange(1, 10_000)
_MEMORY = Number(0, 1e9, min_open=True)
_WEIGHT_BITS = Number(0, 64, min_open=True)


@click.command("plan", cls=Command, epilog=options.CACHE_HELP)
@click.option(
    "--model", metavar="ID|FOLDER|FILE|NAME",
    help="A hub id (its config alone is fetched), a folder, a config.json or .gguf file, or one "
    "of the built-in shapes phi-4, Qwen2.5-7B, Llama-3.1-8B and Qwen3.5-27B; "
    "SmolLM2-135M-Instruct where not given.",
)  # fmt: skip
@click.option(
    "-c", "--context", "contexts", multiple=True, type=click.IntRange(1, 1 << 40), metavar="N",
    help="Context length in tokens; repeatable.  [default: 4096, 32768, 131072]",
)  # fmt: skip
@options.configs(
    "A row: K/V, a policy, or K/V@POLICY; repeatable. Without it and without cache options, "
    "six rows are shown."
)
@click.option("--kv-layers", type=_SIZE, metavar="N", help="In place of a model: its KV layers.")
@click.option("--kv-heads", default=8, type=_SIZE, help="With --kv-layers.")
@click.option("--head-dim", default=128, type=_SIZE, help="With --kv-layers.")
@click.option("--v-head-dim", type=_SIZE, help="With --kv-layers, where V's differs from K's.")
@click.option("--memory", type=_MEMORY, metavar="GB", help="Show what fits in this many GiB.")
@click.option(
    "--weight-bits", type=_WEIGHT_BITS, metavar="N",
    help="Bits per weight, for --memory; by default as the config says, else 16.",
)  # fmt: skip
@options.combined(options.output, options.markdown, options.policy)
def command(**args: Any) -> None:
    """Compare cache formats on a model by its shape alone: no weights are loaded."""
    from ..loading import blas

    blas.require_mlx()
    from ..evaluate.configuration import parse_policy
    from ..report.plan import GIB, make_plan
    from ..report.plan_table import as_json, as_markdown, as_text

    memory, output = args["memory"], options.check_output(args["output"], args["markdown"])
    _check_options(args)
    rows = [(name, parse_policy(name)) for name in args["configs"]]
    asked = {name: args[name] for name in options.CACHE_ARGUMENTS}
    if any(value is not None for value in asked.values()):
        policy = options.policy_from(**asked)
        rows.insert(0, (_label(policy, asked), policy))
    rows = rows or [(name, parse_policy(name)) for name in COMPARED]
    centre = options.centre_from(args["keys"], args["no_centre"], [policy for _, policy in rows])
    shape, weight_bytes = _shape(args)
    plan = make_plan(
        shape,
        rows,
        args["contexts"] or DEFAULT_CONTEXTS,
        None if memory is None else int(memory * GIB),
        weight_bytes,
        centre,
    )
    if output == "json":
        print(json.dumps(as_json(plan), indent=1))
    else:
        print(as_markdown(plan) if output == "markdown" else as_text(plan))


def _check_options(args: dict[str, Any]) -> None:
    """Raises: InputError for options that contradict each other or would change nothing."""
    if args["kv_layers"] is None:
        refuse(["kv_heads", "head_dim", "v_head_dim"], "without --kv-layers")
    else:
        if args["model"] is not None:
            raise InputError("--model and --kv-layers cannot be given together.")
        refuse(["compress_sliding", "weight_bits"], "with --kv-layers")
    if args["memory"] is None:
        refuse(["weight_bits"], "without --memory")


def _shape(args: dict[str, Any]) -> tuple[Any, int | None]:
    """(the model's shape, bytes of its weights)."""
    from ..loading.known_shapes import hypothetical_shape, known_config, shape_from_config
    from ..loading.models import load_config

    model, weight_bits = args["model"], args["weight_bits"]
    if args["kv_layers"] is not None:
        sizes = (args[name] for name in ("kv_layers", "kv_heads", "head_dim", "v_head_dim"))
        return hypothetical_shape(*sizes), None
    config = known_config(model) if model and not os.path.exists(model) else None
    name, source = model, ""
    if config is None:
        config, name, source = load_config(model)
    shape = shape_from_config(config, name, args["compress_sliding"])
    if source.endswith(".gguf") and weight_bits is None:
        return shape, os.path.getsize(source)
    return shape, _weight_bytes(shape.n_parameters, config, weight_bits)


def _label(policy: Any, asked: dict[str, Any]) -> str:
    if policy.name == "uniform":
        return f"{policy.k}/{policy.v}"
    given = [str(asked[name]) for name in ("cache_type_k", "cache_type_v") if asked[name]]
    return policy.name + (f" ({'/'.join(given)})" if given else "")


def _weight_bytes(n_parameters: int | None, config: dict[str, Any], weight_bits: Any) -> int | None:
    """Bytes of the weights; quantised ones have a scale and a bias of 16 bits a group."""
    if n_parameters is None:
        return None
    if weight_bits is None:
        quantization = config.get("quantization") or {}
        bits, group = quantization.get("bits"), quantization.get("group_size", 64)
        weight_bits = bits + 32 / group if bits else 16.0
    return int(n_parameters * weight_bits / 8)


main = console_script(command)
