"""Secrets live in environment variables only: they are refused in what is written and taken out of what is said.

A variable is known by its name, as NAME_API_KEY, HF_TOKEN or AWS_SECRET_ACCESS_KEY, or by its value, an address
with a user and a password in it. Settings that hold no secret (AWS_REGION, AWS_PROFILE), paths of files that hold
one, and values of fewer than 8 characters, which ordinary text may hold by chance, are not.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

from pgm_scale.errors import UserError

_MIN_CHARACTERS = 8
# Of the words of a name: HF_TOKEN and DBPASSWORD, but neither TOKENIZERS_PARALLELISM nor MAX_TOKENS.
_SECRET_WORD = re.compile(
    r"(KEY|APIKEYS|KEYS|TOKEN|SECRETS?|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|JWT|^PASS|^WEBHOOK)$"
)
_PATH_WORDS = ("FILE", "PATH", "DIR", "FOLDER")  # the last word: where a secret lies is none
# The scheme is bounded: at each letter of a long text one of any length is looked for to its end.
# user:password, but not $USER:$PASSWORD, which the shell fills in, nor the tag of docker://image:tag@sha256:...
_ADDRESS_LOGIN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,20}://([^\s/:@?#]*:(?!\$)[^\s/@?#]+)@(?!sha256:)")


def secret_values(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What must not be written: names and values of the variables that hold a secret, the longest value first."""
    found = {}
    for name, value in environment.items():
        value = value.strip()
        login = _ADDRESS_LOGIN.search(value)
        if names_secret(name) and not _is_path(value):
            found[name] = value
        elif login is not None:  # a proxy's or a data base's
            found[name] = login.group(1)
    long_enough = {name: value for name, value in found.items() if len(value) >= _MIN_CHARACTERS}
    return dict(sorted(long_enough.items(), key=lambda item: -len(item[1])))


def check_free_of_secrets(text: str, where: str, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse a text that is about to be written.

    Args:
        where: what the text is, for the message.

    Raises:
        UserError: names the variable whose value is in it, and never the value.
    """
    problem = _problem(text, where, secret_values(environment))
    if problem is not None:
        raise UserError(problem)


def secret_problems(tree: Any, environment: Mapping[str, str] = os.environ) -> list[str]:
    """A line for each leaf of plain containers (a configuration) that holds a secret; keys are looked at too."""
    secrets = secret_values(environment)
    problems = (_problem(text, where, secrets) for where, text in _leaves(tree, ""))
    return [problem for problem in problems if problem is not None]


def redact(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` with `<NAME>` in the place of the value of each secret variable, and of logins in addresses."""
    return _redact(text, secret_values(environment))


class RedactingFormatter(logging.Formatter):
    """Of log lines and the tracebacks below them."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def print_redacted_traceback(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """For `sys.excepthook`: what Python prints of an uncaught exception, without secrets."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def names_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, as far as a name can tell."""
    words = name.upper().split("_")
    return words[-1] not in _PATH_WORDS and any(_SECRET_WORD.search(word) for word in words)


def _is_path(value: str) -> bool:
    """GOOGLE_APPLICATION_CREDENTIALS is one. A secret may begin with a slash, but names no file."""
    return value.startswith("/") and os.path.exists(value)


def _spellings(value: str) -> set[str]:
    """As it is, in quotes of JSON and YAML, as Python shows it, and in an address."""
    return {value, json.dumps(value)[1:-1], repr(value)[1:-1], quote(value, safe="")}


def _redact(text: str, secrets: Mapping[str, str]) -> str:
    for name, value in secrets.items():
        for spelling in _spellings(value):
            text = text.replace(spelling, f"<{name}>")
    return _ADDRESS_LOGIN.sub(_without_login, text)


def _without_login(match: re.Match[str]) -> str:
    return match.group(0).replace(match.group(1), "<login>")


def _problem(text: str, where: str, secrets: Mapping[str, str]) -> str | None:
    where = _redact(where, secrets)  # a place is named by keys, which may hold one too
    for name, value in secrets.items():
        if any(spelling in text for spelling in _spellings(value)):
            return f"{where} holds the value of {name}: leave it in the environment, which jobs inherit"
    if _ADDRESS_LOGIN.search(text):
        return (
            f"{where} holds an address with a user and a password in it: leave them out, and give them to the "
            "program that needs them in the environment"
        )
    return None


def _leaves(tree: Any, where: str) -> Iterator[tuple[str, str]]:
    """Texts in nested containers, with their dotted places."""
    if isinstance(tree, Mapping):
        for key, child in tree.items():
            yield where or "the top level", str(key)
            yield from _leaves(child, f"{where}.{key}" if where else str(key))
    elif isinstance(tree, list | tuple):
        for index, child in enumerate(tree):
            yield from _leaves(child, f"{where}[{index}]")
    elif tree is not None:
        yield where, str(tree)
