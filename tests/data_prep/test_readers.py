import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep import readers
from data_prep.readers import (
    LONGEST_TXT_CHARACTERS,
    InputFile,
    Reading,
    count_documents,
    cut_long,
    find_files,
    fingerprint_files,
    read_documents,
)
from pgm_scale.errors import UserError


def read(path: Path, **reading: Any) -> list[str]:
    (file,) = find_files([path])
    return list(read_documents(file, Reading(**reading)))


def parquet_bytes(texts, column="text", kind=None) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({column: pa.array(texts, kind)}), sink, row_group_size=3)
    return sink.getvalue()


def pack(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        half = len(content) // 2  # two members, two frames: both are legal
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if suffix == ".zst":
        half = len(content) // 2
        compress = zstandard.ZstdCompressor().compress
        return compress(content[:half]) + compress(content[half:])
    return content


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".parquet"])
def test_every_kind_and_compression_gives_the_same_documents(tmp_path, kind, suffix):
    documents = [f"document {i}: ünï {'x' * i}" for i in range(500)]
    content = {
        ".txt": "\n".join(documents).encode(),
        ".jsonl": b"".join(json.dumps({"id": 1, "text": d}).encode() + b"\n\n" for d in documents),
        ".parquet": parquet_bytes(documents),
    }[kind]
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(pack(content, suffix))
    assert read(path, separation="line") == documents
    assert count_documents(InputFile(path, path.name), Reading("line")) == 500


@pytest.mark.parametrize(
    ("separation", "expected"),
    [
        ("file", ["a b\nc\n\n \t\n\nd\n\ne\n"]),
        ("paragraph", ["a b\nc", "d", "e\n"]),
        ("line", ["a b", "c", "d", "e"]),
    ],
)
def test_separations_and_line_ends(tmp_path, separation, expected):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffa b\r\nc\n\n \t\n\r\nd\r\re\n".encode())
    assert read(path, separation=separation) == expected


def test_blocks_do_not_show(tmp_path, monkeypatch):
    """Characters, line ends and separators that lie across two blocks are read as if there were none."""
    generator = random.Random(0)
    text = "".join(generator.choices(["é", "\r\n", "\n", "a", " ", "𝄞"], k=2000))
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    for separation in ("file", "paragraph", "line"):
        whole = read(path, separation=separation)
        for block_bytes in (1, 2, 7):
            monkeypatch.setattr(readers, "_BLOCK_BYTES", block_bytes)
            blocks = read(path, separation=separation)
            # a paragraph's leading or trailing blanks may fall on either side of a cut between blocks
            assert [b.strip() for b in blocks] == [w.strip() for w in whole]
        monkeypatch.undo()


def test_long_text_is_cut_at_newlines_then_spaces_then_anywhere():
    for unit in ("word and\n", " word", "x"):
        text = unit * (5 * LONGEST_TXT_CHARACTERS // len(unit))
        pieces, rest = cut_long(text)
        assert "".join(pieces) + rest == text
        assert len(pieces) >= 4
        assert all(LONGEST_TXT_CHARACTERS // 2 <= len(p) <= LONGEST_TXT_CHARACTERS for p in pieces)
        if unit != "x":
            assert all(p.startswith(unit) for p in [*pieces, rest])


@pytest.mark.fault(59)
def test_a_huge_line_is_read_in_pieces(tmp_path):
    path = tmp_path / "a.txt.gz"
    text = "no end " * 200_000
    path.write_bytes(gzip.compress(text.encode()))
    for separation in ("file", "line", "paragraph"):
        documents = read(path, separation=separation)
        assert "".join(documents) == text
        assert max(map(len, documents)) <= LONGEST_TXT_CHARACTERS


def test_folders_are_walked_in_sorted_order(tmp_path):
    for name in (
        "b/2.txt",
        "b/1.jsonl.gz",
        "a.txt",
        "b-c/0.txt",
        ".hidden/x.txt",
        ".y.txt",
        "z.bin",
        "b/3.parquet",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    names = [file.name for file in find_files([tmp_path])]
    assert names == ["a.txt", "b/1.jsonl.gz", "b/2.txt", "b/3.parquet", "b-c/0.txt"]


def test_fingerprint_is_of_names_and_contents(tmp_path):
    def fingerprint(name: str, content: bytes) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / name).write_bytes(content)
        return fingerprint_files(find_files([folder]))["sha256"]

    same = fingerprint("a.txt", b"1")
    assert fingerprint("a.txt", b"1") == same
    assert fingerprint("b.txt", b"1") != same
    assert fingerprint("a.txt", b"2") != same


LATIN = "line\n" * 60_000 + "caf"
DAMAGED = {
    "a.txt": (LATIN.encode() + b"\xe9\n", "line 60001: not UTF-8.*iconv"),
    "b.txt": (b"cut \xe2\x82", "line 1: not UTF-8"),
    "c.txt.gz": (gzip.compress(b"text " * 99999)[:-20], r"damaged or cut off \.gz"),
    "d.txt.gz": (b"plain text", r"damaged or cut off \.gz.*copy it again"),
    "e.txt.zst": (zstandard.ZstdCompressor().compress(b"text " * 999999)[:-20], r"damaged or cut off \.zst"),
    "f.txt.zst": (b"plain text", r"damaged or cut off \.zst"),
    "g.jsonl": (b'{"text": "x"}\n\n{"text": \n', "line 3: not valid JSON"),
    "h.jsonl": (b'{"text": "x"}\n{"body": "x", "id": 1}\n', "line 2: no text.*'body', 'id'.*--text-field"),
    "i.jsonl": (b'{"text": null}\n', "line 1: no text.*NoneType"),
    "j.jsonl": (b"[1]\n", "line 1: expected a JSON object"),
    "k.jsonl": (b'{"text": "caf\xe9"}\n', "line 1: not UTF-8"),
    "l.jsonl": (b'{"text": "\\ud800"}\n', "line 1: half of a surrogate pair"),
    "m.jsonl": (b"[" * 100_000, "line 1: not valid JSON"),
    "n.jsonl": (b'{"text": ' + b"9" * 5000 + b"}", "line 1: not valid JSON"),
    "o.parquet": (parquet_bytes(["x"], column="body"), "no column 'text'.*'body'.*--text-field"),
    "p.parquet": (parquet_bytes(["x", "y", None, "z"]), "row 3: null"),
    "q.parquet": (parquet_bytes([1, 2]), "column 'text' is int64, not string"),
    "r.parquet": (b"PAR1 nothing PAR1", "not a readable parquet file"),
    "s.parquet": (parquet_bytes(["x"] * 500)[:-100], "not a readable parquet file"),
    "t.parquet.gz": (gzip.compress(b"nothing"), "not a readable parquet file"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(tmp_path, name):
    content, message = DAMAGED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_invalid_utf8_in_parquet(tmp_path):
    text = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 1: not UTF-8"):
        read(tmp_path / "a.parquet")


def test_inputs_that_are_no_text(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    for path, message in [
        ("a.docx", "unknown kind of file"),
        ("none", "no such file or folder"),
        ("empty", "no .txt, .jsonl or .parquet file"),
    ]:
        with pytest.raises(UserError, match=message):
            find_files([tmp_path / path])
