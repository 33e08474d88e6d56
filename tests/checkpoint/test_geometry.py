"""The check that rectangles tile a grid, against counting them in every cell; ranges as rectangles likewise."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgm_scale.checkpoint.geometry import Box, Region, first_fault
from pgm_scale.tensor_slices import TensorSlice

ROWS, STRIDE = 4, 5


@st.composite
def boxes(draw):
    top, left = draw(st.integers(0, ROWS - 1)), draw(st.integers(0, STRIDE - 1))
    return Box(top, draw(st.integers(top + 1, ROWS)), left, draw(st.integers(left + 1, STRIDE)))


@st.composite
def tilings(draw, box, depth=4):
    """A box cut in two, and the parts again, and so on."""
    down = draw(st.booleans())
    low, high = (box.top, box.bottom) if down else (box.left, box.right)
    at = draw(st.integers(low, high))
    if depth == 0 or at in (low, high):
        return [box]
    first = Box(box.top, at, box.left, box.right) if down else Box(box.top, box.bottom, box.left, at)
    second = Box(at, box.bottom, box.left, box.right) if down else Box(box.top, box.bottom, at, box.right)
    return draw(tilings(first, depth - 1)) + draw(tilings(second, depth - 1))


def counts(found):
    cells = np.zeros((ROWS, STRIDE), dtype=int)
    for box in found:
        cells[box.top : box.bottom, box.left : box.right] += 1
    return cells


@settings(max_examples=300)
@given(found=tilings(Box(0, ROWS, 0, STRIDE)), extra=st.lists(boxes(), max_size=2), lost=st.integers(0, 20))
def test_first_fault_equals_counting(found, extra, lost):
    """Whole tilings, tilings with a box more or less, and anything that comes of both."""
    found = extra + found[:lost] + found[lost + 1 :]
    cells = counts(found)
    fault = first_fault(found, ROWS, STRIDE)
    if fault is None:
        assert (cells == 1).all()
        return
    part = cells[fault.box.top : fault.box.bottom, fault.box.left : fault.box.right]
    assert part.size > 0
    assert (part == 0).all() if fault.missing else (part >= 2).all()


@given(data=st.data(), offset=st.integers(0, 3), run=st.integers(1, 3))
def test_a_flat_range_is_three_boxes_at_most_with_its_values_in_order(data, offset, run):
    slice_ = TensorSlice((6, 2, 3), offset, run, 6)
    start = data.draw(st.integers(0, slice_.numel))
    length = data.draw(st.integers(0, slice_.numel - start))
    whole = torch.arange(36).view(6, 2, 3)
    values = slice_.take(whole)[start : start + length].contiguous()
    region = Region.of(slice_, start, length, 6)
    found = list(region.boxes())
    assert len(found) <= 3
    grid = whole.view(6, 6)
    inside = [grid[box.top : box.bottom, box.left : box.right] for box in found]
    assert torch.cat([part.flatten() for part in inside] or [torch.zeros(0)]).tolist() == values.tolist()
    for box, part in zip(found, inside, strict=True):
        assert torch.equal(region.cut(values, box), part)
