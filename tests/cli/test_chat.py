"""mlx_turbokv.chat on a pseudo-terminal, and its turns in this process."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from chat_models import answers_read_at_once, write_chat_folder
from command_calls import call

from mlx_turbokv.cli.chat import _stopping

QUESTIONS = ["the quick fox", "and the dog?", "who else", "the end"]
FORMATS = ("-ctk", "q8_0", "-ctv", "q8_0")
N = 8
PROMPT = ">> "


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_chat_folder(tmp_path_factory.mktemp("chat"), "llama", context=150)


@pytest.fixture(scope="module")
def answers(folder) -> list[str]:
    """The oracle: each turn's whole prompt read by a new cache."""
    return [answer for answer, _ in answers_read_at_once(folder, QUESTIONS, N)]


class Terminal:
    """A process on a pseudo-terminal."""

    def __init__(self, process: subprocess.Popen, master: int) -> None:
        self.process, self.master = process, master

    def until(self, text: str, seconds: float = 120) -> str:
        """What is shown up to and including a text."""
        shown, end = "", time.monotonic() + seconds
        while text not in shown:
            ready, _, _ = select.select([self.master], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {shown!r}"
            shown += os.read(self.master, 4096).decode()
        return shown.replace("\r\n", "\n")

    def say(self, line: str) -> str:
        """Type a line; what is shown until the next one is asked for."""
        os.write(self.master, line.encode() + b"\n")
        return self.until(PROMPT).removeprefix(line + "\n").removesuffix(PROMPT)


@contextmanager
def terminal(folder: Path, *options: object) -> Iterator[Terminal]:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "mlx_turbokv.chat", "--model", folder, "-m", N, *FORMATS]
    environ = {**os.environ, "TERM": "dumb", "INPUTRC": os.devnull}
    process = subprocess.Popen(
        [str(word) for word in [*command, *options]], stdin=slave, stdout=slave, stderr=slave,
        env=environ, start_new_session=True, cwd=folder.parent,
    )  # fmt: skip
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        os.close(master)


def answer_of(shown: str) -> str:
    return shown.partition("\n[")[0]


@pytest.mark.slow
def test_three_turns_saved_ended_loaded_and_gone_on_with(folder, answers) -> None:
    with terminal(folder) as first:
        head = first.until(PROMPT)
        assert "KV cache q8_0/q8_0" in head and "/save FILE" in head
        n_tokens = []
        for question, answer in zip(QUESTIONS[:3], answers):
            shown = first.say(question)
            assert answer_of(shown) == answer
            tokens, percent, held = re.search(
                r"\[KV cache: (\d+) tokens, [\d.]+ MiB, ([\d.]+)% of f16; context (\d+) of 150",
                shown,
            ).groups()
            n_tokens.append(int(tokens))
            # 8 bits and a scale of 16 for 32 values, beside a model in float32 counted as f16
            assert tokens == held and percent == "53.1"
        assert n_tokens == sorted(n_tokens) and "/load FILE" in first.say("h")
        assert first.say("/save talk") == "Saved talk.safetensors\n"
        os.write(first.master, b"q\n")
        assert first.process.wait(60) == 0
    with terminal(folder) as second:
        second.until(PROMPT)
        shown = second.say("/load talk.safetensors")
        assert "Loaded talk.safetensors: 3 answers" in shown
        assert f"KV cache: {n_tokens[-1]} tokens" in shown
        shown = second.say(QUESTIONS[3])
        assert answer_of(shown) == answers[3]
        read = int(re.search(r"prompt (\d+) tokens", shown).group(1))
        assert read < 25 < n_tokens[-1]  # what was saved is not read again
        assert second.say("/save talk") == "Saved talk.safetensors\n"
        assert "starts again" in second.say("r")
        assert answer_of(second.say(QUESTIONS[0])) == answers[0]
        os.write(second.master, b"\x04")  # Ctrl-D
        assert second.process.wait(60) == 0


@pytest.mark.slow
def test_ctrl_c_at_the_prompt_ends_it(folder) -> None:
    with terminal(folder) as chat:
        chat.until(PROMPT)
        for _ in range(6):  # readline may miss one that comes just before it waits
            os.kill(chat.process.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                assert chat.process.wait(10) == 130
                break
        else:
            pytest.fail("Ctrl-C did not end the chat")


def test_the_first_ctrl_c_is_noted_and_the_second_ends() -> None:
    with _stopping() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)


def chat(folder, *lines: str, options=()):
    stdin = "".join(f"{line}\n" for line in lines).encode()
    return call("chat", "--model", folder, "-m", N, *FORMATS, *options, stdin=stdin)


def test_the_context_is_said_to_be_nearly_full_in_time(folder) -> None:
    result = chat(folder, *["the quick brown fox and the lazy dog"] * 4)
    warnings = [line for line in result.err.splitlines() if line.startswith("Warning: ")]
    contexts = [int(n) for n in re.findall(r"context (\d+) of 150", result.out)]
    nearly = [n for n in contexts if 150 - n < 15]
    assert warnings and ("nearly full" in warnings[0] or not nearly)
    assert contexts[-1] > 150 and "is full" in warnings[-1]
    assert all("/save FILE" in warning for warning in warnings)


def test_more_than_the_memory_is_said_before_an_answer(folder, monkeypatch) -> None:
    monkeypatch.setattr("mlx_turbokv.loading.memory.default_limit", lambda: 200_000)
    result = chat(folder, "the")
    assert result.status == 0 and "Warning: " in result.err and "expected to take" in result.err


def test_a_window_that_drops_tokens_is_said_once(folder) -> None:
    result = chat(folder, *["the quick brown fox"] * 3, options=("--max-kv-size", 40))
    said = [line for line in result.err.splitlines() if "oldest tokens are dropped" in line]
    assert result.status == 0 and len(said) == 1 and "--max-kv-size 40" in said[0]


def test_progress_of_a_long_prompt_is_shown_and_that_of_a_short_one_is_not(folder, monkeypatch):
    options = ("generate", "--model", folder, "-p", "the lazy dog " * 9, "-m", 2)
    options += ("--no-calibrate",)
    assert "\r" not in call(*options).err
    monkeypatch.setattr("mlx_turbokv.cli.streaming._DELAY", 1e-9)
    monkeypatch.setattr("mlx_turbokv.cli.streaming._SECONDS", (0, 0))
    result = call(*options, "--prefill-step-size", 16)
    assert "Reading the prompt" in result.err and "Reading the prompt" not in result.out


def test_what_cannot_be_done_is_one_sentence_and_the_chat_goes_on(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.safetensors").write_bytes(b"mine")
    lines = ["/save", "/save a", "/load", "/load absent", "/load other", "the", "/save other",
             "/save x.bin", "/save a", "", "the", "q", "never said"]  # fmt: skip
    result = chat(folder, *lines)
    assert result.status == 0
    errors = [line for line in result.err.splitlines() if line.startswith("Error: ")]
    words = ["/save needs", "nothing to save", "/load needs", "no file absent.safetensors",
             "other.safetensors is not a prompt", "other.safetensors exists", "x.bin"]  # fmt: skip
    assert len(errors) == len(words)
    for error, word in zip(errors, words):
        assert word in error
    assert (tmp_path / "other.safetensors").read_bytes() == b"mine"
    assert result.out.count("[KV cache") == 2 and "Saved a.safetensors" in result.out
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "other.safetensors"}


def test_a_template_that_refuses_a_message_loses_nothing(folder, answers, monkeypatch) -> None:
    from mlx_turbokv.cli.conversation import Conversation

    real = Conversation._rendered

    def refusing(self, *args, **kwargs):
        if self.messages[-1]["content"] == "bad":
            from mlx_turbokv.errors import InputError

            raise InputError("The chat template refuses this.")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Conversation, "_rendered", refusing)
    result = chat(folder, QUESTIONS[0], "bad", QUESTIONS[1])
    assert "Error: The chat template refuses this." in result.err
    shown = [answer_of(part) for part in result.out.split(PROMPT)[1:4]]
    assert shown == [answers[0], "", answers[1]]


def test_a_long_message_that_is_stopped_while_it_is_read(folder, answers, monkeypatch) -> None:
    """It is forgotten, and the next one is answered as if it had never been typed."""
    from mlx_turbokv.cli import chat as chat_module

    real, calls = chat_module._stopping, []

    @contextmanager
    def stopping():
        calls.append(0)
        with real():

            def stopped() -> bool:
                calls[-1] += 1
                return len(calls) == 2 and calls[-1] == 3

            yield stopped

    monkeypatch.setattr(chat_module, "_stopping", stopping)
    options = ("--prefill-step-size", 16)
    result = chat(folder, QUESTIONS[0], "the lazy dog " * 6, QUESTIONS[1], options=options)
    assert "Stopped while the message was read; it is forgotten." in result.err
    shown = [answer_of(part) for part in result.out.split(PROMPT)[1:4]]
    assert shown == [answers[0], "", answers[1]]


def test_an_answer_that_is_stopped_is_kept_as_far_as_it_came(folder, tmp_path, monkeypatch) -> None:
    @contextmanager
    def stopping():
        calls = []
        yield lambda: calls.append(0) or len(calls) == 6

    monkeypatch.setattr("mlx_turbokv.cli.chat._stopping", stopping)
    monkeypatch.chdir(tmp_path)
    result = chat(folder, QUESTIONS[0], "/save cut", "/load cut", options=("-m", 30))
    shown = answer_of(result.out.split(PROMPT)[1])
    assert "[stopped]" in result.out and 0 < len(shown) < 30
    assert "Loaded cut.safetensors: 1 answer\n" in result.out and "Error" not in result.err


def test_chat_goes_on_with_a_prompt_of_cache_prompt(folder, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = call("cache_prompt", "--model", folder, "--prompt", "the fox", *FORMATS,
                "--prompt-cache-file", "p.safetensors")  # fmt: skip
    assert made.status == 0
    before = Path("p.safetensors").read_bytes()
    result = chat(folder, "/load p", "and the dog", "/save p", "/save q")
    assert "p.safetensors exists" in result.err and "Saved q.safetensors" in result.out
    assert Path("p.safetensors").read_bytes() == before
    prompt = "the fox\\nand the dog"  # a line of its own
    generated = call("generate", "--model", folder, "-p", prompt, "-m", N, *FORMATS)
    assert f"\n{PROMPT}{generated.out.split('=' * 10)[1].strip()}" in result.out
