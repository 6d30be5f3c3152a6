"""The picture of a search: what divergence costs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gearshift.report.data import Candidate, Search
from gearshift.report.html import Html
from gearshift.report.labels import Label, along_steps, place_labels
from gearshift.report.numbers import cost, cost_words, counts_bytes, number
from gearshift.report.palette import LIGHT, Palette
from gearshift.report.svg import draw
from gearshift.spec.placement import Placement


def pareto(search: Search, palette: Palette, name: str = "pareto") -> Html | None:
    """Divergence against cost: every candidate, the front, the presets and their budgets. None without candidates."""
    candidates = [candidate for candidate in search.candidates if _drawable(candidate)]
    if not candidates:
        return None
    plot = _Pareto(search, palette, candidates)
    return draw(name, 860, 470, plot.paint, "Divergence from the teacher against cost, for every evaluated placement")


def _drawable(found: Any) -> bool:
    return found.cost is not None and found.divergence is not None


class _Pareto:
    """The picture of a search. Holds what its layers share: the scale of the costs and the hints of the points."""

    def __init__(self, search: Search, palette: Palette, candidates: Sequence[Candidate]):
        self.search, self.palette, self.candidates = search, palette, candidates
        largest = max(candidate.cost or 0 for candidate in candidates)
        power = max(0, int(math.log10(largest) // 3)) if largest > 0 and counts_bytes(search.cost_unit) else 0
        self.scale = 1000.0 ** min(power, 4)
        self.unit = ("bytes", "KB", "MB", "GB", "TB")[min(power, 4)] if counts_bytes(search.cost_unit) else ""
        self.presets = [preset for preset in search.presets if _drawable(preset)]
        self.hints: dict[str, str] = {}

    def paint(self, figure: Any, axes: Any) -> Mapping[str, str]:
        """Draw all layers, lowest first; gives the hints."""
        self._axes(axes)
        self._points(axes)
        self._front(axes)
        self._budgets(axes)
        for preset in self.presets:
            self._point(axes, preset, preset.name, marker="D", markersize=9, color=LIGHT["accent"], zorder=6)
        self._names(figure, axes)
        return self.hints

    def _axes(self, axes: Any) -> None:
        found = [candidate.divergence or 0 for candidate in self.candidates]
        positive = [value for value in found if value > 0]
        if positive:
            floor = 10 ** math.floor(math.log10(min(positive)))
            axes.set_yscale("symlog", linthresh=floor, linscale=0.35)
            axes.set_ylim(min(0, *found) - 0.12 * floor, max(positive) * 2.2)
            decades = range(round(math.log10(floor)), math.ceil(math.log10(max(positive))) + 1)
            axes.set_yticks([0, *(10.0**power for power in decades if 10.0**power <= max(positive) * 2.2)])
            axes.minorticks_off()
        axes.margins(x=0.06)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel(" ".join(filter(None, (self.unit, cost_words(self.search.cost_unit)))))
        axes.set_ylabel("divergence from the teacher, nats a token")

    def _point(self, axes: Any, found: Any, title: str, **style: Any) -> None:
        gid = f"point-{len(self.hints)}"
        spent = cost(found.cost, self.search.cost_unit)
        self.hints[gid] = f"{title}: {spent}, {number(found.divergence)} nats\n{found.placement}"
        axes.plot(
            [found.cost / self.scale],
            [found.divergence],
            gid=gid,
            clip_on=False,
            markeredgecolor=LIGHT["card"],
            **style,
        )

    def _points(self, axes: Any) -> None:
        for candidate in self.candidates:
            if candidate.kind == "preset" and any(candidate.placement == preset.placement for preset in self.presets):
                continue
            mixer = self._mixer(candidate)
            colour = LIGHT["soft"] if candidate.kind in ("verified", "preset") else self.palette.hex(mixer)
            size, marker = {"pure": (11, "s"), "single change": (5, "o")}.get(candidate.kind, (6, "o"))
            title = f"{candidate.kind}, {mixer}" if candidate.kind == "single change" else candidate.kind
            order = 5 if candidate.kind == "pure" else 3
            self._point(
                axes, candidate, title, marker=marker, markersize=size, color=colour, zorder=order, markeredgewidth=0.7
            )

    def _mixer(self, candidate: Candidate) -> str:
        """What a pure placement holds, and what a single change changed: its least used mixer but for the main one."""
        counts = Placement.parse(candidate.placement).counts()
        return min(counts, key=lambda mixer: (mixer == self.palette.main, counts[mixer]))

    def _front(self, axes: Any) -> None:
        front = sorted((point.cost, point.divergence) for point in self.search.front if _drawable(point))
        if front:
            costs, divergences = zip(*front, strict=True)
            style = {"color": LIGHT["accent"], "linewidth": 1.4, "alpha": 0.75, "zorder": 2}
            axes.plot([value / self.scale for value in costs], divergences, drawstyle="steps-post", **style)

    def _budgets(self, axes: Any) -> None:
        for preset in self.presets:
            if preset.budget_cost is None:
                continue
            at = preset.budget_cost / self.scale
            axes.axvline(at, color=LIGHT["accent"], linewidth=1, linestyle=(0, (1, 3)), alpha=0.8, zorder=1)
            share = "" if preset.budget_share is None else f" {preset.budget_share:g}"
            style = {"ha": "center", "va": "bottom", "color": LIGHT["soft"], "size": 11}
            axes.text(at, 1.01, f"budget{share}", transform=axes.get_xaxis_transform(), **style)

    def _names(self, figure: Any, axes: Any) -> None:
        """Name the presets and the pure placements, clear of the points and of each other."""
        pure = [candidate for candidate in self.candidates if candidate.kind == "pure"]
        named: list[tuple[Any, str, str]] = [(preset, preset.name, LIGHT["accent"]) for preset in self.presets]
        named += [(found, f"all {self._mixer(found)}", self.palette.hex(self._mixer(found))) for found in pure]
        figure.draw_without_rendering()

        def pixels(found: Any) -> tuple[float, float]:
            x, y = axes.transData.transform((found.cost / self.scale, found.divergence))
            return float(x), float(y)

        labels = [Label(text, *pixels(found)) for found, text, _ in named]
        obstacles = [pixels(found) for found in (*self.candidates, *self.presets)]
        obstacles += along_steps(sorted(pixels(found) for found in self.search.front if _drawable(found)))
        frame = axes.get_window_extent()
        offsets = place_labels(labels, obstacles, (frame.x0, frame.y0, frame.x1, frame.y1))
        style = {"textcoords": "offset points", "weight": 700, "zorder": 7, "va": "center"}
        for (found, text, colour), offset in zip(named, offsets, strict=True):
            anchor = (found.cost / self.scale, found.divergence)
            axes.annotate(text, anchor, (offset.x, offset.y), color=colour, ha=offset.anchor, **style)
