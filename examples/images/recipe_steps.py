"""The steps of recipe.py: classifier, fully convolutional network, training, maps, boxes, generated images."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common.import_torchvision import import_torchvision
from common.weights import read_weights
from features.geometry import effective_centre, geometry_of
from torch import Tensor, nn

from sgl_ops import LamSchedule, SGLLoss, diagnose, prior_bias
from sgl_ops.localization import box_iou, heatmap_to_box

SIDE = 96  # pixels of the generated images


# ---------------------------------------------------------------------------------------------------------------------
# 1. The classifier


class CutClassifier(nn.Module):
    """A classifier on the feature map of an early stage of a network of timm: a linear layer on the map's mean.

    Args:
        name: name of the model.
        stage: number of the stage: 1 is the map of stride 4 of a ResNet, 2 of stride 8, and so on.
    """

    def __init__(self, name: str, stage: int, classes: int):
        super().__init__()
        import timm

        self.features = nn.Sequential(timm.create_model(name, features_only=True, out_indices=(stage,)), OnlyItem())
        self.fc = nn.Linear(self.features[0].feature_info.channels()[0], classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.features(images).mean((2, 3)))


class OnlyItem(nn.Module):
    """The item of a list with one item."""

    def forward(self, items: list[Tensor]) -> Tensor:
        (item,) = items
        return item


def make_classifier(name: str, classes: int, weights: Path | None, cut: int | None) -> nn.Module:
    """A classifier of timm or torchvision: images (N, 3, H, W) to logits (N, classes).

    Args:
        name: ``timm/NAME`` or ``torchvision/NAME``.
        weights: a .safetensors, .pth or .pt file with a state dict. The weights of another classifier are ignored.
        cut: use the network up to this stage, for a smaller receptive field. Only for timm.
    """
    library, _, model = name.partition("/")
    import_torchvision()
    if library == "timm":
        import timm

        try:
            network = (
                timm.create_model(model, num_classes=classes) if cut is None else CutClassifier(model, cut, classes)
            )
        except RuntimeError as error:  # an unknown name
            raise ValueError(f"backbone: {name} could not be created ({error})") from None
    elif library == "torchvision" and cut is None:
        from torchvision import models

        network = models.get_model(model, num_classes=classes)
    else:
        raise ValueError(f"backbone: expected timm/NAME, or torchvision/NAME without --cut, got {name!r}, cut {cut}")
    if weights is not None:
        target = network if cut is None else network.features[0]
        own = target.state_dict()
        state = {k: v for k, v in read_weights(weights).items() if k in own and own[k].shape == v.shape}
        # the last layer of the classifier may have other classes
        head = list(own)[-2:] if cut is None else []
        absent = [k for k in own if k not in state and k not in head and not k.endswith("num_batches_tracked")]
        if absent:
            raise ValueError(
                f"weights: {weights} does not fit {name}: {len(absent)} of {len(own)} are missing, e.g. {absent[:2]}"
            )
        target.load_state_dict(state, strict=False)
    return network


# ---------------------------------------------------------------------------------------------------------------------
# 2. The fully convolutional network


class FullyConvolutional(nn.Module):
    """A classifier without its global average pooling: logits (N, C, h, w) of images (N, 3, H, W).

    The last linear layer becomes a 1x1 convolution with the same weights. The mean of a map is the classifier's logit.

    Args:
        classifier: a classifier of timm or torchvision that ends in global average pooling, optional dropout, and one
            linear layer. It is copied.
        example: images (N, 3, H, W) to check that the mean of the map is the output of the classifier.

    Raises:
        ValueError: this check fails, because the network has other last layers.
    """

    def __init__(self, classifier: nn.Module, example: Tensor):
        super().__init__()
        linear = [module for module in classifier.modules() if isinstance(module, nn.Linear)][-1]
        self.features = features_of(copy.deepcopy(classifier))
        self.head = nn.Conv2d(linear.in_features, linear.out_features, 1)
        self.eval()
        with torch.no_grad():
            self.head.weight.copy_(linear.weight[:, :, None, None])
            self.head.bias.copy_(linear.bias)
            expected = classifier.eval()(example)
            features = self.features(example)
            if features.dim() != 4 or features.shape[1] != linear.in_features:
                raise ValueError(f"classifier: expected features (N, {linear.in_features}, h, w), got {features.shape}")
            difference = (self.head(features).mean((2, 3)) - expected).abs().max()
        if not difference < 1e-3:
            raise ValueError(f"classifier: the mean of its map differs from its output by {difference:.3g}")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


class TimmFeatures(nn.Module):
    """The part of a classifier of timm before its global pooling."""

    def __init__(self, classifier: nn.Module):
        super().__init__()
        classifier.reset_classifier(0, "")
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.forward_features(images)


def features_of(classifier: nn.Module) -> nn.Module:
    """The part of a classifier before its global pooling: images (N, 3, H, W) to features (N, D, h, w)."""
    if hasattr(classifier, "forward_features"):
        return TimmFeatures(classifier)
    if hasattr(classifier, "features"):  # torchvision: DenseNet, MobileNet, EfficientNet
        last = [nn.ReLU()] if type(classifier).__name__ == "DenseNet" else []  # its forward calls this as a function
        return nn.Sequential(classifier.features, *last)
    if hasattr(classifier, "avgpool"):  # torchvision: ResNet and its relatives
        return nn.Sequential(*(part for name, part in classifier.named_children() if name not in ("avgpool", "fc")))
    raise ValueError(f"classifier: expected one of timm or torchvision, got {type(classifier).__name__}")


# ---------------------------------------------------------------------------------------------------------------------
# 3. Training


def train(
    model: nn.Module, images: Tensor, labels: Tensor, criterion: nn.Module, epochs: int, lr: float, batch_size: int = 32
) -> None:
    """Trains ``model`` on images (N, 3, H, W) and labels (N, C) with SGLLoss and LamSchedule."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=1e-2)
    schedule = LamSchedule.pretrained(criterion.lam, rise=20, window=len(images)) if hasattr(criterion, "lam") else None
    model.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        for batch in torch.randperm(len(images)).split(batch_size):
            logits = model(flipped(images[batch]))
            if schedule is not None:
                with torch.no_grad():
                    criterion.lam = schedule.step(criterion.pooling(logits), labels[batch])
            loss = criterion(logits, labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(batch)
        if epoch % 3 == 0 or epoch == epochs:
            lam = f", lam {criterion.lam:.2f}" if schedule is not None else ""
            print(f"  epoch {epoch}: loss {total / len(images):.3f}{lam}", flush=True)
    model.eval()


def flipped(images: Tensor) -> Tensor:
    """Each image mirrored with probability 1/2."""
    mirror = torch.rand(len(images), 1, 1, 1) < 0.5
    return torch.where(mirror, images.flip(3), images)


# ---------------------------------------------------------------------------------------------------------------------
# 4. Maps and boxes


@torch.no_grad()
def heat_maps(model: nn.Module, images: Tensor) -> Tensor:
    """Logits (N, C, h, w) of all images."""
    return torch.cat([model(part) for part in images.split(64)])


def first_cell(model: FullyConvolutional, side: int) -> float:
    """The centre of the first cell of the map, in cells from the edge of the image: 0.5 / 32 for a whole ResNet.

    Args:
        side: side of the images in pixels.
    """
    stride = geometry_of(model, "features", side).stride
    return effective_centre(model, "features", side, stride) / stride


def boxes_of(logits: Tensor, size: tuple[int, int], first: float) -> np.ndarray:
    """Boxes x, y, w, h in pixels (N, 4) from logits (N, h, w): the peak's component above half of the maximum.

    Args:
        first: centre of the first cell, in cells from the edge of the image.
    """
    return np.stack(
        [
            heatmap_to_box(heat_map, size, 0.5, mode="bilinear", side=1, first=first, relative=True)
            for heat_map in torch.sigmoid(logits).numpy()
        ]
    )


def report(
    title: str, logits: Tensor, labels: Tensor, true_boxes: Tensor, pooling: str | nn.Module, first: float
) -> np.ndarray:
    """Prints the findings of :func:`sgl_ops.diagnose`. Prints and returns the fraction of boxes found at each IoU.

    Args:
        first: centre of the first cell, in cells from the edge of the image.
    """
    print(f"\n{title}")
    print(diagnose(logits, labels, pooling=pooling, names=["square"]))
    positive = labels[:, 0] == 1
    found = boxes_of(logits[positive, 0], (SIDE, SIDE), first)
    overlap = box_iou(found, true_boxes[positive].numpy())
    accuracy = np.array([(overlap > least).mean() for least in (0.1, 0.3, 0.5)])
    print("share of boxes with IoU > 0.1, 0.3, 0.5: " + ", ".join(f"{a:.2f}" for a in accuracy))
    return accuracy


# ---------------------------------------------------------------------------------------------------------------------
# Images


def generated_images(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (N, 3, 96, 96), labels (N, 1) and boxes (N, 4): half of the images have a square with a fine grating.

    Negative images have a square of the same brightness without the grating, so brightness does not give the label.
    """
    generator = torch.Generator().manual_seed(seed)
    images = F.interpolate(torch.randn(count, 3, 12, 12, generator=generator), SIDE, mode="bilinear") * 0.5
    images += torch.randn(count, 3, SIDE, SIDE, generator=generator) * 0.3
    labels = torch.arange(count).remainder(2).float().unsqueeze(1)
    boxes = torch.zeros(count, 4)
    grating = torch.where(torch.arange(SIDE) % 4 < 2, 1.0, -1.0)
    for i in range(count):
        side = int(torch.randint(20, 36, (), generator=generator))
        x, y = torch.randint(0, SIDE - side, (2,), generator=generator).tolist()
        images[i, :, y : y + side, x : x + side] += 0.3
        if labels[i]:
            images[i, :, y : y + side, x : x + side] += grating[:side]
            boxes[i] = torch.tensor([x, y, side, side])
    return images, labels, boxes


def run(args: argparse.Namespace) -> None:
    """All steps of the recipe, with the options of recipe.py."""
    torch.manual_seed(args.seed)
    images, labels, _ = generated_images(args.images, args.seed)
    test_images, test_labels, test_boxes = generated_images(100, args.seed + 1000)

    classifier = make_classifier(args.backbone, 1, args.weights, None if args.cut < 0 else args.cut)
    print("1. classifier: one logit per image")
    train(classifier, images, labels, nn.BCEWithLogitsLoss(), args.epochs, 3e-3)
    print("2. fully convolutional: one logit per cell, the same mean")
    model = FullyConvolutional(classifier, images[:2])
    logits = heat_maps(model, test_images)
    report("the map of the classifier (CAM)", logits, test_labels, test_boxes, "mean_logits", first_cell(model, SIDE))
    with torch.no_grad():  # the classifier expects a positive mean, the bag loss a few positive cells
        model.head.bias.copy_(torch.minimum(model.head.bias, prior_bias(labels, share=0.1)))
    print("\n3. SGLLoss")
    train(model, images, labels, SGLLoss(lam=args.lam, pooling="max"), 2 * args.epochs, 1e-3)
    logits = heat_maps(model, test_images)
    report("the map after SGLLoss", logits, test_labels, test_boxes, "max", first_cell(model, SIDE))
