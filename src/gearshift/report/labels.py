"""Where the words of a picture go, so that they cover neither points nor each other. All lengths in pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""
LETTER, HEIGHT, CLEAR = 7.5, 15.0, 7.0
"""Width of a letter, height of a line, and the room that a point keeps around it."""


@dataclass(frozen=True)
class Label:
    """A name for a point."""

    text: str
    """The name."""
    x: float
    """The point."""
    y: float
    """The point."""

    @property
    def width(self) -> float:
        """An estimate: what is measured here is not the font that a reader will see."""
        return LETTER * len(self.text)


@dataclass(frozen=True)
class Offset:
    """Where a name stands as seen from its point."""

    x: float
    """From the point to the name's anchor."""
    y: float
    """From the point to the name's middle."""
    anchor: Literal["left", "center", "right"]
    """The part of the name that is at x, so that a wider font grows away from the point."""

    def box(self, label: Label) -> Box:
        """The room that the name takes."""
        left = label.x + self.x - label.width * {"left": 0.0, "center": 0.5, "right": 1.0}[self.anchor]
        middle = label.y + self.y
        return left, middle - HEIGHT / 2, left + label.width, middle + HEIGHT / 2


def place_labels(labels: Sequence[Label], points: Sequence[tuple[float, float]], frame: Box) -> list[Offset]:
    """For each label the nearest place that covers the least.

    Covering another label is worst, then leaving the frame, then covering points.
    """
    taken: list[Box] = []
    offsets = []
    for label in labels:

        def harm(offset: Offset, label: Label = label) -> tuple[int, bool, int]:
            box = offset.box(label)
            covered = sum(_overlap(box, (x - CLEAR, y - CLEAR, x + CLEAR, y + CLEAR)) for x, y in points)
            return sum(_overlap(box, other) for other in taken), not _inside(box, frame), covered

        best = min(_offsets(), key=harm)
        taken.append(best.box(label))
        offsets.append(best)
    return offsets


def along_steps(corners: Sequence[tuple[float, float]], every: float = 12.0) -> list[tuple[float, float]]:
    """Points on a line that goes from each corner sideways, then up or down to the next: it is to stay readable."""
    points = []
    for (x, y), (next_x, next_y) in pairwise(corners):
        sideways, upright = (round(abs(way) / every) + 1 for way in (next_x - x, next_y - y))
        points += [(x + (next_x - x) * step / sideways, y) for step in range(1, sideways + 1)]
        points += [(next_x, y + (next_y - y) * step / upright) for step in range(1, upright)]
    return points


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved apart to at least `gap`, in the same order and around the same middle."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    moved = list(heights)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    shift = (sum(heights) - sum(moved)) / len(heights) if heights else 0.0
    return [height + shift for height in moved]


def _offsets() -> Iterator[Offset]:
    """Places around a point, nearest first."""
    for far in (0.0, 10.0, 22.0, 36.0):
        side, rise = 11 + far, 16 + far
        yield Offset(-side, -4 - far / 2, "right")
        yield Offset(side, 0, "left")
        yield Offset(0, -rise, "center")
        yield Offset(0, rise, "center")
        yield Offset(side, rise, "left")
        yield Offset(-side, -rise, "right")
        yield Offset(side, -rise, "left")
        yield Offset(-side, rise, "right")


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
