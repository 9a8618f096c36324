"""Blood-smear photos: a head trained with the image label "has platelets" localizes the platelets.

    git clone https://github.com/Shenggan/BCCD_Dataset
    python bccd_demo.py --data BCCD_Dataset/BCCD --out bccd

Computes the features of the 364 photos once, trains a head with SGL and one without, and writes bccd.png. The figure
shows the first positive test photos in alphabetical order, not a selection.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from common import options
from common.files import naming


def make_parser() -> argparse.ArgumentParser:
    parser = options.make_parser(__doc__)
    files = parser.add_argument_group("data")
    demo = parser.add_argument_group("demonstration")
    files.add_argument("--data", type=Path, required=True, metavar="DIR", help="the folder BCCD of the data set")
    files.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for features and results")
    files.add_argument(
        "--weights",
        default="pretrained",
        metavar="FILE",
        help="weights of tf_efficientnet_lite0: pretrained, or a file (pretrained)",
    )
    demo.add_argument("--photos", type=int, default=4, metavar="N", help="number of photos in the figure (4)")
    demo.add_argument(
        "--repeats", type=int, default=1, metavar="R", help="number of seeds; the figure shows the first (1)"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.photos < 1:
        parser.error(f"--photos: expected at least 1, got {args.photos}")
    import extract_features
    import train_features
    from features import bccd

    try:
        images = bccd.prepare(args.data, args.out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    arguments = ["--backbone", "timm/tf_efficientnet_lite0", "--stages", "blocks.3", "blocks.2"]
    arguments += ["--weights", args.weights, "--images", str(images), "--out", str(args.out / "features")]
    failed = extract_features.main(arguments)
    for loss in ("bag", "sgl"):
        if failed:
            return failed
        arguments = ["--features", str(args.out / "features"), "--labels", str(args.out / "labels.csv")]
        arguments += ["--boxes", str(args.out / "boxes.csv"), "--images", str(images), "--out", str(args.out / loss)]
        arguments += ["--loss", loss, "--repeats", str(args.repeats), "--resume"]
        failed = train_features.main(arguments)
    if not failed:
        try:
            draw(args.out, images, args.photos)
        except OSError as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        options.next_step(f"open {args.out / 'bccd.png'}")
    return failed


def draw(out: Path, images: Path, count: int) -> None:
    """``bccd.png``: photo and true boxes, and map and boxes without and with SGL, of seed 0."""
    from common.drawing import TRUE, draw_box
    from features.bccd import CLASS
    from features.extraction import find_images, read_image
    from features.labels import read_boxes
    from features.pictures import draw_map, extent_of
    from features.runs import cells_of, load_predictions, maps_of
    from features.store import FeatureBags
    from matplotlib.figure import Figure

    bags = FeatureBags(out / "features")
    boxes = read_boxes(out / "boxes.csv", [CLASS], bags.names)[CLASS]
    files = find_images(images)
    found = [maps_of(load_predictions(out / loss / "parts" / "repeat0_fold0.npz"), bags, 0) for loss in ("bag", "sgl")]
    names = sorted(name for name in found[0][0] if name in boxes)[:count]
    figure = Figure(figsize=(10, 2.6 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 3, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        for column, cell in enumerate(row):
            image = read_image(files[name])[0].permute(1, 2, 0).numpy()
            cell.imshow(image, extent=extent_of(image.shape[:2]))
            cell.set_axis_off()
            if column:
                maps, sizes = found[column - 1]
                draw_map(cell, maps[name], sizes[name], *cells_of(bags), width=1.8)
        for box in boxes[name]:
            draw_box(row[0], box, TRUE, 1.5)
    for cell, title in zip(axes[0], ("platelets (never shown in training)", "bag loss", "SGL"), strict=True):
        cell.set_title(title)
    with naming(out / "bccd.png"):
        figure.savefig(out / "bccd.png", dpi=110)


if __name__ == "__main__":
    sys.exit(main())
