"""SVG as text: elements, scales and axes. Colours are classes of the page's style, so that both themes have theirs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

FONT = 12.5  # pixels of a label; a drawing is never scaled down by more than a few percent
CHAR = 0.56  # mean width of a character as a share of the font's size


def tag(name: str, *children: str, text: str | None = None, **attributes: object) -> str:
    """Return an element; a trailing underscore of an attribute's name is dropped, others become hyphens.

    Args:
        name: of the element.
        children: elements, as they are.
        text: escaped.
        attributes: None leaves one out; numbers are written with two digits at most.
    """
    shown = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(number(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = ("" if text is None else escape(text)) + "".join(children)
    return f"<{name}{shown}>{inside}</{name}>" if inside else f"<{name}{shown}/>"


def number(value: object) -> str:
    """Return a coordinate without needless digits, anything else as text."""
    if isinstance(value, float):
        return f"{value:.2f}".rstrip("0").rstrip(".") or "0"
    return str(value)


def picture(key: str, width: float, height: float, title: str, description: str, *children: str) -> str:
    """Return a whole drawing with its name and description for those who do not see it."""
    return tag(
        "svg",
        tag("title", text=title, id=f"{key}-t"),
        tag("desc", text=description, id=f"{key}-d"),
        *children,
        class_="plot",
        viewBox=f"0 0 {number(float(width))} {number(float(height))}",
        width=float(width),
        height=float(height),
        role="img",
        aria_labelledby=f"{key}-t {key}-d",
    )


def label(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "ink") -> str:
    """Return a text; `kind` is a class of the style."""
    return tag("text", text=text, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=kind)


def text_width(text: str, size: float = FONT) -> float:
    """Return about how wide a text is, in pixels."""
    return len(text) * size * CHAR


def clip(text: str, width: float) -> str:
    """Return the text, cut where it would be wider."""
    most = max(4, int(width / (FONT * CHAR)))
    return text if len(text) <= most else f"{text[: most - 1]}…"


def marker(
    kind: str,
    x: float,
    y: float,
    size: float = 6.0,
    *,
    hollow: bool = False,
    title: str | None = None,
    colour: str | None = None,
) -> str:
    """Return the sign of a graph: a square for dense, a circle for pruned, a diamond for random, else a triangle.

    `colour` is the class that colours it, by default the kind's own.
    """
    tip = [] if title is None else [tag("title", text=title)]
    class_ = f"{'line' if hollow else 'fill'} {colour or kind}"
    s = size
    if kind == "dense":
        return tag("rect", *tip, x=x - s * 0.9, y=y - s * 0.9, width=1.8 * s, height=1.8 * s, rx=1.5, class_=class_)
    if kind == "pruned":
        return tag("circle", *tip, cx=x, cy=y, r=s, class_=class_)
    diamond = ((0, -s * 1.2), (s * 1.2, 0), (0, s * 1.2), (-s * 1.2, 0))
    triangle = ((0, -s * 1.1), (s * 1.1, s * 0.9), (-s * 1.1, s * 0.9))
    corners = diamond if kind == "random" else triangle
    points = " ".join(f"{number(x + dx)},{number(y + dy)}" for dx, dy in corners)
    return tag("polygon", *tip, points=points, class_=class_)


@dataclass(frozen=True)
class Scale:
    """A linear map from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """Return the pixel of a value."""
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Return round values inside the range, about `count` of them."""
        step = nice_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, last + 1)]


def fit(values: Sequence[float], start: float, end: float, *, zero: bool = False, room: float = 0.06) -> Scale:
    """Return a scale that holds the values with some room.

    Args:
        values: at least one.
        start: pixel of the lowest value.
        end: pixel of the highest.
        zero: begin at 0.
        room: share of the range left free at each end that is not 0.
    """
    low, high = min(values), max(values)
    if zero:
        low = min(0.0, low)
    spread = (high - low) or abs(high) or 1.0
    below = 0.0 if zero and low == 0 else spread * room
    return Scale(low - below, high + spread * room, start, end)


def nice_step(rough: float) -> float:
    """Return 1, 2 or 5 times a power of ten that is not below `rough`."""
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))


def tick_text(value: float, step: float) -> str:
    """Return a tick with as many digits as its step needs."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step < 1 else 0
    return f"{value:.{digits}f}"


def x_axis(scale: Scale, top: float, bottom: float, title: str, *, count: int = 6) -> str:
    """Return grid lines, tick labels and the name of a horizontal axis."""
    ticks = scale.ticks(count)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    lines = [tag("path", d=f"M{number(scale(t))} {number(top)}V{number(bottom)}", class_="grid") for t in ticks]
    texts = [label(scale(t), bottom + 17, tick_text(t, step), anchor="middle", kind="muted") for t in ticks]
    name = label((scale.start + scale.end) / 2, bottom + 36, title, anchor="middle", kind="muted")
    return "".join([*lines, *texts, name])


def y_axis(scale: Scale, left: float, right: float, title: str, *, count: int = 5) -> str:
    """Return grid lines, tick labels and, above the axis, its name; `scale.end` is the top."""
    ticks = scale.ticks(count)
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    lines = [tag("path", d=f"M{number(left)} {number(scale(t))}H{number(right)}", class_="grid") for t in ticks]
    texts = [label(left - 7, scale(t) + 4, tick_text(t, step), anchor="end", kind="muted") for t in ticks]
    return "".join([*lines, *texts, label(2, scale.end - 12, title, kind="muted")])


def free_place(
    taken: Sequence[tuple[float, float, float]], start: float, end: float, wanted: float, low: float, high: float
) -> float:
    """Return the height nearest to the wanted one where a label lies on none of those taken.

    Args:
        taken: (from, to, height) of labels and signs.
        start: left end of the label.
        end: its right end.
        wanted: height of its middle; it lies there when nothing is free.
        low: least height it may have.
        high: largest one.
    """
    rows = [(a, b, y) for a, b, y in taken if a < end and b > start]
    for distance in range(0, 200, 3):
        for at in (wanted - distance, wanted + distance):
            if low <= at <= high and all(abs(at - y) >= FONT + 2 for _, _, y in rows):
                return at
    return wanted
