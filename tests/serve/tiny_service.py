"""Tiny models behind a service, and an app that is called in-process or served on a port."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pgm_scale.config import (
    AutoregressiveTransformerConfig,
    DiffusionTransformerConfig,
    ModelConfig,
    PartitionTransformerConfig,
    PGMObjectiveConfig,
    SamplerConfig,
)
from pgm_scale.data.manifest import Vocabulary
from pgm_scale.sampling import fitting_sampler
from pgm_scale.serve.app import create_app
from pgm_scale.serve.server import bind, make_server
from pgm_scale.serve.service import Service
from pgm_scale.serve.settings import ServeSettings
from pgm_scale.trained_model import ModelDescription, Origin, TrainedModel
from tests.sampling.test_samplers import random_model

LENGTH = 24
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SIZE = len(ALPHABET) + 2
VOCABULARY = Vocabulary(size=SIZE, mask_id=SIZE - 1, bos_id=0, eos_id=0, pad_id=None)

MODELS: dict[str, ModelConfig] = {
    "pgm": PartitionTransformerConfig(
        hidden_size=16,
        num_heads=2,
        num_encoder_blocks=2,
        num_decoder_blocks=2,
        condition_size=8,
        dropout=0.0,
    ),
    "mdlm": DiffusionTransformerConfig(
        hidden_size=16, num_heads=2, num_blocks=2, condition_size=8, dropout=0.0
    ),
    "ar": AutoregressiveTransformerConfig(hidden_size=16, num_heads=2, num_blocks=2, dropout=0.0),
}


def byte_tokenizer() -> Tokenizer:
    """A token a byte, so that every text is possible, and few generated ones are whole characters."""
    vocabulary = {"<eos>": 0} | {character: 1 + number for number, character in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def text_model(folder: Path, name: str = "pgm") -> TrainedModel:
    folder.mkdir(parents=True, exist_ok=True)
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    model = random_model(MODELS[name], LENGTH, SIZE).eval().requires_grad_(False)
    description = ModelDescription(
        model=MODELS[name],
        objective=PGMObjectiveConfig(),
        sampler=fitting_sampler(SamplerConfig(steps=8), model),
        vocabulary=VOCABULARY,
        length_tokens=LENGTH,
        tokenizer_sha256=None,
        images=None,
        origin=Origin("tiny", None, None, "ema", "0" * 64),
    )
    return TrainedModel(model, description, folder)


def text_service(folder: Path, name: str = "pgm", **settings: Any) -> Service:
    return Service(text_model(folder, name), ServeSettings(**settings), "cpu")


@asynccontextmanager
async def client_of(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    """An in-process client of an app whose engine is ready."""
    app = create_app(service)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            await wait_until_ready(client)
            yield client


async def wait_until_ready(client: httpx.AsyncClient) -> None:
    while (await client.get("/ready")).status_code != 200:
        await asyncio.sleep(0.01)


@contextmanager
def served(service: Service) -> Iterator[str]:
    """The address of a real server in a thread."""
    listening = bind("127.0.0.1", 0)
    server = make_server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    try:
        wait_for(lambda: service.engine.state == "ready")
        yield address
    finally:
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    until_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until_s, "it did not happen"
        time.sleep(0.005)


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON events of a stream, which must be whole and end with [DONE]."""
    parts = text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""], parts[-2:]
    assert all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part[6:]) for part in parts[:-2]]
