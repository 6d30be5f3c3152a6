"""Pictures of what changes from step to step: the losses of a stage, and what a whole run keeps an eye on."""

import math
from collections.abc import Sequence
from typing import Any

from gearshift.report.data import Stage
from gearshift.report.html import Html
from gearshift.report.labels import spread
from gearshift.report.numbers import count
from gearshift.report.palette import LIGHT, Palette
from gearshift.report.svg import draw

Points = list[tuple[int, float]]
"""Step and value."""
TERM_STYLES = ((0, (5, 2)), (0, (1, 1.6)), (0, (5, 1.5, 1, 1.5)), (0, (9, 3)))
FEW_POINTS = 60
"""Up to here a line is drawn as it is, with a mark at every step; a longer one pale, under its running mean."""
REACH = 1e6
"""Ratio of the highest to the lowest value that a logarithmic axis shows: what lies below is rounding."""
WINDOWS = 20
"""How many windows of the running mean a line is long."""


def loss_curves(stage: Stage, palette: Palette, name: str) -> Html | None:
    """The losses of a stage over its steps; None if not one of them is known. Each line is named at its end."""
    lines = [line for line in _loss_lines(stage, palette) if line[1]]
    if not lines:
        return None

    def paint(figure: Any, axes: Any) -> None:
        for _, points, style in lines:
            _plot(axes, points, style)
        _scale(axes, [value for _, points, _ in lines for _, value in points], logarithmic=True)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        _name_ends(figure, axes, [(label, smooth(points)[-1], style["color"]) for label, points, style in lines])

    return draw(name, 460, 290, paint, f"Loss over the {len(stage.records)} steps of the stage {stage.name}")


def run_curve(
    stages: Sequence[tuple[str, Points]], name: str, label: str, smoothed: bool = True, logarithmic: bool = False
) -> Html | None:
    """One value over the steps of a whole run; None without points.

    Args:
        stages: the name of every stage, and its points by the step over all stages.
        name: unique on the page.
        label: what is seen, with its unit.
        smoothed: whether long lines are drawn under their running mean.
        logarithmic: the scale, where all values are positive.
    """
    stages = [(stage, points) for stage, points in stages if points]
    if not stages:
        return None

    def paint(figure: Any, axes: Any) -> None:
        for stage, points in stages:
            _plot(axes, points, _line(LIGHT["ink"], 1.6), smoothed)
            style = {"transform": axes.get_xaxis_transform(), "color": LIGHT["soft"], "size": 11}
            axes.axvline(points[0][0], color=LIGHT["line"], linewidth=1, zorder=1)
            axes.text(points[0][0], 1.02, stage, ha="left", va="bottom", **style)
        _scale(axes, [value for _, points in stages for _, value in points], logarithmic)
        axes.set_xlabel("step of the run")

    return draw(name, 460, 230, paint, f"{label} over the steps of the run")


def smooth(points: Points) -> Points:
    """The running mean over a window around each point, cut short at the ends. Few points stay as they are."""
    if len(points) <= FEW_POINTS:
        return points
    reach = max(1, len(points) // (2 * WINDOWS))
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    bounds = [(max(0, place - reach), min(len(points), place + reach + 1)) for place in range(len(points))]
    return [
        (step, (sums[last] - sums[first]) / (last - first))
        for (step, _), (first, last) in zip(points, bounds, strict=True)
    ]


def _plot(axes: Any, points: Points, style: dict[str, Any], smoothed: bool = True) -> None:
    if len(points) > FEW_POINTS and not smoothed:
        axes.plot(*zip(*points, strict=True), **style)
    elif len(points) > FEW_POINTS:
        if "linestyle" not in style:
            axes.plot(*zip(*points, strict=True), **{**style, "linewidth": 0.8, "alpha": 0.3})
        axes.plot(*zip(*smooth(points), strict=True), **style)
    else:
        axes.plot(*zip(*points, strict=True), marker=".", markersize=4, **style)


def _scale(axes: Any, values: Sequence[float], logarithmic: bool) -> None:
    if logarithmic and min(values) > 0:
        axes.set_yscale("log")
        if min(values) < max(values) / REACH:
            axes.set_ylim(bottom=max(values) / REACH)
    axes.margins(x=0.02)
    _plain_ticks(axes.yaxis)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(False, axis="x")


def _loss_lines(stage: Stage, palette: Palette) -> list[tuple[str, Points, dict[str, Any]]]:
    """Label, points and style of each line; the sum itself only where no mixer's own loss says more."""
    mixers = [mixer for mixer in palette.roles if any(mixer in record.mixer_losses for record in stage.records)]
    terms = list(dict.fromkeys(term for record in stage.records for term in record.loss_terms))
    lines = [
        (mixer, _points(stage, [record.mixer_losses.get(mixer) for record in stage.records]), _line(palette.hex(mixer)))
        for mixer in mixers
    ]
    if not mixers:
        lines.append(("loss", _points(stage, [record.loss for record in stage.records]), _line(LIGHT["ink"])))
    if len(terms) > 1:
        for term, dashes in zip(terms, TERM_STYLES, strict=False):
            points = _points(stage, [record.loss_terms.get(term) for record in stage.records])
            lines.append((term.replace("_", " "), points, {**_line(LIGHT["soft"], 1.3), "linestyle": dashes}))
    return lines


def _points(stage: Stage, values: Sequence[float | None]) -> Points:
    return [(record.step, value) for record, value in zip(stage.records, values, strict=True) if value is not None]


def _line(colour: str, width: float = 1.9) -> dict[str, Any]:
    return {"color": colour, "linewidth": width}


def _name_ends(figure: Any, axes: Any, ends: Sequence[tuple[str, tuple[int, float], str]]) -> None:
    """Write each line's name at its end, moved apart where lines end together; at the bottom if it ends below."""
    figure.draw_without_rendering()
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    anchors = [(right, max(bottom, value)) for _, (_, value), _ in ends]
    heights = [axes.transData.transform(anchor)[1] for anchor in anchors]
    moved = zip(ends, anchors, heights, spread(heights, gap=14), strict=True)
    for (label, _, colour), anchor, old, new in moved:
        axes.annotate(
            label,
            anchor,
            (7, new - old),
            textcoords="offset points",
            color=colour,
            va="center",
            clip_on=False,
        )


def _plain_ticks(axis: Any) -> None:
    """Numbers as people write them, three to seven of them whatever the range."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        axis.set_major_locator(
            LogLocator(subs=(1.0,) if decades > 3 else (1.0, 2.0, 5.0) if decades > 0.8 else range(1, 10))
        )
        axis.set_minor_formatter(NullFormatter())
        axis.set_tick_params(which="minor", length=0)
    axis.set_major_formatter(lambda value, _: count(value) if abs(value) >= 1e4 else f"{value:g}")
