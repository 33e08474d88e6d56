"""nvidia-smi's answers, of several drivers, in the form that it prints."""

import subprocess
from collections.abc import Callable, Sequence

import torch

from pgm_scale.preflight.gpu import gpu_rows, health_rows
from pgm_scale.preflight.rows import Row

_SOUND = {
    "temperature.gpu": "62",
    "clocks.sm": "1755",
    "clocks.max.sm": "1980",
    "clocks_event_reasons.active": "0x0000000000000004",
    "clocks_throttle_reasons.active": "0x0000000000000004",
    "ecc.errors.uncorrected.volatile.total": "0",
    "ecc.errors.corrected.volatile.total": "0",
    "remapped_rows.pending": "No",
    "remapped_rows.failure": "No",
}


def _smi(values: dict[str, str]) -> Callable[[Sequence[str]], str]:
    """A driver that knows these fields; of others it complains, of one at a time."""

    def ask(fields: Sequence[str]) -> str:
        for field in fields:
            if field not in values:
                return f'Field "{field}" is not a valid field to query.\n\n'
        return ", ".join(values[field] for field in fields) + "\n"

    return ask


def _rows(**changes: str) -> dict[str, Row]:
    named = {name.replace("__", "."): text for name, text in changes.items()}
    return {row.check: row for row in health_rows(_smi(_SOUND | named))}


def test_a_sound_gpu() -> None:
    rows = _rows()
    assert {row.status for row in rows.values()} == {"ok"}
    assert rows["temperature"].number == 62
    assert rows["clocks"].value == "1755 of 1980 MHz"
    assert rows["throttling"].value == "none"  # a power cap under load is normal


def test_what_makes_a_gpu_bad() -> None:
    for changes, check in (
        ({"clocks_event_reasons__active": "0x0000000000000040"}, "throttling"),
        ({"clocks_event_reasons__active": "0x0000000000000088"}, "throttling"),
        ({"ecc__errors__uncorrected__volatile__total": "3"}, "GPU memory errors"),
        ({"remapped_rows__failure": "Yes"}, "GPU memory errors"),
        ({"remapped_rows__pending": "1"}, "GPU memory errors"),
    ):
        assert {c for c, row in _rows(**changes).items() if row.status == "bad"} == {check}
    for changes, check in (
        ({"clocks_event_reasons__active": "0x0000000000000020"}, "throttling"),
        ({"temperature__gpu": "91"}, "temperature"),
    ):
        assert {c: row.status for c, row in _rows(**changes).items() if row.status != "ok"} == {
            check: "warning"
        }


def test_fields_that_an_older_driver_or_a_simpler_gpu_does_not_have_are_left_out() -> None:
    old = {k: v for k, v in _SOUND.items() if "event" not in k and "remapped" not in k}
    rows = {row.check: row for row in health_rows(_smi(old | {"clocks_throttle_reasons.active": "0x8"}))}
    assert rows["throttling"].status == "bad"
    rows = _rows(temperature__gpu="[N/A]", ecc__errors__uncorrected__volatile__total="[Not Supported]")
    assert "temperature" not in rows
    assert {row.status for row in rows.values()} == {"ok"}


def test_an_nvidia_smi_that_fails_is_a_warning() -> None:
    def late(fields: Sequence[str]) -> str:
        raise subprocess.TimeoutExpired("nvidia-smi", 30)

    for ask in (
        late,
        lambda fields: "NVIDIA-SMI has failed because it couldn't ...",
        lambda fields: "",
        _smi({}),
    ):
        (row,) = health_rows(ask)
        assert row.status == "warning"


def test_a_machine_without_gpus_says_so() -> None:
    assert list(gpu_rows(torch.device("cpu"), 1, _smi(_SOUND))) == [Row("GPU", "none")]
