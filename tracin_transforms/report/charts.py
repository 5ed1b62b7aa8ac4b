"""Charts as inline SVG; colours come from the page's style, so they follow light and dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

_WIDTH, _HEIGHT = 640, 340
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 28, 12, 46
_PLOT_WIDTH = _WIDTH - _LEFT - _RIGHT
_PLOT_HEIGHT = _HEIGHT - _TOP - _BOTTOM


@dataclass(frozen=True, eq=False)
class Line:
    """A line of a chart.

    Attributes:
        name: For the legend.
        style: CSS class that gives the colour, e.g. ``series-1``.
        x: Shape [n], rising, within the x axis.
        y: Shape [n], within the y axis.
    """

    name: str
    style: str
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class Axis:
    """An axis of a chart.

    Attributes:
        label: What it shows.
        ticks: Where it has marks, rising; it reaches from the first to the last.
        text: How a value is written.
    """

    label: str
    ticks: tuple[float, ...]
    text: Callable[[float], str]

    def place(self, value: float) -> float:
        """Returns where a value lies on the axis, 0 to 1."""
        return (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])


def share_axis(label: str) -> Axis:
    """Returns an axis from 0 to 100 %, for values from 0 to 1."""
    return Axis(label, (0, 0.25, 0.5, 0.75, 1), lambda value: f"{100 * value:.0f} %")


def number_axis(label: str, values: np.ndarray) -> Axis:
    """Returns an axis from 0 to the largest of the values or above it, in round steps."""
    largest = float(np.max(values, initial=0)) or 1.0
    power = 10.0 ** math.floor(math.log10(largest / 4))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power * 4 >= largest * (1 - 1e-9))
    count = math.ceil(largest / step * (1 - 1e-9))
    return Axis(label, tuple(step * i for i in range(count + 1)), lambda value: f"{value:,.6g}")


def line_chart(
    lines: Sequence[Line],
    x_axis: Axis,
    y_axis: Axis,
    marks: Sequence[float],
    tip: Callable[[Line, float, float], str],
) -> Markup:
    """Returns a chart of lines.

    Args:
        lines: Drawn in this order.
        x_axis: Its label stands below.
        y_axis: Its label is the chart's description.
        marks: x at which each line gets a point, where it reaches so far.
        tip: What a point of a line at (x, y) tells when hovered over.
    """
    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            _WIDTH, _HEIGHT, f"{y_axis.label}, over {x_axis.label}"
        )
    ]
    parts += [_x_tick(x_axis, tick) for tick in x_axis.ticks]
    parts += [_y_tick(y_axis, tick) for tick in y_axis.ticks]
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _LEFT + _PLOT_WIDTH / 2, _HEIGHT - 6, x_axis.label
        )
    )
    for line in lines:
        parts.append(_polyline(line, x_axis, y_axis))
    for line in lines:
        for mark in marks:
            if not line.x[0] <= mark <= line.x[-1]:
                continue
            value = float(np.interp(mark, line.x, line.y))
            text = tip(line, mark, value)
            parts.append(_point(line.style, _x(x_axis, mark), _y(y_axis, value), text))
    return Markup("").join([*parts, Markup("</svg>")])


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.place(value) * _PLOT_WIDTH


def _y(axis: Axis, value: float) -> float:
    return _TOP + (1 - axis.place(value)) * _PLOT_HEIGHT


def _x_tick(axis: Axis, tick: float) -> Markup:
    return Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
        _x(axis, tick), _TOP + _PLOT_HEIGHT + 20, axis.text(tick)
    )


def _y_tick(axis: Axis, tick: float) -> Markup:
    y = _y(axis, tick)
    return Markup(
        '<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
        '<text class="axis" x="{label}" y="{text}" text-anchor="end">{value}</text>'
    ).format(
        left=_LEFT,
        right=_LEFT + _PLOT_WIDTH,
        y=y,
        label=_LEFT - 8,
        text=y + 4,
        value=axis.text(tick),
    )


def _polyline(line: Line, x_axis: Axis, y_axis: Axis) -> Markup:
    # A few hundred points draw any curve that fits the width.
    keep = np.unique(np.linspace(0, len(line.x) - 1, 400).round().astype(int))
    points = " ".join(
        f"{_x(x_axis, x):.1f},{_y(y_axis, y):.1f}"
        for x, y in zip(line.x[keep], line.y[keep], strict=True)
    )
    return Markup('<polyline class="line {}" points="{}"/>').format(line.style, points)


def _point(style: str, x: float, y: float, text: str) -> Markup:
    return Markup(
        '<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>'
    ).format(escape(style), x, y, text)
