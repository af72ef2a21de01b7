"""Plots of a benchmark as SVG, the same bytes from the same results on every machine.

Written here and not by a plotting library, whose bytes change with its version, its fonts and its backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

#: Colour-blind safe (Okabe & Ito 2008), one a group.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5d6673")

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 76, 250, 46, 58
#: Room for a letter of a name, and for what is around the name.
LETTER, AROUND = 7, 20
#: From one name at the end of a curve to the next one below.
LINE = 14

_STYLE = (
    "svg{background:#fff;font:13px system-ui,sans-serif}text{fill:#1a1d23}.dim{fill:#5d6673}"
    ".grid{stroke:#dde1e7}.axis{stroke:#5d6673}.title{font-weight:600;font-size:15px}"
)


@dataclass(frozen=True)
class Point:
    """x, y, the interval of y, and the group that gives the colour."""

    label: str
    group: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    label: str
    group: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Box:
    """Percentiles 5, 25, 50, 75 and 95 of a score over films."""

    label: str
    group: str
    percentiles: tuple[float, float, float, float, float]


@dataclass
class _Canvas:
    title: str
    width: int = WIDTH
    height: int = HEIGHT
    right: int = RIGHT
    parts: list[str] = field(default_factory=list)

    def add(self, element: str) -> None:
        self.parts.append(element)

    def text(
        self, x: float, y: float, words: str, *, anchor: str = "start", kind: str = "", turn: bool = False
    ) -> None:
        turned = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turn else ""
        name = f' class="{kind}"' if kind else ""
        self.add(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}{turned}>{escape(words)}</text>')

    def line(
        self, x1: float, y1: float, x2: float, y2: float, *, kind: str = "", stroke: str = "", width: float = 1
    ) -> None:
        look = f' class="{kind}"' if kind else f' stroke="{stroke}" stroke-width="{width:g}"'
        self.add(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{look}/>')

    def legend(self, groups: Sequence[str]) -> None:
        for n, group in enumerate(groups):
            x, y = self.width - self.right + 24, TOP + 8 + 22 * n
            self.add(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{_colour(groups, group)}"/>')
            self.text(x + 20, y + 11, group)

    def svg(self) -> str:
        self.text(LEFT, 26, self.title, kind="title")
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" aria-label="{escape(self.title)}"><style>{_STYLE}</style>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def scatter(title: str, points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Scores with their intervals over a size on a logarithmic axis, each point named."""
    canvas = _Canvas(title)
    groups = list(dict.fromkeys(point.group for point in points))
    x = _log_axis(canvas, [point.x for point in points], x_label)
    y = _y_axis(canvas, [value for point in points for value in (point.low, point.high)], y_label)
    for point in points:
        colour, at = _colour(groups, point.group), x(point.x)
        canvas.line(at, y(point.low), at, y(point.high), stroke=colour, width=1.5)
        canvas.add(f'<circle cx="{at:.1f}" cy="{y(point.y):.1f}" r="5" fill="{colour}"/>')
        canvas.text(at + 8, y(point.y) - 5, point.label, kind="dim")
    canvas.legend(groups)
    return canvas.svg()


def curves(title: str, lines: Sequence[Line], x_label: str, y_label: str) -> str:
    """Scores by epoch, a line each, named at its end."""
    right = max(RIGHT, _room([line.label for line in lines]))
    canvas = _Canvas(title, WIDTH - RIGHT + right, max(560, TOP + BOTTOM + LINE * len(lines)), right)
    groups = list(dict.fromkeys(line.group for line in lines))
    xs = [x for line in lines for x, _ in line.points]
    low, high = min(xs), max(xs)
    span = (high - low) or 1

    def x(value: float) -> float:
        return LEFT + (value - low) / span * (canvas.width - LEFT - canvas.right)

    for tick in sorted({round(low + span * n / 5) for n in range(6)}):
        canvas.text(x(tick), canvas.height - BOTTOM + 20, f"{tick:g}", anchor="middle", kind="dim")
    canvas.text((LEFT + canvas.width - canvas.right) / 2, canvas.height - 14, x_label, anchor="middle")
    y = _y_axis(canvas, [value for line in lines for _, value in line.points], y_label)
    ends = _spread([(y(line.points[-1][1]), line) for line in lines], LINE, canvas.height - BOTTOM)
    for line in lines:
        path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in line.points)
        canvas.add(f'<polyline points="{path}" fill="none" stroke="{_colour(groups, line.group)}" stroke-width="1.8"/>')
    for place, line in ends:
        end = line.points[-1]
        edge = canvas.width - canvas.right + 16
        canvas.line(x(end[0]), y(end[1]), edge, place, kind="grid")
        look = f'style="fill:{_colour(groups, line.group)}"'
        canvas.add(f'<text x="{edge + 4:.1f}" y="{place + 4:.1f}" {look}>{escape(line.label)}</text>')
    return canvas.svg()


def boxes(title: str, rows: Sequence[Box], x_label: str) -> str:
    """Boxes from the 25th to the 75th percentile with the median, whiskers to the 5th and the 95th."""
    canvas = _Canvas(title, height=TOP + BOTTOM + 22 * len(rows))
    groups = list(dict.fromkeys(row.group for row in rows))
    left, right = max(210, _room([row.label for row in rows])), canvas.width - 170
    low = min(row.percentiles[0] for row in rows)
    ticks = _ticks(low, max(row.percentiles[4] for row in rows))

    def x(value: float) -> float:
        return left + (value - ticks[0]) / (ticks[-1] - ticks[0]) * (right - left)

    bottom = canvas.height - BOTTOM
    for tick in ticks:
        canvas.line(x(tick), TOP, x(tick), bottom, kind="grid")
        canvas.text(x(tick), bottom + 20, _short(tick), anchor="middle", kind="dim")
    canvas.text((left + right) / 2, canvas.height - 14, x_label, anchor="middle")
    for n, row in enumerate(rows):
        y, colour = TOP + 22 * n + 11, _colour(groups, row.group)
        p5, p25, p50, p75, p95 = (x(value) for value in row.percentiles)
        canvas.text(left - 10, y + 4, row.label, anchor="end")
        canvas.line(p5, y, p95, y, stroke=colour)
        canvas.add(
            f'<rect x="{p25:.1f}" y="{y - 6}" width="{max(p75 - p25, 0.5):.1f}" height="12" fill="{colour}" '
            f'fill-opacity="0.35" stroke="{colour}"/>'
        )
        canvas.line(p50, y - 6, p50, y + 6, stroke=colour, width=2.5)
    for n, group in enumerate(groups):
        y = TOP + 8 + 22 * n
        canvas.add(f'<rect x="{right + 24}" y="{y}" width="12" height="12" fill="{_colour(groups, group)}"/>')
        canvas.text(right + 44, y + 11, group)
    return canvas.svg()


def intervals(title: str, points: Sequence[Point], y_label: str) -> str:
    """Scores with their intervals: `Point.label` names the place on the horizontal axis, the group the colour; x is not
    used."""
    groups = list(dict.fromkeys(point.group for point in points))
    labels = list(dict.fromkeys(point.label for point in points))
    canvas = _Canvas(title, max(WIDTH, LEFT + RIGHT + LETTER * max(map(len, labels)) * len(labels)))
    y = _y_axis(canvas, [value for point in points for value in (point.low, point.high)], y_label)
    step = (canvas.width - LEFT - RIGHT) / len(labels)
    for n, label in enumerate(labels):
        canvas.text(LEFT + step * (n + 0.5), canvas.height - BOTTOM + 20, label, anchor="middle", kind="dim")
    for point in points:
        place = (groups.index(point.group) + 0.5) / len(groups) * 0.6 + 0.2
        at, colour = LEFT + step * (labels.index(point.label) + place), _colour(groups, point.group)
        canvas.line(at, y(point.low), at, y(point.high), stroke=colour, width=2)
        canvas.add(f'<circle cx="{at:.1f}" cy="{y(point.y):.1f}" r="5" fill="{colour}"/>')
    canvas.legend(groups)
    return canvas.svg()


def _room(labels: Sequence[str]) -> int:
    """The width that the longest of these names takes beside a plot."""
    return AROUND + LETTER * max(map(len, labels))


def _colour(groups: Sequence[str], group: str) -> str:
    return COLOURS[groups.index(group) % len(COLOURS)]


def _y_axis(canvas: _Canvas, values: Sequence[float], label: str) -> Callable[[float], float]:
    ticks = _ticks(min(values), max(values))
    top, bottom = TOP, canvas.height - BOTTOM

    def y(value: float) -> float:
        return bottom - (value - ticks[0]) / (ticks[-1] - ticks[0]) * (bottom - top)

    for tick in ticks:
        canvas.line(LEFT, y(tick), canvas.width - canvas.right, y(tick), kind="grid")
        canvas.text(LEFT - 8, y(tick) + 4, _short(tick), anchor="end", kind="dim")
    canvas.text(20, (top + bottom) / 2, label, anchor="middle", turn=True)
    return y


def _log_axis(canvas: _Canvas, values: Sequence[float], label: str) -> Callable[[float], float]:
    low, high = math.log(min(values) * 0.85), math.log(max(values) * 1.35)

    def x(value: float) -> float:
        return LEFT + (math.log(value) - low) / (high - low) * (canvas.width - LEFT - RIGHT)

    decade = 10.0 ** math.floor(low / math.log(10))
    while decade <= math.exp(high):
        for tick in (decade, 2 * decade, 5 * decade):
            if low <= math.log(tick) <= high:
                canvas.line(x(tick), TOP, x(tick), canvas.height - BOTTOM, kind="grid")
                canvas.text(x(tick), canvas.height - BOTTOM + 20, f"{tick:g}", anchor="middle", kind="dim")
        decade *= 10
    canvas.text((LEFT + canvas.width - canvas.right) / 2, canvas.height - 14, label, anchor="middle")
    return x


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers from below `low` to above `high`."""
    rough = max((high - low) / 5, 1e-6)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def _short(value: float) -> str:
    return f"{value:.4f}".rstrip("0").rstrip(".")


def _spread(places: list[tuple[float, Line]], gap: float, bottom: float) -> list[tuple[float, Line]]:
    """The same places from top to bottom, moved apart until no two names overlap."""
    ordered = sorted(places, key=lambda item: (item[0], item[1].label))
    spread: list[tuple[float, Line]] = []
    for place, line in ordered:
        spread.append((max(place, spread[-1][0] + gap) if spread else place, line))
    over = max(0.0, spread[-1][0] - bottom) if spread else 0.0
    return [(place - over, line) for place, line in spread]
