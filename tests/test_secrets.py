"""No value of a secret variable is written by a training or printed by the command line."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pgm_scale import config as configuration
from pgm_scale.cli import main
from pgm_scale.errors import UserError
from pgm_scale.run_folder import RunFolder
from pgm_scale.secrets import (
    RedactingFormatter,
    check_free_of_secrets,
    redact,
    secret_problems,
    secret_values,
)
from tests.tiny_data import tiny_config, write_tiny_data

# With characters that YAML, JSON and addresses write in other ways.
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "HF_TOKEN": "hf_NeverToBeWritten",
    "AWS_ACCESS_KEY_ID": "AKIANEVERTOBEWRITTEN",
    "AWS_SECRET_ACCESS_KEY": 'never/to+be"written\\anywhere=',
    "AWS_SESSION_TOKEN": "session-never-to-be-written",
}


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


@pytest.mark.parametrize(
    "name",
    [
        *SECRETS,
        *("HUGGING_FACE_HUB_TOKEN", "DB_PASSWORD", "MYPASSWORD", "app_secret", "GITHUBTOKEN", "SLURM_JWT"),
        *("AWS_CONTAINER_AUTHORIZATION_TOKEN", "AZURE_STORAGE_KEY", "CLIENT_SECRETS", "SSH_PASSPHRASE"),
        *("SMTP_PASS", "SLACK_WEBHOOK_URL"),
    ],
)
def test_names_of_secrets(name: str) -> None:
    assert secret_values({name: " long enough\n"}) == {name: "long enough"}
    assert secret_values({name: "2 short"}) == {}


@pytest.mark.parametrize(
    "name",
    [
        *(
            "AWS_REGION",
            "AWS_DEFAULT_REGION",
            "AWS_PROFILE",
            "AWS_ENDPOINT_URL",
            "AWS_SHARED_CREDENTIALS_FILE",
        ),
        *("HF_TOKEN_PATH", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "KEYBOARD", "HOME", "SECRETARY", "PWD"),
        *("COMPASS", "BYPASS_CACHE"),
    ],
)
def test_names_of_settings(name: str) -> None:
    assert secret_values({name: "eu-central-1 or longer"}) == {}


def test_a_path_to_a_secret_is_none(tmp_path: Path) -> None:
    path = tmp_path / "credentials.json"
    path.touch()
    assert secret_values({"GOOGLE_APPLICATION_CREDENTIALS": str(path)}) == {}
    assert secret_values({"AWS_SECRET_ACCESS_KEY": f"{path}+"}) != {}


@pytest.mark.parametrize(
    ("address", "login"),
    [
        ("http://user:password@proxy:3128", "user:password"),
        ("postgresql://:password@host/base", ":password"),
        ("http://proxy:3128/path@x", None),
        ("http://host:80?mail=a@b", None),
        ("http://user@host", None),
        ("docker://image:24.01@sha256:0123", None),
        ("http://$USER:$PASSWORD@proxy", None),
        ("git@host:group/project", None),
    ],
)
def test_logins_in_addresses(address: str, login: str | None) -> None:
    assert secret_values({"HTTPS_PROXY": address}) == ({} if login is None else {"HTTPS_PROXY": login})
    if login is None:
        check_free_of_secrets(address, "the text", {})
        assert redact(address, {}) == address
    else:
        with pytest.raises(UserError, match="the text holds an address with a user and a password"):
            check_free_of_secrets(f"see {address}", "the text", {})
        assert login not in redact(f"see {address}", {})
        assert redact(address, {"HTTPS_PROXY": address}) == address.replace(login, "<HTTPS_PROXY>")


@pytest.mark.parametrize("write", [str, json.dumps, repr, lambda text: quote(text, safe=""), yaml.safe_dump])
@pytest.mark.parametrize("name", SECRETS)
def test_values_are_found_however_they_are_written(name: str, write) -> None:
    text = f"before {write(SECRETS[name])} after"
    with pytest.raises(UserError) as caught:
        check_free_of_secrets(text, "the sbatch text", SECRETS)
    assert name in str(caught.value)
    assert SECRETS[name] not in str(caught.value)
    redacted = redact(text, SECRETS)
    assert f"<{name}>" in redacted
    assert write(SECRETS[name]) not in redacted


def test_a_value_within_another_leaves_no_rest() -> None:
    environment = {"A_TOKEN": "abcdefgh", "B_TOKEN": "abcdefgh-and-more"}
    assert redact("abcdefgh-and-more, abcdefgh", environment) == "<B_TOKEN>, <A_TOKEN>"


@given(st.text(max_size=30), st.text(max_size=30))
def test_other_text_stays(before: str, after: str) -> None:
    environment = {"A_TOKEN": "\x00no text of these tests\x00"}
    text = before + after
    check_free_of_secrets(text.replace("://", ""), "x", environment)
    assert redact(text.replace("://", ""), environment) == text.replace("://", "")


def test_every_leaf_of_a_configuration_is_looked_at() -> None:
    token = SECRETS["HF_TOKEN"]
    tree = {
        "data": {"train": f"s3://bucket/{token}", "validation": "s3://bucket"},
        "list": [1, None, [token]],
        "environment": {token: "a key", "x": 2.5},
    }
    problems = secret_problems(tree, SECRETS)
    assert [problem.split(" holds ")[0] for problem in problems] == [
        "data.train",
        "list[2][0]",
        "environment",
    ]
    assert token not in "".join(problems)
    assert secret_problems({"data": "plain"}, SECRETS) == []


def test_a_key_that_is_a_secret_is_not_named_as_a_place() -> None:
    token, key = SECRETS["HF_TOKEN"], SECRETS["WANDB_API_KEY"]
    problems = secret_problems({token: {"below": key}}, SECRETS)
    assert len(problems) == 2
    assert not any(token in problem for problem in problems)


def _written(folder: Path) -> Iterator[Path]:
    """Files that hold a secret, by content or by name, in any of its spellings."""
    for path in folder.rglob("*"):
        content = str(path).encode() + (path.read_bytes() if path.is_file() else b"")
        for value in SECRETS.values():
            spellings = (value, json.dumps(value)[1:-1], quote(value, safe=""))
            if any(spelling.encode() in content for spelling in spellings):
                yield path


@pytest.mark.fault(28)
def test_a_training_writes_no_secret(
    secrets: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """wandb's files too: its transaction log is not compressed."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    data, run = write_tiny_data(tmp_path / "data"), tmp_path / "run"
    config = tmp_path / "config.yaml"
    changes = {"tracking": {"wandb": "offline"}, "training": {"steps": 2}}
    config.write_text(configuration.to_yaml(tiny_config(data, run, **changes)))
    assert main(["train", str(config)]) == 0
    said = capfd.readouterr()
    (log,) = run.glob("wandb/offline-run-*/*.wandb")
    assert b"micro_batch_sequences" in log.read_bytes()
    assert list(_written(tmp_path)) == []
    assert not any(value in said.out + said.err for value in secrets.values())
    (run / "leak.json").write_text(json.dumps({"key": secrets["AWS_SECRET_ACCESS_KEY"]}))
    assert list(_written(tmp_path)) == [run / "leak.json"]


@pytest.mark.fault(28)
@pytest.mark.parametrize("command", ["config", "train", "plan"])
def test_a_configuration_with_a_secret_is_refused_before_anything_is_written(
    secrets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture, command: str
) -> None:
    data = write_tiny_data(tmp_path / "data")
    config = tmp_path / "config.yaml"
    config.write_text(configuration.to_yaml(tiny_config(data, tmp_path / "run")))
    cluster = ["--cluster", "configs/clusters/h100-8x.yaml"] if command == "plan" else []
    overrides = [
        f"folder={tmp_path}/{secrets['HF_TOKEN']}",
        "data.train=s3://user:password@bucket/train",
    ]
    assert main([command, str(config), *cluster, *overrides]) == 2
    said = capsys.readouterr()
    assert "folder holds the value of HF_TOKEN: leave it in the environment" in said.err
    assert "data.train holds an address with a user and a password" in said.err
    assert secrets["HF_TOKEN"] not in said.out + said.err
    assert "user:password" not in said.out + said.err
    assert list(_written(tmp_path)) == []
    assert not (tmp_path / "run").exists()


def test_a_run_folder_takes_no_secret(secrets: dict[str, str], tmp_path: Path) -> None:
    """Of a configuration that no file was read for."""
    run = RunFolder(tmp_path / "run")
    config = tiny_config(tmp_path, tmp_path / "run", tracking={"project": "x" + secrets["WANDB_API_KEY"]})
    with pytest.raises(UserError, match=r"tracking\.project holds the value of WANDB_API_KEY"):
        run.create_or_match(config, None, tmp_path / "tokenizer.json")  # type: ignore[arg-type]
    assert not run.path.exists()


def test_errors_are_printed_without_secrets(
    secrets: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["config", f"{tmp_path}/{secrets['HF_TOKEN']}.yaml"]) == 2
    said = capsys.readouterr().err
    assert "<HF_TOKEN>.yaml" in said
    assert secrets["HF_TOKEN"] not in said


def test_log_lines_and_their_tracebacks(secrets: dict[str, str]) -> None:
    token = secrets["HF_TOKEN"]
    try:
        raise ValueError(token)
    except ValueError:
        record = logging.LogRecord("x", logging.ERROR, "x.py", 1, "got %s", (token,), sys.exc_info())
    text = RedactingFormatter("%(levelname)s: %(message)s").format(record)
    assert text.startswith("ERROR: got <HF_TOKEN>\nTraceback")
    assert text.endswith("ValueError: <HF_TOKEN>")


@pytest.mark.fault(28)
def test_a_traceback_of_ours_holds_no_secret(secrets: dict[str, str]) -> None:
    script = (
        "import os, sys, pgm_scale.cli as cli\n"
        "def run(options):\n"
        "    try:\n"
        "        raise KeyError(os.environ['HF_TOKEN'])\n"
        "    except KeyError:\n"
        "        raise ValueError(os.environ['AWS_SECRET_ACCESS_KEY'])\n"
        "parser = cli.build_parser()\n"
        "parser.set_defaults(run=run)\n"
        "parser.parse_known_args = lambda _: (__import__('argparse').Namespace(run=run, overrides=[]), [])\n"
        "cli.build_parser = lambda: parser\n"
        "sys.exit(cli.main([]))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "KeyError: '<HF_TOKEN>'" in done.stderr
    assert "ValueError: <AWS_SECRET_ACCESS_KEY>" in done.stderr
    assert not any(value in done.stderr for value in secrets.values())
