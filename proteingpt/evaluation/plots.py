"""Plots of the report as inline SVG: estimates with their intervals, and no library. Colours come from the page's
CSS."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

ROW, LABEL_WIDTH, PLOT_WIDTH, VALUE_WIDTH, TOP, BOTTOM = 28, 380, 430, 190, 12, 34
LONGEST_LABEL = 50  # characters that fit in it
NUM_TICKS = 5


@dataclass(frozen=True)
class Point:
    """An estimate with its interval, None where it is not known; css: a class of the page."""

    css: str
    value: float | None
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Row:
    """note: written at the right."""

    label: str
    points: tuple[Point, ...]
    note: str = ""


def nice_range(values: Sequence[float]) -> tuple[float, float]:
    """A range with round ends that holds all values: 0 to 1 for shares, wider where it must be."""
    low, high = min([0.0, *values]), max([0.0, *values])
    step = nice_step((high - low) / NUM_TICKS or 0.2)
    return step * (low // step), step * -(-high // step) or step


def nice_step(rough: float) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    power = 1e-20
    while power * 10 <= rough:
        power *= 10
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))


def dot_plot(rows: Sequence[Row], title: str, percent: bool = True, reference: float | None = None) -> str:
    """One line for each row, its points with whiskers. reference: a dashed vertical, such as the blind score."""
    known = [v for row in rows for p in row.points for v in (p.value, p.low, p.high) if v is not None]
    low, high = nice_range(known or [0.0, 1.0])
    width, height = LABEL_WIDTH + PLOT_WIDTH + VALUE_WIDTH, TOP + ROW * len(rows) + BOTTOM

    def x(value: float) -> float:
        return LABEL_WIDTH + PLOT_WIDTH * (value - low) / (high - low)

    def text_of(value: float) -> str:
        return f"{round(100 * value, 1) + 0.0:g} %" if percent else f"{round(value, 9) + 0.0:.3g}"

    parts = [
        '<div class="scroll">',
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">',
        f"<title>{escape(title)}</title>",
    ]
    step = nice_step((high - low) / NUM_TICKS)
    tick = step * -(-low // step)  # the first multiple in the range, so that zero is one of them
    while tick <= high + step / 100:
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(
            f'<text class="tick" x="{x(tick):.1f}" y="{height - 12}" text-anchor="middle">{text_of(tick)}</text>'
        )
        tick += step
    if reference is not None:
        parts.append(
            f'<line class="reference" x1="{x(reference):.1f}" x2="{x(reference):.1f}" y1="{TOP}" '
            f'y2="{height - BOTTOM}"/>'
        )
    for number, row in enumerate(rows):
        middle = TOP + ROW * (number + 0.5)
        parts.append(
            f'<text class="label" x="{LABEL_WIDTH - 12}" y="{middle + 4:.1f}" text-anchor="end">'
            f"{escape(short(row.label))}</text>"
        )
        for i, point in enumerate(row.points):
            parts.append(draw_point(point, x, middle + 6 * (i - (len(row.points) - 1) / 2)))
        parts.append(
            f'<text class="note" x="{LABEL_WIDTH + PLOT_WIDTH + 12}" y="{middle + 4:.1f}">{escape(row.note)}</text>'
        )
    return "".join([*parts, "</svg></div>"])


def short(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


def draw_point(point: Point, x, y: float) -> str:
    if point.value is None:
        return ""
    whisker = ""
    if point.low is not None and point.high is not None:
        whisker = f'<line class="whisker" x1="{x(point.low):.1f}" x2="{x(point.high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return f'<g class="{escape(point.css)}">{whisker}<circle cx="{x(point.value):.1f}" cy="{y:.1f}" r="4.5"/></g>'
