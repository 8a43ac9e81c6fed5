"""Load a server: many requests from several clients, some of which disconnect.

    python scripts/serve_load.py [--requests 200] [--clients 8] [--model FILE] [--json FILE]

Starts ``mlx_turbokv serve``, sends the requests, and looks at the server's resident memory after a
warm-up, after the load, and after a second load half as long: memory that grows with requests
shows as growth between the last two. Exits with 1 if an answer is missing, if the server stops
serving or does not end in order, or if memory grew. Every prompt is also sent once without load;
the record says how many answers were the same (rounding differs with the batch's size, and can
change an answer where two tokens are nearly equally likely).
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import openai
from record import write

from mlx_turbokv.evaluate.record import command_line, environment

# the allocator keeps freed pages, so a loaded server's memory varies by some
GROWTH_LIMIT = 0.05
# and takes a step of some 15 MB once, which a loaded machine puts anywhere
GROWTH_BYTES = 20 << 20
WORDS = "the sky sea sun rain wind snow is was and blue green cold warm far near old new".split()
SERVE = [sys.executable, "-c", "from mlx_turbokv.cli.serve import main; main()"]


class Outcome(NamedTuple):
    """Result of one request."""

    index: int
    text: str
    disconnected: bool
    tokens: int


def prompt_of(index: int, n_prompts: int) -> str:
    """One of a few prompts with shared beginnings, of different lengths."""
    rng = random.Random(index % n_prompts)
    shared = " ".join(WORDS * (1 + index % 3))
    return f"{shared} {' '.join(rng.choices(WORDS, k=rng.randint(2, 60)))}"


class Load:
    """Requests to one server process."""

    def __init__(self, options: argparse.Namespace, process: subprocess.Popen, port: int) -> None:
        self.options, self.process = options, process
        url = f"http://127.0.0.1:{port}/v1"
        self.client = openai.OpenAI(base_url=url, api_key="none", timeout=600, max_retries=0)

    def complete(self, prompt: str, max_tokens: int, **options):
        """One completion."""
        return self.client.completions.create(
            model="default_model", prompt=prompt, max_tokens=max_tokens, **options
        )

    def ask(self, index: int, disconnect: bool) -> Outcome:
        """One streamed request; a client that disconnects does so after a few tokens."""
        prompt = prompt_of(index, self.options.prompts)
        stream = self.complete(prompt, self.options.tokens, stream=True)
        most = max(1, self.options.tokens // 2)
        text, tokens, stay = "", 0, random.Random(1000 + index).randint(1, most)
        for chunk in stream:
            text += chunk.choices[0].text
            tokens += 1
            if disconnect and tokens >= stay:
                stream.close()
                return Outcome(index, text, True, tokens)
        return Outcome(index, text, False, tokens)

    def send(self, first: int, n: int) -> list[Outcome]:
        """Send ``n`` requests from the clients, of which a share disconnects."""
        rng = random.Random(first)
        leaving = [rng.random() < self.options.disconnects for _ in range(n)]
        with ThreadPoolExecutor(self.options.clients) as pool:
            return list(pool.map(self.ask, range(first, first + n), leaving))

    def wait_until_ready(self) -> None:
        """Send a request until the server answers."""
        while self.process.poll() is None:
            try:
                self.complete("a", 1)
                return
            except openai.APIConnectionError:
                time.sleep(0.2)
        sys.exit("The server did not start.")

    def resident_bytes(self) -> int:
        """Resident memory, once the answers of disconnected clients have ended."""
        for _ in range(5):
            self.complete("a", 1)
            time.sleep(0.5)
        command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        return int(subprocess.run(command, capture_output=True, check=True).stdout) * 1024

    def measure(self) -> dict:
        """The record: counts, seconds, and memory after each part."""
        options, alone = self.options, {}
        for index in range(options.prompts * 3):
            prompt = prompt_of(index, options.prompts)
            if prompt not in alone:
                alone[prompt] = self.ask(index, False).text
        self.send(0, options.requests // 4)
        warm = self.resident_bytes()
        begun = time.monotonic()
        outcomes = self.send(options.requests, options.requests)
        seconds = time.monotonic() - begun
        loaded = self.resident_bytes()
        self.send(3 * options.requests, options.requests // 2)
        last = self.resident_bytes()
        whole = [outcome for outcome in outcomes if not outcome.disconnected]
        same = sum(o.text == alone[prompt_of(o.index, options.prompts)] for o in whole)
        return {
            "command": f"python {command_line()}",
            **environment(),
            "policy": options.policy,
            "requests": len(outcomes),
            "clients": options.clients,
            "disconnected": len(outcomes) - len(whole),
            "answered": len(whole),
            "answered_as_without_load": same,
            "seconds": round(seconds, 1),
            "tokens_received": sum(outcome.tokens for outcome in outcomes),
            "resident_bytes_after_warm_up": warm,
            "resident_bytes_after_load": loaded,
            "resident_bytes_after_more": last,
            "growth_after_load": round(last / loaded - 1, 4),
            "still_serving": self.process.poll() is None,
        }


def main() -> None:
    """Run the load and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="passed to serve; its default model if not given")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=12, help="how many different prompts")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--disconnects", type=float, default=0.35, help="share that leaves early")
    parser.add_argument("--policy", default="la-v7")
    parser.add_argument("--json", type=Path, help="write the record to this file too")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*SERVE, "--port", str(port), "--policy", options.policy, "--log-level", "WARNING"]
    command += ["--model", options.model] if options.model else []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    load = Load(options, process, port)
    try:
        load.wait_until_ready()
        record = load.measure()
    finally:
        process.terminate()
        errors = process.communicate(timeout=60)[1]
    record |= {"exit_status": process.returncode, "tracebacks": errors.count("Traceback")}
    print(json.dumps(record, indent=2))
    write(options.json, record)
    in_order = record["still_serving"] and process.returncode == record["tracebacks"] == 0
    complete = record["answered"] + record["disconnected"] == record["requests"]
    loaded, last = (record[f"resident_bytes_after_{when}"] for when in ("load", "more"))
    grew = last - loaded > max(GROWTH_LIMIT * loaded, GROWTH_BYTES)
    sys.exit(not (in_order and complete) or grew)


if __name__ == "__main__":
    main()
