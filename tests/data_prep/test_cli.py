import argparse
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_prep import cli
from data_prep.hub import download_parquet, files_of_split
from data_prep.readers import InputFile
from pgm_scale.data import DatasetManifest
from pgm_scale.errors import UserError
from tests.data_prep.conftest import random_text
from tests.data_prep.test_tokenizers import bert_like


def run(*arguments) -> None:
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser.add_subparsers(dest="command"))
    cli.run(parser.parse_args(["prepare", *map(str, arguments), "--quiet"]))


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A hub with one data set: two training files and one test file. Returns what it was asked for."""
    names = ["plain_text/train-00000-of-00002.parquet", "plain_text/train-00001-of-00002.parquet"]
    names += ["plain_text/test-00000-of-00001.parquet", "README.md"]
    for number, name in enumerate(names[:3]):
        path = tmp_path / "hub" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(
            pa.table({"text": [f"{number} hello . " + random_text(n, 30) for n in range(20)]}), path
        )
    asked = []

    class Api:
        def dataset_info(self, repository, revision):
            asked.append((repository, revision))
            siblings = [argparse.Namespace(rfilename=name) for name in names]
            return argparse.Namespace(sha="c0ffee", siblings=siblings if revision != "scripted" else [])

    def snapshot(repository, repo_type, revision, allow_patterns):
        assert (repo_type, revision, allow_patterns) == ("dataset", "c0ffee", ["*.parquet"])
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return asked


@pytest.mark.usefixtures("no_processes")
def test_openwebtext_from_the_hub_keeps_the_commit(tmp_path, fake_hub, capsys):
    run(
        *("openwebtext", "--output", tmp_path / "out", "--tokenizer", "train:bpe:300", "--length", 64),
        *("--validation-documents", 5, "--format", "tar"),
    )
    manifest = DatasetManifest.load(tmp_path / "out" / "train")
    assert manifest.documents == 35
    assert manifest.source["text"]["revision"] == "c0ffee"
    assert fake_hub == [("Skylion007/openwebtext", "main")]
    assert "35 documents" in capsys.readouterr().out


@pytest.mark.usefixtures("no_processes")
def test_lm1b_from_the_hub_and_from_files_agree(tmp_path, fake_hub):
    (tmp_path / "tokenizer.json").write_text(bert_like().to_str())
    common = ("--tokenizer", tmp_path / "tokenizer.json", "--format", "tar")
    run("lm1b", "--output", tmp_path / "a", *common, "--revision", "pin")
    assert fake_hub[0] == ("billion-word-benchmark/lm1b", "pin")
    folder = tmp_path / "hub" / "plain_text"
    train = sorted(folder.glob("train*"))
    run("lm1b", "--output", tmp_path / "b", *common, "--train", *train, "--test", *folder.glob("test*"))
    for split, documents in [("train", 40), ("validation", 20)]:
        a, b = (DatasetManifest.load(tmp_path / name / split) for name in "ab")
        assert a.shards == b.shards
        assert a.documents == a.rows == documents
        assert a.length_tokens == 128
        assert a.packing == "pad"
        assert (a.vocabulary.bos_id, a.vocabulary.eos_id, a.vocabulary.pad_id) == (2, 3, 0)


def test_the_hub_is_refused_in_one_line(fake_hub, monkeypatch):
    with pytest.raises(UserError, match=r"no \.parquet files"):
        download_parquet("x/y", "scripted")
    with pytest.raises(UserError, match="no file of the split 'test'"):
        files_of_split([InputFile(Path("train.parquet"), "train.parquet")], "test")

    def offline(*arguments, **named):
        raise ConnectionError("a long story\n" * 10)

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(UserError, match="the hub did not give it") as raised:
        download_parquet("x/y", None)
    assert "\n" not in str(raised.value)


def test_contradictions(tmp_path):
    with pytest.raises(UserError, match="both --train and --test"):
        run("lm1b", "--output", tmp_path / "out", "--train", tmp_path)
    with pytest.raises(UserError, match="--revision names a commit"):
        run("openwebtext", "--output", tmp_path / "out", "--input", tmp_path, "--revision", "abc")


def test_help_is_complete_and_imports_nothing_heavy():
    code = """if True:
        import argparse, json, sys
        from data_prep import cli
        parser = argparse.ArgumentParser()
        subparsers = parser.add_subparsers()
        cli.add_arguments(subparsers)
        kinds = subparsers.choices["prepare"]._subparsers._group_actions[0].choices
        helps = {name: [a.help for a in kind._actions] for name, kind in kinds.items()}
        texts = [kind.format_help() for kind in kinds.values()]
        heavy = {"numpy", "torch", "tokenizers", "pyarrow", "streaming", "PIL"} & set(sys.modules)
        print(json.dumps([helps, sorted(heavy), texts]))"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=True,
    )
    helps, heavy, texts = json.loads(result.stdout)
    assert set(helps) == {"text", "openwebtext", "lm1b", "python-docs", "images", "imagenet-vq"}
    assert all(all(kind) for kind in helps.values())
    assert heavy == []
    assert all("same\ncommand" in text for text in texts)
