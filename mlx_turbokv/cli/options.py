"""Options that several commands share, and what they mean together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import click

from .. import policy as policies
from ..errors import InputError
from ..quant.formats import FORMAT_NAMES, KVFormat

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_POLICY = "la-v7"
DTYPES = ("float32", "float16", "bfloat16")
BACKENDS = ("auto", "metal", "cuda", "reference")
CACHE_HELP = (
    "Without cache options: K q8_0 and V by Boundary V (la-v7: q8_0 in the first and last two KV "
    "layers, turbo2 between). -ctv alone gives V that format in every layer; beside a policy, "
    "-ctk and -ctv are the formats of the layers that it leaves open. At most one of --policy, "
    "--boundary and --layer-adaptive is accepted, and each wins over TURBO_LAYER_ADAPTIVE. A "
    "policy is never engaged because of the format that was asked for."
)


class FormatType(click.ParamType):
    """A K or V format by name."""

    name = "format"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> KVFormat:
        return value if isinstance(value, KVFormat) else KVFormat.parse(value)


def model_options(function: F) -> F:
    """Adds --model, --adapter-path and --trust-remote-code."""
    for option in (
        click.option(
            "--trust-remote-code",
            is_flag=True,
            help="Let the tokenizer run code that comes with the model.",
        ),
        click.option("--adapter-path", metavar="FOLDER", help="LoRA adapters to load."),
        click.option(
            "--model",
            metavar="ID|FOLDER|GGUF",
            help="A hub id, a folder or a .gguf file; SmolLM2-135M-Instruct where not given.",
        ),
    ):
        function = option(function)
    return function


sliding_option = click.option(
    "--compress-sliding",
    is_flag=True,
    help="Pack layers with a sliding window too; policies then count them as KV layers.",
)


def dtype_option(function: F) -> F:
    """Adds --dtype; ``load_dtype`` reads it."""
    return click.option(
        "--dtype",
        type=click.Choice(DTYPES),
        help="Run the model in this type, its weights dequantised.  [default: as the model is; "
        "float32 on a CPU under Linux]",
    )(function)


def load_dtype(name: str | None) -> dict[str, Any]:
    """What ``models.load`` takes for --dtype."""
    import mlx.core as mx

    return {} if name is None else {"dtype": getattr(mx, name), "packed": False}


backend_option = click.option(
    "--backend",
    type=click.Choice(BACKENDS),
    default="auto",
    show_default=True,
    help="Which kernels to run; a named one that is missing is an error.",
)


def cache_options(function: F) -> F:
    """Adds the options of the packed cache; ``policy_from`` reads those of the policy."""
    return policy_options(backend_option(function))


def policy_options(function: F) -> F:
    """Adds the options that say what is stored, and in which formats."""
    formats = ", ".join(FORMAT_NAMES)
    for option in (
        sliding_option,
        click.option(
            "--layer-adaptive",
            metavar="N",
            help="A policy by its TURBO_LAYER_ADAPTIVE mode: 0, 1, 2, 5, 6, 7 or 10.",
        ),
        click.option(
            "--boundary",
            metavar="A,B[:FORMAT]",
            help="V (or K/V) in this format, q8_0 if none, in the first A and last B KV layers.",
        ),
        click.option(
            "--policy",
            metavar="NAME|FILE",
            help="A policy: uniform, la-v5, la-v6, la-v7, mode-N, boundary:A,B, last:N or a JSON "
            "file.",
        ),
        click.option(
            "-ctv",
            "--cache-type-v",
            type=FormatType(),
            help=f"V's format where no policy sets it: {formats} or turboN:32.  [default: turbo2]",
        ),
        click.option(
            "-ctk",
            "--cache-type-k",
            type=FormatType(),
            help=f"K's format where no policy sets it: {formats} or turboN:32.  [default: q8_0]",
        ),
    ):
        function = option(function)
    return function


def centre_options(function: F) -> F:
    """Adds --keys and --no-centre; ``centre_from`` reads them."""
    for option in (
        click.option(
            "--no-centre",
            is_flag=True,
            help="Leave turbo keys as they are; else what is constant in them is taken out first.",
        ),
        click.option(
            "--keys",
            metavar="FILE",
            help="Mean keys that calibrate --keys wrote. Without it: those beside the policy's "
            "file, or the key projection's bias.",
        ),
    ):
        function = option(function)
    return function


def centre_from(keys: str | None = None, no_centre: bool = False) -> bool | str:
    """What ``make_prompt_cache`` takes as ``centre``.

    Raises:
        InputError: --keys beside --no-centre.
    """
    if keys is not None and no_centre:
        raise InputError("--keys and --no-centre cannot be given together.")
    return keys if keys is not None else not no_centre


def policy_from(
    cache_type_k: KVFormat | None = None,
    cache_type_v: KVFormat | None = None,
    policy: str | None = None,
    boundary: str | None = None,
    layer_adaptive: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> policies.Policy:
    """The policy that the cache options ask for.

    Precedence: one of ``--policy``, ``--boundary`` and ``--layer-adaptive``; then the environment
    variable TURBO_LAYER_ADAPTIVE; then ``-ctv``, the same in every layer; then la-v7.

    Args:
        environ: stands in for the process's environment.

    Raises:
        InputError: options that exclude each other, or a value that is not accepted.
    """
    given = {"--policy": policy, "--boundary": boundary, "--layer-adaptive": layer_adaptive}
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise InputError(
            f"{' and '.join(names)} cannot be given together: each names the whole policy."
        )
    k, v = cache_type_k, cache_type_v
    if policy is not None:
        return policies.load_policy(policy, k, v)
    if boundary is not None:
        return policies.parse_boundary(boundary, k, v)
    if layer_adaptive is not None:
        return policies.layer_adaptive(layer_adaptive, k, v)
    from_env = policies.from_environment(k, v, environ)
    if from_env is not None:
        return from_env
    if v is not None:
        return policies.Uniform(k or "q8_0", v)
    return policies.load_policy(DEFAULT_POLICY, k)
