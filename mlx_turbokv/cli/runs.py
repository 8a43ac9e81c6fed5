"""Steps that the measuring commands share: configurations, the model, records and plots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from ..errors import InputError
from ..policy import Policy
from . import options
from .output import NotWrittenError, check_outputs, print_result, print_status, read_json
from .values import refuse_all_but

Options = dict[str, Any]


def config_names(names: Iterable[str], reference: bool = True) -> list[str]:
    """The configurations without repeats, f16/f16 first if ``reference``.

    Raises: InputError for an unknown name.
    """
    from ..evaluate.names import REFERENCE, check_name

    found = list(dict.fromkeys([REFERENCE, *names] if reference else names))
    for name in found:
        check_name(name)
    return found


def policies_of(names: Iterable[str]) -> list[Policy]:
    """The policies of configurations; mlx-lm's own quantised cache has none."""
    from ..evaluate.names import is_peer, parse_policy

    return [parse_policy(name) for name in names if not is_peer(name)]


def load_model(args: Options) -> Any:
    """The ``models.Loaded`` of --model, --adapter-path, --trust-remote-code and --dtype.

    Raises: InputError.
    """
    # MLX is imported by models, after the CPU's BLAS was found.
    from ..loading import models

    if "backend" in args:
        options.check_backend(args["backend"])

    return models.load(
        args["model"],
        adapter_path=args["adapter_path"],
        trust_remote_code=args["trust_remote_code"],
        **load_dtype(args.get("dtype")),
    )


def asked_centre(args: Options, names: Iterable[str]) -> bool | str:
    """What the options say that keys are centred by in these configurations.

    Raises: InputError.
    """
    return options.centre_from(
        args["keys"], args["no_centre"], policies_of(names), args["no_calibrate"]
    )


def asked_of_file(args: Options) -> Any:
    """The ``Asked`` of a prompt cache file that the options of ``options.cache`` ask for."""
    from ..cache.file_options import Asked
    from ..centring.references import paths_for
    from ..policy.presets import from_environment

    references = args["keys"]
    if args["policy"] is not None and references is None and not args["no_centre"]:
        policy = options.policy_of(args)
        own, has_turbo = getattr(policy, "path", None), any(k.is_turbo for k in policy.k_formats())
        if own and has_turbo and paths_for(own)[1].is_file():
            references = str(paths_for(own)[1])
    return Asked(
        formats=any(args[name] is not None for name in options.CACHE_ARGUMENTS)
        or from_environment() is not None,
        references=references,
        whole_keys=args["no_centre"],
        packed_windows=args["compress_sliding"],
    )


def centre_of(centre: Any, loaded: Any) -> Any:
    """What ``options.centre_from`` said, for the model that was loaded.

    Args:
        loaded: None for random weights, whose keys are not measured.
    """
    from ..centring.first_use import for_model

    if loaded is None:
        return True if centre == options.AUTO else centre
    return for_model(centre, loaded.tokenizer, loaded.name)


def load_dtype(name: str | None) -> dict[str, Any]:
    """What ``models.load`` takes for --dtype."""
    import mlx.core as mx

    return {} if name is None else {"dtype": getattr(mx, name), "packed": False}


def fitting_names(model: Any, names: list[str], args: Options) -> list[str]:
    """The names that fit the model; without --config those that do not are left out."""
    if args["configs"]:
        return names
    from ..evaluate.configuration import fitting

    names, reasons = fitting(model, names, args["backend"])
    for reason in reasons:
        print_status(reason)
    return names


def warn_about_context(loaded: Any, n_tokens: int) -> None:
    """Warn of a context above what the model was made for."""
    if loaded.max_context and n_tokens > loaded.max_context:
        print_status(
            f"Warning: a context of {n_tokens} is above the {loaded.max_context} tokens that "
            f"{loaded.name} was made for."
        )


def deadline_of(args: Options) -> float | None:
    """When --time-limit is over, on ``time.perf_counter``; call it first."""
    limit = args["time_limit"]
    return None if limit is None else time.perf_counter() + limit


def get_record(
    args: Options,
    what: str,
    measure: Callable[[Options], dict],
    render: Callable[[dict, str], str],
    left: Callable[[dict], list[str]],
) -> dict:
    """Print and return the record of --from, or that of a new run.

    Args:
        left: what a record lacks for want of time, a line each.

    Raises: InputError for a path that cannot be written, a plot that cannot be drawn, options that
        would measure beside --from, or a file that is no whole record.
    """
    from_path = args["from_path"]
    if from_path is not None:
        refuse_all_but(("from_path", "output", "plot"), "with --from, which measures nothing")
    check_outputs(args["json_path"], args["plot"])
    if args["plot"] is not None:
        from ..evaluate.plots import require_matplotlib

        require_matplotlib()
    if from_path is None:
        record = print_record(lambda: measure(args), lambda record: render(record, args["output"]))
        _say_left(left(record))
        return record
    record = read_json(from_path, what)
    try:
        text, lines = render(record, args["output"]), left(record)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise not_whole(from_path, what, error) from error
    print_record(lambda: record, lambda _: text)
    _say_left(lines)
    return record


def _say_left(lines: list[str]) -> None:
    for line in lines:
        print_status(f"Not measured within the time limit: {line}.")


def not_whole(path: str, what: str, error: Exception) -> InputError:
    """The error for a record that lacks something."""
    return InputError(f"{path} is not a whole record of {what} ({type(error).__name__}: {error}).")


def print_record(get: Callable[[], dict], render: Callable[[dict], str]) -> dict:
    """Print a new record, also where its file could not be written; return it.

    Raises: InputError where a file could not be written, after the results were printed.
    """
    try:
        record = get()
    except NotWrittenError as error:
        if isinstance(error.record, dict):
            print_result(render(error.record), error.record)
        raise
    print_result(render(record), record)
    return record
