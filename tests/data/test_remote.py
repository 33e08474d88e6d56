"""A split in an S3 bucket, served by moto on this machine, and faults of that store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pgm_scale.data.loader import TokenLoader
from pgm_scale.data.manifest import ImageContent
from pgm_scale.data.order import GlobalOrder
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from tests.data.conftest import Split, flip_bit, make_split

URL = "s3://tokens/set/train"


@dataclass
class Store:
    """moto's S3 behind a filter: `answer(method, path)` may return a response instead of it."""

    requests: list[str] = field(default_factory=list)
    answer: Callable[[str, str], Any] | None = None
    client: Any = None

    def gets(self, name: str) -> int:
        return sum(request == f"GET /tokens/set/train/{name}" for request in self.requests)


@pytest.fixture(scope="module")
def server() -> Iterator[Store]:
    import boto3
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server
    from werkzeug.wrappers import Request

    store = Store()
    moto = DomainDispatcherApplication(create_backend_app)

    def application(environ: dict[str, Any], start_response: Any) -> Any:
        request = Request(environ)
        store.requests.append(f"{request.method} {request.path}")
        response = store.answer(request.method, request.path) if store.answer else None
        return (response or moto)(environ, start_response)

    http = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{http.server_port}"
    patch = pytest.MonkeyPatch()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.setenv(name, "testing")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    patch.setenv("S3_ENDPOINT_URL", endpoint)
    patch.setenv("NO_PROXY", "127.0.0.1")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    store.client = boto3.client("s3", endpoint_url=endpoint)
    store.client.create_bucket(Bucket="tokens")
    yield store
    http.shutdown()
    patch.undo()


@pytest.fixture
def store(server: Store) -> Store:
    server.answer = None
    for item in server.client.list_objects_v2(Bucket="tokens").get("Contents", []):
        server.client.delete_object(Bucket="tokens", Key=item["Key"])
    server.requests.clear()
    return server


@pytest.fixture
def split(store: Store, tmp_path: Path) -> Split:
    split = make_split(tmp_path / "split", "tar", (40, 20))
    for path in split.folder.iterdir():
        store.client.upload_file(str(path), "tokens", f"set/train/{path.name}")
    return split


def read_all(cache: Path) -> np.ndarray:
    storage = SplitStorage(URL, cache)
    order = GlobalOrder(storage.manifest.rows_per_shard, 0, 1, shuffle=False)
    return TokenLoader(storage, order).read(np.arange(60)).tokens_BL


def cached(cache: Path, name: str) -> Path:
    (path,) = cache.glob(f"*/{name}")
    return path


def test_remote_split_is_fetched_once_and_served_from_the_cache(store: Store, split: Split, tmp_path) -> None:
    for _ in range(2):
        np.testing.assert_array_equal(read_all(tmp_path / "cache"), np.concatenate(split.tokens))
    assert store.gets("shard-00000.tar") == store.gets("shard-00001.tar") == 1
    assert SplitStorage(URL, tmp_path / "cache").tokenizer_path().read_text() == "{}"
    assert not list((tmp_path / "cache").rglob("*.writing"))


@pytest.mark.parametrize("remote", [True, False])
def test_the_vq_tokenizer_of_image_codes_comes_along_and_is_verified(
    store: Store, split: Split, tmp_path, remote
) -> None:
    weights = b"weights"
    described = json.dumps({"kind": "vq", "weights_sha256": hashlib.sha256(weights).hexdigest()})
    (split.folder / "tokenizer.json").write_text(described)
    (split.folder / "vq.safetensors").write_bytes(weights)
    codes = ImageContent("codes", 32, 3, 4, ("a",))
    manifest = dataclasses.replace(
        split.manifest,
        images=codes,
        length_tokens=17,
        tokenizer_sha256=hashlib.sha256(described.encode()).hexdigest(),
    )
    manifest.save(split.folder)
    for name in ("tokenizer.json", "vq.safetensors", "dataset.json"):
        store.client.upload_file(str(split.folder / name), "tokens", f"set/train/{name}")
    storage = SplitStorage(URL if remote else split.folder, tmp_path / "cache")
    path = storage.tokenizer_path()
    assert path.with_name("vq.safetensors").read_bytes() == weights
    path.with_name("vq.safetensors").write_bytes(b"Weights")
    if remote:
        storage.tokenizer_path()  # fetched again
        assert path.with_name("vq.safetensors").read_bytes() == weights
    else:
        with pytest.raises(UserError, match=r"vq\.safetensors: corrupt: SHA-256"):
            storage.tokenizer_path()


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_corrupt_cached_shard_is_fetched_again_on_every_run(
    store: Store, split: Split, tmp_path, damage
) -> None:
    read_all(tmp_path / "cache")
    for run in range(2):
        path = cached(tmp_path / "cache", "shard-00001.tar")
        if damage == "flip":
            flip_bit(path)
        else:
            path.write_bytes(path.read_bytes()[:700])
        np.testing.assert_array_equal(read_all(tmp_path / "cache"), np.concatenate(split.tokens))
        assert store.gets("shard-00001.tar") == run + 2


def test_shard_corrupt_in_the_store_is_named_always(store: Store, split: Split, tmp_path) -> None:
    path = split.folder / "shard-00001.tar"
    flip_bit(path)
    store.client.upload_file(str(path), "tokens", "set/train/shard-00001.tar")
    for run in range(2):
        with pytest.raises(UserError, match=rf"{URL}/shard-00001\.tar: corrupt: SHA-256 \w+ instead of \w+"):
            read_all(tmp_path / "cache")
        assert store.gets("shard-00001.tar") == 2 * (run + 1)
        assert not list((tmp_path / "cache").rglob("shard-00001.tar"))


def test_partial_body_is_fetched_again(store: Store, split: Split, tmp_path) -> None:
    from werkzeug.wrappers import Response

    short = (split.folder / "shard-00000.tar").read_bytes()[:1024]

    def answer(method: str, path: str) -> Any:
        if method == "GET" and path.endswith("shard-00000.tar") and store.gets("shard-00000.tar") == 1:
            return Response(short)
        return None

    store.answer = answer
    np.testing.assert_array_equal(read_all(tmp_path / "cache"), np.concatenate(split.tokens))
    assert store.gets("shard-00000.tar") == 2


def test_store_that_fails_twice_then_works(store: Store, split: Split, tmp_path) -> None:
    from werkzeug.wrappers import Response

    failures: list[str] = []

    def answer(method: str, path: str) -> Any:
        if method == "GET" and path.endswith("shard-00000.tar") and len(failures) < 2:
            failures.append(path)
            return Response(status=503)
        return None

    store.answer = answer
    np.testing.assert_array_equal(read_all(tmp_path / "cache"), np.concatenate(split.tokens))
    assert len(failures) == 2


def test_store_that_hangs_times_out(store: Store, split: Split, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("pgm_scale.data.fetching.DOWNLOAD_TIMEOUT_S", 0.2)
    released = threading.Event()

    def answer(method: str, path: str) -> Any:
        if method == "GET" and path.endswith("shard-00000.tar"):
            released.wait(60)

    store.answer = answer
    try:
        with pytest.raises(UserError, match=r"shard-00000\.tar: cannot be fetched \(ReadTimeout"):
            read_all(tmp_path / "cache")
    finally:
        released.set()


def test_refused_shard_is_named_and_not_retried(store: Store, split: Split, tmp_path) -> None:
    from werkzeug.wrappers import Response

    store.answer = lambda _, path: Response(status=403) if path.endswith("shard-00000.tar") else None
    with pytest.raises(UserError, match=rf"{URL}/shard-00000\.tar: cannot be fetched .*credentials"):
        read_all(tmp_path / "cache")
    refused = [r for r in store.requests if r.endswith("shard-00000.tar") and not r.startswith("PUT")]
    assert len(refused) == 1


def test_all_absent_remote_shards_are_listed_at_the_start(store: Store, split: Split, tmp_path) -> None:
    for shard in split.manifest.shards:
        store.client.delete_object(Bucket="tokens", Key=f"set/train/{shard.name}")
    with pytest.raises(UserError, match=r"2 of 2 shards are missing: shard-00000\.tar, shard-00001\.tar"):
        SplitStorage(URL, tmp_path / "cache")


def test_store_that_cannot_be_listed_still_works(store: Store, split: Split, tmp_path, caplog) -> None:
    from werkzeug.wrappers import Response

    store.answer = lambda _, path: Response(status=403) if path.strip("/") == "tokens" else None
    np.testing.assert_array_equal(read_all(tmp_path / "cache"), np.concatenate(split.tokens))
    assert "cannot be listed" in caplog.text


def test_no_manifest_bad_cache_folder_and_unknown_scheme(store: Store, tmp_path) -> None:
    with pytest.raises(UserError, match=rf"{URL}/dataset\.json: cannot be fetched"):
        SplitStorage(URL, tmp_path / "cache")
    with pytest.raises(UserError, match=r"needs data\.cache_folder"):
        SplitStorage(URL)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"data\.cache_folder .*file: cannot be written"):
        SplitStorage(URL, tmp_path / "file")
    with pytest.raises(UserError, match="cannot read ftp://"):
        SplitStorage("ftp://x/y", tmp_path / "cache")


def _read_in_process(cache: Path, results: Any) -> None:
    results.put(read_all(cache).sum())


def test_processes_of_a_node_share_one_download(store: Store, split: Split, tmp_path) -> None:
    import streaming.base.storage  # noqa: F401  (imported before the fork, which makes the race tight)

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_read_in_process, args=(tmp_path, results)) for _ in range(3)]
    for process in processes:
        process.start()
    sums = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert sums == {np.concatenate(split.tokens).astype(np.int64).sum()}
    assert store.gets("shard-00000.tar") == store.gets("shard-00001.tar") == 1
