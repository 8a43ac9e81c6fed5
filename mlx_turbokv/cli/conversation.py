"""A conversation: chat messages, the caches that hold their tokens, and the file of both."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, trim_prompt_cache

from ..cache import checkpoint, files
from ..cache.file_checks import offsets
from ..cache.file_options import Asked
from ..errors import InputError
from ..files import cache_dir
from .end_tokens import EndToken
from .output import KEPT, print_status, shorten

_MARK = "<query>"  # stands before a message whose beginning mlx-lm read


def prompt_text(prompt: str, escapes: bool = True) -> str:
    r"""The text of --prompt: standard input for -, else with \n and \t replaced.

    Args:
        escapes: whether they are.

    Raises: InputError for standard input that is not text.
    """
    if prompt != "-":
        return prompt.replace("\\n", "\n").replace("\\t", "\t") if escapes else prompt
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
    """Messages and the caches that hold their tokens.

    Args:
        loaded: a ``models.Loaded``.
        make_caches: makes empty caches of the model.
        arguments: of the chat template.
        use_template: whether prompts go through the tokenizer's chat template, if it has one.
    """

    def __init__(
        self,
        loaded: Any,
        make_caches: Callable[[], list[Any]],
        arguments: dict[str, Any] | None = None,
        use_template: bool = True,
    ) -> None:
        self.loaded = loaded
        self.make_caches = make_caches
        self.arguments = arguments or {}
        self.use_template = use_template and loaded.tokenizer.has_chat_template
        self.end_token = EndToken(loaded)
        self.reset()

    def reset(self) -> None:
        """Begin anew, with empty caches."""
        self.caches = self.make_caches()
        self.messages: list[dict[str, str]] = []
        self.held: list[int] = []  # tokens in the caches
        self.checkpoint: checkpoint.Checkpoint | None = None
        self._text = ""  # the prompt that ``tokens`` made

    def load(self, file: Path, asked: Asked) -> files.Saved:
        """Go on with a file's conversation.

        Args:
            asked: what the caches of ``make_caches`` were asked to be.

        Raises: InputError; the conversation stays as it was.
        """
        own, fresh = self.loaded, self.make_caches()
        saved = files.load(file, own.name, own.model, fresh, asked, own.source)
        self.end_token.use(saved.end_token, f"The end token in {file},")
        self.caches, self.held, self.messages = saved.caches, saved.tokens, saved.messages
        self.checkpoint = saved.checkpoint
        return saved

    def tokens(
        self, text: str, system_prompt: str | None = None, prefill: str | None = None
    ) -> list[int]:
        """Tokens of the whole sequence: what the caches hold, and the prompt.

        Args:
            text: a message of the user's; it continues one that has no answer yet.
            system_prompt: in place of the conversation's.
            prefill: how the answer begins.

        Raises: InputError for an empty prompt, or one that the chat template does not accept.
        """
        encode, held = self.loaded.tokenizer.encode, self.held
        if not self.use_template:
            tokens = held + encode(text, add_special_tokens=not held)
            if len(tokens) == len(held):
                raise InputError("The prompt is empty; give --prompt some text.")
            return tokens
        n_foreign = held.count(files.FOREIGN)
        if system_prompt is not None:
            if n_foreign:
                raise InputError("A system prompt cannot be put before a prompt that mlx-lm read.")
            others = [m for m in self.messages if m["role"] != "system"]
            self.messages = [{"role": "system", "content": system_prompt}, *others]
        if self.messages and self.messages[-1]["role"] == "user":
            text = self.messages.pop()["content"] + text
        self.messages.append({"role": "user", "content": text})
        self._text = self._rendered(prefill, answered=True)
        return [files.FOREIGN] * n_foreign + encode(self._text, add_special_tokens=False)

    @property
    def is_open(self) -> bool:
        """Whether the next message continues a prompt that was read before."""
        if self.messages:
            return self.messages[-1]["role"] == "user"
        return bool(self.held) and self.use_template

    def _rendered(self, prefill: str | None, answered: bool) -> str:
        """The chat template's text; without what mlx-lm read of it.

        Args:
            answered: whether the beginning of an answer follows.
        """
        messages = list(self.messages)
        if prefill is not None and answered:
            messages.append({"role": "assistant", "content": prefill})
        is_foreign = files.FOREIGN in self.held
        if is_foreign:
            messages[0] = {**messages[0], "content": _MARK + messages[0]["content"]}
        try:
            text = self.loaded.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=prefill is not None and answered,
                add_generation_prompt=prefill is None and answered,
                **self.arguments,
            )
            return text[text.index(_MARK) + len(_MARK) :] if is_foreign else text
        except Exception as error:  # a template may raise anything
            raise InputError(
                f"The chat template of {self.loaded.name} refuses this conversation ({error}); "
                "--ignore-chat-template takes the prompt as it is."
            ) from error

    def read_prompt(self, text: str) -> list[int]:
        """Tokens of a prompt that later messages continue, as mlx_lm.cache_prompt makes them.

        Raises: InputError for an empty prompt, or one that the chat template does not accept.
        """
        encode = self.loaded.tokenizer.encode
        if not text:
            raise InputError("The prompt is empty; give --prompt some text.")
        if not self.use_template:
            return encode(text)
        self.messages = [{"role": "user", "content": text}]
        try:
            rendered = self.loaded.tokenizer.apply_chat_template(
                self.messages,
                tokenize=False,
                add_generation_prompt=False,
                continue_final_message=True,
                **self.arguments,
            )
        except Exception as error:  # a template may raise anything
            raise InputError(
                f"The chat template of {self.loaded.name} refuses this prompt ({error})."
            ) from error
        return encode(rendered, add_special_tokens=False)

    def go_back(self, tokens: list[int]) -> tuple[list[int], int]:
        """Take the caches back to what ``tokens`` begins with.

        Caches that cannot be trimmed go back to a checkpoint, or are emptied, which is said.

        Returns:
            (the tokens, which may be cut up otherwise; how many the caches hold).

        Raises: InputError where they have to be emptied, and the file does not list its tokens.
        """
        n = common(self.held, tokens)
        excess = len(self.held) - n
        if not excess:
            return tokens, n
        if can_trim_prompt_cache(self.caches):
            trim_prompt_cache(self.caches, excess)
        elif rest := self._continuation():
            tokens, n = self.held + rest, len(self.held)
        elif self.checkpoint is not None and self.checkpoint.n_tokens <= n:
            checkpoint.restore(self.caches, self.checkpoint)
            n = self.checkpoint.n_tokens
        elif files.FOREIGN in tokens:
            raise InputError(
                f"This does not continue what the file holds, a cache of {self.loaded.name} cannot "
                "be taken back, and the file does not say which tokens it holds."
            )
        else:
            self.caches = checkpoint.emptied(self.caches, self.make_caches())
            self.checkpoint, n = None, 0
            print_status(
                f"The prompt is read from its start ({len(tokens):,} tokens): it does not continue "
                f"what the cache holds, and a cache of {self.loaded.name} cannot be taken back."
            )
        self.held = tokens[:n]
        return tokens, n

    def _continuation(self) -> list[int]:
        """Tokens of the prompt after what the caches hold, where that is the same text."""
        if not self.use_template or files.FOREIGN in self.held:
            return []
        tokenizer = self.loaded.tokenizer
        text = tokenizer.decode(self.held)
        if not text or not self._text.startswith(text):
            return []
        return tokenizer.encode(self._text[len(text) :], add_special_tokens=False)

    def n_stable(self, tokens: list[int]) -> int:
        """Tokens that later turns begin with too: to the end of the user's message."""
        if not self.use_template:
            return 0
        n_foreign = self.held.count(files.FOREIGN)
        try:
            text = self._rendered(None, answered=False)
        except InputError:  # a template that only makes whole prompts
            return 0
        stable = self.loaded.tokenizer.encode(text, add_special_tokens=False)
        return common([files.FOREIGN] * n_foreign + stable, tokens)

    def keep_checkpoint(self, n_tokens: int) -> None:
        """Copy what cannot be trimmed, now that the caches hold ``n_tokens``."""
        self.checkpoint = checkpoint.take(self.caches, n_tokens)

    @property
    def needs_checkpoint(self) -> bool:
        """Whether a cache of the model cannot always be trimmed."""
        return not all(checkpoint.always_trims(x) for _, x in checkpoint.positions(self.caches))

    def finish(self, tokens: list[int], answer: str | None = None) -> None:
        """Note what the caches hold now.

        Args:
            tokens: of the whole sequence.
            answer: the model's message, if a chat template was used.
        """
        if self.messages and answer is not None:
            self.messages.append({"role": "assistant", "content": answer})
        self.held = tokens[: max(offsets(self.caches), default=len(tokens))]

    def save(self, file: Path, is_prompt: bool = False) -> None:
        """Write the caches, the tokens that they hold and the messages.

        Raises: InputError: the file cannot be written; the message says where it is kept instead.
        """
        saved = files.Saved(self.caches, self.held, self.messages, self.checkpoint, is_prompt)
        saved.end_token = self.end_token.text
        model = self.loaded.name, self.loaded.model
        try:
            files.save(file, saved, *model)
        except InputError as error:
            other = cache_dir() / KEPT / f"{time.strftime('%Y%m%d-%H%M%S')}-{file.name}"
            try:
                other.parent.mkdir(parents=True, exist_ok=True)
                files.save(other, saved, *model)
            except (InputError, OSError):
                raise error from None
            raise InputError(f"{str(error).rstrip('.')}; it is kept in {other}.") from error


def common(held: list[int], tokens: list[int]) -> int:
    """Tokens that two sequences begin with, but for the last of ``tokens``: it is always read."""
    n, most = 0, min(len(held), len(tokens) - 1)
    while n < most and held[n] == tokens[n]:
        n += 1
    return n
