"""The frontier as a picture: in characters for a terminal, and as SVG. No dependency."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeprune.search.run import Row, SearchResult

COLUMNS, LINES = 64, 14
WIDTH, HEIGHT, MARGIN = 640, 400, 60
# name, mark in text, colour, radius
KINDS = (("uniform", "o", "#8a8f98", 4), ("frontier", "*", "#2563c9", 5), ("chosen", "X", "#c2410c", 7))
Point = tuple[float, float, int, str]  # milliseconds, percent, kind, title


def points(result: SearchResult) -> list[Point]:
    """Return what is drawn; later ones lie on top. Predicted latencies, so that all are of one kind."""
    chosen = [] if result.chosen is None else [result.chosen]
    groups: Sequence[Sequence[Row]] = (result.uniform, result.frontier, chosen)
    return [
        (row.predicted_ms, 100 * row.top1, kind, row.label or row.stages or "")
        for kind, rows in enumerate(groups)
        for row in rows
    ]


def _bounds(drawn: Sequence[Point]) -> tuple[float, float, float, float]:
    xs, ys = [p[0] for p in drawn], [p[1] for p in drawn]
    wide, high = (max(xs) - min(xs)) or 1.0, (max(ys) - min(ys)) or 1.0
    return min(xs), min(ys), wide, high


def as_text(result: SearchResult) -> str:
    """Return accuracy over latency in characters."""
    drawn = points(result)
    left, low, wide, high = _bounds(drawn)
    grid = [[" "] * COLUMNS for _ in range(LINES)]
    for x, y, kind, _ in drawn:
        grid[LINES - 1 - round((y - low) / high * (LINES - 1))][round((x - left) / wide * (COLUMNS - 1))] = KINDS[kind][
            1
        ]
    labels = [f"{low + high * (LINES - 1 - i) / (LINES - 1):6.2f}" if i % 4 == 0 else " " * 6 for i in range(LINES)]
    rows = [f"{label} |{''.join(line).rstrip()}" for label, line in zip(labels, grid, strict=True)]
    end = f"{left + wide:.3g} ms"
    axis = f"{' ' * 8}{f'{left:.3g}':<{COLUMNS - len(end)}}{end}"
    legend = ", ".join(f"{mark} {name}" for name, mark, _, _ in KINDS)
    return "\n".join(["top-1 (%)", *rows, f"{' ' * 7}+{'-' * COLUMNS}", axis, f"{' ' * 8}{legend}"])


def as_svg(result: SearchResult) -> str:
    """Return accuracy over latency as one SVG file."""
    drawn = points(result)
    left, low, wide, high = _bounds(drawn)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            MARGIN + (x - left) / wide * (WIDTH - 2 * MARGIN),
            HEIGHT - MARGIN - (y - low) / high * (HEIGHT - 2 * MARGIN),
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(result.request.export.model)}, {escape(result.request.export.method)}: "
        "accuracy against latency</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        f'<path d="M{MARGIN} {MARGIN / 2}V{HEIGHT - MARGIN}H{WIDTH - MARGIN / 2}" fill="none" stroke="#444"/>',
    ]
    for i in range(5):
        x, y = left + wide * i / 4, low + high * i / 4
        (px, _), (_, py) = place(x, low), place(left, y)
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - MARGIN + 18}" text-anchor="middle">{x:.3g}</text>')
        parts.append(f'<text x="{MARGIN - 8}" y="{py + 4:.1f}" text-anchor="end">{y:.2f}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{HEIGHT - 18}" text-anchor="middle">predicted latency (ms)</text>')
    parts.append(f'<text x="{MARGIN}" y="{MARGIN / 2 - 8}">top-1 on calibration images (%)</text>')
    line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y, kind, _ in drawn if kind == 1)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{KINDS[1][2]}"/>')
    for x, y, kind, title in drawn:
        px, py = place(x, y)
        parts.append(
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="{KINDS[kind][3]}" fill="{KINDS[kind][2]}">'
            f"<title>{escape(title)}: {x:.3g} ms, {y:.2f} %</title></circle>"
        )
    for i, (name, _, colour, radius) in enumerate(KINDS):
        x = WIDTH - 2 * MARGIN - 20
        y = HEIGHT - MARGIN - 60 + 18 * i
        parts.append(
            f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{colour}"/><text x="{x + 12}" y="{y + 4}">{name}</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"
