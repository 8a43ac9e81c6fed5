"""``mlx_turbokv chat``: mlx_lm.chat with packed caches."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from ..errors import InputError
from ..policy.recommended import label
from . import options, sampling
from .entry import console_script
from .mlx_lm_options import MlxLmCommand
from .output import print_status
from .values import check_max_kv_size, check_max_tokens, refuse

PROMPT = ">> "
KEYS = "q exit   r reset   h help   /save FILE   /load FILE   Ctrl-C stop an answer"
_NEARLY = 10  # the context is nearly full where less than this part of it is left


@click.command("chat", cls=MlxLmCommand, mlx_lm="chat", epilog=options.CACHE_HELP)
@options.model
@options.cache
def command(**args: Any) -> None:
    """Chat with a model through a packed KV cache, which is kept from turn to turn.

    Keys: q ends, r starts again, h shows the keys. /save FILE keeps the conversation and its cache,
    /load FILE goes on with one, also with a file of cache_prompt or generate. Ctrl-C stops an
    answer.
    """
    import mlx.core as mx

    from ..loading import distributed
    from .runs import centre_of, load_model

    check_max_tokens(args["max_tokens"])
    sampling.check(args)
    check_max_kv_size(args["max_kv_size"])
    if distributed.n_processes() > 1:
        raise InputError("chat is for one machine; mlx_turbokv run -- mlx_lm.chat is for several.")
    cache_options = options.attach_options(args)
    loaded = load_model(args)
    cache_options["centre"] = centre_of(cache_options["centre"], loaded)
    mx.random.seed(args["seed"])
    if not loaded.tokenizer.has_chat_template:
        refuse(["system_prompt"], f"with {loaded.name}, which has no chat template")
    Session(loaded, args, cache_options).run()


main = console_script(command)


class Session:
    """A conversation on the terminal.

    Args:
        loaded: a ``models.Loaded``.
        args: the options of the command.
        cache_options: as ``make_prompt_cache`` takes them.
    """

    def __init__(self, loaded: Any, args: dict[str, Any], cache_options: dict[str, Any]) -> None:
        from ..cache.factory import make_prompt_cache
        from .conversation import Conversation

        self.loaded, self.args = loaded, args
        self.policy: str = label(cache_options["policy"])
        self.conversation = Conversation(
            loaded,
            lambda: make_prompt_cache(
                loaded.model, **cache_options, max_kv_size=args["max_kv_size"]
            ),
        )
        self.own_files: set[Path] = set()  # that may be written again
        self.is_warned = self.is_dropping = False

    def run(self) -> None:
        """Ask and answer until q, or the end of the input."""
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - edits the line that input() reads
        print(f"Chat with {self.loaded.name}, KV cache {self.policy}")
        print(KEYS)
        while (line := self._line()) is not None and line != "q":
            try:
                self._do(line)
            except InputError as error:  # the conversation stays as it was
                print_status(f"Error: {error}")

    def _line(self) -> str | None:
        """What the user types; None at the end of the input."""
        try:
            return input(PROMPT).strip()
        except EOFError:
            print()
            return None
        except UnicodeDecodeError:
            print_status("Error: This is not text in UTF-8.")
            return ""

    def _do(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if line == "h":
            print(KEYS)
        elif line == "r":
            self.conversation.reset()
            self.is_warned = self.is_dropping = False
            print("The conversation starts again, with an empty cache.")
        elif word == "/save":
            self._save(_file(word, rest))
        elif word == "/load":
            self._load(_file(word, rest))
        elif line:
            self._turn(line)

    def _save(self, file: Path) -> None:
        from ..cache.writing import check_target

        check_target(file)
        if not self.conversation.held:
            raise InputError("There is nothing to save yet.")
        if file.exists() and file.resolve() not in self.own_files:
            raise InputError(f"{file} exists, and is not this conversation's: give another name.")
        self.conversation.save(file)
        self.own_files.add(file.resolve())
        print(f"Saved {file}")

    def _load(self, file: Path) -> None:
        from .generate import resume

        if not file.exists():
            raise InputError(f"There is no file {file}.")
        _, is_conversation = resume(self.conversation, file, self.args, self.policy)
        self.own_files = {file.resolve()} if is_conversation else set()
        n = sum(message["role"] == "assistant" for message in self.conversation.messages)
        print(f"Loaded {file}: {n} {'answer' if n == 1 else 'answers'}")
        self._show_cache()

    def _turn(self, text: str) -> None:
        """Answer a message. Where that fails, or is stopped early, it is as if never typed."""
        from .streaming import StoppedError, turn

        conversation, before = self.conversation, list(self.conversation.messages)
        is_new = not before and self.loaded.tokenizer.has_chat_template
        try:
            _check_text(text)
            text = f"\n{text}" if conversation.is_open else text
            tokens = conversation.tokens(text, self.args["system_prompt"] if is_new else None)
            self._warn(len(tokens))
            with _stopping() as stopped:
                answer = turn(conversation, tokens, self.args, stopped=stopped)
        except (InputError, StoppedError) as error:
            conversation.messages = before
            if isinstance(error, InputError):
                raise
            print_status("Stopped while the message was read; it is forgotten.")
            return
        conversation.finish(answer.tokens, answer.text)
        print()
        print(
            f"[{len(answer.generated)} tokens, {answer.generation_tps:.1f} tokens-per-sec; prompt "
            f"{answer.prompt_tokens} tokens, {answer.prompt_tps:.1f} tokens-per-sec; peak "
            f"{answer.peak_memory:.2f} GB]"
        )
        if answer.finish_reason != "stop":
            print(f"[{_ENDS[answer.finish_reason]}]")
        self._show_cache()

    def _show_cache(self) -> None:
        from ..cache.summary import summarize

        n, limit = len(self.conversation.held), self.loaded.max_context
        context = f"; context {n:,} of {limit:,} tokens" if limit else ""
        print(f"[KV cache: {summarize(self.conversation.caches).size()}{context}]")
        self.is_warned = False
        self._warn(n)

    def _warn(self, n_tokens: int) -> None:
        """Say in time that the context is nearly full: once before and after each answer."""
        limit, most = self.loaded.max_context, self.args["max_tokens"]
        window = self.args["max_kv_size"]
        if window is not None and n_tokens > window and not self.is_dropping:
            self.is_dropping = True
            print_status(
                f"The cache is full at --max-kv-size {window:,}: the oldest tokens are dropped, "
                "but for the first 4."
            )
        if limit is None or self.is_warned:
            return
        left = limit - n_tokens
        if left >= max(most, limit // _NEARLY):
            return
        self.is_warned = True
        said = f"is nearly full: {max(left, 0):,} of {limit:,} tokens are left"
        if left <= 0:
            said = f"is full: {self.loaded.name} was made for {limit:,} tokens"
        print_status(
            f"Warning: the context {said}. r starts again; /save FILE keeps the conversation."
        )


_ENDS = {"length": "cut at --max-tokens", "interrupted": "stopped"}


def _file(word: str, name: str) -> Path:
    """The file of /save or /load; .safetensors is added where it has no suffix."""
    name = name.strip()
    if not name:
        raise InputError(f"{word} needs the name of a file, such as {word} a.safetensors.")
    path = Path(name).expanduser()
    return path if path.suffix else path.with_name(f"{path.name}.safetensors")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("This is not text in UTF-8.") from None


@contextlib.contextmanager
def _stopping() -> Iterator[Callable[[], bool]]:
    """Ctrl-C is noted, and ends the answer at the next token; a second one ends the command."""
    pressed: list[int] = []

    def note(number: int, _: Any) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    old = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, old)
