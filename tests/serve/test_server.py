"""A real server: clients that leave, and the end of the process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from pgm_scale.cli import main
from pgm_scale.errors import UserError
from pgm_scale.export.folder import write_model_folder
from pgm_scale.serve.server import bind
from tests.serve.tiny_service import served, text_model, text_service, wait_for


def value(service: Any, name: str) -> float:
    return service.metrics.registry.get_sample_value(name) or 0.0


def slow_down(service: Any, step_s: float) -> None:
    decoding = service.engine._decoding
    step = decoding.step

    def slow_step() -> Any:
        time.sleep(step_s)
        return step()

    decoding.step = slow_step


def post_and_leave(address: str, body: dict[str, Any], read_bytes: int) -> None:
    """Send a request over a socket, read so much of the answer, and close."""
    host, port = address.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + content)
        if read_bytes:
            connection.recv(read_bytes)
        else:
            time.sleep(0.1)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slot_and_its_place_in_the_queue(tmp_path: Path, stream: bool) -> None:
    service = text_service(tmp_path, max_batch_sequences=1)
    with served(service) as address:
        slow_down(service, 0.05)
        body = {"prompt": "a", "max_tokens": 20, "steps": 20, "stream": stream, "n": 3}
        post_and_leave(address, body, read_bytes=10 if stream else 0)
        left_s = time.monotonic()
        wait_for(lambda: service.engine.active_sequences == service.engine.queued_sequences == 0)
        assert time.monotonic() - left_s < 2.0  # all of it would have taken 3 s
        wait_for(lambda: value(service, "pgm_scale_disconnects_total") == 1)
        assert value(service, "pgm_scale_generated_tokens_total") < 40
        response = httpx.post(f"{address}/v1/completions", json={"prompt": "b", "max_tokens": 2}, timeout=30)
        assert response.status_code == 200


def test_a_client_that_leaves_within_its_body_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = text_service(tmp_path, timeout_s=0.5)
    with served(service) as address:
        host, port = address.removeprefix("http://").split(":")
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{"
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head)
        wait_for(lambda: value(service, "pgm_scale_disconnects_total") == 1)
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            connection.sendall(head)  # and no more
            assert b" 408 " in connection.recv(100)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_stream_arrives_while_it_is_decoded(tmp_path: Path) -> None:
    service = text_service(tmp_path)
    with served(service) as address:
        slow_down(service, 0.02)
        body = {"prompt": "a", "max_tokens": 10, "steps": 10, "stream": True, "seed": 4}
        arrived: list[float] = []
        with httpx.stream("POST", f"{address}/v1/completions", json=body, timeout=30) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    arrived.append(time.monotonic())
        assert len(arrived) >= 6
        assert arrived[-2] - arrived[0] > 0.05


def test_many_clients_at_once_get_the_answers_they_get_alone(tmp_path: Path) -> None:
    service = text_service(tmp_path, max_batch_sequences=8)
    with served(service) as address, httpx.Client(base_url=address, timeout=60) as client:

        def text_of(seed: int) -> str:
            body = {"prompt": "ab"[: seed % 3], "max_tokens": 1 + seed % 9, "seed": seed}
            return client.post("/v1/completions", json=body).raise_for_status().json()["choices"][0]["text"]

        alone = [text_of(seed) for seed in range(24)]
        together: dict[int, str] = {}
        threads = [
            threading.Thread(target=lambda seed=seed: together.update({seed: text_of(seed)}))
            for seed in range(24)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert [together[seed] for seed in range(24)] == alone


def test_an_address_in_use_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"cannot listen at 127.0.0.1:{port}"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match="cannot listen"):
        bind("no such host", 80)
    assert main(["serve", str(tmp_path / "nothing")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_a_missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "anything"]) == 2
    assert capsys.readouterr().err.strip() == "serve needs uvicorn; pip install 'pgm-scale[serve]'"


@pytest.mark.parametrize("options", [["--port", "70000"], ["--timeout", "nan"], ["--max-batch", "0"]])
def test_options_out_of_range_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["serve", "anything", *options])
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err


def test_sigterm_lets_running_requests_finish_and_exits_with_0(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "model", text_model(tmp_path / "made"), "a card")
    command = [sys.executable, "-m", "pgm_scale.cli", "serve", str(tmp_path / "model"), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max-batch", "1", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline().strip()
        name, address = line.split(" at ")
        assert name == "tiny"
        with httpx.Client(base_url=address, timeout=60) as client:
            wait_for(lambda: client.get("/ready").status_code == 200)
        statuses: list[Any] = []

        def ask() -> None:
            body = {"prompt": "a", "max_tokens": 20, "steps": 20, "n": 8}
            try:
                statuses.append(httpx.post(f"{address}/v1/completions", json=body, timeout=60).status_code)
            except httpx.TransportError:  # or closed before the server has read the request
                statuses.append("refused")

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        time.sleep(0.15)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, errors
    assert set(statuses) <= {200, 503, "refused"}
    assert len(statuses) == 6
    assert "Traceback" not in errors
