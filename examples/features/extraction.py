"""Features of images: the cells of a feature map, or given points."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from images import pixels
from images.dataset import records_of, some
from images.label_tables import NAMES, name_among, same
from torch import Tensor

from features.backbones import Backbone, aligned
from features.geometry import Geometry, rounded_up
from features.store import Bag

#: Suffixes of images. DICOM files may have any suffix.
IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".jp2", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def find_images(folder: Path) -> dict[str, Path]:
    """The image files of a folder and its subfolders, by their names without suffix.

    Raises:
        ValueError: there are no images, or two have the same name.
    """
    if not folder.is_dir():
        raise ValueError(f"images: expected a folder, got {str(folder)!r}")
    images: dict[str, Path] = {}
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    for path in (p for p in files if p.suffix.lower() in IMAGES or pixels.is_dicom(p)):
        name = pixels.name_without_suffix(path)
        if name in images:
            both = " and ".join(str(p.relative_to(folder)) for p in (images[name], path))
            raise ValueError(
                f"images: {folder} holds {both}; a bag has the name of its image without the suffix, so each name may "
                "occur once: rename one"
            )
        images[name] = path
    if not images:
        raise ValueError(f"images: {folder} holds no {', '.join(IMAGES)} and no DICOM file")
    return images


def read_image(path: Path) -> Tensor:
    """The displayed image, (1, 3, height, width) in [0, 1]; see images.pixels. Grey images have three equal channels.

    Raises:
        ValueError: the image cannot be read.
    """
    array = np.array(pixels.read_image(path).convert("RGB"))
    return torch.from_numpy(array).permute(2, 0, 1).unsqueeze(0).float() / 255


def first_readable(paths: Iterable[Path]) -> Tensor:
    """The first image of ``paths`` that can be read, as :func:`read_image` returns it.

    Raises:
        ValueError: none can be read. The message is that of the first one.
    """
    first: ValueError | None = None
    for path in paths:
        try:
            return read_image(path)
        except ValueError as error:
            first = first or error
    raise first or ValueError("images: there are none")


def read_points(path: Path, images: Collection[str]) -> dict[str, np.ndarray]:
    """Points x, y (n, 2) in pixels by bag, in row order, from a CSV with the columns image (or bag), x and y.

    Raises:
        ValueError: a column is missing, a coordinate is not a number, or a bag has no image among ``images``.
    """
    _, records = records_of(path, [NAMES, "x", "y"])
    name_of = name_among(images)
    points: dict[str, list[tuple[float, float]]] = {}
    absent = {}
    for at, cells in records:
        name = same(cells, NAMES, at, name_of)
        if name is None:
            absent[next(cells[key] for key in NAMES if key in cells)] = at
            continue
        try:
            x, y = float(cells["x"]), float(cells["y"])
        except ValueError:
            x = y = np.nan
        if not np.isfinite([x, y]).all():
            raise ValueError(f"{at}: expected numbers x, y, got {cells['x']!r}, {cells['y']!r}")
        points.setdefault(name, []).append((x, y))
    if absent:
        raise ValueError(f"points: {len(absent)} bags of {path} have no image ({some(absent)})")
    return {name: np.array(places) for name, places in points.items()}


def refuse_far_points(points: Mapping[str, np.ndarray], images: Mapping[str, Path], first: int) -> None:
    """Compares the ``points`` of read_points with the sizes of the ``images``, which are not decoded.

    An image whose size cannot be read is not compared: the extraction names it later.

    Args:
        first: the coordinates of the first pixel, 0 or 1.

    Raises:
        ValueError: a point is more than one pixel outside of its image.
    """
    for name, places in points.items():
        try:
            width, height, _ = pixels.read_header(images[name])
        except ValueError:
            continue
        far = places[((places < first - 1) | (places > [width + first, height + first])).any(1)]
        if len(far):
            raise ValueError(
                f"points: {len(far)} of the {len(places)} points of {name} are outside of the image of "
                f"{width}x{height} pixels: {far[0, 0]:g}, {far[0, 1]:g}"
            )


@torch.no_grad()
def map_of(backbone: Backbone, image: Tensor, scales: Sequence[float], symmetric: bool) -> Tensor:
    """The feature map (D, h, w) of an image (1, 3, H, W), concatenated over ``scales`` of the image.

    The maps of the other scales are resampled on the grid of the first one. The shape is that of :func:`grid_of`.

    Args:
        symmetric: return the mean over the eight flips and rotations by 90 degrees, each transformed back.
    """
    cells = backbone.cells(symmetric)
    maps = []
    for scale in scales:
        scaled = image
        if scale != 1:
            size = [round(n * scale) for n in image.shape[2:]]
            scaled = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
        maps.append(_extended_map(backbone, scaled, symmetric))
    size = maps[0].shape[2:]
    first, *own = (cells._replace(stride=cells.stride / scale, centre=cells.centre / scale) for scale in scales)
    found = maps[:1]
    for m, geometry, scale in zip(maps[1:], own, scales[1:], strict=True):
        if all(math.isclose(k * scale, n * scales[0]) for k, n in zip(size, m.shape[2:], strict=True)):
            same = m.shape[2:] == size
            found.append(m if same else F.interpolate(m, size, mode="bilinear", align_corners=False))
        else:
            found.append(aligned(m, geometry, first, size))
    return torch.cat(found, 1)[0]


def _extended_map(backbone: Backbone, image: Tensor, symmetric: bool) -> Tensor:
    """The map (1, D, h, w) of an image that is extended to a multiple of ``backbone.multiple``, without cells that lie
    in the extension only."""
    bottom, right = (rounded_up(n, backbone.multiple) - n for n in image.shape[2:])
    if bottom or right:
        image = F.pad(image, (0, right, 0, bottom), mode="replicate")
    maps = _symmetric(backbone, image) if symmetric else backbone(image)
    stride = backbone.geometry.stride
    return maps[:, :, : maps.shape[2] - bottom // stride, : maps.shape[3] - right // stride]


def grid_of(backbone: Backbone, size: Sequence[int], scale: float) -> tuple[int, int]:
    """The rows and columns of the map of an image of ``size`` (height, width), at ``scale``."""
    stride = backbone.geometry.stride
    h, w = (rounded_up(round(n * scale), stride) // stride - backbone.absent for n in size)
    return h, w


def _symmetric(network: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    total = 0
    for turns in range(4):
        for flip in (False, True):
            turned = torch.rot90(image.flip(3) if flip else image, turns, (2, 3))
            back = torch.rot90(network(turned), -turns, (2, 3))
            total = total + (back.flip(3) if flip else back)
    return total / 8


def map_bag(backbone: Backbone, geometry: Geometry, image: Tensor, scales: Sequence[float], symmetric: bool) -> Bag:
    """The cells of the feature map of an image as a bag. ``coords`` are the centres of the cells.

    Args:
        geometry: that of the backbone.
    """
    features = map_of(backbone, image, scales, symmetric)
    if symmetric:
        geometry = backbone.cells(symmetric)
    step, centre = geometry.stride / scales[0], geometry.centre / scales[0]
    h, w = features.shape[1:]
    y, x = np.mgrid[:h, :w]
    coords = np.stack([x.ravel(), y.ravel()], 1) * step + centre
    return Bag(features.flatten(1).T.numpy(), coords, (h, w), tuple(image.shape[2:]))


def point_bag(
    backbone: Backbone, geometry: Geometry, image: Tensor, points: np.ndarray, scales: Sequence[float], symmetric: bool
) -> Bag:
    """The features at ``points`` (n, 2; x, y in pixels), interpolated in the maps of the whole image.

    Args:
        geometry: that of the backbone.
    """
    if symmetric:
        geometry = backbone.cells(symmetric)
    found = []
    for scale in scales:
        features = map_of(backbone, image, (scale,), symmetric)
        h, w = features.shape[1:]
        cells = (torch.from_numpy(points).float() * scale - geometry.centre) / geometry.stride
        places = (cells + 0.5) / torch.tensor([w, h]) * 2 - 1
        sampled = F.grid_sample(
            features[None], places[None, None], mode="bilinear", padding_mode="border", align_corners=False
        )
        found.append(sampled[0, :, 0].T)
    return Bag(torch.cat(found, 1).numpy(), points, None, tuple(image.shape[2:]))


def patches_at(image: Tensor, points: np.ndarray, side: int) -> Tensor:
    """The squares (n, 3, side, side) of an image (1, 3, H, W) around ``points`` (n, 2). Beyond the edge, the image is
    mirrored, several times if ``side`` exceeds the image. A point beyond the edge counts as one in the nearest pixel.
    """
    half = side // 2
    rows, columns = (_mirrored(np.arange(-half, n + side), n) for n in image.shape[2:])
    padded = image[:, :, rows][..., columns]
    pixels = np.clip(np.floor(points).astype(int), 0, [image.shape[3] - 1, image.shape[2] - 1])
    return torch.cat([padded[..., y : y + side, x : x + side] for x, y in pixels])


def _mirrored(numbers: np.ndarray, size: int) -> np.ndarray:
    """The pixels 0 to ``size`` - 1 that show the pixels ``numbers`` of the mirrored image. No edge is repeated."""
    last = size - 1
    return last - abs(last - numbers % (2 * last)) if last else np.zeros_like(numbers)


def pixel_bag(image: Tensor, points: np.ndarray, side: int) -> Bag:
    """The pixels (n, 3 side side) in [0, 1] of the squares around ``points``, for the head ``patches``."""
    return Bag(patches_at(image, points, side).flatten(1).numpy(), points, None, tuple(image.shape[2:]))


@torch.no_grad()
def patch_bag(
    backbone: Backbone, image: Tensor, points: np.ndarray, side: int, symmetric: bool, batch_size: int = 64
) -> Bag:
    """The mean of the feature map of the square of ``side`` pixels round each of ``points``, enlarged to the network's
    size. Beyond the edge the image is mirrored."""
    found = []
    for start in range(0, len(points), batch_size):
        patches = patches_at(image, points[start : start + batch_size], side)
        if side != backbone.size:
            size = (backbone.size,) * 2
            patches = F.interpolate(patches, size, mode="bilinear", align_corners=False, antialias=True)
        maps = _symmetric(backbone, patches) if symmetric else backbone(patches)
        found.append(maps.mean((2, 3)))
    return Bag(torch.cat(found).numpy(), points, None, tuple(image.shape[2:]))
