"""Boxes from maps of probabilities: hand-worked cases, properties, and the genuine boxes of ChestX-ray14."""

from __future__ import annotations

import csv
import itertools
import math

import boxes as b
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_np

SIDES = st.integers(1, 9)
MAPS = st_np.arrays(np.float64, st.tuples(SIDES, SIDES), elements=st.integers(0, 8).map(lambda k: k / 8))
MASKS = st_np.arrays(bool, st.tuples(SIDES, SIDES))
COORDINATES = st.integers(0, 60).map(lambda k: k / 4)
LENGTHS = st.integers(1, 40).map(lambda k: k / 4)
BOXES = st.tuples(COORDINATES, COORDINATES, LENGTHS, LENGTHS).map(np.array)


def cells(box, height, width):
    """The pixels of a box whose numbers are whole."""
    mask = np.zeros((height, width), bool)
    x, y, w, h = (int(v) for v in box)
    mask[y : y + h, x : x + w] = True
    return mask


def test_upsampling_by_hand():
    heatmap = np.array([[0.0, 1.0]])
    assert b.upsample(heatmap, (1, 4)).tolist() == [[0, 0, 1, 1]]
    assert b.upsample(heatmap, (2, 3)).tolist() == [[0, 1, 1]] * 2  # the middle pixel's centre is on the border
    assert b.upsample(heatmap, (1, 4), "bilinear").tolist() == [[0, 0.25, 0.75, 1]]


@settings(deadline=None, max_examples=60)
@given(heatmap=MAPS, height=st.integers(1, 20), width=st.integers(1, 20))
def test_upsampling_is_torchs(heatmap, height, width):
    size = (height, width)
    tensor = torch.from_numpy(heatmap)[None, None]
    exact = torch.nn.functional.interpolate(tensor, size, mode="nearest-exact")[0, 0].numpy()
    bilinear = torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False)[0, 0].numpy()
    assert np.allclose(b.upsample(heatmap, size, "bilinear"), bilinear, atol=1e-12)
    # where a pixel's centre lies on a border torch takes either cell, as its rounding goes
    odd = [(2 * np.arange(n) + 1) * k % (2 * n) == 0 for n, k in zip(size, heatmap.shape, strict=True)]
    inside = ~np.logical_or.outer(*odd)
    assert (b.upsample(heatmap, size) == exact)[inside].all()


@pytest.mark.parametrize(
    ("heatmap", "size", "mode", "named"),
    [
        (np.zeros(3), (4, 4), "nearest", "heatmap"),
        (np.zeros((0, 3)), (4, 4), "nearest", "heatmap"),
        (np.zeros((2, 2)), (4, 0), "nearest", "size"),
        (np.zeros((2, 2)), (4, 4), "cubic", "mode"),
    ],
)
def test_what_cannot_be_upsampled(heatmap, size, mode, named):
    with pytest.raises(ValueError, match=named):
        b.upsample(heatmap, size, mode)


def test_box_by_hand():
    heatmap = np.array([[0.1, 0.9, 0.2, 0.0], [0.0, 0.6, 0.1, 0.0], [0.0, 0.0, 0.0, 0.8], [0.0, 0.0, 0.0, 0.7]])
    # the cells of 0.9 and 0.6 hold the maximum: column 1, rows 0 and 1 of 8 x 8 pixels each
    assert b.heatmap_to_box(heatmap, (32, 32)).tolist() == [8, 0, 8, 16]
    assert b.heatmap_to_box(heatmap, (32, 64)).tolist() == [16, 0, 16, 16]
    assert b.heatmap_to_box(heatmap, (32, 32), threshold=0.65).tolist() == [8, 0, 8, 8]
    heatmap[2, 3] = 0.95
    assert b.heatmap_to_box(heatmap, (32, 32)).tolist() == [24, 16, 8, 16]
    assert b.peak_of(heatmap, (32, 32)) == (28, 20)
    # a threshold is not reached by what equals it
    assert np.isnan(b.heatmap_to_box(heatmap, (32, 32), threshold=0.95)).all()


def test_cells_that_touch_at_a_corner_are_one():
    assert b.heatmap_to_box(np.eye(3), (12, 12), side=1).tolist() == [0, 0, 12, 12]


def test_bilinear_box_by_hand():
    # along a row 0, 0.25, 0.75, 1, 1, 1, 0.75, 0.25, 0: above 0.5 from pixel 2 on
    heatmap = np.array([[0.0, 1.0, 1.0, 0.0]])
    assert b.upsample(heatmap, (1, 8), "bilinear").tolist() == [[0, 0.25, 0.75, 1, 1, 0.75, 0.25, 0]]
    assert b.heatmap_to_box(heatmap, (1, 8), mode="bilinear", side=1).tolist() == [2, 0, 4, 1]
    assert b.heatmap_to_box(heatmap, (1, 8), threshold=0.8, mode="bilinear", side=1).tolist() == [3, 0, 2, 1]


#: Of a cell of 8 pixels: begun where the image begins, at its very edge, so far beyond it that none is seen.
BEGINNINGS = (0.5, 0.0625, 1.8125, -0.75)


def test_cells_that_begin_elsewhere_by_hand():
    # cells of 8 pixels, the first of which is centred on pixel 0: as a ResNet's are. Borders half-way between centres
    assert b.nearest_cells(24, 3, 0.0625).tolist() == [0] * 4 + [1] * 8 + [2] * 12
    assert b.nearest_cells(24, 3).tolist() == [0] * 8 + [1] * 8 + [2] * 8
    # as a DenseNet's of stride 8, centred at 14.5: the last one is beyond the image
    assert b.nearest_cells(24, 3, 1.8125).tolist() == [0] * 18 + [1] * 6
    heatmap = np.zeros((3, 3))
    heatmap[1, 2] = 1.0
    assert b.heatmap_to_box(heatmap, (24, 24), first=0.0625).tolist() == [12, 4, 12, 8]
    assert b.peak_of(heatmap, (24, 24), 0.0625) == (16.5, 8.5)
    # between the centres, pixels 8 and 16, an eighth more with every pixel
    line = b.upsample(heatmap, (24, 24), "bilinear", 0.0625)[8]
    assert line.tolist() == [0] * 9 + [k / 8 for k in range(1, 8)] + [1] * 8
    # what is greatest beyond the image is not seen, neither in the box nor as the peak
    assert np.isnan(b.heatmap_to_box(heatmap, (24, 24), first=1.8125)).all()
    heatmap[0, 1] = 0.75
    assert b.heatmap_to_box(heatmap, (24, 24), first=1.8125).tolist() == [18, 0, 6, 18]
    assert b.peak_of(heatmap, (24, 24), 1.8125) == (22.5, 14.5)
    assert b.peak_of(np.eye(1), (24, 24), -0.25) == (0.5, 0.5)


@settings(deadline=None, max_examples=60)
@given(heatmap=MAPS, scale=st.integers(2, 8), first=st.sampled_from(BEGINNINGS))
def test_a_map_that_begins_elsewhere_is_a_map_that_was_shifted(heatmap, scale, first):
    """By pixels: the image of the evenly begun map, of which the edges go on, seen through a window."""
    size = (heatmap.shape[0] * scale, heatmap.shape[1] * scale)
    shift = round((first - 0.5) * scale)
    for mode in b.UPSAMPLING:
        even = b.upsample(np.pad(heatmap, 4, mode="edge"), tuple(n + 8 * scale for n in size), mode)
        window = even[4 * scale - shift :, 4 * scale - shift :][: size[0], : size[1]]
        assert np.allclose(b.upsample(heatmap, size, mode, 0.5 + shift / scale), window, atol=1e-12)


def test_opening_removes_and_closing_fills():
    square = cells((2, 2, 6, 6), 12, 12)
    more = square.copy()
    more[10, 10] = True  # a speck
    more[4, 8:11] = True  # a thread
    assert (b.open_and_close(more, 3) == square).all()
    gap = cells((2, 2, 4, 8), 12, 12) | cells((7, 2, 3, 8), 12, 12)
    assert (b.open_and_close(gap, 3) == cells((2, 2, 8, 8), 12, 12)).all()
    assert (b.open_and_close(gap, 1) == gap).all()
    assert (b.open_and_close(cells((1, 3, 4, 5), 12, 12), 3) == cells((0, 3, 5, 5), 12, 12)).all()  # to the edge


@pytest.mark.parametrize("side", [-1, 0, 2])
def test_a_square_has_a_middle(side):
    with pytest.raises(ValueError, match="side"):
        b.open_and_close(np.ones((4, 4), bool), side)


def test_the_edge_of_the_image_eats_nothing():
    for box in ((0, 0, 5, 5), (7, 7, 5, 5), (0, 0, 12, 3)):
        assert (b.open_and_close(cells(box, 12, 12), 3) == cells(box, 12, 12)).all()
    assert b.open_and_close(np.ones((12, 12), bool), 5).all()
    assert not b.open_and_close(np.zeros((12, 12), bool), 5).any()


def test_what_opening_removes_is_no_box():
    heatmap = np.zeros((12, 12))
    heatmap[2, 2] = 0.9
    assert np.isnan(b.heatmap_to_box(heatmap, (12, 12), side=3)).all()
    heatmap[6:10, 5:9], heatmap[0:3, 7:10] = 0.7, 0.6
    heatmap[11, 0:3] = 0.65
    # the maximum is sought in what is left
    assert b.heatmap_to_box(heatmap, (12, 12), side=3).tolist() == [5, 6, 4, 4]
    heatmap[0:3, 7:10] = 0.8
    assert b.heatmap_to_box(heatmap, (12, 12), side=3).tolist() == [7, 0, 3, 3]
    assert b.heatmap_to_box(heatmap, (12, 12), side=1).tolist() == [2, 2, 1, 1]


@settings(deadline=None, max_examples=50)
@given(mask=MASKS, side=st.sampled_from([3, 5]))
def test_opening_is_the_union_of_the_squares_that_fit(mask, side):
    """Squares round a pixel of the image, of which only what is in the image has to fit. Closing: of what is not."""

    def opened(mask):
        union = np.zeros_like(mask)
        for r, c in np.ndindex(mask.shape):
            square = np.s_[max(r - side // 2, 0) : r + side // 2 + 1, max(c - side // 2, 0) : c + side // 2 + 1]
            union[square] |= mask[square].all()
        return union

    assert (b.open_and_close(mask, side) == ~opened(~opened(mask))).all()


@settings(deadline=None, max_examples=60)
@given(heatmap=MAPS, scale=st.integers(1, 4), threshold=st.integers(-1, 8).map(lambda k: k / 8))
def test_box_is_that_of_the_flooded_component(heatmap, scale, threshold):
    """Against a flood from the maximum, one cell at a time."""
    size = (heatmap.shape[0] * scale, heatmap.shape[1] * scale)
    box = b.heatmap_to_box(heatmap, size, threshold, side=1)
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
    x, y = b.peak_of(heatmap, size)
    assert b.contains(box, (x, y))
    for first in BEGINNINGS:  # wherever the cells are: the box holds the peak
        elsewhere = b.heatmap_to_box(heatmap, size, threshold, side=1, first=first)
        assert np.isnan(elsewhere).all() or b.contains(elsewhere, b.peak_of(heatmap, size, first))


def test_iou_by_hand():
    assert b.iou((0, 0, 4, 4), (2, 2, 4, 4)) == pytest.approx(4 / 28)
    assert b.iou((0, 0, 4, 4), (0, 0, 4, 4)) == 1
    assert b.iou((0, 0, 4, 4), (4, 0, 4, 4)) == 0  # half-open: neighbours share nothing
    assert b.iou((0, 0, 10, 10), (2.5, 2.5, 5, 5)) == pytest.approx(0.25)
    assert b.iou(b.NO_BOX, (0, 0, 1, 1)) == 0
    assert b.iou((1, 1, 0, 0), (1, 1, 0, 0)) == 0
    pairs = b.iou(np.array([[[0, 0, 2, 2]], [[0, 0, 1, 2]]]), np.array([[0, 0, 2, 2], [1, 0, 1, 1]]))
    assert pairs.tolist() == [[1, 0.25], [0.5, 0]]


@given(one=BOXES, other=BOXES, shift=COORDINATES, stretch=st.integers(1, 8))
def test_iou_properties(one, other, shift, stretch):
    value = b.iou(one, other)
    assert 0 <= value <= 1
    assert value == b.iou(other, one)
    assert b.iou(one, one) == 1
    moved = np.array([shift, 2 * shift, 0, 0])
    assert b.iou(one + moved, other + moved) == pytest.approx(value)
    # an image that is squeezed in one direction keeps it: boxes may be compared at any size of the image
    squeezed = np.array([stretch, 1, stretch, 1]) / 4
    assert b.iou(one * squeezed, other * squeezed) == pytest.approx(value)


@given(one=BOXES, other=BOXES)
def test_iou_counts_pixels(one, other):
    quarter = np.array([*(4 * one), *(4 * other)])
    first, second = cells(quarter[:4], 110, 110), cells(quarter[4:], 110, 110)
    assert b.iou(one, other) == pytest.approx((first & second).sum() / (first | second).sum())


def test_accuracy_and_the_gate_by_hand():
    overlaps = np.array([0.1, 0.31, 0.8, 0.0])
    classes = np.array([0, 0, 2, 2])
    names = ["a", "b", "c"]
    accuracy = b.localization_accuracy(overlaps, classes, names)
    assert list(accuracy) == ["0.1", "0.3", "0.5", "0.7"]
    assert accuracy["0.1"] == {"a": 0.5, "c": 0.5, "mean": 0.5}  # 0.1 is not greater than 0.1
    assert accuracy["0.3"] == {"a": 0.5, "c": 0.5, "mean": 0.5}
    assert accuracy["0.7"] == {"a": 0, "c": 0.5, "mean": 0.25}
    gated = b.localization_accuracy(overlaps, classes, names, predicted=[True, True, False, True], at=[0.3])
    assert gated == {"0.3": {"a": 0.5, "c": 0, "mean": 0.25}}
    assert math.isnan(b.per_class(np.zeros(0), np.zeros(0, int), names)["mean"])


def test_mean_is_of_classes_not_of_boxes():
    assert b.per_class([1, 1, 1, 0], np.array([0, 0, 0, 1]), ["a", "b"])["mean"] == 0.5


def test_pointing_game_by_hand():
    box = (2, 4, 3, 2)
    points = np.array([(2, 4), (4.9, 5.9), (5, 5), (3, 6), (1.9, 5)])
    assert b.contains(box, points).tolist() == [True, True, False, False, False]
    assert not b.contains(b.NO_BOX, (0, 0))


@settings(deadline=None, max_examples=60)
@given(
    heatmap=MAPS,
    size=st.tuples(st.integers(1, 24), st.integers(1, 24)),
    mode=st.sampled_from(b.UPSAMPLING),
    first=st.sampled_from(BEGINNINGS),
)
def test_boxes_of_many_thresholds_are_those_of_each(heatmap, size, mode, first):
    thresholds = np.arange(16) / 16
    together = b.boxes_by_threshold(heatmap, size, thresholds, mode, first)
    each = [b.heatmap_to_box(heatmap, size, t, mode, side=1, first=first) for t in thresholds]
    assert np.array_equal(together, each, equal_nan=True)


def test_few_thresholds_are_labelled(monkeypatch):
    calls = []
    original = b.box_of_peak
    monkeypatch.setattr(b, "box_of_peak", lambda *x: calls.append(1) or original(*x))
    heatmap = np.zeros((16, 16))
    heatmap[3:9, 4:7] = 1.0
    boxes = b.boxes_by_threshold(heatmap, (512, 512), np.arange(100) / 100)
    assert (boxes == [128, 96, 96, 192]).all()
    assert len(calls) == 2


def test_max_box_accuracy_by_hand():
    # nested squares of 0.25, 0.75 and 1: 8, 4 and 2 cells wide
    heatmap = np.zeros((16, 16))
    heatmap[4:12, 4:12], heatmap[6:10, 6:10], heatmap[7:9, 7:9] = 0.25, 0.75, 1.0
    true = np.array([[4, 4, 8, 8], [6, 6, 4, 4], [7, 7, 2, 2]]) * 2.0
    accuracy = b.max_box_accuracy([heatmap] * 3, true, np.array([0, 0, 0]), ["a"], (32, 32))
    # 4 wide: IoU 1/4 with 8, 1 with 4, 1/4 with 2
    assert accuracy["0.1"]["mean"] == 1
    assert accuracy["0.1"]["threshold"] == 0.25
    # one threshold for all: a threshold for each map would find all three
    assert accuracy["0.7"] == {"a": pytest.approx(1 / 3), "mean": pytest.approx(1 / 3), "threshold": 0}
    # every map is scaled
    assert b.max_box_accuracy([heatmap / 8 + 0.5] * 3, true, np.zeros(3, int), ["a"], (32, 32)) == accuracy
    constant = b.max_box_accuracy([np.full((4, 4), 0.7)], true[:1], np.zeros(1, int), ["a"], (32, 32))
    assert constant["0.1"]["mean"] == 0


def test_trivial_boxes_by_hand():
    assert b.whole_image((20, 40)).tolist() == [0, 0, 40, 20]
    assert b.centre_box((20, 40)).tolist() == [10, 5, 20, 10]
    boxes = np.array([[0, 0, 2, 2], [4, 4, 4, 4], [8, 8, 6, 6], [50, 50, 1, 1]])
    mean = b.mean_boxes(boxes, np.array([0, 0, 0, 1]), np.array([7, 7, 8, 9]))
    assert mean[:3].tolist() == [[8, 8, 6, 6], [8, 8, 6, 6], [2, 2, 3, 3]]  # not from the same patient
    assert np.isnan(mean[3]).all()


@given(boxes=st.lists(BOXES, min_size=2, max_size=6), moved=BOXES)
def test_mean_box_does_not_know_its_own(boxes, moved):
    classes, groups = np.zeros(len(boxes), int), np.arange(len(boxes))
    before = b.mean_boxes(np.array(boxes), classes, groups)[0]
    after = b.mean_boxes(np.array([moved, *boxes[1:]]), classes, groups)[0]
    assert (before == after).all()


def test_ceiling_by_hand():
    size, grid = (64, 64), (4, 4)
    true = np.array([[16, 0, 32, 16], [20, 20, 4, 4], [14, 0, 20, 16]])
    best = b.grid_ceiling(true, grid, size)
    assert best.tolist() == [[16, 0, 32, 16], [16, 16, 16, 16], [16, 0, 16, 16]]
    assert b.iou(best, true).tolist() == [1, 1 / 16, 0.8]
    # columns of cells centred on pixels 0, 16, 32, 48: pixels 8, 24, 40 are as near to the next, and belong to it
    assert b.grid_ceiling(true[:1], grid, size, 1 / 32).tolist() == [[8, 0, 32, 24]]


@settings(deadline=None, max_examples=100)
@given(box=BOXES, rows=st.integers(1, 6), columns=st.integers(1, 6), first=st.sampled_from(BEGINNINGS))
def test_no_union_of_cells_beats_the_ceiling(box, rows, columns, first):
    size = (26, 25)
    best = b.iou(b.grid_ceiling(box, (rows, columns), size, first)[0], box)
    every = []  # boxes as maps give them
    for (y0, y1), (x0, x1) in itertools.product(*(itertools.combinations(range(k + 1), 2) for k in (rows, columns))):
        cells = np.zeros((rows, columns))
        cells[y0:y1, x0:x1] = 1
        every.append(b.heatmap_to_box(cells, size, side=1, first=first))
    assert best == pytest.approx(b.iou(np.array(every), box).max())


def test_cells_without_a_pixel_scale_nothing():
    """The first column of three is centred beyond the edge: whatever it says, MaxBoxAcc is of what the image shows."""
    size, first = (8, 8), -0.6
    shown = np.array([[0.2, 0.2, 0.6, 0.4]] * 4)
    assert 0 not in b.nearest_cells(8, 4, first)
    true, classes = np.array([b.heatmap_to_box(shown, size, 0.5, side=1, first=first)]), np.zeros(1, int)
    assert not np.isnan(true).any()
    for hidden in (0.2, 0.0, 1.0, 1e9):
        heatmap = shown.copy()
        heatmap[:, 0] = heatmap[0] = hidden
        assert np.array_equal(b.upsample(heatmap, size, first=first), b.upsample(shown, size, first=first))
        assert b.max_box_accuracy([heatmap], true, classes, ["a"], size, first=first)["0.7"]["a"] == 1


def test_the_trivial_predictors_of_the_genuine_boxes(data_dir):
    """984 boxes, measured apart from this code: the centre, the class's mean (leave one out), the best of 16 x 16."""
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
        "centre": np.broadcast_to(b.centre_box(size), true.shape),
        "mean": b.mean_boxes(true, classes, np.arange(len(true))),
        "ceiling": b.grid_ceiling(true, (16, 16), size),
    }.items():
        accuracy = b.localization_accuracy(b.iou(found, true), classes, names)
        rounded[name] = [[round(row[key], 2) for row in accuracy.values()] for key in ("mean", "Cardiomegaly")]
    assert rounded == {
        "centre": [[0.43, 0.18, 0.09, 0.01], [1.0, 0.95, 0.48, 0.03]],
        "mean": [[0.30, 0.15, 0.11, 0.05], [1.0, 0.99, 0.85, 0.36]],
        "ceiling": [[1.0, 0.97, 0.87, 0.58], [1.0] * 4],
    }
