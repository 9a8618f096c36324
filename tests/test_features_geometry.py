"""examples/features/geometry.py: strides, receptive fields and places of the cells of a map."""

from __future__ import annotations

import math

import feature_packages  # noqa: F401
import numpy as np
import pytest
import torch
from features import backbones, extraction, runs, store
from features import geometry as geometries
from features.evaluation import (
    box_of,
    pixels_of,
    point_of,
)
from features.pictures import draw_map
from torch import nn


def test_geometry_equals_that_of_the_convolutions():
    """Stride 4; kernel 3 with padding 1, then kernel 5 with padding 1: a field of 3 + 2 * 4 = 11 pixels."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU6(), nn.Conv2d(4, 5, 5, 2, 1))
    found = geometries.geometry_of(network, "3", 64)
    # The first output of layer 0 is centred on pixel 0 (0.5). That of layer 3 is centred on output 1, 2 pixels later.
    assert found == geometries.Geometry(4, 2.5, 11)


def test_effective_centre_is_the_centre_of_the_weights():
    """The only weight of a 9x9 kernel is in its third row and column, 2 pixels before the middle."""
    network = nn.Sequential(nn.Conv2d(3, 2, 9, 4, 4, bias=False))
    assert geometries.geometry_of(network, "0", 32) == geometries.Geometry(4, 0.5, 9)
    with torch.no_grad():
        network[0].weight.zero_()[:, :, 2, 2] = torch.randn(2, 3)
    assert geometries.effective_centre(network, "0", 32, 4) == pytest.approx(-1.5, abs=1e-4)


def test_receptive_field_after_a_global_mean_is_the_whole_image():
    class Gate(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(x.mean((2, 3), keepdim=True))

    assert geometries.geometry_of(nn.Sequential(nn.Conv2d(3, 4, 2, 2), Gate()), "1", 32).field is None


def test_maps_of_other_stages_are_aligned_with_the_first_stage():
    """A map of the x coordinates of a finer grid, resampled on a coarser grid, has the x coordinates of the latter."""
    fine, coarse = geometries.Geometry(4, 3.5, 9), geometries.Geometry(8, 5.0, 20)
    x = (torch.arange(16) * 4 + 3.5).expand(1, 1, 16, 16)
    found = backbones.aligned(x, fine, coarse, torch.Size((8, 8)))
    expected = torch.arange(8) * 8 + 5.0
    torch.testing.assert_close(found[0, 0, 3, 1:-1], expected[1:-1])
    back = backbones.aligned(expected.expand(1, 1, 8, 8), coarse, fine, torch.Size((16, 16)))
    torch.testing.assert_close(back[0, 0, 5, 2:-2], x[0, 0, 5, 2:-2])


def test_geometry_of_a_network_with_layer_norm(timm):
    """A patch of 4 pixels, then 7x7 convolutions at stride 4: 4 + 24 for each."""
    network = timm.create_model("convnext_atto", depths=(2, 1, 1, 1))
    assert geometries.geometry_of(network, "stages.0", 96) == geometries.Geometry(4, 2.0, 4 + 2 * 24)


@pytest.mark.parametrize(
    ("field", "width", "height", "warns"),
    [(49, 48, 64, True), (48, 48, 64, False), (49, 64, 48, True), (None, 9, 9, False)],
)
def test_warning_of_a_receptive_field_that_exceeds_the_image(field, width, height, warns):
    found = backbones.field_warning(field, width, height)
    assert (found is not None) == warns
    if warns:
        assert f"{field} pixels, exceeds the image of {width}x{height} pixels" in found


class SameConv(nn.Conv2d):
    """A 3x3 convolution of stride 2 with the padding of TensorFlow: it depends on the size of the input."""

    def forward(self, x):
        extra = [max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:]]
        top, left = (n // 2 for n in extra)
        return super().forward(nn.functional.pad(x, (left, extra[1] - left, top, extra[0] - top)))


def small_backbone(convolution, depth, stages=None):
    """Convolutions of 3x3 and stride 2 with equal weights. The effective receptive fields have their exact centres."""
    layers = [convolution(3 if k == 0 else 2, 2, 3, 2) for k in range(depth)]
    for layer in layers:
        nn.init.constant_(layer.weight, 0.1)
        nn.init.zeros_(layer.bias)
    return backbones.Backbone(nn.Sequential(*layers), stages or [str(depth - 1)], [0] * 3, [1] * 3, 128, trained=True)


def spot_at(size, x, y):
    image = torch.zeros(1, 3, *size)
    image[..., y - 8 : y + 8, x - 8 : x + 8] = 1.0
    return image


#: Networks and sizes (height, width) of images. The sides are not always multiples of the stride.
PLACES = [(SameConv, 4, (169, 105)), (SameConv, 4, (128, 96)), (nn.Conv2d, 3, (480, 640)), (nn.Conv2d, 3, (169, 105))]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("convolution", "depth", "size"), PLACES)
def test_spot_is_found_at_its_place(convolution, depth, size, symmetric, tmp_path):
    """The features, the coordinates, and the map for boxes and pictures have the centre of a spot in the image."""
    backbone = small_backbone(convolution, depth)
    x, y = size[1] // 2 + 5, size[0] // 2 - 3
    image = spot_at(size, x, y)
    bag = extraction.map_bag(backbone, backbone.geometry, image, (1.0,), symmetric)
    assert bag.grid == extraction.grid_of(backbone, size, 1.0)
    response = bag.features.sum(1).astype(float)
    assert (response @ bag.coords / response.sum()).tolist() == pytest.approx([x, y], abs=1)
    if symmetric:
        turned = extraction.map_of(backbone, nn.functional.pad(image, (0, -size[1] % 16, 0, -size[0] % 16)), (1,), True)
        rows, columns = bag.grid
        np.testing.assert_allclose(turned[:, :rows, :columns].flatten(1).T, bag.features, atol=1e-6)
    # what train_features.py does with the bag
    centre = backbone.cells(symmetric).centre
    writer = store.StoreWriter(tmp_path, {"stride": backbone.geometry.stride, "centre": centre, "scales": [1.0]})
    writer.add("b", bag)
    first, stride = runs.cells_of(store.FeatureBags(tmp_path))
    heatmap = response.reshape(bag.grid) / response.max()
    pixels = pixels_of(heatmap, size, first, stride)
    assert pixels.shape == size
    found = [(pixels.sum(axis) * (np.arange(n) + 0.5)).sum() / pixels.sum() for axis, n in ((0, size[1]), (1, size[0]))]
    assert found == pytest.approx([x, y], abs=1)
    left, top, width, height = box_of(heatmap, size, first, stride)
    assert [left + width / 2, top + height / 2] == pytest.approx([x, y], abs=2)
    layer = drawn(heatmap, size, first, stride)[..., 3] / 255
    found = [(layer.sum(axis) * (np.arange(n) + 0.5)).sum() / layer.sum() for axis, n in ((0, size[1]), (1, size[0]))]
    assert found == pytest.approx([x, y], abs=1)
    # the pointing game
    peak = point_of(heatmap, size, first, stride)
    assert peak == pytest.approx(bag.coords[response.argmax()].tolist(), abs=0.5)


def drawn(heatmap, size, first, stride):
    """The layer of colour of a picture of the report."""
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw_map(axes, heatmap, size, first, stride)
    (layer,) = axes.images
    for frame in axes.patches:
        (x, y), (width, height) = frame.get_xy(), (frame.get_width(), frame.get_height())
        assert min(x, y) >= 0 and x + width <= size[1] and y + height <= size[0]
    return layer.get_array()


@pytest.mark.parametrize(("convolution", "depth", "size"), PLACES)
def test_squared_gradient_of_a_cell_has_its_centre_at_the_coordinates(convolution, depth, size):
    backbone = small_backbone(convolution, depth)
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    with torch.enable_grad():
        maps = extraction.map_of.__wrapped__(backbone, image, (1.0,), False)
    bag = extraction.map_bag(backbone, backbone.geometry, image.detach(), (1.0,), False)
    h, w = bag.grid
    first, stride = backbone.geometry.centre / backbone.geometry.stride, backbone.geometry.stride
    for row, column in ((h // 3, w // 3), (2 * h // 3, w // 2), (h - 3, w - 3)):
        (gradient,) = torch.autograd.grad(maps[:, row, column].sum(), image, retain_graph=True)
        energy = gradient[0].square().sum(0)
        place = [
            float((energy.sum(axis) * (torch.arange(n) + 0.5)).sum() / energy.sum())
            for axis, n in ((0, size[1]), (1, size[0]))
        ]
        assert place == pytest.approx(bag.coords.reshape(h, w, 2)[row, column].tolist(), abs=1)
        single = np.zeros(bag.grid)
        single[row, column] = 1
        assert place == pytest.approx(point_of(single, size, first, stride), abs=1)
        # each point of --points has the features of the cell there
        points = np.array([place])
        found = extraction.point_bag(backbone, backbone.geometry, image.detach(), points, (1.0,), False)
        np.testing.assert_allclose(found.features[0], maps[:, row, column].detach(), rtol=0.1)


def test_stages_and_scales_are_aligned_at_any_size():
    """A spot has the same centre in the maps of both stages, and of both scales."""
    views = [(["2", "3"], (1.0,)), (["3", "2"], (1.0,)), (["2"], (1.0, 1.5)), (["2"], (2.0, 0.75))]
    for size in ((169, 105), (100, 150)):
        x, y = size[1] // 2, size[0] // 2
        for stages, scales in views:
            backbone = small_backbone(SameConv, 4, stages)
            bag = extraction.map_bag(backbone, backbone.geometry, spot_at(size, x, y), scales, False)
            for part in np.split(bag.features.astype(float), 2, 1):
                found = part.sum(1) @ bag.coords / part.sum()
                assert found.tolist() == pytest.approx([x, y], abs=2), (size, stages, scales)
            step = backbone.geometry.stride / scales[0]
            assert (bag.coords.max(0) - np.array(size)[::-1] < step).all()  # no cell lies in the extension only


def test_images_with_multiples_of_the_stride_are_not_changed(timm):
    for name, cut, size in (
        ("timm/resnet18", "layer2", (96, 64)),
        ("timm/test_efficientnet", "blocks.2", (96, 64)),
        ("timm/vit_tiny_patch16_224", "blocks.0", (64, 96)),
    ):
        backbone = backbones.load_backbone(name, weights="none", cut=cut)
        image = torch.rand(1, 3, *size)
        with torch.no_grad():
            assert torch.equal(extraction.map_of(backbone, image, (1.0,), False), backbone(image)[0])
            large = nn.functional.interpolate(
                image, (2 * size[0], 2 * size[1]), mode="bilinear", align_corners=False, antialias=True
            )
            second = nn.functional.interpolate(
                backbone(large), backbone(image).shape[2:], mode="bilinear", align_corners=False
            )
            both = torch.cat([backbone(image), second], 1)[0]
            assert torch.equal(extraction.map_of(backbone, image, (1.0, 2.0), False), both)


def test_geometry_of_a_size_that_is_no_multiple_of_the_stride():
    """The padding of TensorFlow at 128 pixels, not at 120: with the latter, the cells lie at other places."""
    network = small_backbone(SameConv, 4).network
    assert geometries.geometry_of(network, "3", 120) == geometries.geometry_of(network, "3", 128)
    centres = [geometries.effective_centre(network, "3", side, 16) for side in (60, 64)]
    assert centres[0] == pytest.approx(centres[1], abs=0.1)
