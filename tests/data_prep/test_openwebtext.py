import json

import pytest

from data_prep.openwebtext import VALIDATION_DOCUMENTS, OpenWebTextSource
from data_prep.readers import Reading, find_files
from pgm_scale.errors import UserError


def test_the_last_documents_are_for_validation_also_across_files(tmp_path):
    for name, numbers in {"a.jsonl": range(6), "b.jsonl": range(6, 10)}.items():
        (tmp_path / name).write_text("".join(json.dumps({"text": f"t{n}"}) + "\n" for n in numbers))
    source = OpenWebTextSource(find_files([tmp_path]), Reading(), validation_documents=5)
    assert source.total_documents() == 10
    expected = [("train" if n < 5 else "validation", f"t{n}") for n in range(10)]
    assert list(source.documents()) == expected
    assert list(source.documents()) == expected
    assert source.unit_size.documents == 1000
    assert source.unit_size.characters is None


def test_a_part_of_the_data_is_not_split_as_if_it_were_all(tmp_path):
    assert VALIDATION_DOCUMENTS == 100_000
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match="1 documents cannot give 100000"):
        OpenWebTextSource(find_files([tmp_path]), Reading()).total_documents()
