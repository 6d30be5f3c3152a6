"""One cell a layer: placements as coloured strips, and errors as a heat map. Plain HTML, with a hint on every cell."""

import math
from collections.abc import Iterable, Mapping, Sequence

from gearshift.report.html import Html, markup, tag
from gearshift.report.numbers import number
from gearshift.report.palette import Palette
from gearshift.spec.placement import Placement

CELL = 9
"""Pixels that a layer needs at least; where there is less room, a strip scrolls."""
MANY = 48
"""Layers beyond which cells stand without gaps, which would be wider than the cells."""


def strip(placement: str, palette: Palette, thin: bool = False) -> Html:
    """A placement, first layer at the left."""
    cells = (
        tag("i", style=f"background:{palette.css(mixer)}", title=f"layer {layer}: {mixer}")
        for layer, mixer in enumerate(Placement.parse(placement))
    )
    looks = ["strip", "thin" if thin else "", "dense" if len(Placement.parse(placement)) > MANY else ""]
    return tag("div", cells, class_=" ".join(filter(None, looks)), role="img", aria_label=placement)


def run_lengths(placement: str, block: bool = False) -> Html:
    """A placement's text, which may break after a comma and is copied without the breaks."""
    first, *others = placement.split(",")
    return tag("code", first, [[",", tag("wbr"), item] for item in others], class_="block" if block else None)


def ruler(layers: int) -> Html:
    """Numbers of the layers, to stand under strips of the same width."""
    every = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500) if layers / step <= 12 or step == 500)
    marks = (tag("span", str(layer) if layer % every == 0 else None) for layer in range(layers))
    return tag("div", marks, class_="ruler", aria_hidden="true")


def legend(mixers: Iterable[str], palette: Palette) -> Html:
    """The mixers and their colours."""
    return tag("p", (tag("span", dot(mixer, palette), mixer) for mixer in mixers), class_="legend")


def dot(mixer: str, palette: Palette) -> Html:
    """A mixer's colour."""
    return tag("i", class_="dot", style=f"background:{palette.css(mixer)}")


def heat_map(rows: Sequence[tuple[str, Mapping[str, Sequence[float | None]]]], palette: Palette) -> Html:
    """Errors by layer on a logarithmic scale that all rows share.

    Args:
        rows: for each mixer, its name and its rows: a name such as `before` -> error of each layer.
        palette: the mixers' colours.
    """
    known = [value for _, named in rows for errors in named.values() for value in errors if value is not None]
    positive = [value for value in known if value > 0]
    low, high = (min(positive), max(positive)) if positive else (1.0, 1.0)
    groups = []
    for mixer, named in rows:
        lines = (_heat_row(mixer, moment, errors, low, high) for moment, errors in named.items())
        groups.append(
            tag("div", tag("div", dot(mixer, palette), mixer, class_="heat-name"), lines, class_="heat-group")
        )
    layers = max((len(errors) for _, named in rows for errors in named.values()), default=0)
    foot = tag("div", tag("span"), ruler(layers), tag("span"), class_="heat-row")
    scale = tag("div", tag("span", number(low)), tag("i"), tag("span", number(high)), class_="heat-scale")
    return markup([tag("div", groups, foot, class_="heat"), scale])


def _heat_row(mixer: str, moment: str, errors: Sequence[float | None], low: float, high: float) -> Html:
    cells = (_heat_cell(f"{mixer}, layer {layer}, {moment}", error, low, high) for layer, error in enumerate(errors))
    known = [error for error in errors if error is not None]
    mean = number(sum(known) / len(known) if known else None)
    body = tag("div", cells, class_="strip", role="img", aria_label=f"{mixer} {moment}: mean {mean}")
    return tag("div", tag("span", moment), body, tag("span", mean, class_="mean", title="mean"), class_="heat-row")


def _heat_cell(place: str, error: float | None, low: float, high: float) -> Html:
    hint = f"{place}: {number(error)}"
    if error is None:
        return tag("i", class_="unknown", title=hint)
    reach = math.log(high / low)
    share = math.log(max(error, low) / low) / reach if reach else 0.5
    return tag("i", style=f"--heat:{share * 100:.0f}%", title=hint)
