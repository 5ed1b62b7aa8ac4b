"""Charts as inline SVG; colours come from the page's style, so they follow light and dark."""

from collections.abc import Sequence
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
        x: Shape [n], 0 to 1.
        y: Shape [n], 0 to 1.
    """

    name: str
    style: str
    x: np.ndarray
    y: np.ndarray


def share_chart(
    lines: Sequence[Line], x_label: str, y_label: str, marks: Sequence[float]
) -> Markup:
    """Returns a chart of shares over shares, both axes from 0 to 100 %.

    Args:
        lines: Drawn in this order.
        x_label: Text below the x axis.
        y_label: Text above the y axis, and the chart's description.
        marks: x at which each line gets a point that tells its value when hovered over.
    """
    parts = [
        Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
            _WIDTH, _HEIGHT, f"{y_label}, over {x_label}"
        )
    ]
    for tick in (0, 0.25, 0.5, 0.75, 1):
        parts.append(_grid_line(tick))
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            _LEFT + _PLOT_WIDTH / 2, _HEIGHT - 6, x_label
        )
    )
    for line in lines:
        parts.append(_polyline(line))
    for line in lines:
        parts.extend(_point(line, mark) for mark in marks)
    return Markup("").join([*parts, Markup("</svg>")])


def _grid_line(tick: float) -> Markup:
    x, y = _LEFT + tick * _PLOT_WIDTH, _TOP + (1 - tick) * _PLOT_HEIGHT
    return Markup(
        '<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>'
        '<text class="axis" x="{label}" y="{text}" text-anchor="end">{value} %</text>'
        '<text class="axis" x="{x}" y="{below}" text-anchor="middle">{value} %</text>'
    ).format(
        left=_LEFT,
        right=_LEFT + _PLOT_WIDTH,
        y=y,
        label=_LEFT - 8,
        text=y + 4,
        x=x,
        below=_TOP + _PLOT_HEIGHT + 20,
        value=round(100 * tick),
    )


def _polyline(line: Line) -> Markup:
    # A few hundred points draw any curve that fits the width.
    keep = np.unique(np.linspace(0, len(line.x) - 1, 400).round().astype(int))
    points = " ".join(
        f"{_LEFT + x * _PLOT_WIDTH:.1f},{_TOP + (1 - y) * _PLOT_HEIGHT:.1f}"
        for x, y in zip(line.x[keep], line.y[keep], strict=True)
    )
    return Markup('<polyline class="line {}" points="{}"/>').format(line.style, points)


def _point(line: Line, mark: float) -> Markup:
    value = float(np.interp(mark, line.x, line.y))
    return Markup(
        '<circle class="point {}" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>'
    ).format(
        escape(line.style),
        _LEFT + mark * _PLOT_WIDTH,
        _TOP + (1 - value) * _PLOT_HEIGHT,
        f"{line.name}: {100 * value:.0f} % found after inspecting {100 * mark:.0f} %",
    )
