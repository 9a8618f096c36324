"""features/pictures.py: what the pictures of bags show, for images, points, recordings and unknown places."""

from __future__ import annotations

import numpy as np
import pytest

for needed in ("h5py", "matplotlib", "pandas", "PIL", "scipy", "sklearn", "torch"):
    pytest.importorskip(needed)

import torch  # noqa: E402
from features import labels, runs, store  # noqa: E402
from features.pictures import figure_of, legend, picture_of  # noqa: E402
from PIL import Image  # noqa: E402

P = np.array([0.1, 0.9, 0.3, 0.6])
POINTS = np.array([[10.0, 5], [30, 7], [20, 9], [40, 5]])
TIMES = np.array([[100.0, 0], [300, 0], [200, 0], [400, 0]])


def draw(folder, coords, instances=(), image=None):
    """The axes with the picture, and all other axes of the figure."""
    content = {"features": torch.zeros(4, 2)}
    if coords is not None:
        content["coords"] = torch.from_numpy(coords)
    torch.save(content, folder / "a.pt")
    predictions = runs.Predictions(np.array(["a"]), np.array([[0.8]]), P[:, None], np.array([0, 4]))
    known = labels.Labels(["a"], ["cat"], np.array([[1.0]]), None, np.array(["a"]))
    truth = runs.Truth(known, {"a": np.array(instances)[:, None]} if len(instances) else {}, {})
    arguments = (predictions, 0, 0, truth, store.FeatureBags(folder), {} if image is None else {"a": image})
    assert len(picture_of(*arguments)) > 1000
    axes = {axes.get_title(): axes for axes in figure_of(*arguments).axes}
    picture = axes.pop("p of the bag 0.80, largest p of an instance 0.90")
    axes.pop("", None)  # the colours
    return picture, axes


def test_points_without_image_and_labels_are_squares_that_nearly_touch(tmp_path):
    picture, others = draw(tmp_path, POINTS)
    assert not others
    (tiles,) = picture.collections
    corners = np.stack([path.vertices[:4] for path in tiles.get_paths()])
    np.testing.assert_allclose(corners.mean(1), POINTS)
    # the squares of the distances to the nearest neighbours: 116, 104, 104, 104
    np.testing.assert_allclose(np.ptp(corners, axis=1), np.sqrt(104))
    assert tiles.get_array().tolist() == P.tolist()
    assert picture.yaxis_inverted()


def test_points_over_an_image_and_with_true_labels(tmp_path):
    Image.new("RGB", (50, 20)).save(tmp_path / "a.png")
    picture, others = draw(tmp_path, POINTS, [0, 1, 0, 1], tmp_path / "a.png")
    assert len(picture.images) == len(picture.collections) == 1
    assert others["truth"].collections[0].get_array().tolist() == [0, 1, 0, 1]
    _, others = draw(tmp_path, POINTS, image=tmp_path / "a.png")
    assert list(others) == ["image"] and len(others["image"].images) == 1


def test_frames_of_a_recording_are_a_curve_in_the_order_of_time(tmp_path):
    picture, others = draw(tmp_path, TIMES, [0, 1, 0, 1])
    assert not others
    curve, truth = picture.lines
    assert curve.get_xdata().tolist() == truth.get_xdata().tolist() == [100, 200, 300, 400]
    assert curve.get_ydata().tolist() == [0.1, 0.3, 0.9, 0.6]
    assert truth.get_ydata().tolist() == [0, 0, 1, 1]
    assert picture.get_xlabel() == "x"


@pytest.mark.parametrize("coords", [None, np.zeros((4, 2))])
def test_instances_without_places_are_a_falling_curve(tmp_path, coords):
    picture, others = draw(tmp_path, coords)
    assert not others
    (curve,) = picture.lines
    assert curve.get_ydata().tolist() == [0.9, 0.6, 0.3, 0.1]
    assert "in the order of p" in picture.get_xlabel()


def test_legend_names_boxes_only_for_images():
    assert "boxes" in legend("image")
    assert "boxes" not in legend("bag") and "curve" in legend("bag")
