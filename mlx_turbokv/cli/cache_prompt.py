"""``mlx_turbokv cache_prompt``: mlx_lm.cache_prompt with packed caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..policy.recommended import label
from . import options
from .entry import console_script
from .mlx_lm_options import MlxLmCommand
from .values import check_max_kv_size


@click.command("cache_prompt", cls=MlxLmCommand, mlx_lm="cache_prompt", epilog=options.CACHE_HELP)
@options.model
@click.option(
    "--prompt-cache-file", required=True, type=click.Path(dir_okay=False, path_type=Path),
    help="The .safetensors file to save the prompt cache in.",
)  # fmt: skip
@options.combined(options.prefill_step_size, options.cache)
def command(**args: Any) -> None:
    """Read a prompt and save its packed cache, for generate --prompt-cache-file and for chat.

    A prompt that follows continues it. The file does not change then, and serves any number of
    them.
    """
    from ..cache.factory import make_prompt_cache
    from ..cache.summary import mib, summarize
    from ..cache.writing import check_target
    from .conversation import Conversation, prompt_text
    from .runs import centre_of, load_model
    from .streaming import Reading, read

    file = args["prompt_cache_file"]
    check_target(file)
    check_max_kv_size(args["max_kv_size"])
    cache_options = options.attach_options(args)
    text = prompt_text(args["prompt"], escapes=False)
    loaded = load_model(args)
    cache_options["centre"] = centre_of(cache_options["centre"], loaded)
    conversation = Conversation(
        loaded,
        lambda: make_prompt_cache(loaded.model, **cache_options, max_kv_size=args["max_kv_size"]),
    )
    conversation.end_token.use(args["eos_token"], "--eos-token")
    tokens = conversation.read_prompt(text)
    with Reading(len(tokens)) as progress:
        read(loaded.model, tokens, conversation.caches, args["prefill_step_size"], progress)
    conversation.finish(tokens)
    conversation.save(file, is_prompt=True)
    print(summarize(conversation.caches).line(label(cache_options["policy"])))
    print(f"Saved {file}: {mib(file.stat().st_size)}")


main = console_script(command)
