"""``mlx_turbokv generate``: mlx_lm.generate with packed caches."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from .entry import run
from .options import CACHE_HELP, cache_options, centre_options, model_options

_OPEN = {"show_default": True}
_UNIT = click.FloatRange(0, 1)
_CACHE_OPTIONS = (
    "cache_type_k", "cache_type_v", "policy", "boundary", "layer_adaptive",
)  # fmt: skip
_NOT_DISTRIBUTED = {
    "prompt_cache_file": "--prompt-cache-file",
    "draft_model": "--draft-model",
    "adapter_path": "--adapter-path",
}


@click.command("generate", epilog=CACHE_HELP)
@model_options
@click.option(
    "-p", "--prompt", default="hello", help="The message; - reads standard input.", **_OPEN
)
@click.option("--system-prompt", help="The system's message, for the chat template.")
@click.option("--prefill-response", help="How the answer begins, for the chat template.")
@click.option("--ignore-chat-template", is_flag=True, help="Take the prompt as it is.")
@click.option("--chat-template-config", metavar="JSON", help="Arguments for the chat template.")
@click.option("--extra-eos-token", multiple=True, help="Another token that ends the answer.")
@click.option("-m", "--max-tokens", default=100, help="Tokens to generate; -1: no limit.", **_OPEN)
@click.option("--temp", default=0.0, type=click.FloatRange(0), help="Temperature.", **_OPEN)
@click.option("--top-p", default=1.0, type=_UNIT, help="Sampling top-p.", **_OPEN)
@click.option("--min-p", default=0.0, type=_UNIT, help="Sampling min-p.", **_OPEN)
@click.option("--top-k", default=0, type=click.IntRange(0), help="Sampling top-k.", **_OPEN)
@click.option("--xtc-probability", default=0.0, type=_UNIT, help="Chance of XTC sampling.", **_OPEN)
@click.option(
    "--xtc-threshold", default=0.1, type=click.FloatRange(0, 0.5), help="XTC threshold.", **_OPEN
)
@click.option(
    "--min-tokens-to-keep", default=1, type=click.IntRange(1), help="Kept by min-p.", **_OPEN
)
@click.option("--seed", type=int, help="Seed of the random numbers.")
@click.option("--verbose", default=True, type=bool, help="Print the closing lines.", **_OPEN)
@click.option(
    "--max-kv-size",
    type=click.IntRange(1),
    help="Most tokens in the cache: beyond them the oldest are dropped, but for the first 4.",
)
@click.option(
    "--prefill-step-size", default=2048, type=click.IntRange(1), help="Prompt tokens at a time.",
    **_OPEN,
)  # fmt: skip
@click.option(
    "--prompt-cache-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Go on from this .safetensors file if it exists, and save the cache to it.",
)
@click.option("--draft-model", metavar="ID|FOLDER|GGUF", help="For speculative decoding.")
@click.option(
    "--num-draft-tokens", default=3, type=click.IntRange(1), help="Tokens to draft.", **_OPEN
)
@click.option(
    "--pipeline",
    is_flag=True,
    help="Under mlx.launch: divide up the layers of the model, and not the heads of each layer.",
)
@centre_options
@cache_options
def command(**options: Any) -> None:
    """Generate text through a packed KV cache."""
    from ..loading import blas

    blas.require_mlx()
    _Generation(options).run()


def main() -> None:
    """Console script ``mlx_turbokv.generate``."""
    run(command)


class _Generation:
    """One run of the command."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.template_arguments = _template_arguments(options["chat_template_config"])
        self.file: Path | None = options["prompt_cache_file"]
        self.messages: list[dict[str, str]] = []
        self._check_options()

    def _check_options(self) -> None:
        from ..cache.files import check_target

        if self.options["max_tokens"] == 0 or self.options["max_tokens"] < -1:
            raise InputError(
                f"--max-tokens {self.options['max_tokens']} is not accepted: give at least 1, or "
                "-1 for no limit."
            )
        if self.file is not None:
            if self.options["draft_model"] is not None:
                raise InputError("--prompt-cache-file and --draft-model cannot go together.")
            check_target(self.file)

    def run(self) -> None:
        import mlx.core as mx

        from ..cache.factory import make_prompt_cache
        from ..loading import distributed, models
        from .options import centre_from, policy_from

        options = self.options
        centre = centre_from(options["keys"], options["no_centre"])
        policy = policy_from(**{name: options[name] for name in _CACHE_OPTIONS})
        several = distributed.n_processes() > 1
        if several:
            self._check_for_several()
        text = self._prompt_text()
        if several:
            self.loaded = distributed.load(
                options["model"], options["pipeline"], options["trust_remote_code"]
            )
            distributed.agree_on_a_seed(options["seed"])
        else:
            if options["seed"] is not None:
                mx.random.seed(options["seed"])
            self.loaded = models.load(
                options["model"],
                adapter_path=options["adapter_path"],
                trust_remote_code=options["trust_remote_code"],
            )
        self._add_end_tokens()
        fresh = make_prompt_cache(
            self.loaded.model,
            policy=policy,
            backend=options["backend"],
            centre=centre,
            compress_sliding=options["compress_sliding"],
            max_kv_size=options["max_kv_size"],
        )
        self.policy_name = policy.name
        self.caches, held = self._continued(fresh)
        tokens = self._tokens(text, held)
        n_common = self._rewind(held, tokens)
        max_tokens = self._max_tokens(len(tokens))
        draft = self._draft(len(tokens) + (max_tokens if max_tokens > 0 else math.inf))
        generated, response_text = self._stream(tokens[n_common:], max_tokens, draft)
        if options["verbose"]:
            from ..cache.summary import summarize

            n_layers = len(self.loaded.model.layers)
            print(summarize(self.caches[:n_layers]).line(self.policy_name))
        if self.file is not None:
            self._save(tokens + generated, response_text)
        if several:
            distributed.wait_for_the_others()

    def _check_for_several(self) -> None:
        """Refuse what mlx.launch's processes cannot do together; all but the first fall silent."""
        from ..loading import distributed

        distributed.check_options(self.options, _NOT_DISTRIBUTED)
        if self.options["prompt"] == "-":
            raise InputError("--prompt - cannot be used over several machines: give the text.")
        if not distributed.is_first():
            distributed.be_silent()

    def _prompt_text(self) -> str:
        prompt = self.options["prompt"]
        if prompt == "-":
            try:
                return sys.stdin.read()
            except UnicodeDecodeError as error:
                raise InputError("Standard input is not text in UTF-8.") from error
        return prompt.replace("\\n", "\n").replace("\\t", "\t")

    def _add_end_tokens(self) -> None:
        tokenizer = self.loaded.tokenizer
        vocabulary = tokenizer.get_vocab()
        for token in self.options["extra_eos_token"]:
            if token not in vocabulary and not token.isdigit():
                raise InputError(
                    f"--extra-eos-token {token!r} is no token of {self.loaded.name}; give a "
                    "token's text or its number."
                )
            tokenizer.add_eos_token(token)

    def _continued(self, fresh: list[Any]) -> tuple[list[Any], list[int]]:
        """The caches to use and the tokens that they hold."""
        if self.file is None or not self.file.exists():
            return fresh, []
        from ..cache import files as prompt_cache_file

        named = any(self.options[name] is not None for name in _CACHE_OPTIONS)
        saved = prompt_cache_file.load(self.file, self.loaded.name, fresh, same_formats=named)
        self.messages = saved.messages
        if not named:
            self.policy_name = f"as in {self.file.name}"
        return saved.caches, saved.tokens

    def _tokens(self, text: str, held: list[int]) -> list[int]:
        """Ids of the whole sequence: what the cache holds and the prompt."""
        tokenizer = self.loaded.tokenizer
        if self.options["ignore_chat_template"] or not tokenizer.has_chat_template:
            tokens = held + tokenizer.encode(text, add_special_tokens=not held)
            if len(tokens) == len(held):
                raise InputError("The prompt is empty; give --prompt some text.")
            return tokens
        if self.options["system_prompt"] is not None:
            spoken = [m for m in self.messages if m["role"] != "system"]
            system = {"role": "system", "content": self.options["system_prompt"]}
            self.messages = [system, *spoken]
        self.messages.append({"role": "user", "content": text})
        prefill = self.options["prefill_response"]
        messages = list(self.messages)
        if prefill is not None:
            messages.append({"role": "assistant", "content": prefill})
        try:
            rendered = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=prefill is not None,
                add_generation_prompt=prefill is None,
                **self.template_arguments,
            )
        except Exception as error:  # a template raises what it likes
            raise InputError(
                f"The chat template of {self.loaded.name} refuses this conversation ({error}); "
                "--ignore-chat-template takes the prompt as it is."
            ) from error
        return tokenizer.encode(rendered, add_special_tokens=False)

    def _rewind(self, held: list[int], tokens: list[int]) -> int:
        """Take back from the cache what the new sequence doesn't begin with."""
        from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

        n_common = 0
        while n_common < min(len(held), len(tokens) - 1) and held[n_common] == tokens[n_common]:
            n_common += 1
        excess = len(held) - n_common
        if excess:
            if not can_trim_prompt_cache(self.caches):
                raise InputError(
                    f"The conversation does not continue the one in {self.file}, and a cache of "
                    f"{self.loaded.name} cannot be taken back."
                )
            trim_prompt_cache(self.caches, excess)
        return n_common

    def _max_tokens(self, n_prompt: int) -> int:
        max_tokens = self.options["max_tokens"]
        limit = self.loaded.max_context
        if limit is not None and n_prompt + max(max_tokens, 0) > limit:
            more = f" and {max_tokens:,} new ones" if max_tokens > 0 else ""
            print(
                f"Warning: the prompt's {n_prompt:,} tokens{more} go beyond the {limit:,} "
                f"positions that {self.loaded.name} was made for.",
                file=sys.stderr,
            )
        return max_tokens

    def _draft(self, n_tokens: float) -> Any:
        """The draft model, its caches added to the model's; n_tokens may come to lie in them."""
        from mlx_lm.models.cache import make_prompt_cache

        from ..cache.summary import leaves
        from ..loading import models

        if self.options["draft_model"] is None:
            return None
        draft = models.load(
            self.options["draft_model"], trust_remote_code=self.options["trust_remote_code"]
        )
        if draft.tokenizer.vocab_size != self.loaded.tokenizer.vocab_size:
            raise InputError(
                f"The draft model {draft.name} has another vocabulary than {self.loaded.name}."
            )
        if not all(cache.is_trimmable() for cache in self.caches):
            raise InputError(
                f"{self.loaded.name} cannot decode speculatively: its cache cannot be taken back."
            )
        self.caches = [*self.caches, *make_prompt_cache(draft.model)]
        windows = [cache.max_size for cache in leaves(self.caches) if hasattr(cache, "max_size")]
        if windows and n_tokens > min(windows):
            raise InputError(
                f"A draft model cannot be used beyond a window of {min(windows):,} tokens, from "
                "which mlx-lm takes no rejected tokens back; give a shorter prompt and "
                "--max-tokens, or no --draft-model."
            )
        return draft.model

    def _stream(self, prompt: list[int], max_tokens: int, draft: Any) -> tuple[list[int], str]:
        from mlx_lm import stream_generate

        verbose = self.options["verbose"]
        if verbose:
            print("=" * 10)
        generated, text, response = [], [], None
        for response in stream_generate(
            self.loaded.model,
            self.loaded.tokenizer,
            prompt,
            max_tokens=max_tokens,
            draft_model=draft,
            num_draft_tokens=self.options["num_draft_tokens"],
            sampler=self._sampler(),
            prompt_cache=self.caches,
            prefill_step_size=self.options["prefill_step_size"],
        ):
            print(response.text, end="", flush=True)
            generated.append(int(response.token))
            text.append(response.text)
        print()
        if verbose:
            print("=" * 10)
            if not "".join(text):
                print("No text generated for this prompt")
            print(
                f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec"
            )
            print(
                f"Generation: {response.generation_tokens} tokens, "
                f"{response.generation_tps:.3f} tokens-per-sec"
            )
            print(f"Peak memory: {response.peak_memory:.3f} GB")
        return generated, "".join(text)

    def _sampler(self) -> Any:
        from mlx_lm.sample_utils import make_sampler

        options, tokenizer = self.options, self.loaded.tokenizer
        return make_sampler(
            options["temp"],
            options["top_p"],
            options["min_p"],
            options["min_tokens_to_keep"],
            top_k=options["top_k"],
            xtc_probability=options["xtc_probability"],
            xtc_threshold=options["xtc_threshold"],
            xtc_special_tokens=tokenizer.encode("\n") + list(tokenizer.eos_token_ids),
        )

    def _save(self, tokens: list[int], response_text: str) -> None:
        from ..cache import files as prompt_cache_file
        from ..cache.summary import summarize

        held = tokens[: summarize(self.caches).tokens]
        if self.messages:
            begun = self.options["prefill_response"] or ""
            self.messages.append({"role": "assistant", "content": begun + response_text})
        saved = prompt_cache_file.Saved(self.caches, held, self.messages)
        prompt_cache_file.save(self.file, saved, self.loaded.name)


def _template_arguments(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        arguments = json.loads(text)
    except ValueError as error:
        raise InputError(f"--chat-template-config {text!r} is not JSON ({error}).") from error
    if not isinstance(arguments, dict):
        raise InputError(f"--chat-template-config {text!r} is not a JSON object.")
    return arguments
