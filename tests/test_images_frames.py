"""images/frames.py: the place of an image in its square, and the cells of a map that are not padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from images import frames


@pytest.mark.parametrize(
    ("size", "fit", "expected"),
    [
        ((200, 100), "pad", [0, 16, 64, 32]),
        ((100, 200), "pad", [16, 0, 32, 64]),
        ((100, 100), "pad", [0, 0, 64, 64]),
        ((1000, 1), "pad", [0, 31, 64, 1]),
        ((200, 100), "squeeze", [0, 0, 64, 64]),
        ((100, 100), "square", [0, 0, 64, 64]),
    ],
)
def test_content_of_an_image_in_the_square(size, fit, expected):
    assert frames.frames_of(np.array([size]), 64, fit).tolist() == [expected]


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 500), st.sampled_from(["pad", "squeeze"]), st.integers(8, 200))
def test_boxes_convert_to_the_square_and_back(width, height, fit, side):
    size, box = np.array([width, height]), np.array([0.25, 0.5, 0.5, 0.25]) * [width, height, width, height]
    (frame,) = frames.frames_of(size, side, fit)
    inside = frames.to_square(box, size, frame)
    np.testing.assert_allclose(frames.to_image(inside, size, frame), box)
    whole = frames.to_square(np.array([0, 0, width, height]), size, frame)
    np.testing.assert_allclose(whole, frame)
    np.testing.assert_allclose(frames.clip_boxes(inside, frame), inside)
    assert frame[:2].min() >= 0
    assert (frame[:2] + frame[2:]).max() <= side
    assert frame[2:].min() >= 1


def test_boxes_are_clipped_to_the_content():
    clipped = frames.clip_boxes(np.array([[0.0, 0, 10, 10], [np.nan] * 4]), np.array([2, 3, 4, 4]))
    assert clipped[0].tolist() == [2, 3, 4, 4]
    assert np.isnan(clipped[1]).all()


def test_cells_of_the_content_are_marked():
    content = np.array([[0, 16, 64, 32], [0, 31, 64, 1], [0, 0, 64, 64]])
    mask = frames.cell_mask(content, (8, 8), 4.0, 8.0)
    assert mask.shape == (3, 8, 8)
    assert mask[0].all(1).tolist() == mask[0].any(1).tolist() == [False] * 2 + [True] * 4 + [False] * 2
    assert mask[1].sum(1).tolist() == [0, 0, 0, 8, 0, 0, 0, 0]  # no cell centre lies in the content: the nearest row
    assert mask[2].all()
