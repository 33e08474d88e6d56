import sys

import pytest

from pgm_scale.evaluation.progress import track


@pytest.mark.parametrize("watched", [False, True])
def test_the_items_come_through_whether_or_not_somebody_watches(
    watched: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: watched, raising=False)
    assert list(track(iter(["ab", "c"]), 3, "letters", len)) == ["ab", "c"]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert watched or captured.err == ""
