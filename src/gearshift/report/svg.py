"""From a matplotlib figure to SVG that belongs to the page: its fonts, its colours in both themes, hints on hover."""

import re
from collections.abc import Callable, Mapping
from io import StringIO
from typing import Any

from gearshift.report.html import Html, markup
from gearshift.report.palette import LIGHT

FONT_SIZE = 12

STYLE = {
    "svg.fonttype": "none",
    "font.size": FONT_SIZE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": LIGHT["line"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 1,
    "text.color": LIGHT["ink"],
    "xtick.color": LIGHT["line"],
    "ytick.color": LIGHT["line"],
    "xtick.labelcolor": LIGHT["soft"],
    "ytick.labelcolor": LIGHT["soft"],
    "lines.solid_capstyle": "round",
    "path.simplify": True,
}


def draw(name: str, width: int, height: int, paint: Callable[[Any, Any], Mapping[str, str] | None], label: str) -> Html:
    """A picture as inline SVG, the same bytes every time.

    Args:
        name: unique on the page; prefixes the picture's ids.
        width, height: in CSS pixels at full size.
        paint: given the figure and its axes, draws; may return gid -> hint for the artists that it gave a gid.
        label: what the picture shows, for those who cannot see it.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({**mpl.rcParamsDefault, **STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72, layout="constrained")
        figure.patch.set_visible(False)
        axes = figure.add_subplot()
        axes.patch.set_visible(False)
        axes.tick_params(length=0, pad=6)
        hints = paint(figure, axes) or {}
        stream = StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
    return inline(stream.getvalue(), name, label, hints)


def inline(svg: str, name: str, label: str, hints: Mapping[str, str] | None = None) -> Html:
    """Make a stand-alone SVG of matplotlib's part of a page."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", lambda found: _opening(found[1], label), svg, count=1)
    svg = re.sub(r"font: (?:(\d+) )?([\d.]+px)[^;\"]*", _font, svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = svg.replace("xlink:href=", "href=")
    for gid, hint in (hints or {}).items():
        svg = svg.replace(f'<g id="{gid}">', f"<g><title>{markup(hint)}</title>")
    svg = _unique_ids(svg, name)
    for role, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{role}, {colour})")
    return Html(re.sub(r"\n\s*", "\n", svg))


def _opening(view_box: str, label: str) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" {view_box} role="img" aria-label="{markup(label)}">'


def _font(found: re.Match[str]) -> str:
    """Size and weight alone: the family is the page's."""
    return f"font-size: {found[2]}" + (f"; font-weight: {found[1]}" if found[1] else "")


def _unique_ids(svg: str, name: str) -> str:
    """Keep the ids that something refers to, under the picture's name; drop all others."""
    used = set(re.findall(r"(?:href=\"|url\()#([^\")]+)", svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", svg)
    return re.sub(r"(href=\"|url\()#", rf"\1#{name}-", svg)
