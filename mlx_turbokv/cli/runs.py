"""Steps that the measuring commands share: configurations, the model, records and plots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from .output import check_writable, print_status, read_json

Options = dict[str, Any]


def config_names(names: Iterable[str], reference: bool = True) -> list[str]:
    """The configurations without repeats, f16/f16 first if ``reference``.

    Raises: InputError for an unknown name.
    """
    from ..evaluate.configuration import REFERENCE, check_name

    found = list(dict.fromkeys([REFERENCE, *names] if reference else names))
    for name in found:
        check_name(name)
    return found


def load_model(args: Options) -> Any:
    """The ``models.Loaded`` of --model, --adapter-path, --trust-remote-code and --dtype.

    Raises: InputError.
    """
    # MLX is imported by models, after the CPU's BLAS was found.
    from ..loading import models

    return models.load(
        args["model"],
        adapter_path=args["adapter_path"],
        trust_remote_code=args["trust_remote_code"],
        **load_dtype(args.get("dtype")),
    )


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


def get_record(args: Options, what: str, measure: Callable[[Options], dict]) -> dict:
    """The record of --from, or that of a new run.

    Raises: InputError for a path that cannot be written, or a plot that cannot be drawn.
    """
    check_writable(args["json_path"])
    check_writable(args["plot"])
    if args["from_path"] is not None:
        return read_json(args["from_path"], what)
    if args["plot"] and not args["json_path"]:
        from ..evaluate.plots import require_matplotlib

        require_matplotlib()  # before the run: without --json nothing would be kept of it
    return measure(args)
