"""`pgm-scale sample` of image runs, and the images beside validations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgm_scale.cli import main
from pgm_scale.config import inconsistencies
from pgm_scale.errors import UserError
from pgm_scale.run_folder import load_run
from pgm_scale.sampling import known_prefixes, sample
from pgm_scale.sampling.request import parse_quirks
from pgm_scale.sampling.run_images import class_numbers
from tests.sampling.image_runs import BOS, CLASS_NAMES, CODEBOOK, LENGTH, MODELS, random_vq, write_image_run
from tests.tiny_data import tiny_config


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_run(tmp_path_factory.mktemp("runs"), request.param)


@pytest.fixture(scope="module")
def pgm_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_run(tmp_path_factory.mktemp("runs"))


def codes(run: Path, out: Path, *arguments: str) -> np.ndarray:
    assert main(["sample", str(run), "--out", str(out), *arguments]) == 0
    return np.load(out)


@pytest.mark.parametrize("sampler", ["halton", "confidence"])
def test_the_same_codes_at_any_batch_for_every_class_in_turn(run, sampler, tmp_path):
    given = ["--sampler", sampler, "--guidance", "1.5", "--count", "2"]
    tokens_BL = codes(run, tmp_path / "a.npy", *given)
    assert tokens_BL.shape == (2 * len(CLASS_NAMES), LENGTH)
    assert (tokens_BL[:, 0] == BOS).all()
    assert tokens_BL[:, 1:].max() < CODEBOOK
    np.testing.assert_array_equal(codes(run, tmp_path / "b.npy", *given, "--batch", "4"), tokens_BL)
    assert (codes(run, tmp_path / "c.npy", *given, "--seed", "2") != tokens_BL).any()
    constant = codes(run, tmp_path / "d.npy", *given, "--guidance-schedule", "constant")
    assert (constant != tokens_BL).any()
    default = codes(run, tmp_path / "e.npy", *given[2:])  # the run's kind, pgm_uniform, is for text
    assert np.array_equal(default, tokens_BL) == (sampler == "halton")


def test_grids_and_folders_hold_the_decoded_codes(run, tmp_path):
    given = ["--classes", "goldfish,0", "--classes", "none", "--count", "2"]
    tokens_BL = codes(run, tmp_path / "a.npy", *given)
    images = random_vq().decode(tokens_BL[:, 1:])
    assert main(["sample", str(run), "--out", str(tmp_path / "grid.png"), *given]) == 0
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    assert grid.shape == (3 * 64 + 2 * 2, 2 * 64 + 2, 3)  # a row a class, pixels 8 times as large
    np.testing.assert_array_equal(grid[66:130:8, 66:130:8], images[3])
    assert main(["sample", str(run), "--out", str(tmp_path / "wide.png"), "--columns", "6", *given]) == 0
    assert Image.open(tmp_path / "wide.png").size == (6 * 66 - 2, 64)
    assert main(["sample", str(run), "--out", str(tmp_path / "all"), *given]) == 0
    labels = [1, 1, 0, 0, 3, 3]
    names = [f"{number:06d}_class{label}.png" for number, label in enumerate(labels)]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == names
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "all" / names[4])), images[4])


def test_inpainting_keeps_the_codes_outside_the_box_or_inside_the_box_to_keep(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    given = ["--inpaint", str(tmp_path / "image.png"), "--box", "2,2,6,5", "--count", "3", "--classes", "2"]
    tokens_BL = codes(run, tmp_path / "a.npy", *given)
    inside = np.zeros((4, 4), bool)
    inside[1:3, 1:3] = True
    known_K = random_vq().encode(pixels[None])[0]
    kept = ~inside.reshape(-1)
    assert (tokens_BL[:, 1:][:, kept] == known_K[kept]).all()
    assert (tokens_BL[0] != tokens_BL[1]).any()

    given[2:4] = ["--keep-box", "2,2,6,5"]  # its third row of pixels is half a cell
    tokens_BL = codes(run, tmp_path / "c.npy", *given)
    kept = np.isin(np.arange(16), [5, 6])
    assert (tokens_BL[:, 1:][:, kept] == known_K[kept]).all()
    assert (tokens_BL[:, 1:][:, ~kept] != known_K[~kept]).any(axis=0).all()

    known_BL = np.where(np.arange(LENGTH) % 2, -1, np.arange(LENGTH) % CODEBOOK)[None]
    known_BL[:, 0] = BOS
    np.save(tmp_path / "known.npy", known_BL)
    tokens_BL = codes(run, tmp_path / "b.npy", "--known", str(tmp_path / "known.npy"), "--classes", "0")
    assert (tokens_BL[known_BL >= 0] == known_BL[known_BL >= 0]).all()


@pytest.mark.parametrize(
    ("sampler", "name", "given", "value"),
    [
        ("halton", "temperature_warmup_steps", "3", 3),
        ("confidence", "choice_temperature", "0", 0.0),
        ("halton", "quirks", "register_offset", ("register_offset",)),
        ("confidence", "quirks", "register_offset, dropout", ("register_offset", "dropout")),
    ],
)
def test_options_of_image_samplers_are_settings_of_the_run(pgm_run, sampler, name, given, value, tmp_path):
    arguments = ["--sampler", sampler, "--classes", "0", "--count", "4"]
    without_BL = codes(pgm_run, tmp_path / "a.npy", *arguments)
    given_BL = codes(pgm_run, tmp_path / "b.npy", *arguments, f"--{name.replace('_', '-')}", given)
    assert (given_BL != without_BL).any()
    loaded = load_run(pgm_run)
    config = replace(loaded.description.sampler, kind=sampler, **{name: value})
    result = sample(
        loaded.model,
        loaded.description.vocabulary,
        LENGTH,
        config,
        known_BL=known_prefixes([[]] * 4, LENGTH, BOS),
        labels_B=np.zeros(4, np.int64),
        seed=1,
        batch_sequences=4,
        device="cpu",
    )
    np.testing.assert_array_equal(given_BL, result.tokens_BL)


def test_quirks_are_names_or_none():
    assert parse_quirks("dropout,register_offset") == ("dropout", "register_offset")
    assert parse_quirks("none") == ()


def test_the_tokenizer_may_be_given_and_must_be_the_runs(pgm_run, tmp_path, capsys):
    other, same = tmp_path / "other", tmp_path / "same"
    for folder, seed in ((other, 5), (same, 0)):
        folder.mkdir()
        random_vq(seed).save(folder)
    arguments = ["sample", str(pgm_run), "--classes", "0", "--out", str(tmp_path / "a.png"), "--vq"]
    assert main([*arguments, str(same)]) == 0
    assert main([*arguments, str(other)]) == 2
    assert "is not the VQ tokenizer that the run's data were made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "add --out FILE.png"),
        (["--out", "a.jpg"], "end it in .png"),
        (["--prompt", "x", "--out", "a.png"], "a run of images, for which there is no --prompt"),
        (["--format", "jsonl", "--out", "a.png"], "no --format"),
        (["--classes", "3", "--out", "a.png"], "--classes 3: the run has no such class"),
        (["--classes", "goldfisch", "--out", "a.png"], "did you mean goldfish?"),
        (["--box", "0,0,1,1", "--out", "a.png"], "go together"),
        (["--inpaint", "absent.png", "--out", "a.png"], "go together"),
        (["--keep-box", "0,0,1,1", "--out", "a.png"], "go together"),
        (["--inpaint", "a", "--box", "0,0,1,1", "--keep-box", "0,0,1,1", "--out", "a"], "give one of each"),
        (["--inpaint", "absent.png", "--box", "0,0,1", "--out", "a.png"], "--box 0,0,1: give four"),
        (["--inpaint", "absent.png", "--keep-box", "0", "--out", "a.png"], "--keep-box 0: give four"),
        (["--quirks", "dropuot", "--out", "a.npy"], "--quirks dropuot: 'dropuot' is not one of"),
        (["--quirks", "", "--out", "a.npy"], "'' is not one of register_offset, dropout"),
        (["--quirks", "dropout", "--out", "a.npy"], "with sampler.kind confidence"),
        (["--temperature-warmup-steps", "-1", "--out", "a.npy"], "must be at least 0"),
        (["--sampler", "confidence", "--choice-temperature", "nan", "--out", "a.npy"], "must be at least 0"),
        (["--choice-temperature", "1", "--out", "a.npy"], "--sampler confidence, not of halton; leave"),
        (["--inpaint", "absent.png", "--box", "0,0,1,1", "--out", "a.npy"], "absent.png: cannot be read"),
        (["--sampler", "ancestral", "--out", "a.npy"], "choose one of halton, confidence"),
        (["--sampler", "pgm_uniform", "--guidance", "1", "--out", "a.npy"], "sampler.guidance needs kind"),
        (["--vq", "nowhere", "--out", "a.png"], "nowhere"),
    ],
)
def test_bad_requests_are_one_line(pgm_run, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["sample", str(pgm_run), *arguments]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_run_of_a_tokenizer_is_not_sampled_from(tmp_path, capsys):
    run = write_image_run(tmp_path, tokens="pixels")
    assert main(["sample", str(run), "--out", str(tmp_path / "a.png")]) == 2
    assert "has no sampler" in capsys.readouterr().err


def test_options_of_images_are_refused_for_texts(tmp_path, capsys):
    run = write_image_run(tmp_path, tokens=None)
    given = ["--classes", "0", "--guidance", "1", "--vq", "x", "--quirks", "dropout"]
    assert main(["sample", str(run), *given]) == 2
    assert "there is no --classes, --guidance, --quirks, --vq; leave that out" in capsys.readouterr().err


def test_guidance_of_a_model_without_classes_is_refused_with_its_configuration():
    config = tiny_config(Path("data"), Path("run"))
    assert inconsistencies(config) == []
    for setting in ({"guidance": 1.0}, {"quirks": ("dropout",)}, {"temperature_warmup_steps": 1}):
        (problem,) = inconsistencies(replace(config, sampler=replace(config.sampler, **setting)))
        assert "sampler.guidance, sampler.quirks and" in problem


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, [0, 1, 2]),
        (["2,0"], [2, 0]),
        (["Tench, Tinca tinca", "goldfish, none"], [0, 1, 3]),
        (["great white shark", "NONE"], [2, 3]),
    ],
)
def test_classes_are_numbers_or_names(given, expected):
    assert class_numbers(given, CLASS_NAMES).tolist() == expected


def test_a_name_of_digits_is_the_class_of_that_name():
    assert class_numbers(["2,1"], ("1", "2", "10")).tolist() == [1, 0]
    assert class_numbers(["10"], ("1", "2", "10")).tolist() == [2]


@pytest.mark.parametrize("given", ["-1", "3", "tench", "", "1,,2", "²", "9" * 5000])
def test_classes_that_are_not_there_are_refused(given):
    with pytest.raises(UserError, match="no such class"):
        class_numbers([given], CLASS_NAMES)
