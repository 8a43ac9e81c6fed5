"""The conversation that generate continues: chat messages, their tokens, and the cache file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..cache import files
from ..cache.file_checks import offsets
from ..errors import InputError
from ..loading.default_model import cache_dir
from .output import KEPT, shorten


def prompt_text(prompt: str) -> str:
    r"""The text of --prompt: standard input for -, else with \n and \t replaced.

    Raises: InputError for standard input that is not text.
    """
    if prompt != "-":
        return prompt.replace("\\n", "\n").replace("\\t", "\t")
    if sys.stdin is None:
        raise InputError("--prompt - reads standard input, which is closed: give the text.")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("Standard input is not text in UTF-8.") from error


def template_arguments(text: str | None) -> dict[str, Any]:
    """The arguments of --chat-template-config.

    Raises: InputError for what is not a JSON object.
    """
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"--chat-template-config {shorten(repr(text), 80)} is not JSON ({error})."
        ) from error
    if not isinstance(arguments, dict):
        raise InputError(f"--chat-template-config {shorten(repr(text), 80)} is not a JSON object.")
    return arguments


class Conversation:
    """Messages, the caches that hold their tokens, and the file that both are kept in.

    Args:
        loaded: a ``models.Loaded``.
        caches: empty ones, which a file's replace.
        file: the prompt cache file, or None.
    """

    def __init__(self, loaded: Any, caches: list[Any], file: Path | None) -> None:
        self.loaded = loaded
        self.caches = caches
        self.file = file
        self.messages: list[dict[str, str]] = []
        self.held: list[int] = []  # tokens in the caches

    def resume(self, same_formats: bool) -> bool:
        """Load the file if it exists; whether it does.

        Args:
            same_formats: the file must have the formats of the empty caches.
        """
        if self.file is None or not self.file.exists():
            return False
        loaded = self.loaded
        saved = files.load(self.file, loaded.name, loaded.model, self.caches, same_formats)
        self.caches, self.held, self.messages = saved.caches, saved.tokens, saved.messages
        return True

    def tokens(self, text: str, args: dict[str, Any], arguments: dict[str, Any]) -> list[int]:
        """Tokens of the whole sequence: what the caches hold, and the prompt.

        Args:
            args: the options of the command.
            arguments: of the chat template.

        Raises: InputError for an empty prompt, or one that the chat template does not accept.
        """
        tokenizer, held = self.loaded.tokenizer, self.held
        if args["ignore_chat_template"] or not tokenizer.has_chat_template:
            tokens = held + tokenizer.encode(text, add_special_tokens=not held)
            if len(tokens) == len(held):
                raise InputError("The prompt is empty; give --prompt some text.")
            return tokens
        if args["system_prompt"] is not None:
            others = [m for m in self.messages if m["role"] != "system"]
            self.messages = [{"role": "system", "content": args["system_prompt"]}, *others]
        self.messages.append({"role": "user", "content": text})
        messages, prefill = list(self.messages), args["prefill_response"]
        if prefill is not None:
            messages.append({"role": "assistant", "content": prefill})
        try:
            prompt = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=prefill is not None,
                add_generation_prompt=prefill is None,
                **arguments,
            )
        except Exception as error:  # a template may raise anything
            raise InputError(
                f"The chat template of {self.loaded.name} refuses this conversation ({error}); "
                "--ignore-chat-template takes the prompt as it is."
            ) from error
        return tokenizer.encode(prompt, add_special_tokens=False)

    def trim_to(self, tokens: list[int]) -> int:
        """Trim the caches to what ``tokens`` begins with; its length.

        Raises: InputError if the caches cannot be trimmed.
        """
        held, n_common = self.held, 0
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

    def save(self, tokens: list[int], answer: str) -> None:
        """Write the caches, the tokens that they hold and the messages to the file, if any."""
        if self.file is None:
            return
        if self.messages:
            self.messages.append({"role": "assistant", "content": answer})
        held = tokens[: max(offsets(self.caches), default=len(tokens))]
        saved = files.Saved(self.caches, held, self.messages)
        model = self.loaded.name, self.loaded.model
        try:
            files.save(self.file, saved, *model)
        except InputError as error:
            other = cache_dir() / KEPT / f"{time.strftime('%Y%m%d-%H%M%S')}-{self.file.name}"
            try:
                other.parent.mkdir(parents=True, exist_ok=True)
                files.save(other, saved, *model)
            except (InputError, OSError):
                raise error from None
            raise InputError(f"{str(error).rstrip('.')}; it is kept in {other}.") from error
