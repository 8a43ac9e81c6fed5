"""Clients that leave, dawdle or send halves of requests, with good ones among them."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from gguf_files import write_small_gguf
from server_process import ask, connect, free_port, read_all, running

from mlx_turbokv.errors import InputError
from mlx_turbokv.serve import connections, handler
from mlx_turbokv.serve.connections import Server

pytestmark = pytest.mark.slow

PATH = "/v1/completions"
N_REQUESTS, N_CLIENTS, N_TOKENS = 200, 8, 12
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"


def body(prompt: str, **options) -> bytes:
    return json.dumps({"prompt": prompt, "max_tokens": N_TOKENS, **options}).encode()


def raw(prompt: str, **options) -> bytes:
    content = body(prompt, **options)
    return HEAD.format(len(content)).encode() + content


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[tuple]:
    model = write_small_gguf(tmp_path_factory.mktemp("connections"))
    with running("--model", str(model), "--log-level", "ERROR") as started:
        yield started


@pytest.fixture(scope="module")
def expected(server) -> dict[str, str]:
    """Answers of prompts that no near tie decides, whatever the size of the batch."""
    rng, answers = random.Random(0), {}
    while len(answers) < 6:
        prompt = " ".join(rng.choices(["the", "th", "a", "big", "cat", "x"], k=rng.randint(2, 30)))
        _, answer = ask(server[1], PATH, body(prompt, logprobs=2))
        (choice,) = answer["choices"]
        tops = [sorted(top.values()) for top in choice["logprobs"]["top_logprobs"]]
        if all(top[1] - top[0] > 0.05 for top in tops):
            answers[prompt] = choice["text"]
    return answers


def good(address: str, prompt: str, expected: dict[str, str]) -> None:
    status, answer = ask(address, PATH, body(prompt))
    assert (status, answer["choices"][0]["text"]) == (200, expected[prompt])


def slow(address: str, prompt: str, expected: dict[str, str]) -> None:
    """A request in small pieces over half a second is answered as any other."""
    data = raw(prompt)
    step = len(data) // 8 + 1
    with connect(address) as connection:
        for start in range(0, len(data), step):
            connection.sendall(data[start : start + step])
            time.sleep(0.06)
        answer = read_all(connection)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.0 200")
    assert json.loads(content)["choices"][0]["text"] == expected[prompt]


def leaves_its_stream(address: str, prompt: str, expected: dict[str, str]) -> None:
    with connect(address) as connection:
        connection.sendall(raw(prompt, stream=True, max_tokens=2000))
        assert connection.recv(100).startswith(b"HTTP/1.0 200")


def leaves_before_its_answer(address: str, prompt: str, expected: dict[str, str]) -> None:
    with connect(address) as connection:
        connection.sendall(raw(prompt, max_tokens=2000))


def half_a_head(address: str, prompt: str, expected: dict[str, str]) -> None:
    with connect(address) as connection:
        connection.sendall(raw(prompt)[:40])


def half_a_body(address: str, prompt: str, expected: dict[str, str]) -> None:
    with connect(address) as connection:
        connection.sendall(raw(prompt)[:-10])
        connection.shutdown(socket.SHUT_WR)
        read_all(connection)


def garbage(address: str, prompt: str, expected: dict[str, str]) -> None:
    with connect(address) as connection:
        connection.sendall(random.Random(prompt).randbytes(200) + b"\r\n\r\n")
        assert b'"error"' in read_all(connection)


def resets(address: str, prompt: str, expected: dict[str, str]) -> None:
    with connect(address) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sendall(raw(prompt, stream=True, max_tokens=2000))


def test_200_requests_of_8_clients_lose_nothing(server, expected) -> None:
    process, address = server
    kinds = [good, good, good, slow, leaves_its_stream, leaves_before_its_answer, half_a_head,
             half_a_body, garbage, resets]  # fmt: skip
    rng = random.Random(1)
    left_open = [connect(address) for _ in range(20)]
    for connection in left_open:
        connection.sendall(b"POST /v1/comp")

    def send(index: int) -> None:
        rng.choice(kinds)(address, random.Random(index).choice([*expected]), expected)

    with ThreadPoolExecutor(N_CLIENTS) as pool:
        list(pool.map(send, range(N_REQUESTS)))
    for connection in left_open:
        connection.close()
    for prompt in expected:
        good(address, prompt, expected)
    assert process.poll() is None
    assert ask(address, "/health") == (200, {"status": "ok"})
    assert "Traceback" not in "".join(process.said)


def test_a_request_whose_client_has_gone_is_not_generated_to_its_end(server) -> None:
    with connect(server[1]) as connection:
        connection.sendall(raw("the", max_tokens=1 << 20, seed=1))
        time.sleep(1)
    begun = time.monotonic()
    assert ask(server[1], PATH, body("the", seed=1))[0] == 200  # one at a time, for their seeds
    assert time.monotonic() - begun < 30


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /v1/completions HTTP/1.1\r\n\r\n", 411),
        (b"POST /v1/completions HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (HEAD.format("-1").encode(), 400),
        (HEAD.format("1_0").encode() + b"0123456789", 400),
        (HEAD.format(10**30).encode() + b"a" * 100_000, 413),
        (HEAD.format(3).encode() + b"\xff\xfe\xff", 400),
        (b"PUT /v1/completions HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 405),
        (b"HEAD /v1/models HTTP/1.1\r\n\r\n", 405),
        (b"GET /v1/completions HTTP/1.1\r\n\r\n", 405),
        (b"GET /nothing HTTP/1.1\r\n\r\n", 404),
        (b"POST /v1/models HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 405),
        (b"POST /v1/models/x HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 405),
        (b"POST /health HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 405),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 405),
        (b"POST /nothing HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 404),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_in_openais_form(server, sent: bytes, status: int) -> None:
    with connect(server[1]) as connection:
        connection.sendall(sent)
        answer = read_all(connection)
    head, _, content = answer.partition(b"\r\n\r\n")
    if not sent.startswith(b"HEAD"):
        assert json.loads(content)["error"]["message"]
    assert f" {status} ".encode() in head


class _Generator:
    """Answers nothing, for connections alone."""

    cli_args = SimpleNamespace(allowed_origins="*")
    pages: dict = {}
    status = "ok"
    answered = staticmethod(lambda status: None)


@pytest.fixture
def bare(monkeypatch) -> Iterator[Server]:
    """A server whose deadlines are short."""
    monkeypatch.setattr(handler, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(handler, "DRAIN_SECONDS", 0.2)
    monkeypatch.setattr(connections, "MOST_CONNECTIONS", 5)
    server = Server("127.0.0.1", 0, lambda *args: handler.Handler(_Generator(), 0, *args))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("sent", [b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nA: b\r\n"])
def test_a_request_that_does_not_come_in_time_is_closed(bare: Server, sent: bytes) -> None:
    with connect(f"http://127.0.0.1:{bare.server_port}") as connection:
        connection.sendall(sent)
        begun = time.monotonic()
        answer = read_all(connection)
    assert 0.3 < time.monotonic() - begun < 5
    assert b"408" in answer


def test_drops_of_a_slow_sender_do_not_move_the_deadline(bare: Server) -> None:
    with connect(f"http://127.0.0.1:{bare.server_port}") as connection:
        begun = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while time.monotonic() - begun < 10:
                connection.sendall(b"a")
                time.sleep(0.05)
    assert 0.3 < time.monotonic() - begun < 5


def test_too_many_connections_are_refused_and_then_accepted(bare: Server) -> None:
    address = f"http://127.0.0.1:{bare.server_port}"
    held = [connect(address) for _ in range(5)]
    time.sleep(0.2)
    with connect(address) as one_more:
        assert b"503" in read_all(one_more)
    for connection in held:
        connection.close()
    time.sleep(0.3)
    assert ask(address, "/health") == (200, {"status": "ok"})


def test_an_occupied_port_is_found_before_the_model_is_loaded(capfd) -> None:
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("0.0.0.0", port))
        taken.listen()
        begun = time.monotonic()
        with pytest.raises(InputError, match=f":{port} cannot be listened on"):
            Server("127.0.0.1", port, None)
        assert time.monotonic() - begun < 2


@pytest.mark.parametrize(("host", "shown"), [("::1", "[::1]"), ("localhost", "localhost")])
def test_the_address_can_be_used_as_it_is_said(monkeypatch, caplog, host: str, shown: str) -> None:
    caplog.set_level("INFO")
    family, address = socket.AF_INET, ("127.0.0.1", 0)  # a machine may have no IPv6
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(family, 0, 0, "", address)])
    with Server(host, 0, None) as server:
        server.say_address()
    assert caplog.messages == [f"Listening on http://{shown}:{server.server_port}/v1"]


def test_what_ends_accepting_is_raised_where_it_is_waited_for(monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise OSError("no more memory")

    server = Server("127.0.0.1", 0, None)
    monkeypatch.setattr(server, "service_actions", broken)
    try:
        with pytest.raises(OSError, match="no more memory"):
            server.serve_until_interrupted()
    finally:
        server.server_close()
