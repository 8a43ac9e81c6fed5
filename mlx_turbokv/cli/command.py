"""The class of the commands: help in groups, --version, and answers to flags of other caches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import click

from .. import __version__
from ..errors import InputError
from .output import shorten

HELP_NAMES = ["-h", "--help"]
# Parameters by the section of the help that lists them; others are in the last but one.
_SECTIONS = {
    "Model": "model adapter_path trust_remote_code eos_token draft_model num_draft_tokens pipeline "
    "dtype shape weight_bits kv_layers kv_heads head_dim v_head_dim",
    "Prompt": "prompt system_prompt prefill_response ignore_chat_template chat_template_config "
    "extra_eos_token prefill_step_size prompt_cache_file text",
    "Sampling": "max_tokens temp top_p min_p top_k xtc_probability xtc_threshold "
    "min_tokens_to_keep seed",
    "Cache": "cache_type_k cache_type_v policy boundary layer_adaptive sink recent "
    "compress_sliding keys no_centre no_calibrate max_kv_size backend configs",
}
_OUTPUT = (
    "output markdown json_path json_file plot folder from_path verbose resume no_resume time_limit"
)
_BITS = {8: "q8_0", 6: "turbo6", 5: "turbo5", 4: "turbo4", 3: "turbo3", 2: "turbo2"}
_SHORT = ("-ctk", "-ctv")
_FORMAT_OPTIONS = (*_SHORT, "--cache-type-k", "--cache-type-v")
# Cache options, and how a configuration (--config) says what they say; {} is their value.
_AS_CONFIG = {
    "-ctk": "K/V, such as turbo4/turbo3", "--cache-type-k": "K/V, such as turbo4/turbo3",
    "-ctv": "K/V, such as turbo4/turbo3", "--cache-type-v": "K/V, such as turbo4/turbo3",
    "--policy": "{}", "--boundary": "boundary:{}", "--layer-adaptive": "mode-{}",
    "--sink": "NAME+SINK,RECENT, such as balanced+0,0",
    "--recent": "NAME+SINK,RECENT, such as balanced+0,0",
}  # fmt: skip
_ELSEWHERE = ("--image", "--quantize-activations", "-qa", "--use-default-chat-template")


class ClosedPipeError(Exception):
    """The reader of the output closed it. click exits with 1 at a BrokenPipeError."""


class PipeCommand(click.Command):
    """Raises ClosedPipeError where the reader of the output closed it."""

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As click does."""
        with _closed_pipe():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """As click does."""
        with _closed_pipe():
            return super().invoke(ctx)


@contextlib.contextmanager
def _closed_pipe() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError as error:
        raise ClosedPipeError from error


class Command(PipeCommand):
    """A command whose help is in groups, with -h and --version."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        click.version_option(__version__, package_name="mlx_turbokv")(self)

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        """Those of every command."""
        return HELP_NAMES

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does; a flag of another cache is answered with what to type instead."""
        given = list(args)
        if answer := _not_taken(given, self.get_params(ctx), self.name):
            raise InputError(answer)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if answer := _instead(error.option_name, given, ctx):
                raise InputError(answer) from error
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options by section."""
        sections = {name: params.split() for name, params in _SECTIONS.items()}
        rows: dict[str, list[tuple[str, str]]] = {
            name: [] for name in (*sections, "Options", "Output", "Other")
        }
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None:
                rows[_section_of(param, sections)].append(record)
        for name, records in rows.items():
            if records:
                with formatter.section(name):
                    formatter.write_dl(records)


def _section_of(param: click.Parameter, sections: dict[str, list[str]]) -> str:
    if {"--help", "--version"} & set(param.opts):
        return "Other"
    if param.name in _OUTPUT.split():
        return "Output"
    return next((name for name, params in sections.items() if param.name in params), "Options")


def instead_of_kv_bits(value: str | None, where: str = "") -> str:
    """What to type in place of mlx-lm's --kv-bits, as a sentence.

    Args:
        value: its bits as they were given, if they were.
        where: ends the sentence.
    """
    bits = int(value) if value and value.isdecimal() and len(value) < 3 else 4
    name = _BITS.get(bits, "turbo4")
    said = f" {value}" if value and len(value) < 20 else ""
    return (
        f"--kv-bits{said} is mlx-lm's own quantised cache: give -ctk {name} -ctv {name} "
        f"instead{where}."
    )


def _instead(option: str, args: Sequence[str], ctx: click.Context) -> str | None:
    """What to type instead of an option that there is none of; None of an unknown one."""
    names = {param.name for param in ctx.command.params}
    if option == "--kv-bits":
        if "configs" in names and "cache_type_k" not in names:
            return (
                "--kv-bits is not an option here: give --config turbo4/turbo4 for a packed cache, "
                "or --config mlx-kv4:64 for mlx-lm's own with 4 bits."
            )
        return instead_of_kv_bits(_value_of(option, args))
    if option in ("--kv-group-size", "--quantized-kv-start"):
        return (
            f"{option} belongs to mlx-lm's --kv-bits: omit it, or give -ctk and -ctv a format "
            "with a scale for every 32 values, such as turbo4:32."
        )
    if option in _ELSEWHERE and ctx.command.name == "generate":
        return (
            f"{option} is not taken here: mlx_turbokv run -- mlx_lm.generate {option} has it, with "
            "packed caches."
        )
    return None


def _not_taken(
    args: Sequence[str], params: Sequence[click.Parameter], command: str | None
) -> str | None:
    """What to type instead of a cache option that a command does not take.

    click would read -ctk as -c with the value "tk".

    Args:
        params: the command's.
    """
    taken = {name for param in params for name in param.opts}
    if "-ctk" in taken:
        return None
    for word in args:
        option = word[:4] if word.startswith(_SHORT) else word.partition("=")[0]
        if option in taken or not (option in _AS_CONFIG or option == "--config"):
            continue
        value = shorten(_value_of(option, args) or "NAME")
        if "--config" in taken:
            instead = f"give --config {_AS_CONFIG[option].format(value)}"
        elif command == "calibrate" and option in _FORMAT_OPTIONS:
            instead = (
                f"give --formats {value} for the formats to choose from, or give --base or "
                "--compare K/V"
            )
        elif command == "calibrate":
            instead = f"give --base or --compare {_AS_CONFIG.get(option, '{}').format(value)}"
        elif command == "doctor":
            instead = "--quick and --full choose the formats that are checked; omit it"
        else:
            continue
        return f"{option} is not an option here: {instead}."
    return None


def _value_of(option: str, args: Sequence[str]) -> str | None:
    for word, following in zip(args, [*args[1:], None]):
        if option in _SHORT and word.startswith(option) and word != option:
            return word[len(option) :].lstrip("=")
        if word == option:
            return following
        if word.startswith(f"{option}="):
            return word.partition("=")[2]
    return None
