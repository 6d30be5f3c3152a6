"""One cell a layer: placements as coloured strips, and errors as a heat map. Plain HTML, with a hint on every cell."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from gearshift.report.html import Child, Html, tag
from gearshift.report.numbers import number
from gearshift.report.palette import Palette
from gearshift.spec.placement import Placement

CELL = 9
"""Pixels that a layer needs at least; where there is less room, a strip scrolls."""
REACH = 1e4
"""Ratio of the highest to the lowest value that colours of a logarithmic scale tell apart; those below look alike."""
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


@dataclass(frozen=True)
class Scale:
    """From values to shares of the way from the lowest colour to the highest. Linear ones hold 0."""

    low: float
    high: float
    logarithmic: bool = True

    @classmethod
    def over(cls, values: Iterable[float | None], logarithmic: bool = True) -> "Scale":
        """The scale that just holds what is known of `values`: on a logarithmic one, of those that are positive."""
        known = [value for value in values if value is not None and (value > 0 or not logarithmic)]
        if not logarithmic:
            known.append(0)
        low, high = (min(known), max(known)) if known else (1.0, 1.0)
        # What is equal up to rounding must not take all the colours.
        return cls(max(low, high / REACH) if logarithmic else low, high, logarithmic)

    def share(self, value: float) -> float:
        """0 at the lowest, 1 at the highest, a half where all values are the same."""
        if self.low == self.high:
            return 0.5
        if self.logarithmic:
            return math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def heat_map(
    rows: Sequence[tuple[str, Mapping[str, Sequence[float | None]]]], palette: Palette, logarithmic: bool = True
) -> Html:
    """Numbers by layer on a scale that all rows share.

    Args:
        rows: for each mixer, its name and its rows: a name such as `before` -> value of each layer. A mixer whose one
            row has no name stands beside it instead of above.
        palette: the mixers' colours.
        logarithmic: the scale: for errors; linear for counts and differences.
    """
    scale = Scale.over((value for _, named in rows for values in named.values() for value in values), logarithmic)
    alone = all(list(named) == [""] for _, named in rows)
    groups = []
    for mixer, named in rows:
        title = [dot(mixer, palette), mixer]
        if alone:
            groups.append(_heat_row(mixer, title, "", named[""], scale))
        else:
            lines = (_heat_row(mixer, moment, moment, values, scale) for moment, values in named.items())
            groups.append(tag("div", tag("div", title, class_="heat-name"), lines, class_="heat-group"))
    layers = max((len(values) for _, named in rows for values in named.values()), default=0)
    foot = tag("div", tag("span", "layer"), ruler(layers), tag("span", "mean", class_="mean"), class_="heat-row")
    ends = tag("span", _shown(scale.low)), tag("i"), tag("span", _shown(scale.high))
    looks = "heat alone" if alone else "heat"
    return tag("div", groups, foot, tag("div", ends, class_="heat-scale"), class_=looks)


def _heat_row(mixer: str, title: Child, moment: str, values: Sequence[float | None], scale: Scale) -> Html:
    what = f"{mixer} {moment}".strip()
    cells = (_heat_cell(f"{what}, layer {layer}", value, scale) for layer, value in enumerate(values))
    known = [value for value in values if value is not None]
    mean = number(sum(known) / len(known) if known else None)
    body = tag("div", cells, class_="strip", role="img", aria_label=f"{what}: mean {mean}")
    return tag("div", tag("span", title), body, tag("span", mean, class_="mean", title="mean"), class_="heat-row")


def _heat_cell(place: str, value: float | None, scale: Scale) -> Html:
    hint = f"{place}: {_shown(value)}"
    if value is None:
        return tag("i", class_="unknown", title=hint)
    return tag("i", style=f"--heat:{scale.share(value) * 100:.0f}%", title=hint)


def _shown(value: float | None) -> str:
    """Counts in full, measurements as numbers are."""
    return f"{value:,}" if isinstance(value, int) else number(value)
