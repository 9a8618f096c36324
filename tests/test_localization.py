"""Boxes from maps of probabilities: calculations by hand, properties, and the real boxes of ChestX-ray14."""

from __future__ import annotations

import csv
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

import sgl_ops.localization as loc
from sgl_ops.localization import _boxes

SIDES = st.integers(1, 9)
MAPS = st_np.arrays(np.float64, st.tuples(SIDES, SIDES), elements=st.integers(0, 8).map(lambda k: k / 8))
MASKS = st_np.arrays(bool, st.tuples(SIDES, SIDES))
COORDINATES = st.integers(0, 60).map(lambda k: k / 4)
LENGTHS = st.integers(1, 40).map(lambda k: k / 4)
BOXES = st.tuples(COORDINATES, COORDINATES, LENGTHS, LENGTHS).map(np.array)


def cells(box, height, width):
    """The pixels of a box with integer coordinates."""
    mask = np.zeros((height, width), bool)
    x, y, w, h = (int(v) for v in box)
    mask[y : y + h, x : x + w] = True
    return mask


def test_upsampling_equals_a_calculation_by_hand():
    heatmap = np.array([[0.0, 1.0]])
    assert loc.upsample(heatmap, (1, 4)).tolist() == [[0, 0, 1, 1]]
    assert loc.upsample(heatmap, (2, 3)).tolist() == [[0, 1, 1]] * 2  # the middle pixel's centre is on a border
    assert loc.upsample(heatmap, (1, 4), "bilinear").tolist() == [[0, 0.25, 0.75, 1]]


@settings(deadline=None, max_examples=60)
@given(heatmap=MAPS, height=st.integers(1, 20), width=st.integers(1, 20))
def test_upsampling_equals_torch(heatmap, height, width):
    size = (height, width)
    tensor = torch.from_numpy(heatmap)[None, None]
    exact = torch.nn.functional.interpolate(tensor, size, mode="nearest-exact")[0, 0].numpy()
    bilinear = torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    assert np.allclose(loc.upsample(heatmap, size, "bilinear"), bilinear, atol=1e-12)
    # if the centre of a pixel lies on a border, torch may take either cell, depending on rounding
    odd = [(2 * np.arange(n) + 1) * k % (2 * n) == 0 for n, k in zip(size, heatmap.shape, strict=True)]
    inside = ~np.logical_or.outer(*odd)
    assert (loc.upsample(heatmap, size) == exact)[inside].all()


@pytest.mark.parametrize(
    ("heatmap", "size", "mode", "named"),
    [
        (np.zeros(3), (4, 4), "nearest", "heatmap"),
        (np.zeros((0, 3)), (4, 4), "nearest", "heatmap"),
        (np.zeros((2, 2)), (4, 0), "nearest", "size"),
        (np.zeros((2, 2)), (4, 4), "cubic", "mode"),
    ],
)
def test_invalid_arguments_of_upsample_raise_an_error(heatmap, size, mode, named):
    with pytest.raises(ValueError, match=named):
        loc.upsample(heatmap, size, mode)


def test_box_equals_a_calculation_by_hand():
    heatmap = np.array([[0.1, 0.9, 0.2, 0.0], [0.0, 0.6, 0.1, 0.0], [0.0, 0.0, 0.0, 0.8], [0.0, 0.0, 0.0, 0.7]])
    # the cells of 0.9 and 0.6 hold the maximum: column 1, rows 0 and 1 of 8 x 8 pixels each
    assert loc.heatmap_to_box(heatmap, (32, 32)).tolist() == [8, 0, 8, 16]
    assert loc.heatmap_to_box(heatmap, (32, 64)).tolist() == [16, 0, 16, 16]
    assert loc.heatmap_to_box(heatmap, (32, 32), threshold=0.65).tolist() == [8, 0, 8, 8]
    heatmap[2, 3] = 0.95
    assert loc.heatmap_to_box(heatmap, (32, 32)).tolist() == [24, 16, 8, 16]
    assert loc.heatmap_to_point(heatmap, (32, 32)) == (28, 20)
    # a value equal to the threshold is not above it
    assert np.isnan(loc.heatmap_to_box(heatmap, (32, 32), threshold=0.95)).all()


def test_cells_that_touch_at_a_corner_are_one_component():
    assert loc.heatmap_to_box(np.eye(3), (12, 12), side=1).tolist() == [0, 0, 12, 12]


def test_bilinear_box_equals_a_calculation_by_hand():
    # along a row 0, 0.25, 0.75, 1, 1, 1, 0.75, 0.25, 0: above 0.5 from pixel 2 on
    heatmap = np.array([[0.0, 1.0, 1.0, 0.0]])
    assert loc.upsample(heatmap, (1, 8), "bilinear").tolist() == [[0, 0.25, 0.75, 1, 1, 0.75, 0.25, 0]]
    assert loc.heatmap_to_box(heatmap, (1, 8), mode="bilinear", side=1).tolist() == [2, 0, 4, 1]
    assert loc.heatmap_to_box(heatmap, (1, 8), threshold=0.8, mode="bilinear", side=1).tolist() == [3, 0, 2, 1]


#: Centres of the first cell, in cells of 8 pixels: even grid, ResNet, DenseNet, and a first cell outside the image.
BEGINNINGS = (0.5, 0.0625, 1.8125, -0.75)


def test_first_cell_at_other_positions_equals_a_calculation_by_hand():
    # cells of 8 pixels, the first one centred on pixel 0, as in a ResNet; borders are halfway between centres
    assert loc.nearest_cells(24, 3, 0.0625).tolist() == [0] * 4 + [1] * 8 + [2] * 12
    assert loc.nearest_cells(24, 3).tolist() == [0] * 8 + [1] * 8 + [2] * 8
    # as in a DenseNet of stride 8, centred at 14.5: the last cell is outside the image
    assert loc.nearest_cells(24, 3, 1.8125).tolist() == [0] * 18 + [1] * 6
    heatmap = np.zeros((3, 3))
    heatmap[1, 2] = 1.0
    assert loc.heatmap_to_box(heatmap, (24, 24), first=0.0625).tolist() == [12, 4, 12, 8]
    assert loc.heatmap_to_point(heatmap, (24, 24), 0.0625) == (16.5, 8.5)
    # between the centres at pixels 8 and 16, the value increases by an eighth per pixel
    line = loc.upsample(heatmap, (24, 24), "bilinear", 0.0625)[8]
    assert line.tolist() == [0] * 9 + [k / 8 for k in range(1, 8)] + [1] * 8
    # a maximum outside the image is ignored, both for the box and for the peak
    assert np.isnan(loc.heatmap_to_box(heatmap, (24, 24), first=1.8125)).all()
    heatmap[0, 1] = 0.75
    assert loc.heatmap_to_box(heatmap, (24, 24), first=1.8125).tolist() == [18, 0, 6, 18]
    assert loc.heatmap_to_point(heatmap, (24, 24), 1.8125) == (22.5, 14.5)
    assert loc.heatmap_to_point(np.eye(1), (24, 24), -0.25) == (0.5, 0.5)


@settings(deadline=None, max_examples=60)
@given(heatmap=MAPS, scale=st.integers(2, 8), first=st.sampled_from(BEGINNINGS))
def test_other_position_of_the_first_cell_shifts_the_map(heatmap, scale, first):
    """Compares pixels with a window of the upsampled map of an even grid, whose edge cells are repeated."""
    size = (heatmap.shape[0] * scale, heatmap.shape[1] * scale)
    shift = round((first - 0.5) * scale)
    for mode in loc.UPSAMPLING:
        even = loc.upsample(np.pad(heatmap, 4, mode="edge"), tuple(n + 8 * scale for n in size), mode)
        window = even[4 * scale - shift :, 4 * scale - shift :][: size[0], : size[1]]
        assert np.allclose(loc.upsample(heatmap, size, mode, 0.5 + shift / scale), window, atol=1e-12)


def test_opening_removes_and_closing_fills():
    square = cells((2, 2, 6, 6), 12, 12)
    more = square.copy()
    more[10, 10] = True  # a speck
    more[4, 8:11] = True  # a thread
    assert (loc.open_and_close(more, 3) == square).all()
    gap = cells((2, 2, 4, 8), 12, 12) | cells((7, 2, 3, 8), 12, 12)
    assert (loc.open_and_close(gap, 3) == cells((2, 2, 8, 8), 12, 12)).all()
    assert (loc.open_and_close(gap, 1) == gap).all()
    assert (loc.open_and_close(cells((1, 3, 4, 5), 12, 12), 3) == cells((0, 3, 5, 5), 12, 12)).all()  # to the edge


@pytest.mark.parametrize("side", [-1, 0, 2])
def test_side_of_the_square_must_be_odd(side):
    with pytest.raises(ValueError, match="side"):
        loc.open_and_close(np.ones((4, 4), bool), side)


def test_opening_keeps_areas_at_the_edge_of_the_image():
    for box in ((0, 0, 5, 5), (7, 7, 5, 5), (0, 0, 12, 3)):
        assert (loc.open_and_close(cells(box, 12, 12), 3) == cells(box, 12, 12)).all()
    assert loc.open_and_close(np.ones((12, 12), bool), 5).all()
    assert not loc.open_and_close(np.zeros((12, 12), bool), 5).any()


def test_area_that_opening_removes_gives_no_box():
    heatmap = np.zeros((12, 12))
    heatmap[2, 2] = 0.9
    assert np.isnan(loc.heatmap_to_box(heatmap, (12, 12), side=3)).all()
    heatmap[6:10, 5:9], heatmap[0:3, 7:10] = 0.7, 0.6
    heatmap[11, 0:3] = 0.65
    # the maximum is that of the remaining area
    assert loc.heatmap_to_box(heatmap, (12, 12), side=3).tolist() == [5, 6, 4, 4]
    heatmap[0:3, 7:10] = 0.8
    assert loc.heatmap_to_box(heatmap, (12, 12), side=3).tolist() == [7, 0, 3, 3]
    assert loc.heatmap_to_box(heatmap, (12, 12), side=1).tolist() == [2, 2, 1, 1]


@settings(deadline=None, max_examples=50)
@given(mask=MASKS, side=st.sampled_from([3, 5]))
def test_opening_is_the_union_of_the_squares_that_fit(mask, side):
    """Squares around pixels of the image; only their part inside the image must fit. Closing opens the complement."""

    def opened(mask):
        union = np.zeros_like(mask)
        for r, c in np.ndindex(mask.shape):
            square = np.s_[max(r - side // 2, 0) : r + side // 2 + 1, max(c - side // 2, 0) : c + side // 2 + 1]
            union[square] |= mask[square].all()
        return union

    assert (loc.open_and_close(mask, side) == ~opened(~opened(mask))).all()


@settings(deadline=None, max_examples=60)
@given(heatmap=MAPS, scale=st.integers(1, 4), threshold=st.integers(-1, 8).map(lambda k: k / 8))
def test_box_equals_that_of_a_flood_fill(heatmap, scale, threshold):
    """Compared with a flood fill from the maximum, cell by cell."""
    size = (heatmap.shape[0] * scale, heatmap.shape[1] * scale)
    box = loc.heatmap_to_box(heatmap, size, threshold, side=1)
    start = tuple(int(v) for v in np.unravel_index(np.argmax(heatmap), heatmap.shape))
    if not heatmap[start] > threshold:
        assert np.isnan(box).all()
        return
    seen, waiting = {start}, [start]
    while waiting:
        r, c = waiting.pop()
        for near in ((r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
            inside = 0 <= near[0] < heatmap.shape[0] and 0 <= near[1] < heatmap.shape[1]
            if inside and near not in seen and heatmap[near] > threshold:
                seen.add(near)
                waiting.append(near)
    rows, columns = zip(*seen, strict=True)
    low, high = (min(columns), min(rows)), (max(columns) + 1, max(rows) + 1)
    assert (box == scale * np.array([*low, high[0] - low[0], high[1] - low[1]])).all()
    x, y = loc.heatmap_to_point(heatmap, size)
    assert loc.contains(box, (x, y))
    for first in BEGINNINGS:  # for every position of the cells, the box contains the peak
        elsewhere = loc.heatmap_to_box(heatmap, size, threshold, side=1, first=first)
        assert np.isnan(elsewhere).all() or loc.contains(elsewhere, loc.heatmap_to_point(heatmap, size, first))


def test_iou_equals_a_calculation_by_hand():
    assert loc.box_iou((0, 0, 4, 4), (2, 2, 4, 4)) == pytest.approx(4 / 28)
    assert loc.box_iou((0, 0, 4, 4), (0, 0, 4, 4)) == 1
    assert loc.box_iou((0, 0, 4, 4), (4, 0, 4, 4)) == 0  # half-open: neighbouring boxes do not overlap
    assert loc.box_iou((0, 0, 10, 10), (2.5, 2.5, 5, 5)) == pytest.approx(0.25)
    assert loc.box_iou(loc.NO_BOX, (0, 0, 1, 1)) == 0
    assert loc.box_iou((1, 1, 0, 0), (1, 1, 0, 0)) == 0
    pairs = loc.box_iou(np.array([[[0, 0, 2, 2]], [[0, 0, 1, 2]]]), np.array([[0, 0, 2, 2], [1, 0, 1, 1]]))
    assert pairs.tolist() == [[1, 0.25], [0.5, 0]]


@given(one=BOXES, other=BOXES, shift=COORDINATES, stretch=st.integers(1, 8))
def test_iou_properties(one, other, shift, stretch):
    value = loc.box_iou(one, other)
    assert 0 <= value <= 1
    assert value == loc.box_iou(other, one)
    assert loc.box_iou(one, one) == 1
    moved = np.array([shift, 2 * shift, 0, 0])
    assert loc.box_iou(one + moved, other + moved) == pytest.approx(value)
    # scaling one direction does not change the IoU, so boxes may be compared at any size of the image
    squeezed = np.array([stretch, 1, stretch, 1]) / 4
    assert loc.box_iou(one * squeezed, other * squeezed) == pytest.approx(value)


@given(one=BOXES, other=BOXES)
def test_iou_counts_pixels(one, other):
    quarter = np.array([*(4 * one), *(4 * other)])
    first, second = cells(quarter[:4], 110, 110), cells(quarter[4:], 110, 110)
    assert loc.box_iou(one, other) == pytest.approx((first & second).sum() / (first | second).sum())


def test_accuracy_with_gate_equals_a_calculation_by_hand():
    overlaps = np.array([0.1, 0.31, 0.8, 0.0])
    classes = np.array([0, 0, 2, 2])
    names = ["a", "b", "c"]
    accuracy = loc.localization_accuracy(overlaps, classes, names)
    assert list(accuracy) == ["0.1", "0.3", "0.5", "0.7"]
    assert accuracy["0.1"] == {"a": 0.5, "c": 0.5, "mean": 0.5}  # 0.1 is not greater than 0.1
    assert accuracy["0.3"] == {"a": 0.5, "c": 0.5, "mean": 0.5}
    assert accuracy["0.7"] == {"a": 0, "c": 0.5, "mean": 0.25}
    gated = loc.localization_accuracy(overlaps, classes, names, predicted=[True, True, False, True], at=[0.3])
    assert gated == {"0.3": {"a": 0.5, "c": 0, "mean": 0.25}}
    assert math.isnan(loc.per_class(np.zeros(0), np.zeros(0, int), names)["mean"])


def test_mean_is_over_classes_not_over_boxes():
    assert loc.per_class([1, 1, 1, 0], np.array([0, 0, 0, 1]), ["a", "b"])["mean"] == 0.5
    for names in (["a", "a"], ["mean", "b"], ["a", "threshold"]):
        with pytest.raises(ValueError, match="names: expected names that differ"):
            loc.per_class([1, 1, 1, 0], np.array([0, 0, 0, 1]), names)


def test_pointing_game_equals_a_calculation_by_hand():
    box = (2, 4, 3, 2)
    points = np.array([(2, 4), (4.9, 5.9), (5, 5), (3, 6), (1.9, 5)])
    assert loc.contains(box, points).tolist() == [True, True, False, False, False]
    assert not loc.contains(loc.NO_BOX, (0, 0))


@settings(deadline=None, max_examples=60)
@given(
    heatmap=MAPS,
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    mode=st.sampled_from(loc.UPSAMPLING),
    first=st.sampled_from(BEGINNINGS),
    component=st.sampled_from(loc.COMPONENTS),
)
def test_boxes_at_many_thresholds_equal_those_at_each(heatmap, size, mode, first, component):
    thresholds = np.arange(16) / 16
    how = {"first": first, "component": component}
    together = loc.boxes_by_threshold(heatmap, size, thresholds, mode, **how)
    each = [loc.heatmap_to_box(heatmap, size, t, mode, side=1, **how) for t in thresholds]
    assert np.array_equal(together, each, equal_nan=True)


def test_equal_masks_are_labelled_once(monkeypatch):
    calls = []
    original = _boxes._component_box
    monkeypatch.setattr(_boxes, "_component_box", lambda *x: calls.append(1) or original(*x))
    heatmap = np.zeros((16, 16))
    heatmap[3:9, 4:7] = 1.0
    for component in loc.COMPONENTS:
        calls.clear()
        boxes = loc.boxes_by_threshold(heatmap, (512, 512), np.arange(100) / 100, component=component)
        assert (boxes == [128, 96, 96, 192]).all()
        assert len(calls) <= 2


def test_max_box_accuracy_equals_a_calculation_by_hand():
    # nested squares of 0.25, 0.75 and 1: 8, 4 and 2 cells wide
    heatmap = np.zeros((16, 16))
    heatmap[4:12, 4:12], heatmap[6:10, 6:10], heatmap[7:9, 7:9] = 0.25, 0.75, 1.0
    true = np.array([[4, 4, 8, 8], [6, 6, 4, 4], [7, 7, 2, 2]]) * 2.0
    accuracy = loc.max_box_accuracy([heatmap] * 3, true, np.array([0, 0, 0]), ["a"], (32, 32))
    # width 4: IoU 1/4 with width 8, 1 with width 4, 1/4 with width 2
    assert accuracy["0.1"]["mean"] == 1
    assert accuracy["0.1"]["threshold"] == 0.25
    # one threshold for all maps; with one threshold per map, all three would be found
    assert accuracy["0.7"] == {"a": pytest.approx(1 / 3), "mean": pytest.approx(1 / 3), "threshold": 0}
    # every map is scaled
    assert loc.max_box_accuracy([heatmap / 8 + 0.5] * 3, true, np.zeros(3, int), ["a"], (32, 32)) == accuracy
    constant = loc.max_box_accuracy([np.full((4, 4), 0.7)], true[:1], np.zeros(1, int), ["a"], (32, 32))
    assert constant["0.1"]["mean"] == 0


def test_trivial_boxes_equal_a_calculation_by_hand():
    assert loc.whole_image_box((20, 40)).tolist() == [0, 0, 40, 20]
    assert loc.centre_box((20, 40)).tolist() == [10, 5, 20, 10]
    boxes = np.array([[0, 0, 2, 2], [4, 4, 4, 4], [8, 8, 6, 6], [50, 50, 1, 1]])
    mean = loc.mean_boxes(boxes, np.array([0, 0, 0, 1]), np.array([7, 7, 8, 9]))
    assert mean[:3].tolist() == [[8, 8, 6, 6], [8, 8, 6, 6], [2, 2, 3, 3]]  # not from the same patient
    assert np.isnan(mean[3]).all()


@given(boxes=st.lists(BOXES, min_size=2, max_size=6), moved=BOXES)
def test_mean_box_leaves_out_the_own_patient(boxes, moved):
    classes, groups = np.zeros(len(boxes), int), np.arange(len(boxes))
    before = loc.mean_boxes(np.array(boxes), classes, groups)[0]
    after = loc.mean_boxes(np.array([moved, *boxes[1:]]), classes, groups)[0]
    assert (before == after).all()


def test_ceiling_equals_a_calculation_by_hand():
    size, grid = (64, 64), (4, 4)
    true = np.array([[16, 0, 32, 16], [20, 20, 4, 4], [14, 0, 20, 16]])
    best = loc.grid_ceiling(true, grid, size)
    assert best.tolist() == [[16, 0, 32, 16], [16, 16, 16, 16], [16, 0, 16, 16]]
    assert loc.box_iou(best, true).tolist() == [1, 1 / 16, 0.8]
    # columns of cells centred on pixels 0, 16, 32, 48; pixels 8, 24, 40 are halfway and belong to the next column
    assert loc.grid_ceiling(true[:1], grid, size, 1 / 32).tolist() == [[8, 0, 32, 24]]


def test_ceiling_of_no_box_is_no_box_and_grids_are_checked():
    best = loc.grid_ceiling(np.array([loc.NO_BOX, (0, 0, 16, 16)]), (4, 4), (64, 64))
    assert np.isnan(best[0]).all() and best[1].tolist() == [0, 0, 16, 16]
    with pytest.raises(ValueError, match="grid: expected at least one cell each way"):
        loc.grid_ceiling((0, 0, 4, 4), (0, 2), (64, 64))
    with pytest.raises(ValueError, match="grid: expected two integers"):
        loc.grid_ceiling((0, 0, 4, 4), (2.5, 2), (64, 64))


@settings(deadline=None, max_examples=100)
@given(box=BOXES, rows=st.integers(1, 6), columns=st.integers(1, 6), first=st.sampled_from(BEGINNINGS))
def test_no_union_of_cells_beats_the_ceiling(box, rows, columns, first):
    size = (26, 25)
    best = loc.box_iou(loc.grid_ceiling(box, (rows, columns), size, first)[0], box)
    every = []  # boxes that maps can give
    for (y0, y1), (x0, x1) in itertools.product(*(itertools.combinations(range(k + 1), 2) for k in (rows, columns))):
        cells = np.zeros((rows, columns))
        cells[y0:y1, x0:x1] = 1
        every.append(loc.heatmap_to_box(cells, size, side=1, first=first))
    assert best == pytest.approx(loc.box_iou(np.array(every), box).max())


def test_cells_without_a_pixel_do_not_change_the_scale():
    """The first of three columns is centred outside the image. Its values do not change MaxBoxAcc."""
    size, first = (8, 8), -0.6
    shown = np.array([[0.2, 0.2, 0.6, 0.4]] * 4)
    assert 0 not in loc.nearest_cells(8, 4, first)
    true, classes = np.array([loc.heatmap_to_box(shown, size, 0.5, side=1, first=first)]), np.zeros(1, int)
    assert not np.isnan(true).any()
    for hidden in (0.2, 0.0, 1.0, 1e9):
        heatmap = shown.copy()
        heatmap[:, 0] = heatmap[0] = hidden
        assert np.array_equal(loc.upsample(heatmap, size, first=first), loc.upsample(shown, size, first=first))
        assert loc.max_box_accuracy([heatmap], true, classes, ["a"], size, first=first)["0.7"]["a"] == 1


def test_trivial_predictors_of_the_real_boxes(data_dir):
    """984 boxes, with values from independent code: the centre, the class mean (leave one out), the best of 16 x 16."""
    path = data_dir / "chestxray14" / "BBox_List_2017.csv"
    if not path.exists():
        pytest.skip(f"there is no {path}")
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    names = sorted({row[1] for row in rows})
    classes = np.array([names.index(row[1]) for row in rows])
    true = np.array([[float(v) for v in row[2:6]] for row in rows])
    size = (1024, 1024)
    rounded = {}
    for name, found in {
        "centre": np.broadcast_to(loc.centre_box(size), true.shape),
        "mean": loc.mean_boxes(true, classes, np.arange(len(true))),
        "ceiling": loc.grid_ceiling(true, (16, 16), size),
    }.items():
        accuracy = loc.localization_accuracy(loc.box_iou(found, true), classes, names)
        rounded[name] = [[round(row[key], 2) for row in accuracy.values()] for key in ("mean", "Cardiomegaly")]
    assert rounded == {
        "centre": [[0.43, 0.18, 0.09, 0.01], [1.0, 0.95, 0.48, 0.03]],
        "mean": [[0.30, 0.15, 0.11, 0.05], [1.0, 0.99, 0.85, 0.36]],
        "ceiling": [[1.0, 0.97, 0.87, 0.58], [1.0] * 4],
    }


def components_of(mask):
    """The pixels of every component in the order of their first pixel, by a flood fill, pixel by pixel."""
    left, found = {tuple(at) for at in np.argwhere(mask)}, []
    for start in sorted(left):
        if start not in left:
            continue
        left.remove(start)
        pixels, waiting = {start}, [start]
        while waiting:
            r, c = waiting.pop()
            for near in ((r + i, c + j) for i in (-1, 0, 1) for j in (-1, 0, 1)):
                if near in left:
                    left.remove(near)
                    pixels.add(near)
                    waiting.append(near)
        found.append(sorted(pixels))
    return found


def box_of(pixels):
    rows, columns = zip(*pixels, strict=True)
    return [min(columns), min(rows), max(columns) + 1 - min(columns), max(rows) + 1 - min(rows)]


@settings(deadline=None, max_examples=60)
@given(
    heatmap=MAPS,
    size=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    threshold=st.integers(-1, 8).map(lambda k: k / 8),
    relative=st.booleans(),
    mode=st.sampled_from(loc.UPSAMPLING),
    side=st.sampled_from([1, 3]),
    first=st.sampled_from(BEGINNINGS),
)
def test_every_component_equals_a_flood_fill(heatmap, size, threshold, relative, mode, side, first):
    if relative:
        threshold = abs(threshold) % 1
    how = {"threshold": threshold, "mode": mode, "side": side, "first": first, "relative": relative}
    image = loc.upsample(heatmap, size, mode, first)
    level = threshold * image.max() if relative else threshold
    components = components_of(loc.open_and_close(image > level, side))
    boxes = loc.heatmap_to_boxes(heatmap, size, **how)
    assert boxes.shape == (len(components), 4)
    # by the largest value, then by its position
    components.sort(key=lambda pixels: min((-image[at], at) for at in pixels))
    assert boxes.tolist() == [box_of(pixels) for pixels in components]
    peak = loc.heatmap_to_box(heatmap, size, **how)
    largest = loc.heatmap_to_box(heatmap, size, component="largest", **how)
    if not components:
        assert np.isnan(peak).all()
        assert np.isnan(largest).all()
        return
    assert peak.tolist() == boxes[0].tolist()
    assert largest.tolist() == box_of(min(components, key=lambda pixels: (-len(pixels), pixels[0])))


def test_largest_component_equals_a_calculation_by_hand():
    heatmap = np.array([[0.9, 0.0, 0.6, 0.7], [0.0, 0.0, 0.6, 0.6]])
    assert loc.heatmap_to_box(heatmap, (16, 32)).tolist() == [0, 0, 8, 8]
    assert loc.heatmap_to_box(heatmap, (16, 32), component="largest").tolist() == [16, 0, 16, 16]
    assert loc.heatmap_to_boxes(heatmap, (16, 32)).tolist() == [[0, 0, 8, 8], [16, 0, 16, 16]]
    assert loc.heatmap_to_boxes(heatmap, (16, 32), 0.95).shape == (0, 4)
    with pytest.raises(ValueError, match="component"):
        loc.heatmap_to_box(heatmap, (16, 32), component="all")


def test_relative_threshold_equals_a_calculation_by_hand():
    heatmap = np.array([[0.2, 0.11, 0.1, 0.0]])
    assert np.isnan(loc.heatmap_to_box(heatmap, (1, 4), 0.5, side=1)).all()
    assert loc.heatmap_to_box(heatmap, (1, 4), 0.5, side=1, relative=True).tolist() == [0, 0, 2, 1]  # 0.1 is not above
    assert np.isnan(loc.heatmap_to_box(np.zeros((2, 2)), (4, 4), 0.5, relative=True)).all()
    # the maximum is over the pixels: a cell without a pixel has no influence
    assert loc.heatmap_to_box([[0.2, 0.11, 9.0]], (1, 6), 0.5, side=1, first=1.4, relative=True).tolist() == [
        0,
        0,
        6,
        1,
    ]


@given(heatmap=MAPS, exponent=st.integers(-3, 3), share=st.integers(0, 7).map(lambda k: k / 8))
def test_relative_threshold_does_not_depend_on_the_scale(heatmap, exponent, share):
    how = {"threshold": share, "side": 1, "relative": True}
    boxes = [loc.heatmap_to_boxes(values, (9, 9), **how) for values in (heatmap, heatmap * 2.0**exponent)]
    assert boxes[0].tolist() == boxes[1].tolist()


@pytest.mark.parametrize("threshold", [-0.1, 1.0, math.nan, math.inf])
def test_relative_threshold_must_be_a_fraction(threshold):
    with pytest.raises(ValueError, match="threshold"):
        loc.heatmap_to_box(np.ones((2, 2)), (4, 4), threshold, relative=True)


def test_relative_threshold_of_logits_raises_value_error():
    with pytest.raises(ValueError, match="probabilities"):
        loc.heatmap_to_box([[-1.0, 2.0]], (4, 4), 0.5, relative=True)


TAKES_A_MAP = {
    "upsample": lambda heatmap: loc.upsample(heatmap, (8, 8)),
    "heatmap_to_box": lambda heatmap: loc.heatmap_to_box(heatmap, (8, 8)),
    "heatmap_to_boxes": lambda heatmap: loc.heatmap_to_boxes(heatmap, (8, 8)),
    "heatmap_to_point": lambda heatmap: loc.heatmap_to_point(heatmap, (8, 8)),
    "boxes_by_threshold": lambda heatmap: loc.boxes_by_threshold(heatmap, (8, 8), [0.1, 0.5]),
    "max_box_accuracy": lambda heatmap: loc.max_box_accuracy([heatmap], [[0, 0, 4, 4]], [0], ["a"], (8, 8)),
    "pointing_game": lambda heatmap: loc.pointing_game([heatmap], [[0, 0, 4, 4]], [0], ["a"], (8, 8)),
    "overlay": lambda heatmap: loc.overlay(heatmap, (8, 8)),
}


@pytest.mark.parametrize("name", TAKES_A_MAP)
@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize("cell", [(0, 0), (1, 1)])
def test_nonfinite_maps_raise_value_error_in_every_function(name, bad, cell):
    heatmap = np.array([[0.1, 0.9], [0.4, 0.2]])
    TAKES_A_MAP[name](heatmap)
    heatmap[cell] = bad
    with pytest.raises(ValueError, match="heatmap: expected finite values, got 1 of 4"):
        TAKES_A_MAP[name](heatmap)


def same(one, other):
    if isinstance(one, dict):
        return one == other
    return np.array_equal(np.asarray(one), np.asarray(other), equal_nan=True)


@pytest.mark.parametrize("name", TAKES_A_MAP)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_maps_may_be_lists_arrays_or_tensors(name, dtype):
    values = [[0.125, 0.875], [0.5, 0.25]]  # exact in every type
    tensor = torch.tensor(values, dtype=dtype, requires_grad=True)
    results = [TAKES_A_MAP[name](heatmap) for heatmap in (values, np.array(values), tensor)]
    assert same(results[0], results[1])
    assert same(results[0], results[2])


@pytest.mark.parametrize("name", TAKES_A_MAP)
@pytest.mark.parametrize("heatmap", [np.zeros(4), np.zeros((1, 2, 2)), np.zeros((0, 2)), np.zeros((2, 2), complex)])
def test_maps_of_wrong_shapes_raise_value_error(name, heatmap):
    with pytest.raises(ValueError, match="heatmap"):
        TAKES_A_MAP[name](heatmap)


@pytest.mark.parametrize("size", [(8,), (8, 8, 8), (8.0, 8), (0, 8), (8, -1), None])
def test_invalid_sizes_raise_an_error(size):
    for call in (loc.upsample, loc.heatmap_to_box, loc.heatmap_to_point, loc.overlay):
        with pytest.raises(ValueError, match="size"):
            call(np.ones((2, 2)), size)
    for call in (loc.whole_image_box, loc.centre_box):
        with pytest.raises(ValueError, match="size"):
            call(size)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint16, np.int16, np.uint64, np.float16, np.float32])
@given(
    one=st.lists(st.integers(0, 127), min_size=4, max_size=4),
    other=st.lists(st.integers(0, 127), min_size=4, max_size=4),
)
def test_boxes_of_any_integer_type_do_not_overflow(dtype, one, other):
    typed, typed_other = np.array(one, dtype), np.array(other, dtype)
    assert loc.box_iou(typed, typed_other) == loc.box_iou(one, other)
    assert loc.box_iou(torch.tensor(one), torch.tensor(other)) == loc.box_iou(one, other)
    assert loc.contains(typed, typed_other[:2]) == loc.contains(one, other[:2])
    twice, classes, groups = np.array([typed, typed_other, typed]), [0, 0, 0], [0, 1, 2]
    assert (loc.mean_boxes(twice, classes, groups) == loc.mean_boxes([one, other, one], classes, groups)).all()
    ceilings = [loc.grid_ceiling(box, (5, 3), (256, 256)) for box in (typed, one)]
    assert (ceilings[0] == ceilings[1]).all()


def test_unsigned_boxes_equal_a_calculation_by_hand():
    assert not loc.contains(np.array([10, 10, 255, 255], np.uint8), np.array([8, 12], np.uint8))
    assert loc.contains(np.array([10, 10, 255, 255], np.uint8), np.array([255, 255], np.uint8))
    assert loc.box_iou(np.array([200, 200, 100, 100], np.uint8), np.array([0, 0, 50, 50], np.uint8)) == 0


@pytest.mark.parametrize(
    "box", [[0, 0, -1, 4], [0, 0, 4, -0.5], [math.inf, 0, 1, 1], [0, 0, math.inf, 1], [0, 0, 4], 4.0]
)
def test_invalid_boxes_raise_an_error(box):
    for call in (
        lambda: loc.box_iou(box, [0, 0, 1, 1]),
        lambda: loc.box_iou([0, 0, 1, 1], box),
        lambda: loc.contains(box, [0, 0]),
        lambda: loc.max_box_accuracy([np.eye(2)], [box], [0], ["a"], (4, 4)),
        lambda: loc.pointing_game([np.eye(2)], [box], [0], ["a"], (4, 4)),
    ):
        with pytest.raises(ValueError, match=r"boxes|\ba\b|\bb\b"):
            call()


@pytest.mark.parametrize("make", [list, tuple, np.array, torch.tensor])
def test_values_and_classes_may_be_lists_arrays_or_tensors(make):
    names = ["a", "b", "c"]
    assert loc.per_class(make([1, 0, 1]), make([0, 0, 2]), names) == {"a": 0.5, "c": 1, "mean": 0.75}
    accuracy = loc.localization_accuracy(
        make([0.4, 0.2, 0.9]), make([0, 0, 2]), names, make([True, True, False]), [0.3]
    )
    assert accuracy == {"0.3": {"a": 0.5, "c": 0, "mean": 0.25}}
    boxes = make([[0, 0, 4, 8], [0, 0, 4, 8]])
    maps = [make([[0.9, 0.1], [0.2, 0.3]]), make([[0.1, 0.9], [0.2, 0.3]])]
    assert loc.pointing_game(maps, boxes, make([0, 1]), names, (8, 8)) == {"a": 1, "b": 0, "mean": 0.5}
    assert loc.max_box_accuracy(maps, boxes, make([0, 1]), names, (8, 8))["0.5"]["a"] in (0, 1)
    assert np.isnan(loc.mean_boxes(boxes, make([0, 0]), make([3, 3]))).all()


@pytest.mark.parametrize(
    ("values", "classes"), [([1, 0], [0]), ([1], [0, 1]), ([1], [3]), ([1], [-1]), ([1], [0.5]), ([[1]], [0])]
)
def test_invalid_values_and_classes_raise_value_error(values, classes):
    with pytest.raises(ValueError, match=r"values|classes"):
        loc.per_class(values, classes, ["a", "b", "c"])


def test_best_of_several_true_boxes_counts():
    heatmap = np.zeros((4, 4))
    heatmap[1, 2] = 1.0
    near, far = [2, 1, 1, 1], [0, 3, 1, 1]
    arguments = ([0], ["a"], (4, 4))
    for boxes, hit in (([[near, far]], 1), ([[far, near]], 1), ([[far, far]], 0), ([far], 0)):
        assert loc.max_box_accuracy([heatmap], boxes, *arguments)["0.5"]["a"] == hit
        assert loc.pointing_game([heatmap], boxes, *arguments)["a"] == hit
    for boxes in ([near, far], [], [np.zeros((0, 4))]):
        with pytest.raises(ValueError, match="boxes"):
            loc.max_box_accuracy([heatmap], boxes, *arguments)
        with pytest.raises(ValueError, match="boxes"):
            loc.pointing_game([heatmap], boxes, *arguments)


@settings(deadline=None, max_examples=30)
@given(
    maps=st.lists(MAPS, min_size=1, max_size=3),
    boxes=st.lists(BOXES, min_size=3, max_size=3),
    mode=st.sampled_from(loc.UPSAMPLING),
    component=st.sampled_from(loc.COMPONENTS),
)
def test_max_box_accuracy_equals_a_search_over_thresholds(maps, boxes, mode, component):
    size, classes, names = (12, 10), [0, 1, 1][: len(maps)], ["a", "b"]
    means = np.zeros(10)
    for step in range(10):
        hits = []
        for heatmap, box in zip(maps, boxes, strict=False):
            scaled = (heatmap - heatmap.min()) / ((heatmap.max() - heatmap.min()) or 1)
            found = loc.heatmap_to_box(scaled, size, step / 10, mode, 1, component=component)
            hits.append(loc.box_iou(found, box) > 0.3)
        means[step] = np.mean(
            [np.mean([h for h, c in zip(hits, classes, strict=True) if c == k]) for k in set(classes)]
        )
    how = {"mode": mode, "at": [0.3], "steps": 10, "component": component}
    accuracy = loc.max_box_accuracy(maps, boxes[: len(maps)], classes, names, size, **how)["0.3"]
    assert accuracy["mean"] == pytest.approx(means.max())
    assert accuracy["threshold"] == means.argmax() / 10


def test_overlay_equals_a_calculation_by_hand():
    layer = loc.overlay([[0.0, 0.05], [0.5, 1.0]], (4, 4))
    assert layer.shape == (4, 4, 4)
    assert layer.dtype == np.uint8
    # opacity follows the value: 255 * 0.6 * p
    assert layer[::2, ::2, 3].tolist() == [[0, 8], [76, 153]]
    assert layer[3, 3, :3].tolist() == loc.COLOURS[-1].tolist()
    assert layer[0, 0, :3].tolist() == loc.COLOURS[0].tolist()
    assert loc.overlay([[2.0, -1.0]], (1, 2), opacity=1)[0, :, 3].tolist() == [255, 0]
    own = loc.overlay([[0.02, 0.04, 0.06]], (1, 3), limits=None, opacity=1)
    assert own[0, :, 3].tolist() == [0, 128, 255]
    assert (loc.overlay(np.full((2, 2), 0.7), (2, 2), limits=None)[..., 3] == 0).all()
    grey = loc.overlay([[0.5]], (1, 1), colours=np.array([(0, 0, 0), (200, 100, 50)], np.uint8))
    assert grey[0, 0, :3].tolist() == [100, 50, 25]


@given(heatmap=MAPS, mode=st.sampled_from(loc.UPSAMPLING), opacity=st.integers(0, 4).map(lambda k: k / 4))
def test_overlay_opacity_follows_the_map(heatmap, mode, opacity):
    size = (11, 7)
    expected = 255 * opacity * loc.upsample(heatmap, size, mode)
    assert np.abs(loc.overlay(heatmap, size, mode, opacity=opacity)[..., 3] - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    "wrong",
    [
        {"limits": (1.0, 0.0)},
        {"limits": (0.0, math.nan)},
        {"opacity": 1.5},
        {"opacity": math.nan},
        {"colours": np.zeros((1, 3), np.uint8)},
        {"colours": np.zeros((4, 4), np.uint8)},
        {"colours": np.zeros((4, 3))},
    ],
)
def test_invalid_arguments_of_overlay_raise_an_error(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        loc.overlay([[0.5]], (2, 2), **wrong)


def test_import_without_scipy_fails_only_for_localization():
    code = """
import sys
sys.modules["scipy"] = None
import sgl_ops
try:
    import sgl_ops.localization
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'sgl_ops.localization needs scipy: pip install "sgl-ops[localization]"'


@pytest.mark.parametrize("first", [math.nan, math.inf])
def test_first_cell_must_be_finite(first):
    with pytest.raises(ValueError, match="first"):
        loc.upsample(np.eye(2), (4, 4), first=first)


def test_thresholds_must_increase():
    for thresholds in ([0.5, 0.1], [[0.1]], [math.nan]):
        with pytest.raises(ValueError, match="thresholds"):
            loc.boxes_by_threshold(np.eye(2), (4, 4), thresholds)
    assert loc.boxes_by_threshold(np.eye(2), (4, 4), []).shape == (0, 4)
