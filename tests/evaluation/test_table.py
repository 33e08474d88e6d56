from typing import Any

from pgm_scale.evaluation.table import aligned, table_rows


def test_columns_are_aligned() -> None:
    rows: list[tuple[str, ...]] = [
        ("metric", "value", "+-", "of"),
        ("a", "10.5", "0.25", "x y"),
        ("long name", "2", "", "z"),
    ]
    assert aligned(rows).splitlines() == [
        "metric     value    +-  of",
        "a           10.5  0.25  x y",
        "long name      2        z",
    ]


def test_what_has_no_value_says_why() -> None:
    form: dict[str, Any] = {"perplexity": 12345.6, "perplexity_standard_error": float("nan")}
    part = {
        "samples": 4,
        "sampler": None,
        "file": "x.npy",
        "unigram_entropy_nats": 2.0,
        "retokenised_first_chunk": form,
        "raw_tokens": {"perplexity": None, "reason": "other tokens"},
        "per_sample_mean": form,
    }
    assert table_rows({"generative_perplexity": part})[:2] == [
        ("generative perplexity, retokenised_first_chunk", "12,346", "-", "4 samples, from x.npy"),
        ("generative perplexity, raw_tokens", "-", "-", "other tokens"),
    ]


def test_a_result_of_images_is_a_loss() -> None:
    score = {"split": "s", "loss": 0.5, "loss_standard_error": 0.01, "sequences": 3, "draws": 1}
    assert table_rows({"likelihood": [score]}) == [("loss", "0.5", "0.01", "s: 3 sequences, 1 draw(s)")]


def test_metrics_of_tasks_stand_beside_their_errors() -> None:
    part = {"tasks": {"t": {"acc": 0.5, "acc_stderr": 0.1}}, "examples": {"t": 9}, "likelihood": "exact"}
    assert table_rows({"harness": part}) == [("t acc", "0.5", "0.1", "9 examples, exact")]
