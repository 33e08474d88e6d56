"""A server and clients that break the rules: typed errors, and the next client gets what it always got."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgm_scale.serve.connections import Connection
from tests.serve.tiny_service import events_of, served, text_service, wait_for

BODY = {"prompt": "ab", "max_tokens": 6, "seed": 3, "steps": 4}
ENDPOINTS = ("/v1/completions", "/v1/infill", "/v1/images")


class Server:
    """Its address, and the answer that it gave before anybody attacked it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.host, port = address.removeprefix("http://").split(":")
        self.port = int(port)
        self.answer = self.ask()

    def ask(self) -> str:
        answered = httpx.post(f"{self.address}/v1/completions", json=BODY, timeout=30)
        assert answered.status_code == 200, answered.text
        return answered.json()["choices"][0]["text"]

    def check(self) -> None:
        assert self.ask() == self.answer

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), timeout=20)

    def raw(self, data: bytes, then_closes: bool = False) -> bytes:
        """All that the server says to these bytes, until it closes."""
        with self.connect() as client:
            with suppress(OSError):  # it has closed already
                client.sendall(data)
                if then_closes:
                    client.shutdown(socket.SHUT_WR)
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    parts = []
    with suppress(ConnectionResetError):
        while part := client.recv(1 << 16):
            parts.append(part)
    return b"".join(parts)


def request(body: bytes, path: str = "/v1/completions", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: test", "Connection: close", *headers]
    return "\r\n".join([*lines, f"Content-Length: {len(body)}", "", ""]).encode() + body


def refused(answer: bytes) -> int:
    """The status of a typed error of 4xx."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split()[1])
    assert 400 <= status < 500, answer
    error = json.loads(body)["error"]
    assert error["type"] == "invalid_request_error", answer
    assert error["message"]
    return status


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    service = text_service(tmp_path_factory.mktemp("model"), timeout_s=5.0)
    with served(service) as address:
        yield Server(address)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(st.characters(), max_size=8)
    | st.sampled_from(["\ud800", "\0", "{9999999999}", "{4}", "a{2}b", 10**4000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
_FIELDS = [
    "prompt",
    "max_tokens",
    "stop",
    "stream",
    "stream_options",
    "echo",
    "logprobs",
    "suffix",
    "best_of",
]
_FIELDS += [
    "frequency_penalty",
    "logit_bias",
    "template",
    "segments",
    "classes",
    "guidance",
    "model",
    "n",
    "seed",
]
_FIELDS += ["temperature", "top_p", "top_k", "steps", "sampler", "user", "surprise"]


@pytest.mark.fault(62)
@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(ENDPOINTS), st.dictionaries(st.sampled_from(_FIELDS), _VALUES, max_size=4))
def test_any_json_is_answered_or_refused(server: Server, path: str, changes: dict[str, Any]) -> None:
    tree = {"steps": 2, "max_tokens": 3, "prompt": "a"} if path == ENDPOINTS[0] else {"template": "a{2}"}
    text = json.dumps(tree | changes)
    answer = server.raw(request(text.encode()))
    status = int(answer.split()[1])
    assert status == 200 or refused(answer)
    if b"text/event-stream" not in answer:
        json.loads(answer.partition(b"\r\n\r\n")[2])


@pytest.mark.fault(62)
def test_bytes_that_are_no_json(server: Server) -> None:
    generator, valid = random.Random(5), json.dumps(BODY).encode()
    nested = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    bodies = [b"", b"\xff\xfe", b"[1]", b"nul", nested, b'{"seed": 1e999}', b'{"seed": ' + b"9" * 5000 + b"}"]
    for _ in range(60):
        broken = bytearray(valid)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(broken))
            action = generator.randrange(3)
            if action == 0:
                broken[place] ^= 1 << generator.randrange(8)
            elif action == 1:
                del broken[place : place + generator.randint(1, 9)]
            else:
                broken[place:place] = broken[: generator.randint(1, 9)]
            broken = broken or bytearray(b"{")
        bodies.append(bytes(broken))
    for body in bodies:
        answer = server.raw(request(body))
        assert answer.startswith(b"HTTP/1.1 200") or refused(answer), body
    server.check()


@pytest.mark.fault(62)
@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 5, 6\r\n\r\nabcde",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n{}",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
        + b"f" * 50
        + b"\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"y" * 200_000 + b"\r\n\r\n",
        b"\r\n" * 1000 + b"\0",
        b"GET /\xff\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
        b"POST /v1/%ff%00 HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
        b"BREW /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(server: Server, data: bytes) -> None:
    answer = server.raw(data, then_closes=True)
    assert not answer or refused(answer)  # nothing: the client closed in the middle
    server.check()


@pytest.mark.fault(62)
def test_a_body_without_end_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """10 MB of it are sent; 1 MiB may be."""
    monkeypatch.setattr(Connection, "head_s", 0.5)
    with server.connect() as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        with suppress(OSError):
            for _ in range(160):
                client.sendall(b"10000\r\n" + b" " * 65_536 + b"\r\n")
        answer = read_all(client)
    assert not answer or refused(answer) == 413  # or reset, as its bytes are not read
    server.check()


@pytest.mark.fault(62)
def test_pipelined_requests_are_answered_in_turn(server: Server) -> None:
    body = json.dumps(BODY).encode()
    one = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with server.connect() as client:
        client.sendall(one * 3 + b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        answer = read_all(client)
    assert answer.count(b"HTTP/1.1 200") == 4
    assert answer.count(json.dumps(server.answer, ensure_ascii=False).encode()) == 3


@pytest.mark.fault(63)
def test_clients_that_leave_free_their_places(tmp_path: Path) -> None:
    service = text_service(tmp_path, max_batch_sequences=2, max_queue_sequences=64)
    with served(service) as address:
        server = Server(address)
        long = json.dumps({"prompt": "a", "max_tokens": 20, "steps": 20, "n": 2, "stream": True}).encode()
        for cut in (10, len(request(long)) - 5, None):
            for _ in range(8):
                client = server.connect()
                client.sendall(request(long)[:cut])
                client.close()
        wait_for(lambda: not service.engine.active_sequences and not service.engine.queued_sequences)
        server.check()
        streamed = httpx.post(f"{address}/v1/completions", json=BODY | {"stream": True}, timeout=30)
        texts = [choice["text"] for event in events_of(streamed.text) for choice in event["choices"]]
        assert "".join(texts) == server.answer


@pytest.mark.fault(63)
def test_a_head_that_drips_is_refused_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of such connections would take all sockets that the server may have."""
    monkeypatch.setattr(Connection, "head_s", 0.3)
    head = b"GET /health HTTP/1.1\r\nHost: a\r\n"
    clients = [server.connect() for _ in range(20)]
    kept = server.connect()
    kept.sendall(head + b"\r\n")  # and after an answer, too
    kept.recv(1 << 16)
    for client in (*clients[1:], kept):  # the first says nothing at all
        client.sendall(head)
    for client in (*clients, kept):
        client.settimeout(10)
        assert refused(read_all(client)) == 408
        client.close()
    server.check()


@pytest.mark.fault(63)
def test_a_body_that_drips_is_refused_in_time(tmp_path: Path) -> None:
    with served(text_service(tmp_path, timeout_s=0.5)) as address:
        server = Server(address)
        with server.connect() as client:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 100\r\n\r\n"
            client.sendall(head + b"{")
            assert refused(read_all(client)) == 408
        server.check()
