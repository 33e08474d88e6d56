"""A split in an S3 bucket, served by moto on this machine, and faults of that store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import multiprocessing
import os
import re
import resource
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgm_scale.data.loader import TokenLoader
from pgm_scale.data.manifest import ImageContent
from pgm_scale.data.order import GlobalOrder
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from tests.data.conftest import Split, flip_bit, make_split
from tests.data.damage import Damage, attempt, damages

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


@pytest.mark.fault(19)
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


@pytest.mark.fault(19)
def test_shard_corrupt_in_the_store_is_named_always(store: Store, split: Split, tmp_path) -> None:
    path = split.folder / "shard-00001.tar"
    flip_bit(path)
    store.client.upload_file(str(path), "tokens", "set/train/shard-00001.tar")
    for run in range(2):
        with pytest.raises(UserError, match=rf"{URL}/shard-00001\.tar: corrupt: SHA-256 \w+ instead of \w+"):
            read_all(tmp_path / "cache")
        assert store.gets("shard-00001.tar") == 2 * (run + 1)
        assert not list((tmp_path / "cache").rglob("shard-00001.tar"))


@pytest.mark.fault(22)
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


@pytest.mark.fault(22)
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


@pytest.mark.fault(22)
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


@pytest.mark.fault(22)
def test_refused_shard_is_named_and_not_retried(store: Store, split: Split, tmp_path) -> None:
    from werkzeug.wrappers import Response

    store.answer = lambda _, path: Response(status=403) if path.endswith("shard-00000.tar") else None
    with pytest.raises(UserError, match=rf"{URL}/shard-00000\.tar: cannot be fetched .*credentials"):
        read_all(tmp_path / "cache")
    refused = [r for r in store.requests if r.endswith("shard-00000.tar") and not r.startswith("PUT")]
    assert len(refused) == 1


@pytest.mark.fault(21)
def test_all_absent_remote_shards_are_listed_at_the_start(store: Store, split: Split, tmp_path) -> None:
    for shard in split.manifest.shards:
        store.client.delete_object(Bucket="tokens", Key=f"set/train/{shard.name}")
    with pytest.raises(UserError, match=r"2 of 2 shards are missing: shard-00000\.tar, shard-00001\.tar"):
        SplitStorage(URL, tmp_path / "cache")


@pytest.mark.fault(22)
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


@pytest.mark.fault(22)
@pytest.mark.parametrize(("status", "requests"), [(503, 6), (404, 1), (302, 2)], ids=str)
def test_a_store_that_is_busy_is_asked_again_and_one_that_refuses_is_not(
    store: Store, split: Split, tmp_path, monkeypatch, status: int, requests: int
) -> None:
    """Its client asks three times, and we start that anew after the delay; a redirect is followed once."""
    from werkzeug.wrappers import Response

    monkeypatch.setattr("pgm_scale.data.fetching.RETRY_DELAYS_S", (0.0,))
    storage = SplitStorage(URL, tmp_path / "cache")
    location = {"Location": "/tokens/set/train/shard-00000.tar"} if status == 302 else {}
    store.answer = lambda _, path: (
        Response(status=status, headers=location) if path.endswith("shard-00000.tar") else None
    )
    store.requests.clear()
    with pytest.raises(UserError, match=rf"{URL}/shard-00000\.tar: cannot be fetched \(.*; check") as caught:
        storage.shard_path(storage.manifest.shards[0])
    assert "\n" not in str(caught.value)
    assert sum(request.endswith("shard-00000.tar") for request in store.requests) == requests
    store.answer = None
    assert (
        storage.shard_path(storage.manifest.shards[0]).read_bytes()
        == (split.folder / "shard-00000.tar").read_bytes()
    )


@pytest.mark.fault(22)
@pytest.mark.parametrize("hangs", [False, True])
def test_a_body_that_is_shorter_than_it_says_or_never_ends(
    store: Store, split: Split, tmp_path, monkeypatch, hangs: bool
) -> None:
    from werkzeug.wrappers import Response

    monkeypatch.setattr("pgm_scale.data.fetching.DOWNLOAD_TIMEOUT_S", 0.3)
    content = (split.folder / "shard-00000.tar").read_bytes()
    released = threading.Event()

    def body() -> Iterator[bytes]:
        yield content[:500]
        if hangs:
            released.wait(60)

    def answer(method: str, path: str) -> Any:
        if method == "GET" and path.endswith("shard-00000.tar"):
            return Response(body(), headers={"Content-Length": str(len(content))})
        return None

    store.answer = answer
    try:
        with pytest.raises(
            UserError, match=r"shard-00000\.tar: cannot be fetched \((IncompleteRead|ReadTimeout)"
        ):
            read_all(tmp_path / "cache")
    finally:
        released.set()
    assert not list((tmp_path / "cache").rglob("shard-00000.tar"))  # nothing half is taken for whole
    store.answer = None
    np.testing.assert_array_equal(read_all(tmp_path / "cache"), np.concatenate(split.tokens))


@pytest.mark.fault(22)
def test_missing_credentials_are_one_line_at_once(store: Store, split: Split, tmp_path, monkeypatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    store.requests.clear()
    with pytest.raises(UserError, match=r"dataset\.json: cannot be fetched .*[Cc]redentials"):
        SplitStorage(URL, tmp_path / "cache")
    assert store.requests == []


@pytest.mark.fault(19)
@pytest.mark.fault(22)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(damage=damages(), name=st.sampled_from(["shard-00000.tar", "shard-00001.tar", "tokenizer.json"]))
def test_any_damage_in_the_cache_is_never_served(
    store: Store, split: Split, tmp_path: Path, damage: Damage, name: str
) -> None:
    def serve() -> tuple[bytes, bytes]:
        storage = SplitStorage(URL, tmp_path / "cache")
        tokens = read_all(tmp_path / "cache")
        return storage.tokenizer_path().read_bytes(), tokens.astype(np.uint16).tobytes()

    expected = (split.folder / "tokenizer.json").read_bytes(), np.concatenate(split.tokens).tobytes()
    assert serve() == expected
    path = cached(tmp_path / "cache", name)
    path.write_bytes(damage(path.read_bytes()))
    assert serve() == expected


@pytest.mark.fault(19)
@pytest.mark.fault(22)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    damage=damages(),
    name=st.sampled_from(["dataset.json", "shard-00000.tar", "shard-00001.tar", "tokenizer.json"]),
)
def test_any_damage_in_the_store_is_found_or_changes_nothing(
    store: Store, split: Split, damage: Damage, name: str
) -> None:
    whole = (split.folder / name).read_bytes()
    damaged = damage(whole)

    def serve(cache: Path) -> tuple[Any, np.ndarray]:
        storage = SplitStorage(URL, cache)
        storage.tokenizer_path()
        return storage.manifest, read_all(cache)

    store.client.put_object(Bucket="tokens", Key=f"set/train/{name}", Body=damaged)
    try:
        with tempfile.TemporaryDirectory() as cache:
            for _ in range(2):
                served, message = attempt(serve, Path(cache))
                if message is None:
                    assert served[0] == split.manifest
                    np.testing.assert_array_equal(served[1], np.concatenate(split.tokens))
                    assert damaged == whole or name == "dataset.json"  # its white space
                else:
                    assert name in message
    finally:
        store.client.put_object(Bucket="tokens", Key=f"set/train/{name}", Body=whole)


@pytest.mark.fault(57)
@pytest.mark.parametrize("junk", ["folder", "fifo", "link"])
def test_junk_in_the_place_of_a_cached_file_is_replaced(
    store: Store, split: Split, tmp_path: Path, junk: str
) -> None:
    read_all(tmp_path / "cache")
    SplitStorage(URL, tmp_path / "cache").tokenizer_path()
    precious = tmp_path / "precious"
    precious.write_text("not ours")
    for path in (
        cached(tmp_path / "cache", "shard-00001.tar"),
        cached(tmp_path / "cache", "tokenizer.json"),
        cached(tmp_path / "cache", "tokenizer.json").with_name(".shard-00001.tar.writing"),
    ):
        path.unlink(missing_ok=True)
        if junk == "folder":
            (path / "inside").mkdir(parents=True)
        elif junk == "fifo":
            os.mkfifo(path)
        else:
            path.symlink_to(precious)
    np.testing.assert_array_equal(read_all(tmp_path / "cache"), np.concatenate(split.tokens))
    assert SplitStorage(URL, tmp_path / "cache").tokenizer_path().read_text() == "{}"
    assert precious.read_text() == "not ours"


@pytest.mark.fault(57)
def test_a_cache_that_cannot_be_written(store: Store, split: Split) -> None:
    """By another user, as nothing is forbidden to root."""
    import streaming.base.storage  # noqa: F401  (before the fork)

    def as_another_user() -> None:
        os.setuid(65534)
        read_all(cache)

    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(scratch)
        read_all(cache)
        shard = cached(cache, "shard-00001.tar")
        for path in (cache, *cache.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        told = in_fork(as_another_user)
        assert re.fullmatch(rf"{shard.parent}: the cache cannot be written \(Permission denied\); .*", told)
        assert shard.exists()


@pytest.mark.fault(57)
def test_a_cache_without_room(store: Store, split: Split, tmp_path: Path) -> None:
    import streaming.base.storage  # noqa: F401  (before the fork)

    def with_small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        read_all(tmp_path)

    told = in_fork(with_small_files)
    expected = r".*shard-00000\.tar: cannot be fetched \(OSError: .*File too large.*room in .*"
    assert re.fullmatch(expected, told)


def in_fork(function: Callable[[], Any]) -> str:
    """What a child process is told when it does that."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            sending.send(attempt(function)[1] or "nothing")
        except BaseException as error:
            sending.send(f"{type(error).__name__}: {error}")
        os._exit(0)
    assert receiving.poll(60)
    os.waitpid(child, 0)
    return str(receiving.recv())


@pytest.mark.fault(57)
def test_a_stopped_process_that_holds_a_file_of_the_cache_is_named(
    store: Store, split: Split, tmp_path: Path, monkeypatch, caplog
) -> None:
    """It may be fetching for long, so it is waited for; but who waits says for whom."""
    from pgm_scale.data import fetching

    lock = tmp_path / ".shard.lock"
    receiving, sending = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        with fetching.locked(lock):
            sending.send("held")
            os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    assert receiving.recv() == "held"
    os.waitpid(child, os.WUNTRACED)  # until it is stopped
    monkeypatch.setattr(fetching, "_LOCK_WARNING_S", 0.1)

    def wake() -> None:
        while "held by process" not in caplog.text:
            time.sleep(0.02)
        os.kill(child, signal.SIGCONT)

    waker = threading.Thread(target=wake, daemon=True)
    waker.start()
    with fetching.locked(lock):
        waker.join(30)
    os.waitpid(child, 0)
    assert f"{lock}: held by process {child} on" in caplog.text
