"""``mlx_turbokv plan``: what fits a memory, and what to type, from a model's shape alone."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from ..errors import InputError
from ..loading.known_shapes import KNOWN
from . import options
from .command import Command
from .entry import console_script
from .values import MemorySize, Number, TokenCount, exclude, refuse

DEFAULT_CONTEXTS = (4096, 32768, 131072)
_SIZE = click.IntRange(1, 10_000)
_WEIGHT_BITS = Number(0, 64, min_open=True)


@click.command("plan", cls=Command, epilog=options.CACHE_HELP)
@click.option(
    "--model", metavar="ID|FOLDER|FILE|NAME",
    help="A hub id (its config alone is fetched), a folder, a config.json or GGUF file, or one of "
    f"the built-in shapes {', '.join(KNOWN)}; SmolLM2-135M-Instruct where not given.",
)  # fmt: skip
@click.option(
    "-c", "--context", "contexts", multiple=True, type=TokenCount(), metavar="N",
    help="Context length in tokens, such as 32768 or 128K; repeatable.  [default: 4K, 32K and 128K "
    "as far as the model goes]",
)  # fmt: skip
@options.configs(
    "A row: K/V, a policy, or K/V@POLICY; repeatable. Without it and without cache options, the "
    "settings worth recommending are shown, best first."
)
@click.option("--kv-layers", type=_SIZE, metavar="N", help="In place of a model: its KV layers.")
@click.option("--kv-heads", default=8, type=_SIZE, help="With --kv-layers.")
@click.option("--head-dim", default=128, type=_SIZE, help="With --kv-layers.")
@click.option("--v-head-dim", type=_SIZE, help="With --kv-layers, where V's differs from K's.")
@click.option(
    "--memory", type=MemorySize(), metavar="SIZE",
    help="Say what fits a Mac with this memory, such as 16GB (GiB without a unit), of which macOS "
    "lets the GPU use about 67 to 75 %.  [default: this machine's, where it has a GPU]",
)  # fmt: skip
@click.option(
    "--gpu-memory", type=MemorySize(), metavar="SIZE",
    help="In place of --memory: what the GPU may use, as iogpu.wired_limit_mb or a graphics card "
    "says.",
)  # fmt: skip
@click.option(
    "--weight-bits", type=_WEIGHT_BITS, metavar="N",
    help="Bits per weight; by default as the config says, else 16, and 4.5 for built-in shapes "
    "(gpt-oss: its experts in 4.25).",
)  # fmt: skip
@options.prefill_step_size
@options.combined(options.output, options.markdown, options.policy)
def command(**args: Any) -> None:
    """Compare cache formats on a model by its shape alone: no weights are loaded.

    mlx_turbokv plan --model Qwen3-8B --memory 16GB -c 32K

    The last sentence says what to type: the first row that fits the longest context.
    """
    from ..loading import blas

    blas.require_mlx()
    from ..report.plan import make_plan
    from ..report.plan_table import as_json, as_markdown, as_text

    output = options.check_output(args["output"], args["markdown"])
    _check_options(args)
    rows = _rows(args)
    used_by = [policy for _, policy in rows]
    centre = options.centre_from(args["keys"], args["no_centre"], used_by, args["no_calibrate"])
    memory_bytes, machine_bytes = _memory(args)
    if memory_bytes is None:
        refuse(["weight_bits", "prefill_step_size"], "without --memory")
    shape, weight_bytes = _shape(args)
    plan = make_plan(
        shape,
        rows,
        args["contexts"] or _contexts(shape.max_context),
        memory_bytes,
        weight_bytes,
        centre,
        machine_bytes,
        args["prefill_step_size"],
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
        refuse(["compress_sliding", "weight_bits", "prefill_step_size"], "with --kv-layers")
    exclude("memory", "gpu_memory")


def _rows(args: dict[str, Any]) -> list[tuple[str, Any]]:
    """(name, policy) of every row."""
    from ..evaluate.names import parse_policy
    from ..policy.recommended import label, recommended

    rows = [(name, parse_policy(name)) for name in args["configs"]]
    asked = {name: args[name] for name in options.CACHE_ARGUMENTS}
    if any(value is not None for value in asked.values()):
        policy = options.policy_from(**asked)
        rows.insert(0, (_label(policy, asked), policy))
    return rows or [(label(policy), policy) for policy in recommended()]


def _contexts(most: int | None) -> list[int]:
    """The default contexts that a model was made for, or its own where that is shorter."""
    found = [n for n in DEFAULT_CONTEXTS if most is None or n <= most]
    return found or [most or DEFAULT_CONTEXTS[0]]


def _memory(args: dict[str, Any]) -> tuple[int | None, int | None]:
    """(what the GPU may use, the machine's memory); None where that is not known."""
    import mlx.core as mx

    from ..loading.memory import apple_gpu_bytes, default_limit

    if (memory := args["memory"]) is not None:
        return apple_gpu_bytes(memory), memory
    if (memory := args["gpu_memory"]) is not None:
        return memory, None
    if args["kv_layers"] is None and mx.default_device() == mx.gpu:
        return default_limit() or None, None
    return None, None


def _shape(args: dict[str, Any]) -> tuple[Any, int | None]:
    """(the model's shape, bytes of its weights)."""
    from ..loading.gguf.reader import open_gguf
    from ..loading.gguf.shards import gguf_source
    from ..loading.known_shapes import known_name, quantization
    from ..loading.model_shape import hypothetical_shape, shape_from_config
    from ..loading.models import load_config

    model, weight_bits = args["model"], args["weight_bits"]
    if args["kv_layers"] is not None:
        sizes = (args[name] for name in ("kv_layers", "kv_heads", "head_dim", "v_head_dim"))
        return hypothetical_shape(*sizes), None
    known = known_name(model) if model and not os.path.exists(model) else None
    if known is None:
        config, name, source = load_config(model)
    else:
        config, name, source = KNOWN[known] | quantization(known), known, ""
    shape = shape_from_config(config, name, args["compress_sliding"])
    if weight_bits is not None:
        return shape, int(shape.n_parameters * weight_bits / 8)
    gguf = gguf_source(source) if source else None
    return shape, open_gguf(gguf).n_bytes if gguf else shape.weight_bytes


def _label(policy: Any, asked: dict[str, Any]) -> str:
    if policy.name == "uniform":
        return f"{policy.k}/{policy.v}"
    given = [str(asked[name]) for name in ("cache_type_k", "cache_type_v") if asked[name]]
    return policy.name + (f" ({'/'.join(given)})" if given else "")


main = console_script(command)
