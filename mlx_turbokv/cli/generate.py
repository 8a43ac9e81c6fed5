"""``mlx_turbokv generate``: mlx_lm.generate with packed caches."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from . import options, sampling
from .entry import console_script
from .mlx_lm_options import MlxLmCommand
from .values import refuse

_OF_CHAT = ("system_prompt", "prefill_response", "chat_template_config")


@click.command("generate", cls=MlxLmCommand, mlx_lm="generate", epilog=options.CACHE_HELP)
@options.model
@click.option(
    "--prompt-cache-file", type=click.Path(dir_okay=False, path_type=Path),
    help="Continue from this .safetensors file if it exists, and save the cache to it.",
)  # fmt: skip
@click.option("--draft-model", metavar="ID|FOLDER|GGUF", help="For speculative decoding.")
@click.option(
    "--pipeline", is_flag=True,
    help="Under mlx.launch: divide up the layers of the model, and not the heads of each layer.",
)  # fmt: skip
@options.cache
def command(**args: Any) -> None:
    """Generate text through a packed KV cache."""
    from ..loading import distributed

    _check_options(args)
    is_distributed = distributed.n_processes() > 1
    if is_distributed:
        _check_distributed(args)
    else:
        refuse(["pipeline"], "in one process: start several with mlx.launch")
    _generate(args, is_distributed)
    if is_distributed:
        distributed.barrier()


main = console_script(command)


def _check_options(args: dict[str, Any]) -> None:
    from ..cache.files import check_target

    if args["max_tokens"] == 0 or args["max_tokens"] < -1:
        raise InputError(
            f"--max-tokens {args['max_tokens']} is not accepted: give at least 1, or -1 for no "
            "limit."
        )
    sampling.check(args)
    if args["ignore_chat_template"]:
        refuse(_OF_CHAT, "with --ignore-chat-template")
    if args["draft_model"] is None:
        refuse(["num_draft_tokens"], "without --draft-model")
    if args["max_kv_size"] is not None:
        refuse(["keys"], "with --max-kv-size: the keys of a window stay whole")
    if args["prompt_cache_file"] is not None:
        if args["draft_model"] is not None:
            raise InputError("--prompt-cache-file and --draft-model cannot go together.")
        check_target(args["prompt_cache_file"])


def _check_distributed(args: dict[str, Any]) -> None:
    """Check the options for use with mlx.launch; only rank 0 prints to stdout from here on."""
    from ..loading import distributed

    for name in ("--prompt-cache-file", "--draft-model", "--adapter-path"):
        if args[name[2:].replace("-", "_")] is not None:
            raise InputError(f"{name} cannot be used over several machines.")
    if args["prompt"] == "-":
        raise InputError("--prompt - cannot be used over several machines: give the text.")
    if distributed.rank() != 0:
        distributed.silence_stdout()


def _generate(args: dict[str, Any], is_distributed: bool) -> None:
    from ..cache.factory import make_prompt_cache
    from ..cache.summary import summarize
    from .conversation import Conversation, prompt_text, template_arguments

    arguments = template_arguments(args["chat_template_config"])
    asked = {name: args[name] for name in options.CACHE_ARGUMENTS}
    policy = options.policy_from(**asked)
    centre = options.centre_from(args["keys"], args["no_centre"], [policy])
    options.check_backend(args["backend"])
    text = prompt_text(args["prompt"])
    loaded = _load(args, is_distributed)
    _add_end_tokens(loaded, args["extra_eos_token"])
    sampling.check_vocabulary(loaded, args)
    if not loaded.tokenizer.has_chat_template:
        refuse(_OF_CHAT, f"with {loaded.name}, which has no chat template")
    caches = make_prompt_cache(
        loaded.model,
        policy=policy,
        backend=args["backend"],
        centre=centre,
        compress_sliding=args["compress_sliding"],
        max_kv_size=args["max_kv_size"],
    )
    conversation = Conversation(loaded, caches, args["prompt_cache_file"])
    has_formats = any(value is not None for value in asked.values())
    name = policy.name
    if conversation.resume(same_formats=has_formats) and not has_formats:
        name = f"as in {args['prompt_cache_file'].name}"
    tokens = conversation.tokens(text, args, arguments)
    n_common = conversation.trim_to(tokens)
    n_most = _max_tokens(loaded, args["max_tokens"], len(tokens))
    caches, draft = conversation.caches, None
    if args["draft_model"] is not None:
        draft, draft_caches = _draft(args, loaded, caches, len(tokens) + n_most)
        caches = [*caches, *draft_caches]
    generated, answer = _stream(args, loaded, caches, tokens[n_common:], draft)
    if args["verbose"]:
        print(summarize(caches[: len(loaded.model.layers)]).line(name))
    sys.stdout.flush()
    conversation.save(tokens + generated, (args["prefill_response"] or "") + answer)


def _load(args: dict[str, Any], is_distributed: bool) -> Any:
    import mlx.core as mx

    from ..loading import distributed
    from .runs import load_model

    if is_distributed:
        loaded = distributed.load(args["model"], args["pipeline"], args["trust_remote_code"])
        distributed.share_seed(args["seed"])
        return loaded
    if args["seed"] is not None:
        mx.random.seed(args["seed"])
    return load_model(args)


def _add_end_tokens(loaded: Any, tokens: tuple[str, ...]) -> None:
    vocabulary = loaded.tokenizer.get_vocab()
    for token in tokens:
        is_number = re.fullmatch("[0-9]{1,9}", token) and int(token) < len(vocabulary)
        if token not in vocabulary and not is_number:
            raise InputError(
                f"--extra-eos-token {token!r} is no token of {loaded.name}; give a token's text "
                "or its number."
            )
        loaded.tokenizer.add_eos_token(token)


def _max_tokens(loaded: Any, max_tokens: int, n_prompt: int) -> float:
    """The most tokens to generate, infinite for -1; warns beyond the model's context."""
    limit = loaded.max_context
    if limit is not None and n_prompt + max(max_tokens, 0) > limit:
        more = f" and {max_tokens:,} new ones" if max_tokens > 0 else ""
        print(
            f"Warning: the prompt's {n_prompt:,} tokens{more} go beyond the {limit:,} "
            f"positions that {loaded.name} was made for.",
            file=sys.stderr,
        )
    return max_tokens if max_tokens > 0 else math.inf


def _draft(
    args: dict[str, Any], loaded: Any, caches: list[Any], n_tokens: float
) -> tuple[Any, list[Any]]:
    """The draft model and its caches, which may have to hold ``n_tokens``."""
    from mlx_lm.models.cache import make_prompt_cache

    from ..cache import speculation
    from ..loading import models

    draft = models.load(args["draft_model"], trust_remote_code=args["trust_remote_code"])
    if draft.tokenizer.vocab_size != loaded.tokenizer.vocab_size:
        raise InputError(f"The draft model {draft.name} has another vocabulary than {loaded.name}.")
    draft_caches = make_prompt_cache(draft.model)
    speculation.check(loaded.name, caches, draft_caches, args["num_draft_tokens"], n_tokens)
    return draft.model, draft_caches


def _stream(
    args: dict[str, Any], loaded: Any, caches: list[Any], prompt: list[int], draft: Any
) -> tuple[list[int], str]:
    """Generate and print; the tokens and the text."""
    from mlx_lm import stream_generate
    from mlx_lm.sample_utils import make_sampler

    verbose, tokenizer = args["verbose"], loaded.tokenizer
    names = ("temp", "top_p", "min_p", "min_tokens_to_keep", "top_k", "xtc_probability",
             "xtc_threshold")  # fmt: skip
    sampler = make_sampler(
        **{name: args[name] for name in names},
        xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
    )
    if verbose:
        print("=" * 10)
    generated, text, response = [], "", None
    for response in stream_generate(
        loaded.model,
        tokenizer,
        prompt,
        max_tokens=args["max_tokens"],
        draft_model=draft,
        num_draft_tokens=args["num_draft_tokens"],
        sampler=sampler,
        prompt_cache=caches,
        prefill_step_size=args["prefill_step_size"],
    ):
        print(response.text, end="", flush=True)
        generated.append(int(response.token))
        text += response.text
    print()
    if verbose and response is not None:
        print("=" * 10)
        if not text:
            print("No text generated for this prompt")
        print(f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec")
        print(
            f"Generation: {response.generation_tokens} tokens, "
            f"{response.generation_tps:.3f} tokens-per-sec"
        )
        print(f"Peak memory: {response.peak_memory:.3f} GB")
    return generated, text
