from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pgm_scale.data import TokenBatch
from pgm_scale.data.loader import BatchStream, TokenLoader
from pgm_scale.data.order import BatchPlan, GlobalOrder
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from tests.data.conftest import LENGTH_TOKENS, Split, flip_bit, make_split


def open_loader(split: Split, block: int = 2, shuffle: bool = True) -> TokenLoader:
    storage = SplitStorage(split.folder)
    return TokenLoader(storage, GlobalOrder(storage.manifest.rows_per_shard, 11, block, shuffle))


def test_an_epoch_reads_every_row_once_with_its_padding(split: Split) -> None:
    loader = open_loader(split)
    batches = [loader.read(np.arange(start, start + 48)) for start in range(0, 432, 48)]
    tokens = np.concatenate([batch.tokens_BL for batch in batches])
    valid = np.concatenate([batch.valid_BL for batch in batches])
    stored = np.concatenate(split.tokens)
    stored_valid = np.arange(LENGTH_TOKENS) < np.concatenate(split.valid_lengths)[:, None]
    found, expected = np.lexsort(tokens.T), np.lexsort(stored.T)
    np.testing.assert_array_equal(tokens[found], stored[expected])
    np.testing.assert_array_equal(valid[found], stored_valid[expected])
    assert tokens.dtype == np.int64
    assert batches[1].sample_numbers_B.tolist() == list(range(48, 96))


def test_labels_stay_with_their_rows(pixel_split: Split, split: Split) -> None:
    assert pixel_split.labels is not None
    stored = np.concatenate(pixel_split.tokens).tolist(), np.concatenate(pixel_split.labels).tolist()
    label_of = {tuple(tokens): label for tokens, label in zip(*stored, strict=True)}
    assert len(label_of) == 432  # no two rows are equal
    loader = open_loader(pixel_split)
    for start in range(0, 432, 48):
        batch = loader.read(np.arange(start, start + 48))
        assert batch.labels_B is not None
        assert batch.labels_B.dtype == batch.tokens_BL.dtype == np.int64
        assert batch.labels_B.tolist() == [label_of[tuple(tokens)] for tokens in batch.tokens_BL.tolist()]
    assert open_loader(split).read(np.arange(4)).labels_B is None


def test_validation_order_is_the_stored_one(split: Split) -> None:
    batch = open_loader(split, shuffle=False).read(np.arange(310))
    np.testing.assert_array_equal(batch.tokens_BL, np.concatenate(split.tokens)[:310])


def test_shards_are_decoded_once_an_epoch_and_memory_is_bounded(split: Split, monkeypatch) -> None:
    import pgm_scale.data.loader as module

    names = []
    read_shard = module.read_shard

    def counting(path, shard, manifest):
        names.append(shard.name)
        return read_shard(path, shard, manifest)

    monkeypatch.setattr(module, "read_shard", counting)
    loader = open_loader(split, block=2)
    for start in range(0, 432, 8):
        loader.read(np.arange(start, start + 8))
        assert len(loader._open) <= 2
    assert sorted(names) == sorted(shard.name for shard in split.manifest.shards)


@pytest.mark.fault(19)
@pytest.mark.fault(21)
@pytest.mark.fault(58)
@pytest.mark.parametrize("fault", ["flip", "truncate", "missing"])
def test_a_bad_local_shard_is_named_on_every_run(split: Split, fault: str) -> None:
    loader = open_loader(split, shuffle=False)  # the manifest was fine when the run started
    path = split.folder / split.manifest.shards[1].name
    if fault == "flip":
        flip_bit(path)
    elif fault == "truncate":
        path.write_bytes(path.read_bytes()[:-512])
    else:
        path.unlink()
    reason = {"flip": "SHA-256 .* instead of", "truncate": "bytes instead of", "missing": "No such file"}
    for _ in range(2):
        assert loader.read(np.arange(300)).tokens_BL.shape == (300, LENGTH_TOKENS)
        with pytest.raises(UserError, match=rf"shard-00001\.\w+: .*{reason[fault]}"):
            loader.read(np.arange(300, 310))
        if fault == "flip":
            loader = open_loader(split, shuffle=False)
        else:  # the next run sees it before its first step
            with pytest.raises(UserError, match=r"1 of 5 shards are (missing|not as written): shard-00001"):
                open_loader(split, shuffle=False)


def test_the_tokenizer_is_verified(split: Split) -> None:
    storage = SplitStorage(split.folder)
    assert storage.tokenizer_path() == split.folder / "tokenizer.json"
    (split.folder / "tokenizer.json").write_text("{ }")
    with pytest.raises(UserError, match=r"tokenizer\.json: corrupt"):
        storage.tokenizer_path()


def identity(batch: TokenBatch) -> TokenBatch:
    return batch


def stream_of(split: Split, start: int = 0, stop: int = 6, plan: BatchPlan | None = None, **options):
    plan = plan or BatchPlan(48, 12)
    options = {"transform": identity} | options
    return BatchStream(open_loader(split), plan, start_step=start, stop_step=stop, **options)


@pytest.mark.fault(23)
def test_resumed_stream_continues_exactly(split: Split) -> None:
    """432 rows, so 12 steps of 48 cross into the second epoch; the cut lies inside a block."""
    with stream_of(split, 0, 12) as stream:
        whole = list(stream)
    with stream_of(split, 5, 12, ahead=1) as stream:
        rest = list(stream)
    assert len(whole) == 48
    assert len(rest) == 28
    for expected, batch in zip(whole[20:], rest, strict=True):
        np.testing.assert_array_equal(batch.tokens_BL, expected.tokens_BL)
        np.testing.assert_array_equal(batch.sample_numbers_B, expected.sample_numbers_B)


@pytest.mark.fault(23)
def test_two_ranks_see_what_one_sees(split: Split) -> None:
    with stream_of(split, 1, 2) as stream:
        one = list(stream)
    parts = []
    for rank in range(2):
        with stream_of(split, 1, 2, BatchPlan(48, 12, rank, 2)) as stream:
            parts.append(list(stream))
    interleaved = [parts[m % 2][m // 2] for m in range(4)]
    for a, b in zip(one, interleaved, strict=True):
        np.testing.assert_array_equal(a.tokens_BL, b.tokens_BL)


def test_error_in_the_thread_reaches_the_consumer_at_once(split: Split) -> None:
    failed = threading.Event()

    def transform(batch: TokenBatch) -> TokenBatch:
        if batch.sample_numbers_B[0] >= 24:
            failed.set()
            raise UserError("the third micro-batch is bad")
        return batch

    with stream_of(split, transform=transform) as stream:
        assert failed.wait(30)
        stream._thread.join(30)
        with pytest.raises(UserError, match="the third micro-batch is bad"):
            next(stream)  # two good ones are ready, the error comes first
        with pytest.raises(UserError, match="the third micro-batch is bad"):
            next(stream)


def test_corrupt_shard_reaches_the_consumer(split: Split) -> None:
    flip_bit(split.folder / split.manifest.shards[0].name)
    with stream_of(split, 0, 12) as stream, pytest.raises(UserError, match=r"shard-00000\.\w+: corrupt"):
        list(stream)


def test_prefetch_is_bounded_off_the_consumer_thread_and_closes(tmp_path: Path) -> None:
    threads = []

    def transform(batch: TokenBatch) -> TokenBatch:
        threads.append(threading.current_thread().name)
        return batch

    split = make_split(tmp_path / "split", "tar")
    stream = stream_of(split, 0, 1000, transform=transform, ahead=3)
    next(stream)
    deadline = time.monotonic() + 10
    while len(threads) < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert threads == ["batch-stream"] * 5  # one taken, three ready, one waiting for room
    stream.close()
    assert not stream._thread.is_alive()
    with pytest.raises(StopIteration):
        next(stream)


def test_waiting_is_measured(tmp_path: Path) -> None:
    def slow(batch: TokenBatch) -> TokenBatch:
        time.sleep(0.05)
        return batch

    split = make_split(tmp_path / "split", "tar")
    with stream_of(split, 0, 1, transform=slow) as stream:
        assert len(list(stream)) == 4
        assert stream.data_wait_s > 0.15
