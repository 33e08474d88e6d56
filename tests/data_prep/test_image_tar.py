"""WebDataset tars: what the real library reads of them is what we read, and hostile or damaged ones are refused."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from data_prep.image_tar import read_image_tar
from pgm_scale.errors import UserError
from tests.data_prep.pictures import encoded, picture

JPEGS = [encoded(picture(n)) for n in range(4)]
MEMBERS = [
    ("train/0.jpg", JPEGS[0]),
    ("train/0.cls", b"2\n"),
    ("train/1.json", json.dumps({"label": 1, "caption": "x"}).encode()),
    ("train/1.JPEG", JPEGS[1]),
    ("train/1.txt", b"left alone"),
    ("train/2.seg.png", b"another view"),
    ("train/2.png", JPEGS[2]),
    ("train/2.cls", b"0"),
    ("val/2.jpg", JPEGS[3]),
    ("val/2.cls", b"7"),
]
EXPECTED = [
    ("train/0.jpg", JPEGS[0], 2),
    ("train/1.JPEG", JPEGS[1], 1),
    ("train/2.png", JPEGS[2], 0),
    ("val/2.jpg", JPEGS[3], 7),
]


def archive(
    members: list[tuple[str, bytes]], last: tarfile.TarInfo | None = None, format: int = tarfile.PAX_FORMAT
) -> bytes:
    """A tar of plain files, and one more header at its end."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as tar:
        folder = tarfile.TarInfo("train")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        if last is not None:
            tar.addfile(last)
    return content.getvalue()


def read(path: Path, content: bytes) -> list[tuple[str, bytes, int]]:
    path.write_bytes(content)
    return list(read_image_tar(path))


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples(tmp_path: Path, format: int) -> None:
    content = archive(MEMBERS, format=format)
    assert read(tmp_path / "a.tar", content) == EXPECTED
    assert read(tmp_path / "a.tar.gz", gzip.compress(content)) == EXPECTED
    assert read(tmp_path / "a.tar.zst", zstandard.compress(content)) == EXPECTED


def test_long_names(tmp_path: Path) -> None:
    name = "n" * 150 + "/" + "k" * 120
    members = [(f"{name}.jpg", JPEGS[0]), (f"{name}.cls", b"3")]
    for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        assert read(tmp_path / "a.tar", archive(members, format=format)) == [(f"{name}.jpg", JPEGS[0], 3)]


def test_the_library_writes_what_we_read(tmp_path: Path) -> None:
    import webdataset

    with webdataset.TarWriter(str(tmp_path / "a.tar")) as writer:
        for number, jpeg in enumerate(JPEGS):
            writer.write({"__key__": f"{number:03d}", "jpg": jpeg, "cls": number + 1})
    found = list(read_image_tar(tmp_path / "a.tar"))
    assert found == [(f"{n:03d}.jpg", jpeg, n + 1) for n, jpeg in enumerate(JPEGS)]


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, **fields: object) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size = kind, size
    for key, value in fields.items():
        setattr(member, key, value)
    return member


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    ("last", "named"),
    [
        (header("9.jpg", tarfile.SYMTYPE, linkname="/etc/passwd"), "'9.jpg' is not a plain file"),
        (header("9.jpg", tarfile.LNKTYPE, linkname="train/0.jpg"), "'9.jpg' is not a plain file"),
        (header("9.jpg", tarfile.CHRTYPE), "'9.jpg' is not a plain file"),
        (header("9.jpg", tarfile.BLKTYPE), "'9.jpg' is not a plain file"),
        (header("9.jpg", tarfile.FIFOTYPE), "'9.jpg' is not a plain file"),
        (header("9.jpg", tarfile.GNUTYPE_SPARSE), "'9.jpg' is not a plain file"),
        (header("9.jpg", b"Z"), "'9.jpg' is not a plain file"),
        (header("/etc/9.jpg"), "'/etc/9.jpg' leaves the folder"),
        (header("train/../../9.jpg"), "'train/../../9.jpg' leaves the folder"),
        (header("9.jpg", size=1 << 40), "'9.jpg' declares 1099511627776 bytes"),
        (header("9.jpg", size=-1), "'9.jpg' declares -1 bytes"),
        (header("@LongLink", tarfile.GNUTYPE_LONGNAME, 1 << 32), "'@LongLink' declares 4294967296 bytes"),
        (header("x", tarfile.XHDTYPE, 1 << 33), "'x' declares 8589934592 bytes"),
        (header("x", tarfile.XGLTYPE, 512), "'x' is a global pax header"),
    ],
)
def test_hostile_members_are_refused_by_name(tmp_path: Path, last: tarfile.TarInfo, named: str) -> None:
    path = tmp_path / "evil.tar"
    content = archive(MEMBERS)[:-10240].rstrip(b"\0")
    content += bytes(-len(content) % 512) + last.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(UserError, match="the archive is refused") as caught:
        read(path, content)
    assert str(caught.value).startswith(f"{path}: its member {named}")
    assert sorted(tmp_path.parent.rglob("*")) == sorted([*before, path])


@pytest.mark.fault(27)
def test_a_size_that_an_extended_header_declares(tmp_path: Path) -> None:
    """The plain header of the member, which comes after it, says 0."""
    last = header("9.jpg", pax_headers={"size": str(1 << 41)})
    content = archive(MEMBERS, last)
    with pytest.raises(UserError, match=r"'9\.jpg' declares 2199023255552 bytes"):
        read(tmp_path / "a.tar", content)


@pytest.mark.fault(20)
def test_every_cut_is_noticed(tmp_path: Path) -> None:
    """Also at a boundary of members, and in the header of one, where tarfile sees a clean end."""
    content = archive(MEMBERS, format=tarfile.USTAR_FORMAT)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        boundaries = [member.offset for member in tar.getmembers()]
    for cut in [0, *boundaries, boundaries[-1] + 100, boundaries[3] + 512 + 700]:
        with pytest.raises(UserError, match=r"a\.tar: .*(damaged or cut off|unexpected end|empty)"):
            read(tmp_path / "a.tar", content[:cut])
    for offset in boundaries[1:]:
        damaged = bytearray(content)
        damaged[offset + 3] ^= 1  # in the name, which the header's sum covers
        with pytest.raises(UserError, match=r"a\.tar: it is damaged or cut off \(bad checksum\)"):
            read(tmp_path / "a.tar", bytes(damaged))
    packed = gzip.compress(content)
    with pytest.raises(UserError, match=r"a\.tar\.gz: damaged or cut off"):
        read(tmp_path / "a.tar.gz", packed[: len(packed) // 2])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.jpg", b"x")], "sample '0' has no label"),
        ([("0.cls", b"1")], "sample '0' has no .jpg, .jpeg or .png"),
        ([("0.jpg", b"x"), ("0.cls", b"cat")], "sample '0' has no readable label"),
        ([("0.jpg", b"x"), ("0.cls", b"\xff1")], "sample '0' has no readable label"),
        ([("0.jpg", b"x"), ("0.json", b"[3]")], "sample '0' has no readable label"),
        ([("0.jpg", b"x"), ("0.json", b'{"label": "cat"}')], "sample '0' has no readable label"),
        ([("0.jpg", b"x"), ("0.json", b'{"label": true}')], "True is not a whole number"),
        ([("0.jpg", b"x"), ("0.png", b"x"), ("0.cls", b"1")], "sample '0' has two images"),
        ([("0.jpg", b"x"), ("0.cls", b"1"), ("0.cls", b"2")], "sample '0' has two labels"),
        ([("0.jpg", b"x"), ("0.json", b"1"), ("0.JSON", b"2")], r"two labels, the second is '0\.JSON'"),
        ([("i.v2.jpg", b"x"), ("i.v2.cls", b"1")], r"sample 'i' has no .*\(it has 'i\.v2\.jpg'"),
        ([("0.webp", b"x"), ("0.txt", b"1")], r"sample '0' has no .*\(it has '0\.webp'"),
        ([("0.jpg", b"x"), ("0.v2.cls", b"1")], "sample '0' has no label"),
    ],
)
def test_incomplete_samples_are_named(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "a.tar", archive(members))
    assert "\n" not in str(caught.value)


@pytest.mark.fault(27)
def test_a_key_that_comes_again_is_named(tmp_path: Path) -> None:
    again = [*MEMBERS, ("train/1.jpg", JPEGS[0]), ("train/1.cls", b"1")]
    with pytest.raises(UserError, match=r"sample 'train/1' comes again with 'train/1\.jpg'"):
        read(tmp_path / "a.tar", archive(again))
    hidden = [("train/._1.jpg", b"of another system"), *MEMBERS]
    assert read(tmp_path / "a.tar", archive(hidden)) == EXPECTED


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".zst", zstandard.compress)]
)
def test_nothing_may_follow_the_end(tmp_path: Path, suffix: str, pack: Callable[[bytes], bytes]) -> None:
    """Two archives in one file, and a header in the middle that was overwritten with zeros."""
    path = tmp_path / f"a.tar{suffix}"
    content = archive(MEMBERS, format=tarfile.USTAR_FORMAT)
    assert read(path, pack(content + bytes(1_000_000))) == EXPECTED
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        middle = tar.getmembers()[5].offset
    zeroed = content[:middle] + bytes(512) + content[middle + 512 :]
    far = content + bytes(1_000_000) + b"x"
    for damaged in (content + archive([("9.jpg", JPEGS[0]), ("9.cls", b"1")]), zeroed, far):
        with pytest.raises(UserError, match=r"a\.tar.*: more follows its end") as caught:
            read(path, pack(damaged))
        assert str(caught.value).startswith(str(path))


def pax(content: bytes) -> bytes:
    """An extended header, which speaks of the member after it."""
    return header("x", tarfile.XHDTYPE, len(content)).tobuf() + content + bytes(-len(content) % 512)


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "headers",
    [
        pax(b"22 GNU.sparse.map=a,b\n") + header("9.jpg").tobuf(),  # ValueError
        pax(b"99999999999999999999 path=9\n") + header("9.jpg").tobuf(),  # OverflowError
        pax(b"20 hdrcharset=\xff\xfe\n") + header("9.jpg").tobuf(),  # UnicodeDecodeError
        pax(b"10 path=9\n") * 2000 + header("9.jpg").tobuf(),  # RecursionError
    ],
    ids=["value", "overflow", "unicode", "recursion"],
)
def test_whatever_tarfile_stumbles_over_is_refused(tmp_path: Path, headers: bytes) -> None:
    content = archive(MEMBERS, format=tarfile.USTAR_FORMAT).rstrip(b"\0")
    content += bytes(-len(content) % 512)
    with pytest.raises(UserError, match=r"a\.tar: it has a header that cannot be read \(\w+Error") as caught:
        read(tmp_path / "a.tar", content + headers + bytes(1024))
    assert "\n" not in str(caught.value)
