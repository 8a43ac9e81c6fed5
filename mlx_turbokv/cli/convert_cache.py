"""``mlx_turbokv convert_cache``: prompt cache files of mlx-lm packed, and packed ones unpacked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..policy.recommended import label
from . import options
from .command import Command
from .entry import console_script
from .values import refuse

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("convert_cache", cls=Command, epilog=options.CACHE_HELP)
@click.argument("source", type=_FILE, metavar="FROM")
@click.argument("target", type=_FILE, metavar="TO")
@options.combined(options.model, options.cache)
def command(source: Path, target: Path, **args: Any) -> None:
    """Convert a prompt cache file between mlx-lm and this package.

    A file of mlx_lm.cache_prompt, quantised with --kv-bits or not, is packed: generate and chat go
    on with it. A packed one is dequantised: mlx_lm.generate reads it without this package.
    """
    from ..cache import end_token, files
    from ..cache.factory import make_prompt_cache
    from ..cache.file_options import Asked
    from ..cache.importing import unpacked
    from ..cache.summary import mib, summarize
    from ..cache.writing import check_target, save_prompt_cache
    from .runs import centre_of, load_model

    if source.resolve() == target.resolve():
        raise InputError(f"{target} cannot be read and written: give two files.")
    check_target(target)
    is_packed = _is_packed(source)
    if is_packed:
        names = [*options.CACHE_ARGUMENTS, "keys", "no_centre", "no_calibrate", "compress_sliding"]
        refuse(names, f"on {source}, which holds packed rows: they are dequantised")
    cache_options = options.attach_options(args)
    loaded = load_model(args)
    # packed rows say themselves what their keys are centred by
    cache_options["centre"] = True if is_packed else centre_of(cache_options["centre"], loaded)
    fresh = make_prompt_cache(loaded.model, **cache_options)
    # of packed windows `unpacked` says that they cannot be converted
    asked = Asked(formats=not is_packed, windows=not is_packed)
    saved = files.load(source, loaded.name, loaded.model, fresh, asked, loaded.source)
    if is_packed:
        caches = [unpacked(cache) for cache in saved.caches]
        # mlx_lm.generate compares its --model with this
        metadata = {"model": loaded.source, **end_token.written(saved.end_token)}
        save_prompt_cache(target, caches, metadata)
        kind = "dequantised"
    else:
        caches, kind = saved.caches, label(cache_options["policy"])
        files.save(target, saved, loaded.name, loaded.model)
    print(summarize(caches).line(kind))
    print(f"Saved {target}: {mib(source.stat().st_size)} before, {mib(target.stat().st_size)} now")


def _is_packed(path: Path) -> bool:
    """Whether a prompt cache file has packed caches.

    Raises: InputError where it cannot be read, or is no prompt cache.
    """
    from ..cache.file_checks import read_prompt_header

    metadata = read_prompt_header(path).metadata
    classes = [name for key, name in metadata.items() if key.startswith("1.")]
    return any(name.startswith("Turbo") for name in classes)


main = console_script(command)
