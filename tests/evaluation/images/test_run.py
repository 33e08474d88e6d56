"""The whole way from a run, or a tokenizer, to its numbers, with an untrained image PGM and light features."""

import json
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from pgm_scale.checkpoint import CheckpointStore
from pgm_scale.cli import main
from pgm_scale.data.manifest import DatasetManifest
from pgm_scale.data.storage import SplitStorage
from pgm_scale.errors import UserError
from pgm_scale.evaluation.images import generation, sources
from pgm_scale.evaluation.images.light import LightFeatures
from pgm_scale.evaluation.images.run import (
    Comparison,
    SamplingRequest,
    evaluate_images,
    evaluate_reconstruction,
)
from pgm_scale.evaluation.images.sources import SplitImages, open_images
from pgm_scale.evaluation.images.work import only_process
from pgm_scale.files import temporary_name
from pgm_scale.parallel.launch import Launch
from pgm_scale.run_folder import load_run
from pgm_scale.sampling import known_prefixes, sample
from tests.evaluation.images.tiny_run import TinyImages, save_step, write_tiny_images
from tests.tiny_images import write_pixel_split

REQUEST = SamplingRequest(count=33, settings={"guidance": 1.0}, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyImages:
    return write_tiny_images(tmp_path_factory.mktemp("images"))


def _rank(rank: int, world_size: int) -> Launch:
    return Launch("torchrun", rank, world_size, rank, "127.0.0.1", 1)


def _comparison(tiny: TinyImages, work: Path, **changes: Any) -> Comparison:
    defaults = Comparison(tiny.pixels, work, features="light", batch_images=5, chunk_images=8, timeout_s=60)
    return replace(defaults, **changes)


def _evaluate(tiny: TinyImages, work: Path, request: SamplingRequest = REQUEST, **changes: Any) -> dict:
    result = evaluate_images(tiny.run, request, _comparison(tiny, work, **changes), _rank(0, 1))
    assert result is not None
    return result


def _numbers(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "images_per_second_per_process"}


def _distance(first: np.ndarray, second: np.ndarray) -> float:
    """As published, in one go, from pixels."""
    features = [LightFeatures()(pixels).features_BF.astype(np.float64) for pixels in (first, second)]
    covariances = [np.cov(rows, rowvar=False) for rows in features]
    jitter = 1e-6 * np.eye(240)  # fewer images than features
    root = scipy.linalg.sqrtm((covariances[0] + jitter) @ (covariances[1] + jitter)).real
    shift = features[0].mean(axis=0) - features[1].mean(axis=0)
    return float(shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root))


def test_numbers_equal_sampling_and_comparing_in_one_go(tiny: TinyImages, tmp_path: Path) -> None:
    result = _evaluate(tiny, tmp_path)
    run = load_run(tiny.run)
    labels = tiny.labels_B[:33]  # in the order of the reference's rows
    config = replace(run.description.sampler, guidance=1.0)
    length = run.description.length_tokens
    tokens = sample(
        run.model,
        run.description.vocabulary,
        length,
        config,
        known_BL=known_prefixes([[]] * 33, length, run.description.vocabulary.bos_id),
        labels_B=labels,
        seed=3,
        batch_sequences=33,
        device="cpu",
    ).tokens_BL
    expected = _distance(tiny.vq.decode(tokens[:, 1:]), tiny.images_BHWC)
    assert result["light_distance"] == pytest.approx(expected, rel=1e-3)
    assert result["count"] == 33  # not 32, the multiple of the batch
    assert result["sampler"]["guidance"] == 1.0
    assert (result["sampler"]["kind"], result["sampler"]["steps"], result["seed"]) == ("halton", 4, 3)
    assert (result["reference"]["name"], result["reference"]["content"]) == (tiny.pixels, "pixels")
    assert result["reference"]["count"] == 45
    assert len(result["reference"]["sha256"]) == len(result["checkpoint_sha256"]) == 64
    assert result["vq_sha256"] == run.description.tokenizer_sha256
    assert result["features"]["name"] == "light-1"
    assert 1 <= result["classifier_score"] <= 2
    assert result["images_per_second_per_process"] > 0


def test_ranks_and_batches_do_not_change_the_numbers(tiny: TinyImages, tmp_path: Path) -> None:
    expected = _evaluate(tiny, tmp_path / "one")
    results: list[Any] = [None] * 3

    def run(rank: int) -> None:
        comparison = _comparison(tiny, tmp_path / "three")
        results[rank] = evaluate_images(tiny.run, REQUEST, comparison, _rank(rank, 3))

    others = [threading.Thread(target=run, args=(rank,)) for rank in (1, 2)]
    run_0 = threading.Thread(target=run, args=(0,))
    for thread in (run_0, *others):
        thread.start()
    for thread in (run_0, *others):
        thread.join()
    assert results[1:] == [None, None]
    assert _numbers(results[0]) == _numbers(expected)
    again = _evaluate(tiny, tmp_path / "batch", batch_images=3)
    assert again["light_distance"] == pytest.approx(expected["light_distance"], rel=1e-6)


def test_a_run_that_dies_goes_on_and_ends_with_the_same_numbers(
    tiny: TinyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _evaluate(tiny, tmp_path / "straight")
    numbers: list[int] = []

    def dying(*arguments: Any, first_sample_number: int, **options: Any) -> Any:
        if len(numbers) == 3:
            raise KeyboardInterrupt
        numbers.append(first_sample_number)
        return sample(*arguments, first_sample_number=first_sample_number, **options)

    monkeypatch.setattr(generation, "sample", dying)
    with pytest.raises(KeyboardInterrupt):
        _evaluate(tiny, tmp_path / "resumed")
    assert numbers == [0, 8, 16]
    numbers.clear()
    assert _numbers(_evaluate(tiny, tmp_path / "resumed")) == _numbers(expected)
    assert numbers == [24, 32]
    # Another seed is another set of samples, also in this work folder.
    monkeypatch.undo()
    other = _evaluate(tiny, tmp_path / "resumed", replace(REQUEST, seed=4))
    assert other["light_distance"] != expected["light_distance"]


def test_an_evaluation_keeps_to_its_step_while_training_goes_on(
    tiny: TinyImages, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, work = tmp_path / "run", tmp_path / "work"
    shutil.copytree(tiny.run, run)

    def evaluate(work: Path, step: int | None = None) -> dict[str, Any]:
        request = replace(REQUEST, count=10, step=step)
        result = evaluate_images(str(run), request, _comparison(tiny, work), _rank(0, 1))
        assert result is not None
        return result

    first = evaluate(work)
    save_step(run, 2)
    caplog.clear()
    assert _numbers(evaluate(work)) == _numbers(first)
    assert "keeps to step 1; for step 2 add --step 2" in caplog.text
    newest = evaluate(tmp_path / "fresh")
    assert (first["step"], newest["step"]) == (1, 2)
    assert newest["light_distance"] != first["light_distance"]
    assert _numbers(evaluate(work, step=2)) == _numbers(newest)
    assert _numbers(evaluate(tmp_path / "fresh", step=1)) == _numbers(first)
    with pytest.raises(UserError, match=r"run has no checkpoint of step 3; give one of \[1, 2\]"):
        evaluate(work, step=3)
    shutil.rmtree(CheckpointStore(run).folders.of(1))
    with pytest.raises(
        UserError, match=r"keeps to step 1, which .*run no longer has; name another with --step"
    ):
        evaluate(work)


def test_one_process_a_rank(tiny: TinyImages, tmp_path: Path) -> None:
    request = replace(REQUEST, count=10)
    with only_process(tmp_path, _rank(0, 2)):
        with pytest.raises(UserError, match="another process is evaluating here as rank 0; wait for it"):
            _evaluate(tiny, tmp_path, request)
        with pytest.raises(UserError, match="another process is evaluating here as rank 0"):
            evaluate_reconstruction(tiny.vq_path, _comparison(tiny, tmp_path), _rank(0, 2))
        assert evaluate_reconstruction(tiny.vq_path, _comparison(tiny, tmp_path), _rank(1, 2)) is None
    assert not list(tmp_path.glob("codes-*"))
    assert _evaluate(tiny, tmp_path, request)["count"] == 10


def _relabelled(tiny: TinyImages, folder: Path, labels_B: np.ndarray, names: tuple[str, ...]) -> str:
    """The pixels of the reference with other labels or names of classes."""
    write_pixel_split(folder, tiny.images_BHWC, labels_B, "validation")
    manifest = DatasetManifest.load(folder)
    assert manifest.images is not None
    replace(manifest, images=replace(manifest.images, class_names=names)).save(folder)
    return str(folder)


def test_labels_of_other_classes_are_refused(tiny: TinyImages, tmp_path: Path) -> None:
    swapped = _relabelled(tiny, tmp_path / "swapped", tiny.labels_B, ("cross", "square"))
    more = _relabelled(tiny, tmp_path / "more", tiny.labels_B, ("square", "cross", "disc"))
    numbered = _relabelled(tiny, tmp_path / "numbered", tiny.labels_B, ("0", "1"))
    work = tmp_path / "work"
    for split, problem in [
        (swapped, "its class 0 is 'cross', the run's 'square'"),
        (more, "3 classes, the run 2"),
    ]:
        with pytest.raises(UserError, match=f"--reference {split}: .*{problem}; .* --labels balanced"):
            _evaluate(tiny, work, reference=split)
        with pytest.raises(UserError, match=f"--classifier {split}: .*{problem}"):
            _evaluate(tiny, work, replace(REQUEST, classifier=split))
    assert not work.exists()
    # Without their labels they are images like others.
    balanced = replace(REQUEST, labels="balanced")
    assert "classifier_score" not in _evaluate(tiny, work, balanced, reference=swapped)
    learned = _evaluate(tiny, work, replace(balanced, classifier=tiny.pixels), reference=swapped)
    assert "classifier_accuracy" in learned
    assert "classifier_accuracy_of_reference" not in learned
    assert "classifier_accuracy" in _evaluate(tiny, work, reference=numbered)


def test_what_no_classifier_learns_from_is_told_before_sampling(
    tiny: TinyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = _relabelled(tiny, tmp_path / "ones", np.ones_like(tiny.labels_B), ("square", "cross"))
    work = tmp_path / "work"
    with pytest.raises(UserError, match=r"ones: all of one class, .* give another split with --classifier"):
        _evaluate(tiny, work, replace(REQUEST, classifier=ones))
    last = np.arange(45) // 44  # the second class comes in the second piece that is read
    two = open_images(_relabelled(tiny, tmp_path / "last", last, ("a", "b")), None)
    assert isinstance(two, SplitImages)
    assert two.has_two_classes()
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match="the classifier needs scikit-learn; install it"):
        _evaluate(tiny, work)
    assert not work.exists()


def test_a_remote_reference_is_fetched_below_the_work_folder(
    tiny: TinyImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []

    def fetched(split: str, cache_folder: Any = None) -> SplitStorage:
        asked.append((split, cache_folder))
        return SplitStorage(tiny.pixels)

    monkeypatch.setattr(sources, "SplitStorage", fetched)
    request = replace(REQUEST, count=10, classifier="gs://bucket/other")
    result = _evaluate(tiny, tmp_path, request, reference="s3://bucket/real")
    assert result["reference"]["name"] == "s3://bucket/real"
    assert asked == [("s3://bucket/real", tmp_path / "remote"), ("gs://bucket/other", tmp_path / "remote")]


def test_a_full_gpu_or_disk_is_one_line(
    tiny: TinyImages, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, saved = tmp_path / "result.json", tmp_path / "real.npz"
    arguments = [
        "eval-images",
        tiny.run,
        "--reference",
        tiny.pixels,
        "--features",
        "light",
        "--out",
        str(out),
    ]
    arguments += ["--count", "10", "--save-reference", str(saved)]

    def refusal() -> str:
        capsys.readouterr()
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip().split("\n")[-1]
        assert "Traceback" not in line
        return line

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(generation, "sample", full)
        assert refusal().startswith("--batch 32: the GPU is out of memory; lower --batch")
    for path in (saved, out):
        in_the_way = temporary_name(path)
        in_the_way.mkdir()
        assert f"cannot write {path} (Is a directory)" in refusal()
        in_the_way.rmdir()
    assert main(arguments) == 0
    assert out.exists()
    assert saved.exists()


def test_labels_in_turn_and_a_classifier_of_its_own(tiny: TinyImages, tmp_path: Path) -> None:
    request = replace(REQUEST, labels="balanced", classifier=str(tiny.folder / "other"))
    result = _evaluate(tiny, tmp_path, request)
    assert result["labels"] == "balanced over 2"
    codes = next(tmp_path.glob("codes-*"))
    assert len(list(codes.glob("*.safetensors"))) == 5
    assert 0.0 <= result["classifier_accuracy"] <= 1.0
    assert result["classifier_accuracy_of_reference"] > 0.8  # unseen squares and crosses


def test_saved_statistics_and_codes_serve_as_references(tiny: TinyImages, tmp_path: Path) -> None:
    saved = tmp_path / "real.npz"
    direct = _evaluate(tiny, tmp_path, save_reference=str(saved))
    found = _evaluate(tiny, tmp_path, replace(REQUEST, labels="balanced"), reference=str(saved))
    assert "classifier_accuracy" not in found
    assert (found["reference"]["count"], found["reference"]["content"]) == (45, "statistics")
    with pytest.raises(UserError, match=r"--save-reference: .*real\.npz already is a file of statistics"):
        _evaluate(tiny, tmp_path, reference=str(saved), save_reference=str(tmp_path / "copy.npz"))
    with pytest.raises(UserError, match="--labels reference needs a reference with labels"):
        _evaluate(tiny, tmp_path, replace(REQUEST, labels="reference"), reference=str(saved))
    same_labels = _evaluate(tiny, tmp_path, reference=tiny.codes)
    decoded = open_images(tiny.codes, tiny.vq).read(range(45))
    np.testing.assert_array_equal(decoded.pixels_BHWC, tiny.vq.decode(tiny.vq.encode(tiny.images_BHWC)))
    np.testing.assert_array_equal(decoded.columns["labels"], tiny.labels_B)
    assert same_labels["light_distance"] != direct["light_distance"]
    assert same_labels["reference"]["content"] == "codes"


def test_reconstruction_is_compared_with_its_originals(tiny: TinyImages, tmp_path: Path) -> None:
    comparison = _comparison(tiny, tmp_path)
    assert evaluate_reconstruction(tiny.vq_path, comparison, _rank(1, 2)) is None
    result = evaluate_reconstruction(tiny.vq_path, comparison, _rank(0, 2))
    assert result is not None
    rebuilt = tiny.vq.decode(tiny.vq.encode(tiny.images_BHWC))
    squares = ((rebuilt / 255 - tiny.images_BHWC / 255) ** 2).reshape(45, -1).mean(axis=1)
    assert result["mean_squared_error"] == pytest.approx(squares.mean(), rel=1e-5)
    assert result["psnr_db"] == pytest.approx(np.mean(10 * np.log10(1 / squares)), rel=1e-5)
    assert result["light_distance"] == pytest.approx(_distance(rebuilt, tiny.images_BHWC), rel=1e-3)


def test_the_command_writes_a_result_and_tells_what_is_wrong(
    tiny: TinyImages, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "result.json"
    light = ["--features", "light", "--out", str(out)]
    arguments = ["eval-images", tiny.run, "--reference", tiny.pixels, *light, "--count", "12"]
    assert main([*arguments, "--guidance", "2", "--steps", "3", "--quirks", "register_offset"]) == 0
    assert "12 images against" in capsys.readouterr().out
    result = json.loads(out.read_text())
    assert (result["sampler"]["guidance"], result["sampler"]["steps"], result["step"]) == (2.0, 3, 1)
    assert result["sampler"]["quirks"] == ["register_offset"]
    reconstruction = ["eval-images", "--vq", tiny.vq_path, "--reconstruction", "--reference", tiny.pixels]
    assert main([*reconstruction, *light]) == 0
    assert json.loads(out.read_text())["psnr_db"] > 0
    capsys.readouterr()
    (tmp_path / "small").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "junk").mkdir()
    for folder in ("small", "junk"):
        Image.new("RGB", (5, 5)).save(tmp_path / folder / "a.png")
    (tmp_path / "junk" / "z.png").write_text("no image")
    shutil.rmtree(f"{out}.work")
    for wrong, message in [
        (
            [*arguments[:2], "--reference", str(tmp_path / "small"), *light],
            "small: images of 5 x 5 x 3 values, those of the run",
        ),
        (
            [*arguments[:2], "--reference", str(tmp_path / "junk"), *light],
            "z.png: cannot be read as an image",
        ),
        ([*arguments, "--choice-temperature", "1"], "--sampler confidence, not of halton; leave it out"),
        ([*arguments[:4], "--out", str(out)], "inception features need --inception PATH"),
        ([*arguments, "--quirks", "none,all"], "--quirks none,all: 'none' is not one of"),
        ([*arguments[:-1], "9"], "the scores need at least 10 images"),
        (["eval-images", "--reference", tiny.pixels, *light], "give the folder of a run"),
        ([*reconstruction, *light, "--vq", str(tmp_path / "absent")], "absent: no such VQ tokenizer"),
        ([*arguments[:2], "--reference", "nowhere", *light], "nowhere: no such folder"),
        ([*reconstruction[:-1], tiny.codes, *light], "--reconstruction needs the original images"),
        ([*arguments, "--labels", "balanced", "--classifier", str(tmp_path / "empty")], "no images in it"),
    ]:
        assert main(wrong) == 2, wrong
        errors = capsys.readouterr().err
        assert message in errors
        assert "Traceback" not in errors
    assert not list(Path(f"{out}.work").glob("codes-*"))  # all of it is told before sampling


def test_a_folder_of_image_files_is_taken_as_it_is(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 6, 3), dtype=np.uint8)
    (tmp_path / "b").mkdir()
    for name, image in zip(("a.png", "b/a.png", "c.png"), pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    source = open_images(str(tmp_path), None)
    np.testing.assert_array_equal(source.read(range(1, 3)).pixels_BHWC, pixels[1:])
    Image.fromarray(pixels[0, :, :5]).save(tmp_path / "c.png")
    with pytest.raises(UserError, match=r"c.png: 5 x 6 pixels, but .* squares of one size \(6\)"):
        open_images(str(tmp_path), None)
    (tmp_path / "c.png").write_text("no image")
    with pytest.raises(UserError, match=r"c\.png: cannot be read as an image"):
        open_images(str(tmp_path), None)
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:-40])  # its header is good
    with pytest.raises(UserError, match=r"c\.png: cannot be read as an image"):
        open_images(str(tmp_path), None).read(range(3))
