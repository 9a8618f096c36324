"""Compares the images for a report with the bags of features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from images.dataset import some
from images.pixels import read_header

from features.store import FeatureBags

#: The sizes of so many images are compared.
SAMPLE = 200


def missing_images(files: Mapping[str, Path], bags: FeatureBags, names: Sequence[str]) -> str | None:
    """A line with the number of bags that have no image, and their first names; None if all have one.

    Args:
        files: the images by the names of their bags, see :func:`features.extraction.find_images`.
        names: the bags.

    Raises:
        ValueError: an image has another size than the one whose features are in ``bags``.
    """
    for name in [name for name in names if name in files][:SAMPLE]:
        size = bags.size(name)
        try:
            width, height, _ = read_header(files[name])
        except ValueError:
            continue  # the report leaves out images that cannot be read
        if size is not None and (height, width) != size:
            raise ValueError(
                f"images: {files[name]} has {width}x{height} pixels, but the features of {name} are those of an image "
                f"of {size[1]}x{size[0]} pixels; expected the images of the features"
            )
    missing = [name for name in names if name not in files]
    return f"{len(missing)} of {len(names)} bags have no image in --images ({some(missing)})" if missing else None
