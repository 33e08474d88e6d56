"""The endpoints of text, called in-process."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from pgm_scale.errors import UserError
from pgm_scale.sampling import known_prefixes, sample
from pgm_scale.serve.service import Service
from pgm_scale.serve.settings import ServeSettings
from tests.serve.tiny_service import (
    LENGTH,
    MODELS,
    VOCABULARY,
    byte_tokenizer,
    client_of,
    events_of,
    text_model,
    text_service,
)

TOKENIZER = byte_tokenizer()


async def complete(client: httpx.AsyncClient, **body: Any) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def texts(answer: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


@pytest.mark.parametrize("name", MODELS)
async def test_a_lone_request_gets_what_sample_gives(tmp_path: Path, name: str) -> None:
    """All positions behind the prompt, n times, as `pgm-scale sample --prompt --count` numbers them."""
    service = text_service(tmp_path, name)
    prompt = TOKENIZER.encode("hey").ids
    known_BL = np.repeat(known_prefixes([prompt], LENGTH, VOCABULARY.bos_id), 3, axis=0)
    expected_BL = sample(
        service.model,
        VOCABULARY,
        LENGTH,
        service.sampler,
        known_BL=known_BL,
        seed=11,
        batch_sequences=3,
        device="cpu",
    ).tokens_BL
    async with client_of(service) as client:
        answer = await complete(client, prompt="hey", n=3, seed=11, max_tokens=LENGTH - 1 - len(prompt))
    for choice, tokens_L in zip(answer["choices"], expected_BL, strict=True):
        generated = tokens_L[1 + len(prompt) :].tolist()
        kept = generated[: generated.index(0)] if 0 in generated else generated
        assert choice["text"] == TOKENIZER.decode(kept)
        assert choice["finish_reason"] == ("stop" if 0 in generated else "length")
    assert answer["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize("name", MODELS)
async def test_a_seed_gives_the_same_text_whatever_it_is_batched_with(tmp_path: Path, name: str) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": "a" * (number % 5), "seed": number, "max_tokens": 3 + number % 7}
        | ({"temperature": 0.7, "top_p": 0.9} if number % 3 == 0 else {})
        | ({"top_k": 5} if number % 4 == 0 else {})
        | ({"steps": 1 + number % 5} if name == "pgm" else {})
        for number in range(16)
    ]
    async with client_of(text_service(tmp_path, name)) as client:
        lone = [texts(await complete(client, **body)) for body in bodies]
        together = await asyncio.gather(*(complete(client, **body) for body in bodies))
        assert [texts(answer) for answer in together] == lone
        other = await complete(client, **bodies[0] | {"seed": 99, "max_tokens": 20})
        assert other["seed"] == 99
        metrics = (await client.get("/metrics")).text
    assert len({text for own in lone for text in own}) > 8
    families = {family.name: family for family in text_string_to_metric_families(metrics)}
    samples = {sample_.name: sample_.value for sample_ in families["pgm_scale_batch_sequences"].samples}
    if name == "pgm":  # rows did share steps
        assert samples["pgm_scale_batch_sequences_sum"] > 1.5 * samples["pgm_scale_batch_sequences_count"]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("stop", [None, ["\ufffd", "e"]])
async def test_a_stream_puts_together_the_text_without_streaming(
    tmp_path: Path, name: str, stop: list[str] | None
) -> None:
    body = {"prompt": ["ab", "c", ""], "n": 2, "seed": 5, "max_tokens": 12, "stop": stop, "echo": True}
    async with client_of(text_service(tmp_path, name)) as client:
        whole = await complete(client, **body)
        response = await client.post("/v1/completions", json=body | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    streamed, reasons = dict.fromkeys(range(6), ""), dict[int, str]()
    positions: dict[int, list[int]] = {number: [] for number in range(6)}
    for event in events_of(response.text):
        assert event["object"] == "text_completion"
        assert event["seed"] == 5
        for choice in event["choices"]:
            streamed[choice["index"]] += choice["text"]
            positions[choice["index"]] += [token["position"] for token in choice.get("tokens", [])]
            if choice["finish_reason"]:
                assert choice["index"] not in reasons
                reasons[choice["index"]] = choice["finish_reason"]
    assert list(streamed.values()) == texts(whole)
    assert [reasons[number] for number in range(6)] == [c["finish_reason"] for c in whole["choices"]]
    for number, own in positions.items():
        assert len(own) == len(set(own))
        assert set(own) <= set(range(12))
        if reasons[number] == "length":
            assert sorted(own) == list(range(12))
    if name == "pgm":
        assert any(own != sorted(own) for own in positions.values())  # decoded in another order


@pytest.mark.parametrize("name", ["pgm", "mdlm"])
async def test_infilling_keeps_what_is_known(tmp_path: Path, name: str) -> None:
    async with client_of(text_service(tmp_path, name)) as client:
        body: dict[str, Any] = {"template": "ab{3}cd{2}", "seed": 2, "n": 2}
        response = await client.post("/v1/infill", json=body)
        segments = [{"text": "ab"}, {"hole": 3}, {"text": "cd"}, {"hole": 2}]
        same = await client.post("/v1/infill", json={"segments": segments, "seed": 2, "n": 2})
        streamed = await client.post("/v1/infill", json=body | {"stream": True})
    choices = response.json()["choices"]
    assert choices == same.json()["choices"]
    for choice in choices:
        first, second = choice["holes"]
        assert choice["text"].startswith("ab")
        assert "cd" in choice["text"]
        if "\ufffd" not in choice["text"]:
            assert choice["text"] == f"ab{first}cd{second}"
    joined = ["", ""]
    for event in events_of(streamed.text):
        for choice in event["choices"]:
            joined[choice["index"]] += choice["text"]
    assert joined == [choice["text"] for choice in choices]
    assert response.json()["usage"] == {"prompt_tokens": 4, "completion_tokens": 10, "total_tokens": 14}


async def test_an_autoregressive_model_refuses_to_infill(tmp_path: Path) -> None:
    async with client_of(text_service(tmp_path, "ar")) as client:
        response = await client.post("/v1/infill", json={"template": "a{2}b"})
    assert response.status_code == 400
    assert "cannot infill" in response.json()["error"]["message"]


@pytest.mark.parametrize("name", MODELS)
async def test_temperature_zero_is_greedy_and_forgets_the_seed(tmp_path: Path, name: str) -> None:
    async with client_of(text_service(tmp_path, name)) as client:
        answers = [
            # One position, so that the order of decoding does not matter.
            texts(await complete(client, prompt="ab", max_tokens=1, temperature=0, seed=seed))
            for seed in range(5)
        ]
    assert all(answer == answers[0] for answer in answers)


async def test_a_request_without_a_seed_can_be_repeated(tmp_path: Path) -> None:
    async with client_of(text_service(tmp_path)) as client:
        first, second = [await complete(client, prompt="a") for _ in range(2)]
        assert first["seed"] != second["seed"]
        assert texts(await complete(client, prompt="a", seed=first["seed"])) == texts(first)
        ids = await complete(client, prompt=TOKENIZER.encode("a").ids, seed=first["seed"])
        assert texts(ids) == texts(first)


HOSTILE: list[tuple[int, bytes]] = [
    (400, b""),
    (400, b"{"),
    (400, b"\xff\xfe\x00"),
    (400, b"\x80\x81"),
    (400, b"[]"),
    (400, b"null"),
    (400, b"[" * 100_000),
    (400, b'{"a":' * 5_000),
    (400, b'{"temperature": NaN}'),
    (400, b'{"temperature": -Infinity}'),
    (400, b'{"max_tokens": ' + b"9" * 5_000 + b"}"),
    (422, b'{"temperature": 1e999}'),
    (422, b'{"temperature": 1e-300}'),
    (422, b'{"temperature": -1}'),
    (422, b'{"temperature": "hot"}'),
    (422, b'{"temperature": true}'),
    (422, b'{"top_p": 0}'),
    (422, b'{"top_p": 1.5}'),
    (422, b'{"top_k": -1}'),
    (422, b'{"n": 0}'),
    (422, b'{"n": 1.5}'),
    (422, b'{"n": 99999999999999999999999999}'),
    (422, b'{"seed": 99999999999999999999999999}'),
    (422, b'{"max_tokens": 0}'),
    (422, b'{"max_tokens": -5}'),
    (422, b'{"stream_options": {"include_usage": 1}}'),
    (422, b'{"steps": 0}'),
    (422, b'{"steps": 100000}'),
    (422, b'{"stream": "yes"}'),
    (422, b'{"prompt": "\\ud800"}'),
    (422, b'{"prompt": ["a", ["b"]]}'),
    (422, b'{"prompt": [["a"]]}'),
    (422, b'{"prompt": []}'),
    (422, b'{"prompt": [1.5]}'),
    (422, b'{"prompt": [true]}'),
    (422, b'{"prompt": [-1]}'),
    (422, b'{"prompt": [123456789012345678901234567890]}'),
    (422, b'{"prompt": {"text": "a"}}'),
    (422, b'{"stop": [""]}'),
    (422, b'{"stop": ["a", "b", "c", "d", "e"]}'),
    (422, b'{"stop": 3}'),
    (422, b'{"sampler": "halton"}'),
    (422, b'{"sampler": "' + b"x" * 1000 + b'"}'),
    (422, b'{"\\ud800": 1}'),
    (422, b'{"unknown": 1}'),
    (400, b'{"n": 1000}'),
    (400, b'{"max_tokens": 1000}'),
    (400, b'{"logprobs": 5}'),
    (400, b'{"best_of": 2}'),
    (400, b'{"suffix": "b"}'),
    (400, b'{"frequency_penalty": 1.0}'),
    (400, b'{"logit_bias": {"1": 5}}'),
    (404, b'{"model": "gpt-4"}'),
    (413, b'{"prompt": "' + b"a" * 5_000 + b'"}'),
    (413, b'{"prompt": "' + b"a" * 200_000 + b'"}'),
]


async def test_hostile_bodies_get_one_message_and_never_a_traceback(tmp_path: Path) -> None:
    async with client_of(text_service(tmp_path, max_body_bytes=100_000)) as client:
        for status, content in HOSTILE:
            response = await client.post("/v1/completions", content=content)
            assert response.status_code == status, (content[:80], response.text)
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            assert 0 < len(error["message"]) < 500
            assert "\n" not in error["message"]
        bodies: list[dict[str, Any]] = [
            {},
            {"template": "a"},
            {"template": "{3}", "segments": [{"hole": 3}]},
            {"segments": []},
            {"segments": [{}]},
            {"segments": [{"text": "a", "hole": 1}]},
            {"segments": [{"hole": 0}]},
            {"template": "{99999999999999999999}"},
            {"template": "{0}"},
            {"template": "\ud800 {4}"},
            {"segments": [{"text": "\udfff"}, {"hole": 4}]},
        ]
        for body in bodies:
            response = await client.post("/v1/infill", content=json.dumps(body))
            assert response.status_code in (400, 422), (body, response.text)
            assert response.json()["error"]["message"]
        assert (await client.post("/v1/images", json={})).status_code == 400
        assert (await client.get("/nothing")).status_code == 404
        assert (await client.get("/v1/completions")).json()["error"]["type"] == "invalid_request_error"
        assert (await client.get("/docs")).status_code == 404
        assert (await complete(client, prompt="still"))["choices"]


async def test_null_leaves_a_field_out(tmp_path: Path) -> None:
    async with client_of(text_service(tmp_path)) as client:
        nulls = dict.fromkeys(
            ("prompt", "max_tokens", "n", "stop", "stream", "echo", "stream_options", "model")
        )
        assert texts(await complete(client, seed=3, **nulls)) == texts(await complete(client, seed=3))


async def test_a_stream_ends_with_its_usage_if_asked(tmp_path: Path) -> None:
    body = {"prompt": ["a", "bc"], "n": 2, "seed": 3, "max_tokens": 9}
    async with client_of(text_service(tmp_path)) as client:
        whole = await complete(client, **body)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        *chunks, last = events_of((await client.post("/v1/completions", json=body | options)).text)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert not any("usage" in chunk for chunk in chunks)


async def test_an_mdlm_decodes_its_full_length(tmp_path: Path) -> None:
    """As it was trained; what is behind the answer is decoded, too, and left out."""
    service = text_service(tmp_path, "mdlm")
    known_BL = known_prefixes([TOKENIZER.encode("hey").ids], LENGTH, VOCABULARY.bos_id)
    tokens_BL = sample(
        service.model,
        VOCABULARY,
        LENGTH,
        service.sampler,
        known_BL=known_BL,
        seed=11,
        batch_sequences=1,
        device="cpu",
    ).tokens_BL
    async with client_of(service) as client:
        infilled = await client.post("/v1/infill", json={"template": "hey{4}", "seed": 11})
    assert infilled.json()["choices"][0]["holes"] == [TOKENIZER.decode(tokens_BL[0, 4:8].tolist())]


async def post_to_slow_reader(client: httpx.AsyncClient, body: dict[str, Any], send_s: float) -> bytes:
    """What a client has got that takes so long for every part of a stream, and never leaves."""
    transport: Any = client._transport
    content, got = json.dumps(body).encode(), bytearray()
    unread = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> dict[str, Any]:
        return unread.pop() if unread else await asyncio.Event().wait()  # type: ignore[return-value]

    async def send(message: Any) -> None:
        await asyncio.sleep(send_s)
        got.extend(message.get("body", b""))

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "query_string": b""}
    await asyncio.wait_for(transport.app(scope, receive, send), 30)
    return bytes(got)


async def test_a_stream_that_nobody_reads_ends(tmp_path: Path) -> None:
    service = text_service(tmp_path, timeout_s=0.5)
    body = {"prompt": "a", "max_tokens": 20, "steps": 20, "stream": True, "seed": 2}
    async with client_of(service) as client:
        # Past the deadline, but never still: it gets all that was decoded in time.
        assert (await post_to_slow_reader(client, body, 0.1)).endswith(b"[DONE]\n\n")
        assert service.metrics.registry.get_sample_value("pgm_scale_disconnects_total") == 0
        assert await post_to_slow_reader(client, body, 3600) == b""
        assert service.engine.active_sequences == service.engine.queued_sequences == 0


async def test_a_full_queue_is_429_and_a_late_answer_503(tmp_path: Path) -> None:
    service = text_service(tmp_path, max_batch_sequences=1, max_queue_sequences=1, timeout_s=0.3)
    async with client_of(service) as client:
        hold = service.engine._changed
        body = {"prompt": "a", "max_tokens": 2}
        hold.acquire()  # the engine's thread cannot begin a step
        try:
            # The loop submits while this thread holds the (re-entrant) lock.
            late = [asyncio.create_task(client.post("/v1/completions", json=body)) for _ in range(2)]
            while service.engine.queued_sequences < 2:
                await asyncio.sleep(0.01)
            refused = await client.post("/v1/completions", json=body)
            answers = await asyncio.gather(*late)
            streamed = await client.post("/v1/completions", json=body | {"stream": True})
        finally:
            hold.release()
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert [answer.status_code for answer in answers] == [503, 503]
        assert "0.3 s" in answers[0].json()["error"]["message"]
        last_event = streamed.text.strip().rsplit("data: ", 1)[1]
        assert json.loads(last_event)["error"]["type"] == "server_error"
        assert (await client.post("/v1/completions", json=body)).status_code == 200


async def test_what_the_server_says_of_itself(tmp_path: Path) -> None:
    service = text_service(tmp_path)
    async with client_of(service) as client:
        await complete(client, prompt="a", model="tiny", user="somebody", logprobs=None, max_tokens=5)
        models = (await client.get("/v1/models")).json()
        page = (await client.get("/")).text
        assert (await client.get("/health")).json() == {"status": "alive"}
        metrics = await client.get("/metrics")
    assert [model["id"] for model in models["data"]] == ["tiny"]
    assert models["data"][0]["length_tokens"] == LENGTH
    assert "<html" in page
    assert "http://" not in page
    assert "https://" not in page
    assert metrics.headers["content-type"].startswith("text/plain")
    samples = {
        (part.name, *part.labels.values()): part.value
        for family in text_string_to_metric_families(metrics.text)
        for part in family.samples
    }
    assert samples["pgm_scale_requests_total", "/v1/completions", "200"] == 1
    assert samples["pgm_scale_request_seconds_count", "/v1/completions"] == 1
    assert samples["pgm_scale_generated_tokens_total",] == 5
    assert samples["pgm_scale_queue_sequences",] == 0
    assert samples["pgm_scale_disconnects_total",] == 0


async def test_before_and_after_it_is_ready_the_server_answers_503(tmp_path: Path) -> None:
    service = text_service(tmp_path)
    async with client_of(service) as client:
        service.engine.stop()
        for response in (await client.get("/ready"), await client.post("/v1/completions", json={})):
            assert response.status_code == 503
            assert response.headers["retry-after"]
        assert (await client.get("/health")).status_code == 200


async def test_a_model_that_fails_is_500_and_the_server_lives(tmp_path: Path) -> None:
    service = text_service(tmp_path)
    async with client_of(service) as client:
        decoding: Any = service.engine._decoding
        predict = decoding._predict

        def broken(*arguments: Any) -> Any:
            raise RuntimeError("out of luck")

        decoding._predict = broken
        response = await client.post("/v1/completions", json={"prompt": "a"})
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "server_error"
        assert "luck" not in response.text
        decoding._predict = predict
        assert (await complete(client, prompt="a"))["choices"]


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    trained = text_model(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer"):
        Service(trained, ServeSettings(), "cpu")
