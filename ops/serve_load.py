"""Load test of `pgm-scale serve`: many clients against one server, batched and one by one.

    python ops/serve_load.py --seconds 30 --json serve_load.json

A demo-size PGM with random weights (its speed is that of a trained one) is served by three processes: one that
decodes sequences together, one with `--max-batch 1` for as many clients, and one for a single client. They take
turns, a few seconds each, so that whatever else the machine does slows all of them; only one is asked at a time.
Clients ask again as soon as they are answered (closed loop), and wait as long as Retry-After says at 429 and 503.
Prompts, lengths and seeds differ; CPU seconds are those of the server's process.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from pgm_scale.config import PartitionTransformerConfig, PGMObjectiveConfig, SamplerConfig
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.export.folder import write_model_folder
from pgm_scale.models import build_model
from pgm_scale.trained_model import ModelDescription, Origin, TrainedModel

VOCABULARY = Vocabulary(size=4097, mask_id=4096, bos_id=0, eos_id=0, pad_id=None)
LENGTH = 128
WEIGHT_DEVIATION = 0.05
START_S = 120.0


@dataclass
class Tally:
    """What clients have seen of one server."""

    tokens: int = 0
    elapsed_s: float = 0.0
    cpu_s: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)
    latencies_s: list[float] = field(default_factory=list)

    def report(self) -> dict[str, Any]:
        latency = {f"p{q}": round(float(np.percentile(self.latencies_s, q)), 3) for q in (50, 95, 99)}
        return {
            "statuses": self.statuses,
            "generated_tokens": self.tokens,
            "tokens_per_second": round(self.tokens / self.elapsed_s, 1),
            "cpu_ms_per_token": round(1e3 * self.cpu_s / max(1, self.tokens), 3),
            "server_cores_used": round(self.cpu_s / self.elapsed_s, 2),
            "latency_s": latency,
            "seconds": round(self.elapsed_s, 1),
        }


@dataclass
class ServerProcess:
    """`pgm-scale serve` on a free port."""

    process: subprocess.Popen[str]
    port: int
    tally: Tally = field(default_factory=Tally)

    @classmethod
    def start(cls, folder: Path, *options: str) -> ServerProcess:
        command = [sys.executable, "-m", "pgm_scale.cli", "serve", str(folder), "--port", "0", *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the server did not start: {' '.join(command)}")
        return cls(process, int(line.rsplit(":", 1)[1]))

    @property
    def cpu_s(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(60)


def write_model(folder: Path) -> None:
    """A PGM of 4 + 4 blocks, hidden size 256, with random weights, and a tokenizer of words."""
    made = folder.parent / "made"
    made.mkdir()
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY.mask_id)}, unk_token="w1"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(made / "tokenizer.json"))
    config = PartitionTransformerConfig(
        hidden_size=256,
        num_heads=4,
        num_encoder_blocks=4,
        num_decoder_blocks=4,
        condition_size=128,
        dropout=0.0,
    )
    torch.manual_seed(1)
    model = build_model(config, VOCABULARY.size, LENGTH).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, WEIGHT_DEVIATION)
    description = ModelDescription(
        model=config,
        objective=PGMObjectiveConfig(),
        sampler=SamplerConfig(steps=LENGTH),
        vocabulary=VOCABULARY,
        length_tokens=LENGTH,
        tokenizer_sha256=None,
        images=None,
        origin=Origin("load-test", None, None, "ema", "0" * 64),
    )
    write_model_folder(folder, TrainedModel(model, description, made), "Random weights, for a load test.\n")


async def client(server: ServerProcess, number: int, until_s: float, options: argparse.Namespace) -> None:
    """One connection that asks and asks until the time is over; what is not answered by then does not count."""
    generator = np.random.default_rng(number)
    while time.monotonic() < until_s:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        except OSError:
            _count(server.tally, "connection refused")
            await asyncio.sleep(0.1)
            continue
        try:
            while time.monotonic() < until_s:
                words = generator.integers(1, VOCABULARY.mask_id, generator.integers(1, options.prompt * 2))
                body: dict[str, Any] = {
                    "prompt": " ".join(f"w{word}" for word in words),
                    "max_tokens": options.tokens,
                    "seed": int(generator.integers(1 << 31)),
                }
                if options.steps:
                    body["steps"] = options.steps
                started_s = time.monotonic()
                status, answer, retry_s = await _post(reader, writer, body)
                if time.monotonic() > until_s:
                    return
                _count(server.tally, str(status))
                if status == 200:
                    server.tally.tokens += answer["usage"]["completion_tokens"]
                    server.tally.latencies_s.append(time.monotonic() - started_s)
                await asyncio.sleep(retry_s)
        except (OSError, asyncio.IncompleteReadError) as error:
            _count(server.tally, type(error).__name__)
        finally:
            writer.close()


async def _post(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: dict[str, Any]
) -> tuple[int, dict[str, Any], float]:
    """Status, JSON and seconds to wait; written by hand, so that the clients leave the cores to the server."""
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    answer = json.loads(await reader.readexactly(int(headers["content-length"])))
    return int(lines[0].split()[1]), answer, float(headers.get("retry-after", 0))


def _count(tally: Tally, status: str) -> None:
    tally.statuses[status] = tally.statuses.get(status, 0) + 1


async def ask(server: ServerProcess, clients: int, seconds: float, options: argparse.Namespace) -> None:
    """One turn of one server. Requests still open at its end are dropped, and the server drops their sequences."""
    started_s, cpu_s = time.monotonic(), server.cpu_s
    until_s = started_s + seconds
    turn = len(server.tally.latencies_s)
    tasks = [
        asyncio.create_task(client(server, turn * 1000 + number, until_s, options))
        for number in range(clients)
    ]
    await asyncio.sleep(until_s - time.monotonic())
    server.tally.elapsed_s += time.monotonic() - started_s
    server.tally.cpu_s += server.cpu_s - cpu_s
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(1.0)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        write_model(folder)
        common = ("--threads", str(options.threads))
        servers = {
            "batched": (ServerProcess.start(folder, *common), options.clients),
            "one_by_one": (ServerProcess.start(folder, *common, "--max-batch", "1"), options.clients),
            "one_client": (ServerProcess.start(folder, *common), 1),
        }
        try:
            for server, _ in servers.values():
                await _until_answered(server, options)
            for _ in range(options.turns):
                for server, clients in servers.values():
                    await ask(server, clients, options.seconds / options.turns, options)
        finally:
            exit_codes = {name: server.stop() for name, (server, _) in servers.items()}
    reports = {name: server.tally.report() for name, (server, _) in servers.items()}
    batched, one_by_one, lone = (reports[name] for name in ("batched", "one_by_one", "one_client"))
    return {
        "settings": {key: value for key, value in vars(options).items() if key != "json"},
        "load_average": psutil.getloadavg(),
        "exit_codes": exit_codes,
        "servers": reports,
        "speedup_over_one_by_one": _ratio(batched, one_by_one, "tokens_per_second"),
        "speedup_over_one_client": _ratio(batched, lone, "tokens_per_second"),
        "cpu_saved_to_one_by_one": _ratio(one_by_one, batched, "cpu_ms_per_token"),
        "undocumented_errors": sum(
            count
            for report in reports.values()
            for status, count in report["statuses"].items()
            if status not in ("200", "429", "503")
        ),
    }


async def _until_answered(server: ServerProcess, options: argparse.Namespace) -> None:
    """Wait until the server is ready, and let it see the sizes of the test once."""
    until_s = time.monotonic() + START_S
    while "200" not in server.tally.statuses:
        if time.monotonic() > until_s:
            raise SystemExit("the server does not answer")
        await ask(server, 1, 2.0, options)
    server.tally = Tally()


def _ratio(one: dict[str, Any], other: dict[str, Any], key: str) -> float | None:
    return round(one[key] / other[key], 2) if other[key] else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each server")
    parser.add_argument("--turns", type=int, default=3, help="that the seconds of a server are cut into")
    parser.add_argument("--prompt", type=int, default=8, help="mean number of prompt tokens")
    parser.add_argument("--tokens", type=int, default=16, help="max_tokens (OpenAI's default)")
    parser.add_argument("--steps", type=int, default=0, help="0: one token a step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    text = json.dumps(asyncio.run(run(options)), indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
