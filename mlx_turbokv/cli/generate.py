"""``mlx_turbokv generate``: mlx_lm.generate with packed caches."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..policy.recommended import label
from . import options, sampling
from .end_tokens import add_end_tokens
from .entry import console_script
from .mlx_lm_options import MlxLmCommand
from .output import print_status
from .values import check_max_kv_size, check_max_tokens, refuse

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
@click.option(
    "--output", type=click.Choice(["text", "json"]), default="text",
    help="Print the text as it comes, or all as JSON at the end.",
)  # fmt: skip
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
    from ..cache.writing import check_target

    check_max_tokens(args["max_tokens"])
    sampling.check(args)
    if args["output"] == "json":
        refuse(["verbose"], "with --output json")
    if args["ignore_chat_template"]:
        refuse(_OF_CHAT, "with --ignore-chat-template")
    if args["draft_model"] is None:
        refuse(["num_draft_tokens"], "without --draft-model")
    check_max_kv_size(args["max_kv_size"])
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
    from .output import print_result
    from .runs import centre_of
    from .streaming import print_part, turn

    arguments = template_arguments(args["chat_template_config"])
    cache_options = options.attach_options(args)
    text = prompt_text(args["prompt"])
    loaded = _load(args, is_distributed)
    add_end_tokens(loaded, args["extra_eos_token"])
    sampling.check_vocabulary(loaded, args)
    cache_options["centre"] = centre_of(cache_options["centre"], loaded)
    if not loaded.tokenizer.has_chat_template:
        refuse(_OF_CHAT, f"with {loaded.name}, which has no chat template")
    conversation = Conversation(
        loaded,
        lambda: make_prompt_cache(loaded.model, **cache_options, max_kv_size=args["max_kv_size"]),
        arguments,
        use_template=not args["ignore_chat_template"],
    )
    file, prefill = args["prompt_cache_file"], args["prefill_response"]
    name, is_kept = resume(conversation, file, args, label(cache_options["policy"]))
    tokens = conversation.tokens(text, args["system_prompt"], prefill)
    n_most = most_new_tokens(loaded, args["max_tokens"], len(tokens))
    draft = None
    if args["draft_model"] is not None:
        draft = _draft(args, loaded, conversation.caches, len(tokens) + n_most)
    as_json, verbose = args["output"] == "json", args["verbose"]
    if verbose and not as_json:
        print("=" * 10)
    answer = turn(
        conversation,
        tokens,
        args,
        draft,
        _silent if as_json else print_part,
        goes_on=file is not None and is_kept,
    )
    held = summarize(conversation.caches[: len(loaded.model.layers)])
    if as_json:
        record = _record(loaded.name, answer, held, name)
        print_result(json.dumps(record, indent=1, ensure_ascii=False), record)
    else:
        print()
        if verbose:
            _print_closing_lines(answer, held.line(name))
    sys.stdout.flush()
    if file is not None and is_kept:
        conversation.finish(answer.tokens, (prefill or "") + answer.text)
        conversation.save(file)


def resume(
    conversation: Any, file: Path | None, args: dict[str, Any], policy: str
) -> tuple[str, bool]:
    """Go on with a file, if there is one.

    Args:
        conversation: a ``Conversation``.
        args: the options of the command.
        policy: the name of the policy that they ask for.

    Returns:
        (what the policy of the caches is called, whether the conversation is saved to the file).

    Raises: InputError.
    """
    from .runs import asked_of_file

    if file is None or not file.exists():
        return policy, True
    asked = asked_of_file(args)
    saved = conversation.load(file, asked)
    if saved.is_prompt:
        n = f"{len(saved.tokens):,} tokens"
        packed = f", which are packed in {saved.n_packed} layers" if saved.n_packed else ""
        print_status(f"{file.name} holds a prompt of {n}{packed}; the file stays as it is.")
    if not asked.formats and not saved.n_packed:
        policy = f"as in {file.name}"
    return policy, not saved.is_prompt


def _silent(_: str) -> None:
    """Show no part of the text."""


def _record(model: str, answer: Any, held: Any, policy: str) -> dict[str, Any]:
    """What --output json prints."""
    return {
        "what": "generated text",
        "model": model,
        "text": answer.text,
        "finish_reason": answer.finish_reason,
        "prompt_tokens": len(answer.tokens) - len(answer.generated),
        "prompt_tokens_read": answer.prompt_tokens,
        "prompt_tps": answer.prompt_tps,
        "generation_tokens": len(answer.generated),
        "generation_tps": answer.generation_tps,
        "peak_memory_gb": answer.peak_memory,
        "kv_cache": {"policy": policy, **dataclasses.asdict(held)},
    }


def _print_closing_lines(answer: Any, cache: str) -> None:
    print("=" * 10)
    if not answer.text:
        print("No text generated for this prompt")
    print(f"Prompt: {answer.prompt_tokens} tokens, {answer.prompt_tps:.3f} tokens-per-sec")
    print(f"Generation: {len(answer.generated)} tokens, {answer.generation_tps:.3f} tokens-per-sec")
    print(f"Peak memory: {answer.peak_memory:.3f} GB")
    print(cache)


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


def most_new_tokens(loaded: Any, max_tokens: int, n_prompt: int) -> float:
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
