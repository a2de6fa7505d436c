"""Pictures of the page: SVG curves and latents as PNG, written by hand, with their words.

Colours and dashes are classes (`s0`, `s1` ..), set in page.css for a light and a dark screen.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from eqst.webpage.markup import Html, tag

WIDTH, HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 16, 10, 40
STYLES = 8  # classes s0 .. s7 of page.css


class Curve(NamedTuple):
    """One line: a label for the legend, its points, its style, and an interval or None."""

    label: str
    x: np.ndarray
    y: np.ndarray
    style: int
    low: np.ndarray | None = None
    high: np.ndarray | None = None
    points: bool = False


class Axis(NamedTuple):
    """A label, the range, the places of ticks, whether it is logarithmic."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, values: np.ndarray) -> np.ndarray:
        """0 .. 1 along the axis."""
        if self.log:
            return np.log(values / self.low) / math.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)


def frequency_axis(low_hz: float, high_hz: float, *, few: bool = False) -> Axis:
    """Logarithmic, with decades (and 2 and 5 of them, unless there is room for few)."""
    steps = (1,) if few else (1, 2, 5)
    ticks = [step * 10.0**power for power in range(1, 5) for step in steps]
    return Axis(
        "Hz" if few else "frequency (Hz)",
        low_hz,
        high_hz,
        tuple(x for x in ticks if low_hz <= x <= high_hz),
        log=True,
    )


def even_axis(label: str, low: float, high: float, *, steps: int = 5, zero: bool = False) -> Axis:
    """Linear, with ticks at 1, 2 or 5 times a power of ten, widened to end on them."""
    low = min(low, 0.0) if zero else low
    wide = max(high - low, 1e-9)
    unit = 10.0 ** math.floor(math.log10(wide / steps))
    step = next(x * unit for x in (1, 2, 5, 10) if x * unit >= wide / steps)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    last = max(last, first + 1)
    ticks = tuple(round(k * step, 10) for k in range(first, last + 1))
    return Axis(label, ticks[0], ticks[-1], ticks)


def plot(
    name: str,
    curves: Sequence[Curve],
    x: Axis,
    y: Axis,
    *,
    title: str,
    words: str,
    width: int = WIDTH,
    height: int = HEIGHT,
) -> Html:
    """A plot as inline SVG that a screen reader takes for one image with a title and words.

    Args:
      name: unique on the page.
      curves: drawn in order, the first below.
      title: what it is.
      words: what it shows, in numbers.
    """
    box_w, box_h = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM

    def at_x(values: np.ndarray) -> np.ndarray:
        return _LEFT + box_w * x.place(np.asarray(values, float))

    def at_y(values: np.ndarray) -> np.ndarray:
        place = np.clip(y.place(np.asarray(values, float)), -0.02, 1.02)
        return _TOP + box_h * (1.0 - place)

    bottom = _TOP + box_h
    parts: list[Html] = []
    for value in y.ticks:
        line = f"{at_y(np.array(value)):.1f}"
        zero = " zero" if value == 0 and y.low < 0 else ""
        parts.append(tag("path", d=f"M{_LEFT} {line}h{box_w}", cls="grid" + zero))
        parts.append(
            _label(f"{value:g}".replace("-", "\u2212"), _LEFT - 6, float(line) + 4.5, "end")
        )
    for value in x.ticks:
        column = f"{at_x(np.array(value)):.1f}"
        parts.append(tag("path", d=f"M{column} {_TOP}v{box_h}", cls="grid"))
        parts.append(_label(_short(value), float(column), bottom + 16, "middle"))
    parts.append(_label(x.label, _LEFT + box_w / 2, height - 6, "middle"))
    if y.label:
        turn = f"rotate(-90 12 {_TOP + box_h / 2:.0f})"
        parts.append(_label(y.label, 12, _TOP + box_h / 2, "middle", transform=turn))
    for curve in curves:
        style = f"s{curve.style % STYLES}"
        xs, ys = at_x(curve.x), at_y(curve.y)
        if curve.low is not None and curve.high is not None:
            outline = np.r_[at_y(curve.low), at_y(curve.high)[::-1]]
            parts.append(
                tag("path", d=_path(np.r_[xs, xs[::-1]], outline) + "Z", cls=f"band {style}")
            )
        parts.append(tag("path", d=_path(xs, ys), cls=f"line {style}"))
        if curve.points or len(xs) == 1:
            parts += [
                tag("circle", cx=f"{a:.1f}", cy=f"{b:.1f}", r="3", cls=f"dot {style}")
                for a, b in zip(xs, ys, strict=True)
            ]
    return tag(
        "svg",
        tag("title", title, id=f"{name}-t"),
        tag("desc", words, id=f"{name}-d"),
        parts,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_labelledby=f"{name}-t {name}-d",
    )


def legend(curves: Sequence[tuple[str, int]]) -> Html:
    """What the lines mean: labels and styles, for one plot or several alike."""
    items = []
    for label, style in curves:
        line = tag("path", d="M1 6h30", cls=f"line s{style % STYLES}")
        sample = tag("svg", line, viewBox="0 0 32 12", aria_hidden="true", cls="sample")
        items.append(tag("li", sample, " ", label))
    return tag("ul", items, cls="legend")


def _label(words: str, x: float, y: float, anchor: str, **attributes: str) -> Html:
    return tag("text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, **attributes)


def _path(xs: np.ndarray, ys: np.ndarray) -> str:
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(xs, ys, strict=True))


def _short(value: float) -> str:
    return f"{value / 1000:g}k" if value >= 1000 else f"{value:g}"


# ------------------------------------------------------------------------------ latents


def latent_png(values_CM: np.ndarray, limit: float) -> bytes:
    """Signed values as a picture, a pixel each: blue below 0, near white at 0, red above.

    Args:
      values_CM: [C, M] rows from top to bottom.
      limit: magnitude of full colour, > 0.

    Returns:
      A PNG of M x C pixels, 8 bits of red, green and blue.
    """
    level_CM1 = np.clip(np.asarray(values_CM, float) / limit, -1.0, 1.0)[..., None]
    middle = np.array([246.0, 244.0, 240.0])
    low, high = np.array([16.0, 78.0, 139.0]), np.array([165.0, 15.0, 30.0])
    ends = np.where(level_CM1 < 0, low, high)
    # The root brings out what is small: most of a latent is.
    colour_CM3 = middle + (ends - middle) * np.sqrt(np.abs(level_CM1))
    return _png(np.round(colour_CM3).astype(np.uint8))


def scale_png() -> bytes:
    """The colours of `latent_png` from -limit to +limit, a strip of 256 x 1 pixels."""
    return latent_png(np.linspace(-1.0, 1.0, 256)[None], 1.0)


def image(png: bytes, words: str, **attributes: str) -> Html:
    """A PNG inside the page, with a text in its place."""
    address = "data:image/png;base64," + base64.b64encode(png).decode("ascii")
    return tag("img", src=address, alt=words, **attributes)


def _png(colour_YX3: np.ndarray) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    height, width, _ = colour_YX3.shape
    rows = b"".join(b"\0" + row.tobytes() for row in colour_YX3)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )
