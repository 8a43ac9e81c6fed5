"""Kill a server while it writes a prompt cache, and see what the next one has of it.

    python scripts/serve_restarts.py [--kills 1] [--tokens 3000] [--model FILE] [--json FILE]

Each round: two turns of a conversation are answered and their cache written; then a third one is
asked for, and the server killed (SIGKILL) as soon as it writes that. A new server gets the second
turn again. Checked: at least 95 % of its tokens come from disk, its text is what the killed server
answered, and no damaged entry was met. Measured: the time to its first token, and that of a prompt
as long which no cache holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import openai
from prometheus_client.parser import text_string_to_metric_families
from record import record, write

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
from server_process import SERVE, free_port, wait_until_ready

from mlx_turbokv.evaluate.text import load_text

LEAST_REUSED = 0.95
WRITE_SECONDS = 120
LATE_SECONDS = 0.2  # by which a write begins after its answer
GROWTH = 0.015  # of a conversation, by a turn


class Process:
    """A server that keeps its prompt caches in a folder."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        port = free_port()
        command = [*SERVE, "--port", str(port), "--prompt-cache-dir", str(folder)]
        command += ["--policy", options.policy, "--log-level", "WARNING"]
        command += ["--model", options.model] if options.model else []
        self.address, self.folder = f"http://127.0.0.1:{port}", folder
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        wait_until_ready(self.process, port)
        self.client = openai.OpenAI(
            base_url=f"{self.address}/v1", api_key="none", timeout=600, max_retries=0
        )

    def metric(self, name: str) -> float | None:
        """One of the server's metrics."""
        text = urllib.request.urlopen(f"{self.address}/metrics", timeout=30).read().decode()
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"turbokv_{name}":
                    return sample.value
        return None

    def answer(self, prompt: str, n: int) -> dict:
        """A prompt's text, seconds to its first token, its tokens and those from a cache."""
        begun, first, text, usage = time.perf_counter(), 0.0, "", None
        for chunk in self.client.completions.create(
            model="default_model", prompt=prompt, max_tokens=n, temperature=0, stream=True,
            stream_options={"include_usage": True},
        ):  # fmt: skip
            if chunk.choices:
                first = first or time.perf_counter() - begun
                text += chunk.choices[0].text
            usage = chunk.usage or usage
        cached = usage.prompt_tokens_details.cached_tokens
        return {"text": text, "first": first, "tokens": usage.prompt_tokens, "cached": cached}

    def wait_for_writes(self, n: int) -> None:
        """Wait until as many entries have been written since the start."""
        end = time.monotonic() + WRITE_SECONDS
        while (self.metric("disk_writes_total") or 0) < n and time.monotonic() < end:
            time.sleep(0.02)

    def kill_while_writing(self, prompt: str, n: int, wait: float) -> bool:
        """Kill the server some time after it begins to write a prompt's cache.

        Returns:
            Whether the write was cut short.
        """

        def kill() -> None:
            while not answered.is_set() and not _is_writing(self.folder):
                pass
            end = time.monotonic() + LATE_SECONDS
            while time.monotonic() < end and not _is_writing(self.folder):
                pass
            time.sleep(wait)
            self.process.kill()

        answered = threading.Event()
        thread = threading.Thread(target=kill)
        thread.start()
        with contextlib.suppress(Exception):  # whatever a client raises for a server that is gone
            self.answer(prompt, n)
        answered.set()
        thread.join()
        self.process.wait()
        return _is_writing(self.folder)


def _is_writing(folder: Path) -> bool:
    return any(name.startswith(".turbokv-") for name in os.listdir(folder))


def prompts_of(text: str, index: int, n_characters: int) -> list[str]:
    """Three turns of a conversation; each conversation begins otherwise."""
    start = (index * 997) % len(text)
    whole = f"{index} " + (text[start:] + text) * (1 + n_characters // len(text))
    ends = [int(n_characters * (1 + i * GROWTH)) for i in range(3)]
    return [whole[:end].rpartition(" ")[0] for end in ends]


def main() -> None:
    """Run the rounds and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="passed to serve; its default model if not given")
    parser.add_argument("--policy", default="la-v7")
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=3000, help="of the first turn, about")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--json", type=Path, help="write the record to this file too")
    options = parser.parse_args()
    text, rng = " ".join(load_text("sample").text.split()), random.Random(0)
    rounds, damaged = [], 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "cache"
        server = Process(options, folder)
        probe = server.answer(text[:2000], 1)
        n_characters = int(options.tokens * 2000 / probe["tokens"])
        n_written = 1 if probe["tokens"] >= 512 else 0
        for index in range(options.kills):
            first, second, third = prompts_of(text, index, n_characters)
            anew = server.answer(first, options.answer)
            server.wait_for_writes(n_written + 1)
            expected = server.answer(second, options.answer)
            n_written += 2
            server.wait_for_writes(n_written)
            wait = rng.choice([0, 0, 0, rng.uniform(0, 0.1)])
            was_cut = server.kill_while_writing(third, options.answer, wait)
            server, n_written = Process(options, folder), 0
            again = server.answer(second, options.answer)
            n_written += 1
            server.wait_for_writes(n_written)
            damaged += int(server.metric("disk_damaged_total") or 0)
            rounds.append({
                "tokens": again["tokens"], "reused": again["cached"] / again["tokens"],
                "same_text": again["text"] == expected["text"], "write_was_cut": was_cut,
                "seconds_anew": anew["first"], "seconds_after_restart": again["first"],
                "seconds_per_token_anew": anew["first"] / (anew["tokens"] - anew["cached"]),
            })  # fmt: skip
            print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
        server.process.terminate()
        status = server.process.wait(timeout=60)
    ratios = [
        r["seconds_after_restart"] / (r["seconds_per_token_anew"] * r["tokens"]) for r in rounds
    ]
    report = record(
        policy=options.policy, kills=len(rounds), tokens=rounds[0]["tokens"],
        writes_cut_short=sum(r["write_was_cut"] for r in rounds), damaged_entries=damaged,
        least_reused=round(min(r["reused"] for r in rounds), 4),
        same_texts=sum(r["same_text"] for r in rounds),
        median_seconds_anew=round(statistics.median(r["seconds_anew"] for r in rounds), 3),
        median_seconds_after_restart=round(
            statistics.median(r["seconds_after_restart"] for r in rounds), 3
        ),
        median_share_of_reading_anew=round(statistics.median(ratios), 4), exit_status=status,
    )  # fmt: skip
    print(json.dumps(report, indent=2))
    write(options.json, report)
    right = report["same_texts"] == len(rounds) and report["least_reused"] >= LEAST_REUSED
    sys.exit(not (right and damaged == 0 and status == 0))


if __name__ == "__main__":
    main()
