"""The drawings of a report. Each takes its width, so that phones get one of their own in place of a shrunken one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeprune.bench.html import svg
from edgeprune.bench.html.svg import label, marker, number, tag
from edgeprune.bench.layers import LayersResult
from edgeprune.bench.report import format_ratio
from edgeprune.bench.result import RunnerResult
from edgeprune.bench.stats import Ratio

GRID = 90  # places where a density is estimated
SHARE_SHOWN = 0.98  # of the samples the axis holds; those above are counted at its end
MIN_DENSITY = 8  # samples below which no density is drawn


def kind_of(runner: str) -> str:
    """Return the class that colours a graph: "dense", "pruned", "random", "float" or "naive"."""
    return runner.partition(" ")[0]


def distributions(runners: Sequence[RunnerResult], *, key: str, width: float, dots: int = 240) -> str:
    """Return the wall times of every graph: density, quartiles, median, and a dot per sample.

    Args:
        runners: a row each.
        key: unique in the page.
        width: pixels.
        dots: most samples drawn of each; the evenly spread ones in order of time.
    """
    row, top, left, right = 78.0, 6.0, 8.0, width - 14
    every = np.concatenate([np.asarray(r.wall_ms) for r in runners])
    cap = max(float(np.quantile(every, SHARE_SHOWN)), max(r.median_wall_ms for r in runners) * 1.05)
    shown = every[every <= cap]
    scale = svg.fit([float(shown.min()), float(shown.max())], left, right, room=0.03)
    bottom = top + row * len(runners)
    parts = [svg.x_axis(scale, top, bottom, "wall time of a run (ms)", count=4 if width < 500 else 8)]
    for i, runner in enumerate(runners):
        parts.append(_distribution(runner, scale, top + i * row, row, dots))
    told = "; ".join(
        f"{r.name}: median {r.median_wall_ms:.3f} ms, quartiles {_quartile_words(r)}, n {r.n}" for r in runners
    )
    return svg.picture(key, width, bottom + 44, "Distributions of the wall time", told, *parts)


def _quartile_words(runner: RunnerResult) -> str:
    low, high = np.quantile(runner.wall_ms, [0.25, 0.75])
    return f"{low:.3f} to {high:.3f} ms"


def _distribution(runner: RunnerResult, scale: svg.Scale, top: float, row: float, dots: int) -> str:
    kind, base = kind_of(runner.name), top + row - 22
    times = np.sort(np.asarray(runner.wall_ms))
    inside = times[times <= scale.high]
    parts = [tag("path", d=f"M{number(scale.start)} {number(base)}H{number(scale.end)}", class_="rule")]
    if len(inside) >= MIN_DENSITY:
        parts.append(tag("path", d=_density_path(inside, scale, base, row - 42), class_=f"area {kind}"))
    chosen = inside if len(inside) <= dots else inside[np.linspace(0, len(inside) - 1, dots).round().astype(int)]
    golden = 0.61803398875
    d = "".join(f"M{number(scale(float(t)))} {number(base + 5 + 9 * (i * golden % 1))}h0" for i, t in enumerate(chosen))
    parts.append(tag("path", d=d, class_=f"dots {kind}"))
    low, high = (scale(float(q)) for q in np.quantile(times, [0.25, 0.75]))
    end = min(high, scale.end)
    parts.append(tag("rect", x=low, y=base - 2.5, width=max(end - low, 1.0), height=5, rx=2.5, class_=f"fill {kind}"))
    middle = scale(runner.median_wall_ms)
    parts.append(tag("path", d=f"M{number(middle)} {number(base - 9)}V{number(base + 9)}", class_="median"))
    above = len(times) - len(inside)
    told = f"median {runner.median_wall_ms:.3f} ms · n {runner.n}"
    parts.append(marker(kind, scale.start + 5, top + 13, 4.5))
    parts.append(label(scale.start + 16, top + 17, runner.name, kind="ink strong"))
    parts.append(label(scale.end, top + 17, told, anchor="end", kind="ink"))
    if above:
        parts.append(label(scale.end, base - 6, f"{above} above ▸", anchor="end", kind="muted"))
    return "".join(parts)


def _density_path(values: np.ndarray, scale: svg.Scale, base: float, height: float) -> str:
    """Return the outline of a Gaussian kernel density, its highest place `height` pixels over the base."""
    q10, q25, q50, q75 = np.quantile(values, [0.1, 0.25, 0.5, 0.75])
    # what lies far above the median must not smooth the rest away: the lower half has its say too
    spreads = (float(values.std()), float(q75 - q25) / 1.34, float(q50 - q10) / 1.28)
    spread = min((s for s in spreads if s > 0), default=scale.high * 1e-3)
    width = max(0.9 * spread * len(values) ** -0.2, (scale.high - scale.low) / 400)
    at = np.linspace(scale.low, scale.high, GRID)
    density = np.exp(-0.5 * ((at[:, None] - values[None, :]) / width) ** 2).sum(1)
    density = density / density.max() * height
    line = "L".join(f"{number(scale(float(x)))} {number(base - float(y))}" for x, y in zip(at, density, strict=True))
    return f"M{number(scale.start)} {number(base)}L{line}L{number(scale.end)} {number(base)}Z"


@dataclass(frozen=True)
class SpeedRow:
    """A graph's measured speed-up over dense, beside what its operations promise."""

    name: str
    kind: str
    speedup: Ratio
    nominal: float | None
    ideal: float | None


def speedups(rows: Sequence[SpeedRow], *, key: str, width: float) -> str:
    """Return measured speed-ups with intervals, the MACs ratio and what the graphs' own MACs would give."""
    row, top, left, right = 50.0, 8.0, 12.0, width - 18
    values = [1.0]
    for r in rows:
        values += [x for x in (r.speedup.estimate, r.speedup.low, r.speedup.high, r.nominal, r.ideal) if x is not None]
    scale = svg.fit(values, left, right, room=0.05)
    bottom = top + row * len(rows)
    parts = [svg.x_axis(scale, top, bottom, "times as fast as the dense graph (x)", count=4 if width < 500 else 8)]
    parts.append(tag("path", d=f"M{number(scale(1.0))} {number(top)}V{number(bottom)}", class_="one"))
    told = []
    for i, r in enumerate(rows):
        y = top + i * row + 34
        parts.append(label(left, y - 18, r.name, kind="ink strong"))
        parts.append(label(right, y - 18, f"{format_ratio(r.speedup)} x", anchor="end"))
        if r.nominal is not None:
            tip = f"MACs ratio {r.nominal:.2f}"
            parts.append(marker("random", scale(r.nominal), y, 5, hollow=True, title=tip, colour="promise"))
        if r.ideal is not None:
            x = number(scale(r.ideal))
            parts.append(tag("path", tag("title", text=f"ideal {r.ideal:.2f}"), d=f"M{x} {y - 8}v16", class_="ideal"))
        if r.speedup.low is not None and r.speedup.high is not None:
            low, high = scale(r.speedup.low), scale(r.speedup.high)
            path = f"M{number(low)} {number(y - 5)}v10m0 -5H{number(high)}m0 -5v10"
            parts.append(tag("path", d=path, class_=f"whisker {r.kind}"))
        parts.append(marker(r.kind, scale(r.speedup.estimate), y, 5.5, title=format_ratio(r.speedup)))
        promise = [f"MACs ratio {r.nominal:.2f}"] if r.nominal is not None else []
        promise += [f"ideal {r.ideal:.2f}"] if r.ideal is not None else []
        told.append(f"{r.name}: measured {format_ratio(r.speedup)}{''.join(f', {p}' for p in promise)}")
    return svg.picture(
        key, width, bottom + 44, "Measured speed-up and what the operations promise", "; ".join(told), *parts
    )


@dataclass(frozen=True)
class Point:
    """A place in a drawing of two quantities.

    Attributes:
        name: what stands beside it.
        kind: of the graph.
        low, high: of y, an interval; None where there is none.
        x_range: from, to; None for a single value.
        linked: points of one name here are joined by a line.
    """

    name: str
    kind: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    x_range: tuple[float, float] | None = None
    linked: str | None = None
    hollow: bool = False


def on_frontier(points: Sequence[Point]) -> list[bool]:
    """Tell of each point whether no other is both at least as fast (x) and at least as good (y), and one of it more."""
    return [not any((q.x <= p.x and q.y >= p.y) and (q.x < p.x or q.y > p.y) for q in points) for p in points]


def frontier(points: Sequence[Point], *, key: str, width: float) -> str:
    """Return accuracy over latency, and the frontier: what nothing else beats in both."""
    height = 330.0 if width > 500 else 300.0
    left, right, top, bottom = 50.0, width - 16, 34.0, height - 46
    x = svg.fit([p.x for p in points], left, right, room=0.14)
    y = svg.fit([v for p in points for v in (p.low, p.y, p.high) if v is not None], bottom, top, room=0.1)
    best = on_frontier(points)
    line = sorted((p for p, b in zip(points, best, strict=True) if b), key=lambda p: p.x)
    steps = "".join(
        f"{'M' if i == 0 else 'H'}{number(x(p.x))}{' ' if i == 0 else 'V'}{number(y(p.y))}" for i, p in enumerate(line)
    )
    parts = [
        svg.x_axis(x, top, bottom, "median latency (ms)", count=4 if width < 500 else 8),
        svg.y_axis(y, left, right, "top-1 accuracy (%), bars: 95 % CI"),
        tag("path", d=f"{steps}H{number(right)}", class_="front"),
        *_points(points, x, y, hollow=[not b for b in best], right=right, top=top, bottom=bottom),
    ]
    told = "; ".join(
        f"{p.name}: {p.y:.2f} % at {p.x:.3f} ms{', on the frontier' if b else ''}"
        for p, b in zip(points, best, strict=True)
    )
    return svg.picture(key, width, height, "Accuracy against latency", told, *parts)


def tokens(points: Sequence[Point], *, key: str, width: float) -> str:
    """Return latency over the patch tokens kept at the first stage, buckets included."""
    height = 330.0 if width > 500 else 300.0
    left, right, top, bottom = 50.0, width - 16, 34.0, height - 46
    xs = [v for p in points for v in (*(p.x_range or ()), p.x)]
    x = svg.fit(xs, left, right, room=0.1)
    y = svg.fit([v for p in points for v in (p.low, p.y, p.high) if v is not None], bottom, top, zero=True, room=0.12)
    lines = []
    for name in dict.fromkeys(p.linked for p in points if p.linked is not None):
        chain = sorted((p for p in points if p.linked == name), key=lambda p: p.x)
        d = "L".join(f"{number(x(p.x))} {number(y(p.y))}" for p in chain)
        lines.append(tag("path", d=f"M{d}", class_="link"))
    parts = [
        svg.x_axis(x, top, bottom, "patch tokens kept at the first stage", count=4 if width < 500 else 8),
        svg.y_axis(y, left, right, "median latency (ms), bars to p90"),
        *lines,
        *_points(points, x, y, hollow=[p.hollow for p in points], right=right, top=top, bottom=bottom),
    ]
    told = "; ".join(f"{p.name}: {p.x:g} tokens, {p.y:.3f} ms" for p in points)
    return svg.picture(key, width, height, "Latency against tokens", told, *parts)


def _points(
    points: Sequence[Point],
    x: svg.Scale,
    y: svg.Scale,
    *,
    hollow: Sequence[bool],
    right: float,
    top: float,
    bottom: float,
) -> list[str]:
    """Return markers with intervals, and labels that lie neither on each other nor on other markers."""
    under, over = [], []
    taken = [(x(p.x) - 8, x(p.x) + 8, y(p.y)) for p in points]
    for p, empty in zip(points, hollow, strict=True):
        px, py = x(p.x), y(p.y)
        if p.low is not None or p.high is not None:
            ends = [y(p.y if v is None else v) for v in (p.low, p.high)]
            under.append(
                tag("path", d=f"M{number(px)} {number(ends[0])}V{number(ends[1])}", class_=f"whisker {p.kind}")
            )
        if p.x_range is not None:
            a, b = (x(v) for v in p.x_range)
            under.append(tag("path", d=f"M{number(a)} {number(py)}H{number(b)}", class_=f"whisker {p.kind}"))
        over.append(marker(p.kind, px, py, 6, hollow=empty, title=f"{p.name}: {p.x:g}, {p.y:g}"))
        wide = svg.text_width(p.name)
        before = px + 14 + wide > right
        start = px - 12 - wide if before else px + 12
        at = svg.free_place(taken, start, start + wide, py, top + 8, bottom - 8)
        taken.append((start, start + wide, at))
        anchor = "end" if before else "start"
        over.append(label(px - 12 if before else px + 12, at + 4, p.name, anchor=anchor, kind="ink halo"))
    return under + over


@dataclass(frozen=True)
class Bar:
    """A bar with what is written at its end."""

    group: str
    name: str
    kind: str
    value: float
    text: str


def bars(rows: Sequence[Bar], *, key: str, width: float, title: str, unit: str) -> str:
    """Return horizontal bars in groups, each with its value written at its end."""
    narrow = width < 500
    left = 12.0 if narrow else 12.0 + max(svg.text_width(r.name) for r in rows) + 14
    room = max(svg.text_width(r.text) for r in rows) + 14
    top, bar, gap = 4.0, 15.0, 4.0
    scale = svg.Scale(0.0, max(*(r.value for r in rows), 1e-12), left, width - room - 6)
    y, parts, group = top, [], None
    for r in rows:
        if r.group != group:
            y += 20 if group is None else 26
            group = r.group
            parts.append(label(12, y - 2, r.group, kind="ink strong"))
            y += 6
        if narrow:
            parts.append(label(12, y + 11, r.name, kind="muted"))
            y += 16
        else:
            parts.append(label(left - 8, y + 12, r.name, anchor="end", kind="muted"))
        long = max(scale(r.value) - left, 1.0)
        parts.append(tag("rect", x=left, y=y, width=long, height=bar, rx=3, class_=f"bar {r.kind}"))
        parts.append(label(left + long + 7, y + 12, r.text))
        y += bar + gap
    told = "; ".join(f"{r.group}{', ' if r.group else ''}{r.name}: {r.text}" for r in rows)
    return svg.picture(key, width, y + 8, f"{title} ({unit})", told, *parts)


def part_bars(layers: Sequence[LayersResult]) -> list[Bar]:
    """Return the bars of where the time went: a group per part of the network, a bar per graph."""
    parts = list(dict.fromkeys(p.part for found in layers for p in found.parts))
    rows = []
    for part in parts:
        for found in layers:
            time = next((p for p in found.parts if p.part == part), None)
            if time is not None:
                share = "" if time.share is None else f" ({100 * time.share:.1f} %)"
                rows.append(Bar(part, found.runner, kind_of(found.runner), time.ms, f"{time.ms:.3f} ms{share}"))
    return rows
