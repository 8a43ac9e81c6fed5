"""Load a server: many requests from several clients, some of which disconnect.

    python scripts/serve_load.py [--requests 200] [--clients 8] [--model FILE] [--json FILE]

Starts ``mlx_turbokv serve``, sends the requests, and looks at the server's resident memory after a
warm-up, after the load, and after a second load half as long: memory that grows with requests
shows as growth between the last two. Exits with 1 if an answer is missing, if the server stops
serving or does not end in order, or if memory grew. Every prompt is also sent once without load;
the record says how many answers were the same (rounding differs with the batch's size, and where
two tokens are nearly equally likely that can turn an answer).
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
from dataclasses import dataclass

import openai

from mlx_turbokv.evaluate.record import command_line, environment

# a loaded server's memory wavers by freed pages that the allocator keeps
GROWTH_LIMIT = 0.05
WORDS = "the sky sea sun rain wind snow is was and blue green cold warm far near old new".split()
SERVE = [sys.executable, "-c", "from mlx_turbokv.cli.serve import main; main()"]


@dataclass
class Outcome:
    """What became of one request."""

    index: int
    text: str
    disconnected: bool
    tokens: int


def prompt_of(index: int, n_prompts: int) -> str:
    """One of a few prompts with shared beginnings, of different lengths."""
    rng = random.Random(index % n_prompts)
    shared = " ".join(WORDS * (1 + index % 3))
    return f"{shared} {' '.join(rng.choices(WORDS, k=rng.randint(2, 60)))}"


def ask(client: openai.OpenAI, index: int, options: argparse.Namespace, leave: bool) -> Outcome:
    """One streamed request; a client that leaves closes the connection after a few tokens."""
    rng = random.Random(1000 + index)
    stream = client.completions.create(
        model="default_model",
        prompt=prompt_of(index, options.prompts),
        max_tokens=options.tokens,
        stream=True,
    )
    text, tokens, stay = "", 0, rng.randint(1, max(1, options.tokens // 2))
    for chunk in stream:
        text += chunk.choices[0].text
        tokens += 1
        if leave and tokens >= stay:
            stream.close()
            return Outcome(index, text, True, tokens)
    return Outcome(index, text, False, tokens)


def load(client: openai.OpenAI, options: argparse.Namespace, first: int, n: int) -> list[Outcome]:
    """Send ``n`` requests from the clients, of which a share disconnects."""
    rng = random.Random(first)
    leaving = [rng.random() < options.disconnects for _ in range(n)]
    with ThreadPoolExecutor(options.clients) as pool:
        return list(pool.map(lambda i: ask(client, first + i, options, leaving[i]), range(n)))


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, in bytes."""
    shown = subprocess.run(
        ["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=True
    )
    return int(shown.stdout) * 1024


def wait_until_ready(client: openai.OpenAI, process: subprocess.Popen) -> None:
    """Ask until the server answers."""
    while process.poll() is None:
        try:
            client.completions.create(model="default_model", prompt="a", max_tokens=1)
            return
        except openai.APIConnectionError:
            time.sleep(0.2)
    sys.exit("The server did not start.")


def settled_bytes(client: openai.OpenAI, pid: int) -> int:
    """Resident memory once the answers that nobody waits for have ended."""
    for _ in range(5):
        client.completions.create(model="default_model", prompt="a", max_tokens=1)
        time.sleep(0.5)
    return resident_bytes(pid)


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
    parser.add_argument("--json", help="write the record to this file too")
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*SERVE, "--port", str(port), "--policy", options.policy, "--log-level", "WARNING"]
    command += ["--model", options.model] if options.model else []
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=600, max_retries=0
    )
    try:
        wait_until_ready(client, process)
        record = measure(client, options, process)
    finally:
        process.terminate()
        said = process.communicate(timeout=60)[1]
    record["exit_status"] = process.returncode
    record["tracebacks"] = said.count("Traceback")
    text = json.dumps(record, indent=2)
    print(text)
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    sys.exit(0 if passed(record) else 1)


def measure(client: openai.OpenAI, options: argparse.Namespace, process: subprocess.Popen) -> dict:
    """The record: counts, seconds, and memory after each part."""
    alone = {}
    for index in range(options.prompts * 3):
        prompt = prompt_of(index, options.prompts)
        if prompt not in alone:
            alone[prompt] = ask(client, index, options, leave=False).text
    load(client, options, 0, options.requests // 4)
    warm = settled_bytes(client, process.pid)
    begun = time.monotonic()
    outcomes = load(client, options, options.requests, options.requests)
    seconds = time.monotonic() - begun
    loaded = settled_bytes(client, process.pid)
    load(client, options, 3 * options.requests, options.requests // 2)
    last = settled_bytes(client, process.pid)
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
        "still_serving": process.poll() is None,
    }


def passed(record: dict) -> bool:
    """Whether the server kept serving, ended in order, and memory stayed."""
    return (
        record["still_serving"]
        and record["answered"] + record["disconnected"] == record["requests"]
        and record["exit_status"] == 0
        and record["tracebacks"] == 0
        and record["growth_after_load"] < GROWTH_LIMIT
    )


if __name__ == "__main__":
    main()
