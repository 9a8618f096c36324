"""Galleries of a page: images with maps, true boxes and predicted boxes."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from images.page import OPACITY, Markup, text
from sgl_ops.localization import overlay, seen_cells


class View(NamedTuple):
    """The prediction of a network for an image: its name, the map (h, w), the box (4,) (NaN: none), a caption.

    ``box`` may also be several boxes (m, 4). ``first``: the centre of the first cell of the map, in cells from the edge
    of the image.
    """

    name: str
    heatmap: np.ndarray
    box: np.ndarray
    caption: str
    first: float = 0.5


class Card(NamedTuple):
    """An image of the gallery: (size, size) uint8, with the true ``boxes`` (m, 4) in an image of ``side`` pixels.

    The gallery can be filtered by ``group`` and by ``best``, the IoU of the first view. ``frame``: the part x, y,
    width, height of the image that is shown; None: all. ``aspect``: the width of the shown part, divided by its height.
    """

    title: str
    group: str
    image: np.ndarray
    side: int
    boxes: np.ndarray
    views: Sequence[View]
    best: float
    frame: Sequence[int] | None = None
    aspect: float = 1.0


def data_uri(pixels: np.ndarray, kind: str) -> str:
    """A data URI of an image (h, w) or (h, w, 3) uint8. ``kind`` is png or jpeg."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 80} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _rects(boxes: np.ndarray, kind: str) -> str:
    """The frames of boxes (m, 4)."""
    places = (f'x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"' for x, y, w, h in boxes)
    return "".join(f'<rect class="edge" {place}/><rect class="{kind}" {place}/>' for place in places)


def _found(view: View, frame: Sequence[int]) -> str:
    """The frames of the boxes of a view, or the words "no box" in the shown part ``frame`` of the image."""
    boxes = np.atleast_2d(view.box)
    boxes = boxes[~np.isnan(boxes).any(1)]
    if len(boxes):
        return _rects(boxes, "found")
    x, y, width, height = frame
    size = 0.08 * min(width, height)
    return f'<text class="none" x="{x + width / 2:g}" y="{y + 0.96 * height:g}" font-size="{size:g}">no box</text>'


def _map(view: View, side: int) -> str:
    """The map over an image of ``side`` pixels, scaled to 0 ... 1 and to its own range. CSS shows one of the two.

    The cells at the edges are extended to the edges of the image. The frame of the picture clips the rest.
    """
    more = math.ceil(abs(view.first - 0.5))
    height, width = view.heatmap.shape
    x, y, w, h = (
        f"{side * cells / count:.6g}"
        for cells, count in (
            (view.first - 0.5 - more, width),
            (view.first - 0.5 - more, height),
            (width + 2 * more, width),
            (height + 2 * more, height),
        )
    )
    seen = view.heatmap[np.ix_(*seen_cells((height, width), (side, side), view.first))]
    low, high = float(seen.min()), float(seen.max())
    padded = np.pad(view.heatmap, more, mode="edge")
    layers = []
    for kind, limits in (("fixed", (0.0, 1.0)), ("own", (low, high) if low < high else None)):
        pixels = overlay(padded, padded.shape, limits=limits, opacity=1.0)
        layers.append(
            f'<image class="map {kind}" href="{data_uri(pixels, "png")}" x="{x}" y="{y}" width="{w}" height="{h}" '
            'preserveAspectRatio="none"/>'
        )
    return "".join(layers)


#: A form for the opacity of the maps and the range of their colours. Every such form changes all maps of the page.
MAP_CONTROLS = Markup(
    f'<label>Opacity of the map <input class="opacity" type="range" min="0" max="100" value="{OPACITY}"></label> '
    '<label>Colours span <select class="range"><option value="fixed">0 to 1</option>'
    '<option value="own">each map\'s own range</option></select></label>'
)


#: A selection of cards by the IoU of the first view.
HIT_CONTROL = (
    '<label>Box of the first network <select id="hits"><option value="">all</option>'
    '<option value="1">IoU &gt; 0.3</option><option value="0">IoU ≤ 0.3</option></select></label> '
)


def gallery(cards: Sequence[Card], smooth: bool, name: str, controls: str = "filters") -> Markup:
    """The cards of the gallery ``name``, with a form that changes all maps of the page.

    ``controls`` is "map", "groups", "filters" or "" (no form). The form of "groups" and "filters" also selects cards by
    group. The form of "filters" also selects them by whether the box of the first network has an IoU > 0.3.
    ``smooth``: the browser interpolates the maps. Each image is stored once for all views of its card.
    """
    form, filtered = MAP_CONTROLS, controls in ("groups", "filters")
    if filtered:
        options = "".join(f"<option>{text(group)}</option>" for group in sorted({card.group for card in cards}))
        form = Markup(
            f'<label>Class <select id="group"><option value="">all</option>{options}</select></label> '
            f'{HIT_CONTROL if controls == "filters" else ""}{MAP_CONTROLS} <output id="count"></output>'
        )
    parts = [f'<form class="controls" hidden>{form}</form>'] if controls else []
    for k, card in enumerate(cards):
        true = _rects(card.boxes, "true")
        frame = (0, 0, card.side, card.side) if card.frame is None else card.frame
        box = " ".join(f"{value:g}" for value in frame)
        # an image whose two sides were scaled to a square is shown with its own aspect ratio
        stretched = card.aspect * frame[3] != frame[2]
        shape = f' preserveAspectRatio="none" style="aspect-ratio: {card.aspect:.4g}"' if stretched else ""
        views = []
        for j, view in enumerate(card.views):
            base = (
                f'<image id="{name}{k}" href="{data_uri(card.image, "jpeg")}" width="{card.side}" '
                f'height="{card.side}"/>'
                if j == 0
                else f'<use href="#{name}{k}"/>'
            )
            views.append(
                f'<div class="view"><svg viewBox="{box}"{shape} role="img" '
                f'aria-label="{text(card.title)}, {text(view.name)}: {text(view.caption)}">{base}'
                f"{_map(view, card.side)}{true}{_found(view, frame)}"
                f"</svg><b>{text(view.name)}</b> {text(view.caption)}</div>"
            )
        parts.append(
            f'<figure class="card" data-group="{text(card.group)}" data-hit="{int(card.best > 0.3)}">'
            f'<div class="views" tabindex="0">{"".join(views)}</div>'
            f"<figcaption>{text(card.title)}</figcaption></figure>"
        )
    kinds = " ".join(["gallery", *(["smooth"] if smooth else []), *(["filtered"] if filtered else [])])
    return Markup(f'<div class="{kinds}">{"".join(parts)}</div>')


_FOUND_KEY = '<span class="box found"></span> found box &ensp; <span class="key-none">no box</span>'
_MAP_KEY = '0 <span class="swatch"></span> 1 probability of the class; a higher probability is more opaque'
#: The legend of the colours of the gallery.
KEY = Markup(
    f'<p class="note"><span class="box"></span> true box &ensp; {_FOUND_KEY} the map has no pixel above T_p, or '
    f"opening removes them all &ensp; {_MAP_KEY}</p>"
)
#: The same for images without labels, whose boxes also depend on the gate.
KEY_WITHOUT_LABELS = Markup(
    f'<p class="note">{_FOUND_KEY} the class is not predicted, the map has no pixel above T_p, or opening removes them '
    f"all &ensp; {_MAP_KEY}</p>"
)
