"""Images over HTTP, from an image run."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from pgm_scale.errors import UserError
from pgm_scale.loading import load
from pgm_scale.sampling import known_prefixes, sample
from pgm_scale.sampling.images import decode_images
from pgm_scale.serve.service import Service
from pgm_scale.serve.settings import ServeSettings
from pgm_scale.vq_tokenizer import VQTokenizer
from tests.sampling.image_runs import (
    BOS,
    CLASS_NAMES,
    LENGTH,
    MODELS,
    SIDE_PIXELS,
    random_vq,
    write_image_run,
)
from tests.serve.tiny_service import client_of


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_run(tmp_path_factory.mktemp("runs"), request.param)


def service_of(run: Path, **settings: Any) -> Service:
    return Service(load(run), ServeSettings(**settings), "cpu")


async def post(client: httpx.AsyncClient, **body: Any) -> list[dict[str, Any]]:
    response = await client.post("/v1/images", json=body)
    assert response.status_code == 200, response.text
    return response.json()["data"]


def pixels(item: dict[str, Any]) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(item["b64_json"], validate=True))))


async def test_images_are_those_of_sample(run: Path) -> None:
    service = service_of(run)
    labels = [2, 2, 0, 0]
    expected = sample(
        service.model,
        service.vocabulary,
        LENGTH,
        service.sampler,
        known_BL=np.repeat(known_prefixes([[]], LENGTH, BOS), 4, axis=0),
        labels_B=np.array(labels),
        seed=6,
        batch_sequences=4,
        device="cpu",
    ).tokens_BL
    images_BHWC = decode_images(VQTokenizer.load(run), expected)
    async with client_of(service) as client:
        data = await post(client, classes=[2, "TENCH, tinca tinca"], n=2, seed=6)
    assert [item["class_number"] for item in data] == labels
    assert [item["class"] for item in data] == [CLASS_NAMES[label] for label in labels]
    for item, image_HWC in zip(data, images_BHWC, strict=True):
        assert pixels(item).shape == (SIDE_PIXELS, SIDE_PIXELS, 3)
        np.testing.assert_array_equal(pixels(item), image_HWC)


async def test_a_seed_gives_the_same_images_in_any_company(run: Path) -> None:
    bodies: list[dict[str, Any]] = [
        {
            "classes": [number % 3, None],
            "seed": number,
            "guidance": float(number % 2),
            "steps": 3 + number % 2,
        }
        for number in range(6)
    ]
    async with client_of(service_of(run, max_wait_ms=50)) as client:
        alone = [await post(client, **body) for body in bodies]
        together = await asyncio.gather(*(post(client, **body) for body in bodies))
    assert together == alone
    assert alone[0][1]["class"] is None


async def test_every_class_unless_some_are_asked_for_and_no_others(run: Path) -> None:
    async with client_of(service_of(run)) as client:
        assert [item["class_number"] for item in await post(client)] == [0, 1, 2]
        for classes in ([3], [-1], ["dragon"], [], [1.5], [10**30], [True]):
            response = await client.post("/v1/images", json={"classes": classes})
            assert response.status_code == 422, classes
            assert "\n" not in response.json()["error"]["message"]
        many = await client.post("/v1/images", json={"n": 1000})
        assert many.status_code == 400
        for path in ("/v1/completions", "/v1/infill"):
            refused = await client.post(path, json={"template": "{2}"} if path == "/v1/infill" else {})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "unsupported")


def test_another_vq_tokenizer_is_refused(tmp_path: Path) -> None:
    run = write_image_run(tmp_path)
    random_vq(seed=9).save(run)
    with pytest.raises(UserError):
        service_of(run)
