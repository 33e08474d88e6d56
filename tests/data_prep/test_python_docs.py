import random

import pytest

from data_prep import python_docs
from data_prep.python_docs import PythonDocsSource, _docstrings, near_duplicate_clusters, validation_documents
from tests.data_prep.conftest import random_text


def test_the_corpus_is_as_large_as_promised_and_split_by_cluster():
    source = PythonDocsSource(0.05)
    documents = list(source.documents())
    texts = [text for _, text in documents]
    assert len(set(texts)) == len(texts) == source.total_documents()
    assert 5_000 < len(texts) < 10_000
    characters = sum(map(len, texts))
    assert 1.5e6 < characters < 3e6
    validation = sum(len(text) for split, text in documents if split == "validation")
    assert 0.04 * characters < validation <= 0.05 * characters


def test_near_duplicates_are_one_cluster():
    words = random_text(0, 60).split()
    half_new = [*words[:40], *random_text(1, 20).split()]
    texts = [
        " ".join(words),
        random_text(2, 60),
        " ".join(half_new),
        " ".join(words[10:30]).upper(),
        "x",
        "X.",
    ]
    clusters = sorted(sorted(cluster) for cluster in near_duplicate_clusters(texts))
    assert clusters == [[0, 2, 3], [1], [4, 5]]


def test_no_cluster_is_on_both_sides():
    generator = random.Random(0)
    texts = [random_text(n % 30, 20) + f" {generator.random()}" for n in range(90)]
    validation = validation_documents(texts, 0.2)
    assert 6 <= len(validation) <= 21
    for cluster in near_duplicate_clusters(texts):
        assert len(cluster) == 3
        assert len(validation.intersection(cluster)) in (0, 3)


def test_docstrings_are_parsed_not_imported(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "a.py").write_text('"""Third party."""')
    (tmp_path / "broken.py").write_text("def (")
    module = """'Module.'
raise SystemExit
class A:
    'Class.'
    async def f(self):
        'Function.\\n\\n        Text.\\n            Indented.'
"""
    (tmp_path / "b.py").write_text(module)
    assert list(_docstrings(tmp_path)) == ["Module.", "Class.", "Function.\n\nText.\n    Indented."]


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_is_a_share(share):
    with pytest.raises(python_docs.UserError, match="--validation-share"):
        PythonDocsSource(share)
