"""A page of results in one self-contained file: tables, curves and a gallery.

The functions return HTML or SVG as text. They escape every text once. Text that is already HTML is a ``Markup``.

The charts are not drawn by matplotlib, for three reasons. Their colours follow the light or dark scheme of the page.
They have a quarter of the size. They take a millisecond instead of half a second; a report has up to 20 charts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np
from common.drawing import FOUND, OPACITY, TRUE

from sgl_ops.localization import overlay


class Markup(str):
    """Text that is already HTML."""


class Line(NamedTuple):
    """A curve: name, x and y of equal length, the number of its colour, whether it is dashed."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    dashed: bool = False


class Span(NamedTuple):
    """A value with its interval, in a row of ``intervals``."""

    low: float
    value: float
    high: float
    colour: int


def text(value: object) -> Markup:
    return value if isinstance(value, Markup) else Markup(escape(str(value)))


def number(value: float | None, digits: int = 3) -> str:
    """A number as text; NaN and None become a dash."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def paragraph(content: str, kind: str = "") -> Markup:
    return Markup(f'<p class="{text(kind)}">{text(content)}</p>' if kind else f"<p>{text(content)}</p>")


def table(header: Sequence[object], rows: Sequence[Sequence[object]], caption: str = "") -> Markup:
    """A table. Its first column names the rows and stays visible if the page is narrower than the table."""
    head = "".join(f'<th scope="col">{text(cell)}</th>' for cell in header)
    body = "".join(
        f'<tr><th scope="row">{text(row[0])}</th>' + "".join(f"<td>{text(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    about = f'<p class="caption">{text(caption)}</p>' if caption else ""
    return Markup(
        f'{about}<div class="wide" tabindex="0" role="group" aria-label="{text(caption or header[0])}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def details(summary: str, *content: Markup) -> Markup:
    return Markup(f"<details><summary>{text(summary)}</summary>{''.join(content)}</details>")


def section(title: str, *content: Markup) -> Markup:
    return Markup(f"<section><h2>{text(title)}</h2>{''.join(content)}</section>")


def side_by_side(*content: Markup) -> Markup:
    return Markup(f'<div class="charts">{"".join(content)}</div>')


def legend(names: Sequence[tuple[str, int, bool]]) -> Markup:
    """A legend of entries (name, colour, dashed)."""
    items = "".join(
        f'<li><svg class="key" viewBox="0 0 24 8" aria-hidden="true"><line x1="0" y1="4" x2="24" y2="4" '
        f'class="c{colour}{" dashed" if dashed else ""}"/></svg>{text(name)}</li>'
        for name, colour, dashed in names
    )
    return Markup(f'<ul class="legend">{items}</ul>')


def chart(lines: Sequence[Line], title: str, x_name: str, y_name: str) -> Markup:
    """A chart of curves with x and y in 0 ... 1. Points that are NaN are left out."""
    width, height, left, top, right, bottom = 360, 260, 44, 10, 12, 40
    across, down = width - left - right, height - top - bottom

    def x_of(value: float) -> float:
        return left + across * value

    def y_of(value: float) -> float:
        return top + down * (1 - value)

    parts = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        x, y = x_of(tick), y_of(tick)
        parts.append(f'<line class="grid" x1="{x:g}" y1="{top}" x2="{x:g}" y2="{top + down}"/>')
        parts.append(f'<line class="grid" x1="{left}" y1="{y:g}" x2="{left + across}" y2="{y:g}"/>')
        parts.append(f'<text x="{x:g}" y="{top + down + 15}" text-anchor="middle">{tick:g}</text>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:g}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<text x="{left + across / 2:g}" y="{height - 6}" text-anchor="middle">{text(x_name)}</text>')
    parts.append(
        f'<text transform="translate(12 {top + down / 2:g}) rotate(-90)" text-anchor="middle">{text(y_name)}</text>'
    )
    for line in lines:
        points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if not (math.isnan(x) or math.isnan(y))]
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="c{line.colour}{" dashed" if line.dashed else ""}" points="{path}"/>')
    keys = legend([(line.name, line.colour, line.dashed) for line in lines])
    return Markup(
        f'<figure class="chart"><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{text(title)}">{"".join(parts)}</svg>{keys}</figure>'
    )


def intervals(rows: Sequence[tuple[str, Sequence[Span]]], title: str, low: float, high: float) -> Markup:
    """A chart with one row per name. Each span is a bar from low to high with a dot at the value."""
    width, left, right, line = 360, 124, 12, 22
    height = line * len(rows) + 26

    def x_of(value: float) -> float:
        return left + (width - left - right) * (min(max(value, low), high) - low) / (high - low)

    parts = []
    step = 0.1 if high - low < 0.65 else 0.2
    for tick in np.arange(math.ceil(round(low / step, 6)), math.floor(round(high / step, 6)) + 1) * step:
        x = x_of(tick)
        parts.append(f'<line class="grid" x1="{x:.1f}" y1="4" x2="{x:.1f}" y2="{height - 20}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick:.1f}</text>')
    for k, (name, spans) in enumerate(rows):
        middle = line * k + line / 2 + 4
        parts.append(f'<text x="{left - 8}" y="{middle + 4:g}" text-anchor="end">{text(name)}</text>')
        for j, span in enumerate(spans):
            y = middle + 7 * (j - (len(spans) - 1) / 2)
            if not math.isnan(span.low):
                parts.append(
                    f'<line class="c{span.colour}" x1="{x_of(span.low):.1f}" y1="{y:g}" '
                    f'x2="{x_of(span.high):.1f}" y2="{y:g}"/>'
                )
            if not math.isnan(span.value):
                parts.append(f'<circle class="c{span.colour}" cx="{x_of(span.value):.1f}" cy="{y:g}" r="3.5"/>')
    return Markup(
        f'<figure class="chart"><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{text(title)}">{"".join(parts)}</svg></figure>'
    )


def bullets(items: Sequence[str]) -> Markup:
    return Markup(f"<ul>{''.join(f'<li>{text(item)}</li>' for item in items)}</ul>")


def page(title: str, lead: str, *content: Markup) -> str:
    """The whole page. Its content security policy prevents browsers from loading anything from elsewhere."""
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f'<meta name="color-scheme" content="light dark"><title>{text(title)}</title><style>{STYLE}</style></head>'
        f"<body><main><h1>{text(title)}</h1><p>{text(lead)}</p>{''.join(content)}</main><script>{SCRIPT}</script>"
        "</body></html>\n"
    )


STYLE = """
:root { --ground: #fff; --raised: #f5f5f3; --ink: #1c1c1a; --faint: #5e5e59; --rule: #d9d9d4; --map: MAP;
  --c0: #c14f00; --c1: #0072b2; --c2: #007a58; --c3: #b0548a; --c4: #777; --c5: #8a6500; }
@media (prefers-color-scheme: dark) { :root { --ground: #161615; --raised: #222220; --ink: #ecece8; --faint: #a5a59f;
  --rule: #3b3b37; --c0: #ff8f45; --c1: #5ab4f0; --c2: #3cc79c; --c3: #e39ac5; --c4: #a0a09a; --c5: #e6b540; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 76rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
.note { color: var(--faint); font-size: .9rem; }
.warning { border-left: 4px solid var(--c0); padding-left: .7rem; }
.wide { overflow-x: auto; margin: .2rem 0 .8rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
.caption { color: var(--faint); font-size: .875rem; margin: 1rem 0 0; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--rule); text-align: right; white-space: nowrap; }
thead th { vertical-align: bottom; font-weight: 600; white-space: normal; }
th:first-child { position: sticky; left: 0; background: var(--ground); text-align: left; white-space: normal;
  min-width: 7.5rem; }
tbody th { font-weight: 400; }
details { margin: .6rem 0; }
summary { cursor: pointer; padding: .3rem 0; }
figure { margin: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1.2rem; }
.chart figcaption { font-size: .9rem; }
.chart > svg { width: 100%; max-width: 34rem; display: block; }
.chart > svg text { font-size: 11px; fill: var(--faint); }
.grid { stroke: var(--rule); stroke-width: 1; }
polyline, line { fill: none; stroke-width: 2; }
.dashed { stroke-dasharray: 5 4; }
.c0 { stroke: var(--c0); } .c1 { stroke: var(--c1); } .c2 { stroke: var(--c2); }
.c3 { stroke: var(--c3); } .c4 { stroke: var(--c4); } .c5 { stroke: var(--c5); }
circle.c0 { fill: var(--c0); } circle.c1 { fill: var(--c1); } circle { stroke: none; }
.legend { list-style: none; margin: .2rem 0; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1rem;
  font-size: .85rem; }
.key { width: 24px; height: 8px; margin-right: .4rem; vertical-align: middle; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.controls { grid-column: 1 / -1; display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center;
  position: sticky; top: 0; background: var(--ground); padding: .5rem 0; z-index: 1; }
.controls[hidden] { display: none; }
select, input { font: inherit; }
.card { background: var(--raised); border-radius: 6px; padding: .5rem; font-size: .8rem; content-visibility: auto;
  contain-intrinsic-size: auto 15rem; }
.card[hidden] { display: none; }
.card figcaption { color: var(--faint); margin-top: .2rem; overflow-wrap: anywhere; }
.views { display: flex; gap: .4rem; }
.view { flex: 1 1 0; min-width: 0; }
.view b { display: block; }
.view svg { width: 100%; display: block; margin-bottom: .2rem; background: #000; cursor: zoom-in; }
.card.large { grid-column: 1 / -1; }
.card.large .view svg { cursor: zoom-out; }
@media (max-width: 40rem) { th, td { padding: .25rem .35rem; } .card.large .views { flex-direction: column; } }
.map { opacity: var(--map); image-rendering: pixelated; }
.own, :root[data-range=own] .fixed { display: none; }
:root[data-range=own] .own { display: inline; }
.none { fill: #fff; stroke: #000; stroke-width: .25em; paint-order: stroke; text-anchor: middle; font-weight: 600; }
.key-none { background: #000; color: #fff; font-weight: 600; padding: 0 .4em; border-radius: 3px; }
ul { max-width: 46rem; padding-left: 1.2rem; margin: .5rem 0; }
li { margin: .2rem 0; }
.legend li { margin: 0; }
.smooth .map { image-rendering: auto; }
rect { fill: none; stroke-width: 2px; vector-effect: non-scaling-stroke; }
rect.edge { stroke: #000; stroke-width: 4px; opacity: .6; }
rect.true { stroke: TRUE; }
rect.found { stroke: FOUND; stroke-dasharray: 7 4; }
.swatch { display: inline-block; width: 8rem; height: .8rem; vertical-align: middle;
  background: linear-gradient(to right, SCALE), #777; }
.box { display: inline-block; width: 1.1em; height: .8em; vertical-align: middle; border: 3px solid TRUE; }
.box.found { border: 3px dashed FOUND; }
"""
STYLE = STYLE.replace("TRUE", TRUE).replace("FOUND", FOUND).replace("MAP", f"{OPACITY / 100:g}")
_SCALE = overlay(np.linspace(0, 1, 9)[None], (1, 9), opacity=OPACITY / 100)[0].tolist()
STYLE = STYLE.replace("SCALE", ", ".join(f"rgb({r} {g} {b} / {a / 255:.2f})" for r, g, b, a in _SCALE))

SCRIPT = """
const root = document.documentElement, all = (selector) => [...document.querySelectorAll(selector)];
for (const form of all(".controls")) form.hidden = false;
for (const input of all(".opacity")) input.oninput = () => {
  root.style.setProperty("--map", input.value / 100);
  for (const other of all(".opacity")) other.value = input.value;
};
for (const input of all(".range")) input.onchange = () => {
  root.dataset.range = input.value;
  for (const other of all(".range")) other.value = input.value;
};
for (const card of all(".card")) {
  const views = card.querySelector(".views");
  views.onclick = () => card.classList.toggle("large");
  views.onkeydown = (event) => event.key === "Enter" && views.onclick();
}
const group = document.getElementById("group"), hits = document.getElementById("hits");
if (group) {
  const cards = all(".filtered .card");
  const show = () => {
    let shown = 0;
    for (const card of cards) {
      card.hidden = (group.value && card.dataset.group !== group.value)
        || (hits && hits.value && card.dataset.hit !== hits.value);
      shown += !card.hidden;
    }
    document.getElementById("count").textContent = `${shown} of ${cards.length}`;
  };
  group.onchange = show;
  if (hits) hits.onchange = show;
  show();
}
"""
