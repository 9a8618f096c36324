"""Generates chest radiographs with findings.

Contents of the images and their reasons:

- A chest has a body, two lungs, a heart, a spine, ribs, clavicles and vessels. Their sizes and positions vary between
  patients and are equal in the images of one patient. Exposure and noise differ between images. In AP views the heart
  is larger and the contrast is lower than in PA views.
- Each class has a finding with its own appearance, position and size. The boxes of the eight classes with boxes are
  about as large as the real ones: a nodule has 48 to 96 of 1024 pixels, an infiltration 180 to 350, a large heart 420
  to 520, always in the same place. The contrast varies by a factor of three, down to findings that are hidden by the
  vessels. Some findings are visible in a small patch (nodule, the streaks of an atelectasis). Some are visible
  at an edge (pneumothorax, effusion), and some only in the whole image (cardiomegaly, emphysema). So no receptive field
  fits all.
  Mass and nodule differ only in size and outline.
- The box encloses the area in which the finding has more than half of its strength. An image has at most one finding
  per class, so that every finding can have a box. In the test list every finding of the eight classes has a box; in the
  training list none has one.
- Some structures are not findings: electrodes (round, as large as a nodule, with a hole), catheters, side markers,
  crossings of ribs, and faint nipples on both sides.
- The classes are imbalanced, from 20 percent (Infiltration) down to 3 (Hernia). Some findings occur together (Effusion
  with Atelectasis, Cardiomegaly with Edema, Pneumonia with Infiltration), so that a label alone does not determine
  which appearance belongs to it.
- Patients have one to eight images. Some findings remain in the same place in later images, so a split by image would
  leak information. The test list has a fifth of the patients. It has more findings and more AP views, as the real one.
- The files have three properties of the real ones. Two images in a hundred are RGBA. The last line of a list has no
  newline. The box list names the class Infiltration "Infiltrate".

The images do not look real to a radiologist. Results on them say nothing about patients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image

from images.nih import BOX_SIDE, CLASSES

# separate random streams: these numbers follow the seed (a final 0 would have no effect)
PATIENT, IMAGE, FINDING, FILE, PLAN, TABLES = range(1, 7)

Array = np.ndarray


class Canvas:
    """Shapes on a square image of ``size`` pixels, in coordinates of BOX_SIDE pixels. All arrays are (size, size)."""

    def __init__(self, size: int):
        self.size = size
        self.scale = BOX_SIDE / size
        self.x = ((np.arange(size, dtype=np.float32) + 0.5) * self.scale)[None, :]
        self.y = self.x.T

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, soft: float, angle: float = 0.0) -> Array:
        """An ellipse: 1 inside, 0 outside, 1/2 on the outline. ``soft``: width of the edge in pixels."""
        x, y = self.x - cx, self.y - cy
        u = (x * np.cos(angle) + y * np.sin(angle)) / rx
        v = (y * np.cos(angle) - x * np.sin(angle)) / ry
        return step((1 - np.hypot(u, v)) * (min(rx, ry) / soft))

    def line(self, distance: Array, width: float) -> Array:
        """A line: 1 where ``distance`` is 0, falling to 0 within ``width`` pixels."""
        return np.exp(-0.5 * np.square(distance / max(width, self.scale / 2)))

    def noise(self, rng: np.random.Generator, cell: float) -> Array:
        """Smooth noise with standard deviation 1 and spots of about ``cell`` pixels, equal for every image size."""
        count = max(int(np.ceil(BOX_SIDE / cell)), 2)
        grid = Image.fromarray(rng.standard_normal((count, count)).astype(np.float32))
        return 1.5 * np.asarray(grid.resize((self.size, self.size), Image.Resampling.BICUBIC))


def step(x: Array) -> Array:
    return 1 / (1 + np.exp(-4 * np.clip(x, -20, 20)))


class Chest(NamedTuple):
    """The anatomy of a patient, in pixels of 1024: lungs (2, 4) and heart (4,) as centre and half axes."""

    lungs: Array
    heart: Array
    rib_start: float
    rib_distance: float
    rib_bend: float
    stout: float


def draw_patient(rng: np.random.Generator) -> Chest:
    cy, rx, ry = rng.uniform(470, 530), rng.uniform(135, 170), rng.uniform(280, 340)
    apart = rx + rng.uniform(40, 60)
    middle = rng.uniform(495, 529)
    lungs = [[middle + side * apart, cy + rng.uniform(-10, 10), rx, ry * rng.uniform(0.96, 1.04)] for side in (-1, 1)]
    heart = [middle + rng.uniform(30, 60), cy + rng.uniform(110, 150), rng.uniform(105, 140), rng.uniform(115, 150)]
    return Chest(
        np.array(lungs), np.array(heart), rng.uniform(190, 240), rng.uniform(62, 80), rng.uniform(0.7, 1.3),
        rng.uniform(0.9, 1.1),
    )  # fmt: skip


# The findings: functions that return the change of the image, mostly between 0 and 1, and the area, both (size, size).

Finding = Callable[[Canvas, Chest, np.random.Generator], tuple[Array, Array]]


def _place(chest: Chest, rng: np.random.Generator, low: float, high: float) -> tuple[float, float, int]:
    """A random point in a lung, between ``low`` and ``high`` of its height (0: top, 1: bottom), and the lung."""
    side = int(rng.integers(2))
    cx, cy, rx, ry = chest.lungs[side]
    v = 2 * rng.uniform(low, high) - 1
    return cx + 0.75 * rx * np.sqrt(1 - v**2) * rng.uniform(-1, 1), cy + v * ry, side


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def nodule(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    x, y, _ = _place(chest, rng, 0.15, 0.85)
    r = rng.uniform(22, 52)
    where = canvas.ellipse(x, y, r, r * rng.uniform(0.85, 1.1), 10, rng.uniform(0, 3))
    return where, where


def mass(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    x, y, _ = _place(chest, rng, 0.15, 0.8)
    r = _log_uniform(rng, 60, 150)
    where = canvas.ellipse(x, y, 0.8 * r, 0.8 * r, 14)
    for angle in rng.uniform(0, 2 * np.pi, 4):  # lobes
        lobe = canvas.ellipse(x + 0.5 * r * np.cos(angle), y + 0.5 * r * np.sin(angle), 0.5 * r, 0.5 * r, 14)
        where = np.maximum(where, lobe)
    return where * (1 + 0.08 * canvas.noise(rng, 40)), where


def atelectasis(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    x, y, _ = _place(chest, rng, 0.5, 0.85)
    angle = rng.uniform(-0.35, 0.35)
    where = canvas.ellipse(x, y, _log_uniform(rng, 55, 160), _log_uniform(rng, 36, 75), 16, angle)
    across = (canvas.y - y) * np.cos(angle) - (canvas.x - x) * np.sin(angle)
    streaks = 0.5 + 0.5 * np.sin(across / rng.uniform(6.5, 9) + 0.6 * canvas.noise(rng, 90))
    return where * (0.35 + 0.9 * streaks), where


def infiltration(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    x, y, _ = _place(chest, rng, 0.25, 0.8)
    where = canvas.ellipse(x, y, _log_uniform(rng, 78, 200), _log_uniform(rng, 75, 200), 45, rng.uniform(0, 3))
    return where * (0.45 + 0.45 * np.abs(canvas.noise(rng, 26))), where


def pneumonia(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    x, y, _ = _place(chest, rng, 0.4, 0.8)
    where = canvas.ellipse(x, y, _log_uniform(rng, 84, 190), _log_uniform(rng, 82, 200), 40, rng.uniform(0, 3))
    airways = canvas.line(canvas.noise(rng, 75), 0.16)  # along the zeros of a noise
    return where * (1 - 0.9 * airways), where


def consolidation(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    x, y, _ = _place(chest, rng, 0.3, 0.7)
    where = canvas.ellipse(x, y, rng.uniform(80, 140), rng.uniform(80, 150), 40)
    where = where * step((y + rng.uniform(0, 30) - canvas.y) / 12)  # it ends at a fissure
    return where, where


def effusion(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    cx, cy, rx, ry = chest.lungs[rng.integers(2)]
    outward = np.sign(cx - 512)
    height = _log_uniform(rng, 0.25, 1.1) * ry
    depth = cy + ry - height
    surface = depth - 0.4 * height * np.clip(outward * (canvas.x - cx) / rx, -0.6, 1)  # it climbs the chest wall
    where = canvas.ellipse(cx, cy, rx, 1.02 * ry, 16) * step((canvas.y - surface) / 22)
    return where, where


def pneumothorax(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    cx, cy, rx, ry = chest.lungs[rng.integers(2)]
    outward = np.sign(cx - 512)
    lung = canvas.ellipse(cx, cy, rx, ry, 12)
    shrunk = rng.uniform(0.5, 0.85)
    rest = (cx - outward * rx * (1 - shrunk) * 0.8, cy + ry * (1 - shrunk) * 1.1, rx * shrunk, ry * shrunk)
    inside = canvas.ellipse(*rest, 12)
    above = lung * step((cy + rng.uniform(-0.5, 0.3) * ry - canvas.y) / 25)
    above = above * step((outward * (canvas.x - cx) - rng.uniform(-1, 0.4) * rx) / 20)
    where = above * (1 - inside)
    pleura = above * canvas.line(4 * inside * (1 - inside) - 1, 0.2)  # where inside is 1/2
    return 0.6 * pleura - where, where


def cardiomegaly(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    cx, cy, _, _ = chest.heart
    where = canvas.ellipse(cx - 10, cy - 25, rng.uniform(205, 275), rng.uniform(152, 225), 22, 0.15)
    return where, where


def edema(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    width = rng.uniform(110, 150)
    wings = [canvas.ellipse(cx - 0.3 * rx * np.sign(cx - 512), cy, width, 1.5 * width, 70)
             for cx, cy, rx, _ in chest.lungs]  # fmt: skip
    where = np.maximum(*wings)
    return where * (0.7 + 0.3 * canvas.noise(rng, 50)), where


def emphysema(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    where = np.maximum(*(canvas.ellipse(cx, cy + 25, 1.08 * rx, 1.1 * ry, 20) for cx, cy, rx, ry in chest.lungs))
    return -0.6 * where, where


def fibrosis(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    lungs = np.maximum(*(canvas.ellipse(*lung, 20) for lung in chest.lungs))
    where = lungs * step((canvas.y - chest.lungs[0, 1] - rng.uniform(0, 80)) / 60)
    return where * canvas.line(canvas.noise(rng, 38), 0.2), where


def hernia(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    x, y, _, _ = chest.heart
    x, y, r = x + rng.uniform(-60, 20), y + rng.uniform(20, 60), rng.uniform(55, 95)
    where = canvas.ellipse(x, y, r, r, 10)
    return where - 1.8 * canvas.ellipse(x, y - 0.25 * r, 0.7 * r, 0.5 * r, 8), where  # a bubble of air in it


def pleural_thickening(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> tuple[Array, Array]:
    cx, cy, rx, ry = chest.lungs[rng.integers(2)]
    outward = np.sign(cx - 512)
    inside = canvas.ellipse(cx - outward * rng.uniform(14, 30), cy, rx, ry, 8)
    where = canvas.ellipse(cx, cy, rx, ry, 8) * (1 - inside) * step(outward * (canvas.x - cx) / 20)
    where = where * step((rng.uniform(120, 260) - np.abs(canvas.y - cy)) / 20)
    return where, where


DRAW: dict[str, tuple[Finding, float]] = {  # largest strength; the smallest is a third of it
    "Atelectasis": (atelectasis, 0.30), "Cardiomegaly": (cardiomegaly, 1.0), "Consolidation": (consolidation, 0.35),
    "Edema": (edema, 0.22), "Effusion": (effusion, 0.36), "Emphysema": (emphysema, 0.22), "Fibrosis": (fibrosis, 0.24),
    "Hernia": (hernia, 0.24), "Infiltration": (infiltration, 0.30), "Mass": (mass, 0.34), "Nodule": (nodule, 0.34),
    "Pleural_Thickening": (pleural_thickening, 0.34), "Pneumonia": (pneumonia, 0.36),
    "Pneumothorax": (pneumothorax, 0.24),
}  # fmt: skip


# the image


def draw_chest(canvas: Canvas, chest: Chest, rng: np.random.Generator, ap: bool) -> Array:
    """A chest without findings, with values between about 0 and 1."""
    x, y = canvas.x, canvas.y
    middle = float(chest.lungs[:, 0].mean())
    image = 0.08 + 0.62 * canvas.ellipse(middle, 640, 450 * chest.stout, 640, 40)
    lungs = np.maximum(*(canvas.ellipse(*lung, 14) for lung in chest.lungs))
    image = image - 0.42 * lungs
    cx, cy, rx, ry = chest.heart
    image = np.maximum(image, 0.66 * canvas.ellipse(cx, cy, rx * (1.12 if ap else 1), ry, 16, 0.3))
    image = image + 0.12 * canvas.line(x - middle, 30)
    for k in range(9):
        arc = chest.rib_start + k * chest.rib_distance + chest.rib_bend * 0.0011 * np.square(x - middle)
        image = image + lungs * 0.07 * canvas.line(y - arc, 11) + lungs * 0.03 * canvas.line(y - 2 * arc + 0.8 * y, 9)
    for side in (-1, 1):
        clavicle = 205 - side * 0.22 * (x - middle)
        image = image + 0.10 * canvas.line(y - clavicle, 14) * step(side * (x - middle) / 40)
    vessels = canvas.noise(rng, 22) + canvas.noise(rng, 48) + canvas.noise(rng, 110)
    near = np.exp(-np.square((x - middle) / 260))
    image = image + lungs * (0.012 + 0.02 * near) * vessels
    return image + 0.02 * canvas.noise(rng, 300)


def draw_distractors(canvas: Canvas, chest: Chest, rng: np.random.Generator) -> Array:
    """Draws structures that are not findings."""
    x, y = canvas.x, canvas.y
    extra = np.zeros((canvas.size, canvas.size), dtype=np.float32)
    if rng.random() < 0.35:
        for _ in range(rng.integers(1, 5)):
            cx, cy, r = rng.uniform(150, 874), rng.uniform(200, 850), rng.uniform(20, 30)
            disc = canvas.ellipse(cx, cy, r, r, 5) - 0.9 * canvas.ellipse(cx, cy, 0.45 * r, 0.45 * r, 5)
            extra = np.maximum(extra, 0.32 * disc)
    if rng.random() < 0.3:
        start, slope, bend = rng.uniform(300, 724), rng.uniform(-0.6, 0.6), rng.uniform(-40, 40)
        course = start + slope * (y - 100) + bend * np.sin(y / 120)
        extra = np.maximum(extra, 0.28 * canvas.line(x - course, 5) * step((rng.uniform(500, 900) - y) / 10))
    if rng.random() < 0.15:
        r = rng.uniform(16, 24)
        for lung in chest.lungs:
            cx = lung[0] + 0.45 * lung[2] * np.sign(lung[0] - 512)
            extra = extra + 0.10 * canvas.ellipse(cx, lung[1] + 0.5 * lung[3], r, r, 10)
    if rng.random() < 0.8:
        cx, cy = (rng.uniform(40, 120) if rng.random() < 0.5 else rng.uniform(904, 984)), rng.uniform(40, 120)
        stroke = np.maximum((abs(x - cx) < 7) & (abs(y - cy) < 30), (abs(y - cy - 30) < 7) & (abs(x - cx - 15) < 22))
        extra = np.maximum(extra, 0.7 * stroke)
    return extra


def draw_image(
    size: int, seed: int, patient: int, follow_up: int, findings: list[str], ap: bool
) -> tuple[Array, dict[str, tuple[float, float, float, float]]]:
    """Grey values (size, size) uint8, and the box (x, y, width, height) of every finding, in pixels of 1024."""
    canvas = Canvas(size)
    chest = draw_patient(np.random.default_rng((seed, PATIENT, patient)))
    rng = np.random.default_rng((seed, IMAGE, patient, follow_up))
    image = draw_chest(canvas, chest, rng, ap)
    boxes = {}
    for name in findings:
        draw, most = DRAW[name]
        number = CLASSES.index(name)
        # seeded by patient and class: the next image of the patient has the same finding, with another strength
        added, where = draw(canvas, chest, np.random.default_rng((seed, FINDING, patient, number)))
        strength = most * np.random.default_rng((seed, FINDING, patient, number, 1 + follow_up)).uniform(1 / 3, 1)
        # the density of a large heart does not depend on what is behind it
        image = image + added * (np.clip(0.66 - image, 0, None) if name == "Cardiomegaly" else strength)
        boxes[name] = box_of(where > 0.5 * where.max(), canvas.scale)
    image = image + draw_distractors(canvas, chest, rng)
    image = np.clip(image, 0, None) ** rng.uniform(0.8, 1.25) * rng.uniform(0.85, 1.15)
    if ap:
        image = 0.1 + 0.85 * image
    image = image + rng.uniform(0.008, 0.025) * rng.standard_normal(image.shape, dtype=np.float32)
    return np.clip(255 * image, 0, 255).astype(np.uint8), boxes


def box_of(where: Array, scale: float) -> tuple[float, float, float, float]:
    """(x, y, width, height) of the True pixels, times ``scale``."""
    columns, rows = np.flatnonzero(where.any(0)), np.flatnonzero(where.any(1))
    return (
        scale * float(columns[0]), scale * float(rows[0]),
        scale * float(columns[-1] + 1 - columns[0]), scale * float(rows[-1] + 1 - rows[0]),
    )  # fmt: skip
