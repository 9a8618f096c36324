"""frozen_cxr.py: means of predictions (mirrored images, other grids), and cells near the edge that are not used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from images.frozen import FIRST, Films, Head, Predicted, grad_cam, load_maps, predict, reduce_features
from images.frozen_means import mean_of_heads, mean_with_mirrored, mirrored_back, on_cells_of

from sgl_ops.pooling import make_pooling


def films(n=6, cells=10, **values):
    features = np.random.default_rng(0).normal(size=(n, 5, cells, cells)).astype(np.float16)
    test = np.arange(n) % 3 == 2
    return Films(features, torch.zeros(n, 14), np.arange(n), test, {"nih": {}}, **values)


@pytest.mark.parametrize("first", [0.5, FIRST, 0.25, 1.2])
def test_maps_of_mirrored_images_are_mirrored_about_the_middle_of_the_image(first):
    """The value of a cell is the place of its centre, or its distance from the right edge in the mirrored image."""
    width = 8
    centres = np.arange(width) + first
    found = mirrored_back(np.tile(width - centres, (2, 3, 1)), first)
    assert found.shape == (2, 3, width)
    seen = np.clip(centres, (width - centres).min(), (width - centres).max())  # the centres of the mirrored cells
    np.testing.assert_allclose(found, np.broadcast_to(seen, (2, 3, width)))


def test_a_symmetric_grid_is_reversed():
    maps = np.random.default_rng(0).random((2, 14, 3, 4))
    np.testing.assert_array_equal(mirrored_back(maps, 0.5), maps[..., ::-1])
    np.testing.assert_array_equal(mirrored_back(maps[..., :1], 0.5), maps[..., :1])


def test_the_mean_is_that_of_each_image_and_its_mirrored_image():
    generator = np.random.default_rng(0)
    given = films(8, first=0.5, mirrored=True)
    scores, maps = generator.random((4, 14)), generator.random((4, 14, 3, 3))
    found = mean_with_mirrored(given, Predicted(np.array([1, 3, 5, 7]), scores, maps))
    assert found.numbers.tolist() == [1, 3]
    np.testing.assert_allclose(found.scores, (scores[:2] + scores[2:]) / 2)
    np.testing.assert_allclose(found.maps, (maps[:2] + maps[2:, :, :, ::-1]) / 2)
    with pytest.raises(ValueError, match="mirrored image of each image"):
        mean_with_mirrored(given, Predicted(np.array([1, 3, 5, 6]), scores, maps))


def test_the_mean_of_heads_is_that_of_scores_and_maps():
    numbers, ones = np.array([4, 7]), np.ones((2, 14, 3, 3))
    found = mean_of_heads([Predicted(numbers, ones[..., 0, 0] * k, ones * k) for k in (1, 2, 6)])
    np.testing.assert_array_equal(found.numbers, numbers)
    np.testing.assert_allclose(found.scores, 3 * ones[..., 0, 0])
    np.testing.assert_allclose(found.maps, 3 * ones)


def on_grid(shape, **values):
    """Films whose maps have ``shape``."""
    return films(**values)._replace(features=np.zeros((6, 5, *shape)))


@pytest.mark.parametrize("margin", [0.0, 0.15])
@pytest.mark.parametrize(("first", "new_first"), [(0.5, 0.5), (0.29, FIRST), (FIRST, 0.5), (0.5, 1.2)])
def test_maps_of_another_network_keep_their_place_in_the_image(first, new_first, margin):
    """The value of a used cell is the place of its centre as a fraction of the side, with other slopes on both axes."""
    other, shown = (on_grid(shape, first=f, margin=margin) for shape, f in (((8, 10), first), ((14, 7), new_first)))
    rows, columns = (((np.arange(n) + first) / n) for n in (8, 10))
    maps = np.tile((rows[:, None] + 10 * columns) * other.inside, (2, 3, 1, 1))
    found = on_cells_of(maps, other, shown)
    ends = [centres[other.inside.any(axis)][[0, -1]] for centres, axis in ((rows, 1), (columns, 0))]
    places = [((np.arange(n) + new_first) / n).clip(*end) for n, end in zip((14, 7), ends, strict=True)]
    expected = (places[0][:, None] + 10 * places[1]) * shown.inside
    assert (found != 0).sum() == 6 * shown.inside.sum()
    np.testing.assert_allclose(found, np.broadcast_to(expected, (2, 3, 14, 7)))


def test_maps_of_the_shown_network_are_unchanged():
    given = films(first=FIRST, margin=0.15)
    maps = np.random.default_rng(0).random((2, 14, 10, 10))
    np.testing.assert_array_equal(on_cells_of(maps, given, given), maps)


def test_an_image_and_its_mirrored_image_are_in_the_same_part():
    half = films(12)
    both = half._replace(
        labels=half.labels.tile(2, 1), patients=np.tile(half.patients, 2), test=np.tile(half.test, 2), mirrored=True
    )
    for parts, expected in zip(
        both.splits() + both.splits(range(4)), half.splits() + half.splits(range(4)), strict=True
    ):
        for found, numbers in zip(parts, expected, strict=True):
            assert found.tolist() == [*numbers, *numbers + 12]


def test_files_of_mirrored_images_follow_those_of_the_images(tmp_path):
    maps = np.arange(6).reshape(2, 3, 1, 1)
    np.save(tmp_path / "features.npy", maps)
    np.testing.assert_array_equal(load_maps(tmp_path, "features.npy", False), maps)
    with pytest.raises(ValueError, match=r"holds no mirrored_features.npy; frozen_cxr.py extract --mirror writes"):
        load_maps(tmp_path, "features.npy", True)
    np.save(tmp_path / "mirrored_features.npy", maps + 10)
    np.testing.assert_array_equal(load_maps(tmp_path, "features.npy", True), np.concatenate([maps, maps + 10]))
    with pytest.raises(ValueError, match=r"holds no before.npy; frozen_cxr.py extract without --stages"):
        load_maps(tmp_path, "before.npy", True)


@pytest.mark.parametrize(
    ("first", "margin", "expected"),
    [
        (0.5, 0.0, range(10)),
        (FIRST, 0.0, range(10)),  # the centre of the last cell is 0.5 pixels of 320 inside
        (0.5, 0.05, range(10)),  # the centre of the first cell is 0.05 inside, which is not nearer
        (0.5, 0.06, range(1, 9)),
        (FIRST, 0.05, range(9)),
        (FIRST, 0.1, range(1, 9)),
        (FIRST, 0.15, range(1, 8)),
        (0.5, 0.45, range(4, 6)),  # the centres are exactly 0.45 inside
        (1.2, 0.0, range(10)),  # the centre of the last cell is outside of the image
        (1.2, 0.05, range(9)),
    ],
)
def test_cells_nearer_to_an_edge_than_the_margin_are_not_used(first, margin, expected):
    inside = films(first=first, margin=margin).inside
    used = np.zeros(10, bool)
    used[expected] = True
    np.testing.assert_array_equal(inside, used[:, None] & used)


def test_unused_cells_have_no_influence_and_the_value_0():
    given = films(first=FIRST, margin=0.15)
    cells, _ = reduce_features(given, 3)
    whole, _ = reduce_features(given._replace(margin=0.0), 3)
    torch.testing.assert_close(cells, whole[:, torch.from_numpy(given.inside.ravel())])
    torch.manual_seed(0)
    head, pooling = Head(3, 4, 14).eval(), make_pooling("mean")
    numbers = np.array([2, 5])
    found = predict(head, pooling, cells, given, numbers)
    assert found.maps.shape == (2, 14, 10, 10)
    assert (found.maps[:, :, ~given.inside] == 0).all()
    full = predict(head, pooling, whole, given._replace(margin=0.0), numbers)
    used = found.maps[:, :, given.inside]
    np.testing.assert_allclose(used, full.maps[:, :, given.inside], rtol=1e-6)
    np.testing.assert_allclose(1 / (1 + np.exp(-found.scores)), used.mean(2), rtol=1e-5)
    shown = predict(head, pooling, cells, given, numbers, with_grad_cam=True)
    np.testing.assert_allclose(shown.maps[:, :, given.inside], grad_cam(head, pooling, cells[numbers]), rtol=1e-6)
    assert (shown.maps[:, :, ~given.inside] == 0).all()
