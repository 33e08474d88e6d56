from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pgm_scale.errors import UserError
from pgm_scale.sampling.images import (
    codes_touching,
    codes_within,
    image_grid,
    known_inside,
    known_outside,
    read_image,
    write_image_files,
    write_image_grid,
)
from tests.sampling.image_runs import BOS, random_vq


@pytest.mark.parametrize(
    "box", [(0, 0, 1, 1), (3, 4, 4, 5), (4, 0, 8, 12), (2, 3, 9, 4), (0, 0, 12, 12), (11, 11, 12, 12)]
)
def test_a_box_touches_the_cells_with_which_it_shares_a_pixel(box):
    side, grid_side = 12, 3
    x0, y0, x1, y1 = box
    expected = {
        (y * grid_side // side) * grid_side + x * grid_side // side
        for y in range(y0, y1)
        for x in range(x0, x1)
    }
    assert set(np.flatnonzero(codes_touching(box, side, grid_side)).tolist()) == expected


@pytest.mark.parametrize("box", [(0, 0, 4, 4), (3, 4, 8, 9), (4, 1, 12, 11), (1, 0, 11, 12), (0, 0, 12, 12)])
def test_a_box_holds_the_cells_of_which_no_pixel_is_outside(box):
    side, grid_side = 12, 3
    x0, y0, x1, y1 = box
    cut = {
        (y * grid_side // side) * grid_side + x * grid_side // side
        for y in range(side)
        for x in range(side)
        if not (x0 <= x < x1 and y0 <= y < y1)
    }
    assert set(np.flatnonzero(codes_within(box, side, grid_side)).tolist()) == set(range(9)) - cut


@pytest.mark.parametrize("box", [(0, 0, 13, 1), (-1, 0, 1, 1), (4, 4, 4, 5), (5, 4, 4, 5)])
def test_a_box_that_is_not_in_the_image_is_refused(box):
    with pytest.raises(UserError, match=r"^--box .* must hold"):
        codes_touching(box, 12, 3)
    with pytest.raises(UserError, match=r"^--keep-box .* must hold"):
        codes_within(box, 12, 3)


@pytest.mark.parametrize("box", [(0, 0, 3, 12), (1, 1, 7, 12), (5, 5, 6, 6)])
def test_a_box_without_a_whole_cell_keeps_nothing_and_is_refused(box):
    with pytest.raises(UserError, match=r"holds no whole cell of a code, 4 x 4 pixels.*; enlarge it"):
        codes_within(box, 12, 3)


def test_what_is_known_of_an_image_are_its_codes_outside_or_inside_the_box():
    vq, pixels = random_vq(), np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    codes_K = vq.encode(pixels[None])[0]
    known_1L = known_outside(pixels, (3, 0, 5, 2), vq, BOS)
    assert known_1L.tolist() == [[BOS, codes_K[0], -1, -1, *codes_K[3:]]]
    known_1L = known_inside(pixels, (1, 0, 6, 3), vq, BOS)
    assert known_1L.tolist() == [[BOS, -1, *codes_K[1:3], *[-1] * 13]]


def test_images_are_scaled_and_their_centre_is_cut_out(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), np.uint8)
    wide[:, 8:16] = (250, 120, 7)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    assert (read_image(tmp_path / "wide.png", 8, 3) == [250, 120, 7]).all()
    assert read_image(tmp_path / "wide.png", 5, 3).shape == (5, 5, 3)
    Image.new("L", (3, 9), 77).save(tmp_path / "gray.png")
    assert (read_image(tmp_path / "gray.png", 4, 3) == 77).all()
    assert (read_image(tmp_path / "gray.png", 4, 1) == 77).all()
    Image.fromarray(np.full((6, 6), 200 * 257, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png", 4, 1) == 200).all()
    Image.new("CMYK", (6, 6), (0, 255, 255, 0)).save(tmp_path / "cmyk.tif")
    assert (read_image(tmp_path / "cmyk.tif", 4, 3) == [255, 0, 0]).all()
    Image.new("RGB", (1, 1), (9, 8, 7)).save(tmp_path / "dot.png")
    assert (read_image(tmp_path / "dot.png", 4, 3) == [9, 8, 7]).all()


def test_what_is_no_image_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not an image")
    Image.new("RGB", (64, 64), (9, 8, 7)).save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-200])
    for name in ("text.jpg", "cut.jpg", "absent.jpg"):
        with pytest.raises(UserError, match=name) as raised:
            read_image(tmp_path / name, 8, 3)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_holds_the_images_in_rows(channels, tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (5, 40, 60, channels), dtype=np.uint8)
    write_image_grid(tmp_path / "grid.png", images, 3)
    grid = np.asarray(Image.open(tmp_path / "grid.png")).reshape(2 * 40 + 2, 3 * 60 + 2 * 2, channels)
    for number, image in enumerate(images):
        top, left = number // 3 * 42, number % 3 * 62
        np.testing.assert_array_equal(grid[top : top + 40, left : left + 60], image)
    assert (grid[42:, 124:] == 255).all()
    assert (grid[:, 60:62] == 255).all()
    assert image_grid(images, 9).shape == (40, 5 * 60 + 4 * 2, channels)


def test_small_images_of_a_grid_are_enlarged():
    images = np.random.default_rng(0).integers(0, 255, (1, 15, 15, 1), dtype=np.uint8)
    grid = image_grid(images, 1)
    assert grid.shape == (60, 60, 1)
    for row, column in ((0, 0), (3, 59), (31, 4), (59, 58)):
        assert grid[row, column] == images[0, row // 4, column // 4]


def test_image_files_are_numbered_and_name_their_class(tmp_path):
    images = np.random.default_rng(0).integers(0, 255, (2, 4, 4, 3), dtype=np.uint8)
    write_image_files(tmp_path / "a" / "b", images, np.array([7, 0]))
    names = sorted(path.name for path in (tmp_path / "a" / "b").iterdir())
    assert names == ["000000_class7.png", "000001_class0.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a" / "b" / names[1])), images[1])
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file"):
        write_image_files(tmp_path / "file", images, np.array([7, 0]))
