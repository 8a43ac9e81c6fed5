"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import click

from .. import policy as policies
from ..centring import AUTO
from ..errors import InputError
from ..policy.policies import DEFAULT_K, DEFAULT_V
from ..policy.settings import DEFAULT, SETTINGS, default_policy
from ..quant.formats import FORMAT_NAMES, KVFormat
from .values import (
    BACKEND_VARIABLE,
    COUNT,
    BackendType,
    FormatType,
    Number,
    ProtectedType,
    exclude,
    given,
)

F = TypeVar("F", bound=Callable[..., Any])

DTYPES = ("float32", "float16", "bfloat16")
CACHE_ARGUMENTS = ("cache_type_k", "cache_type_v", "policy", "boundary", "layer_adaptive")
CACHE_ARGUMENTS += ("sink", "recent")
_PAIR = SETTINGS[DEFAULT]
CACHE_HELP = (
    f"Without cache options: the setting {DEFAULT} (K {_PAIR.k}, V {_PAIR.v}). -ctk and -ctv "
    "without a policy are the formats of every layer, and one that is not given is that setting's; "
    "with a policy they are the formats of the layers that it leaves open. At most one of "
    "--policy, --boundary and --layer-adaptive is accepted, and each overrides "
    "TURBO_LAYER_ADAPTIVE."
)
_FORMATS = f"{', '.join(FORMAT_NAMES)} or turboN:32"


def combined(*options: Callable[[F], F]) -> Callable[[F], F]:
    """One decorator for several options, listed by --help in this order."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


model = combined(
    click.option(
        "--model", metavar="ID|FOLDER|GGUF",
        help="A hub id, a folder or a .gguf file; SmolLM2-135M-Instruct where not given.",
    ),
    click.option("--adapter-path", metavar="FOLDER", help="LoRA adapters to load."),
    click.option(
        "--trust-remote-code", is_flag=True,
        help="Let the tokenizer run code that comes with the model.",
    ),
)  # fmt: skip
dtype = click.option(
    "--dtype", type=click.Choice(DTYPES),
    help="Run the model in this type, its weights dequantised.  [default: as the model is; "
    "float32 on a CPU under Linux]",
)  # fmt: skip
backend = click.option(
    "--backend", type=BackendType(), default="auto", envvar=BACKEND_VARIABLE,
    help="Which kernels to run; a named one that is missing is an error. Also by the environment "
    f"variable {BACKEND_VARIABLE}.",
)  # fmt: skip
prefill_step_size = click.option(
    "--prefill-step-size", default=2048, type=COUNT,
    help="Prompt tokens at a time.",
)  # fmt: skip
compress_sliding = click.option(
    "--compress-sliding", is_flag=True,
    help="Pack layers with a sliding window too; policies then count them as KV layers.",
)  # fmt: skip
centre = combined(
    click.option(
        "--keys", metavar="FILE",
        help="Mean keys and scales that calibrate --keys wrote.  [default: the file next to the "
        "policy's file, or what is measured at the model's first use]",
    ),
    click.option(
        "--no-centre", is_flag=True,
        help="Do not subtract the constant part of turbo keys before they are quantised.",
    ),
    click.option(
        "--no-calibrate", is_flag=True,
        help="Do not measure a model's keys at its first use: a key bias alone then centres them.",
    ),
)  # fmt: skip
protection = combined(
    click.option(
        "--sink", type=ProtectedType(), metavar="N",
        help="Tokens at a sequence's start that are stored in 8.5 bits in every layer: a multiple "
        "of 32.  [default: the policy file's, or 32; 0 for la-vN and mode-N]",
    ),
    click.option(
        "--recent", type=ProtectedType(), metavar="N",
        help="The same at a sequence's end, at least.  [default: the policy file's, or 128; 0 for "
        "la-vN and mode-N]",
    ),
)  # fmt: skip
policy = combined(
    click.option(
        "-ctk", "--cache-type-k", type=FormatType(),
        help=f"K's format where no policy sets it: {_FORMATS}.  [default: {_PAIR.k}; "
        f"{DEFAULT_K} with a policy]",
    ),
    click.option(
        "-ctv", "--cache-type-v", type=FormatType(),
        help=f"V's format where no policy sets it: {_FORMATS}.  [default: {_PAIR.v}; "
        f"{DEFAULT_V} with a policy]",
    ),
    click.option(
        "--policy", metavar="NAME|FILE",
        help=f"A setting ({', '.join(SETTINGS)}) or a policy: uniform, la-v5, la-v6, la-v7, "
        "mode-N, boundary:A,B, last:N or a JSON file.",
    ),
    click.option(
        "--boundary", metavar="A,B[:FORMAT]",
        help="V (or K/V) in this format, q8_0 if none, in the first A and last B KV layers.",
    ),
    click.option(
        "--layer-adaptive", metavar="N",
        help="A policy by its TURBO_LAYER_ADAPTIVE mode: 0, 1, 2, 5, 6, 7 or 10.",
    ),
    protection,
    compress_sliding,
    centre,
)  # fmt: skip
cache = combined(policy, backend)
output = click.option(
    "--output", type=click.Choice(["text", "markdown", "json"]), default="text",
    help="How the results are printed.",
)  # fmt: skip
markdown = click.option("--markdown", is_flag=True, help="The same as --output markdown.")
json = click.option(
    "--json", "json_path", metavar="FILE", help="Write the whole record to this file."
)
from_record = click.option(
    "--from", "from_path", metavar="FILE", help="Show this record; measure nothing."
)
time_limit = click.option(
    "--time-limit", type=Number(0), metavar="SECONDS",
    help="Start nothing after this time; what was not measured is listed.",
)  # fmt: skip
resume = click.option(
    "--resume/--no-resume", default=None,
    help="Require, or ignore, the finished parts of an interrupted run; by default they are used "
    "where the settings are the same.",
)  # fmt: skip


def configs(help: str) -> Callable[[F], F]:
    """--config, which is repeatable."""
    return click.option("--config", "configs", multiple=True, metavar="CONFIG", help=help)


def centre_from(
    keys: str | None = None,
    no_centre: bool = False,
    used_by: Iterable[policies.Policy] | None = None,
    no_calibrate: bool = False,
) -> bool | str:
    """What ``make_prompt_cache`` takes as ``centre``.

    Args:
        used_by: the policies that are asked for; None where that is known later.

    Raises:
        InputError: --keys with --no-centre, one of them where no K format is turbo, or a file of
            references that is missing.
    """
    if keys is not None and no_centre:
        raise InputError("--keys and --no-centre cannot be given together.")
    if keys is None and not no_centre:
        return no_calibrate or AUTO
    option = "--no-centre" if keys is None else "--keys"
    if used_by is not None and not any(k.is_turbo for p in used_by for k in p.k_formats()):
        raise InputError(
            f"{option} has no effect where no K format is turbo: give one, such as -ctk turbo4 or "
            "--config turbo4/turbo3."
        )
    if keys is None:
        return False
    from ..centring.references import paths_for

    if not os.path.basename(keys.rstrip("/")).strip("."):
        raise InputError(f"--keys {keys!r} is not a file's name: calibrate --keys writes one.")
    for file in reversed(paths_for(keys)):
        if not os.path.isfile(file):
            raise InputError(
                f"There are no key references at {file}; calibrate --keys writes them."
            )
    return keys if keys != AUTO else os.path.join(os.curdir, keys)


def check_backend(name: str) -> str:
    """The name of a back-end that this machine has, checked before a model is loaded.

    Raises:
        InputError: it is missing here.
    """
    from ..kernels.backend import select_backend

    select_backend(name)
    return name


def attach_options(args: Mapping[str, Any]) -> dict[str, Any]:
    """What ``attach`` and ``make_prompt_cache`` take for the options of ``cache``, checked.

    Raises: InputError.
    """
    policy = policy_of(args)
    centre = centre_from(args["keys"], args["no_centre"], [policy], args["no_calibrate"])
    return {
        "policy": policy,
        "backend": check_backend(args["backend"]),
        "centre": centre,
        "compress_sliding": args["compress_sliding"],
    }


def policy_of(args: Mapping[str, Any]) -> policies.Policy:
    """The policy that the options of a command ask for.

    Raises: InputError.
    """
    return policy_from(**{name: args[name] for name in CACHE_ARGUMENTS})


def check_output(output: str, markdown: bool) -> str:
    """What --output and --markdown ask for together.

    Raises:
        InputError: they contradict each other.
    """
    if markdown and given("output") and output != "markdown":
        exclude("markdown", "output")
    return "markdown" if markdown else output


def policy_from(
    cache_type_k: KVFormat | None = None,
    cache_type_v: KVFormat | None = None,
    policy: str | None = None,
    boundary: str | None = None,
    layer_adaptive: str | None = None,
    sink: int | None = None,
    recent: int | None = None,
    environ: Mapping[str, str] | None = None,
) -> policies.Policy:
    """The policy that the cache options ask for.

    Precedence: one of ``--policy``, ``--boundary`` and ``--layer-adaptive``; then the environment
    variable TURBO_LAYER_ADAPTIVE; then ``default_policy`` of ``-ctk`` and ``-ctv``.

    Args:
        sink, recent: protected tokens; None: as many as the policy says.
        environ: used in place of the process's environment.

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
        found = policies.load_policy(policy, k, v)
    elif boundary is not None:
        found = policies.parse_boundary(boundary, k, v)
    elif layer_adaptive is not None:
        found = policies.layer_adaptive(layer_adaptive, k, v)
    elif (from_env := policies.from_environment(k, v, environ)) is not None:
        found = from_env
    else:
        found = default_policy(k, v)
    option = "--sink" if sink else "--recent" if recent else None
    if option is not None and not found.has_turbo():
        raise InputError(
            f"{option} {sink or recent} has no effect where no K or V format is turbo: q8_0 and "
            "f16 are at least as exact."
        )
    return found.protecting(sink, recent)
