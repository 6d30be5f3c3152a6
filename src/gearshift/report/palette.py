"""The colours, in one place: every picture and every strip shows a mixer in the same one, on light and on dark.

The hues are those of Okabe and Ito (Color Universal Design, 2008), which people with any colour vision tell apart,
darkened or lightened for contrast. The main mixer alone has no hue: it is what all others are measured against.
"""

from collections.abc import Sequence
from dataclasses import dataclass

LIGHT = {
    "paper": "#faf9f6",
    "card": "#ffffff",
    "ink": "#1e2530",
    "soft": "#5b6675",
    "line": "#dedcd5",
    "grid": "#eceae4",
    "accent": "#a8324a",
    "good": "#1c7c54",
    "heat-low": "#fdf3c4",
    "heat-high": "#5a1160",
    "mixer-0": "#333f50",
    "mixer-1": "#4aa3df",
    "mixer-2": "#0f9b76",
    "mixer-3": "#e39a10",
    "mixer-4": "#c46a9c",
    "mixer-5": "#0b66a8",
    "mixer-6": "#cf5a13",
    "mixer-7": "#b9ab1f",
}
DARK = {
    "paper": "#14171c",
    "card": "#1b1f26",
    "ink": "#e6e8eb",
    "soft": "#9aa4b1",
    "line": "#323943",
    "grid": "#272d36",
    "accent": "#ff8095",
    "good": "#5fc79a",
    "heat-low": "#2b2440",
    "heat-high": "#ffe27a",
    "mixer-0": "#cfd6df",
    "mixer-1": "#56b4e9",
    "mixer-2": "#16ab83",
    "mixer-3": "#eca72c",
    "mixer-4": "#d584b2",
    "mixer-5": "#3d8fd1",
    "mixer-6": "#e8702a",
    "mixer-7": "#e5da4b",
}
MIXERS = sum(name.startswith("mixer-") for name in LIGHT)


@dataclass(frozen=True)
class Palette:
    """Which colour each mixer has."""

    main: str
    """The main mixer."""
    roles: dict[str, str]
    """Mixer -> name of its colour, the main mixer first."""

    @classmethod
    def of(cls, mixers: Sequence[str], main: str) -> "Palette":
        """The main mixer without a hue, the others in order; more than there are hues share them in turn."""
        others = [mixer for mixer in mixers if mixer != main]
        roles = {mixer: f"mixer-{1 + place % (MIXERS - 1)}" for place, mixer in enumerate(others)}
        return cls(main, {main: "mixer-0", **roles})

    def hex(self, mixer: str) -> str:
        """The colour on light, as figures draw with it; `svg.inline` then makes it follow the theme."""
        return LIGHT[self.roles[mixer]]

    def css(self, mixer: str) -> str:
        """The colour as style sheets name it."""
        return f"var(--{self.roles[mixer]})"


def stylesheet() -> str:
    """The colours as custom properties; the dark ones where a person prefers dark, never on paper."""
    light, dark = ("".join(f"--{name}:{colour};" for name, colour in colours.items()) for colours in (LIGHT, DARK))
    return f":root{{{light}}}\n@media screen and (prefers-color-scheme:dark){{:root{{{dark}}}}}\n"
