"""Where the words of a picture go, so that they cover neither points nor each other. All lengths in pixels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""
LETTER, HEIGHT, CLEAR = 6.8, 15.0, 7.0
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


def place_labels(
    labels: Sequence[Label], points: Sequence[tuple[float, float]], frame: Box
) -> list[tuple[float, float]]:
    """For each label the offset of its left middle from its point: the nearest place that covers the least.

    Covering another label is worst, then leaving the frame, then covering points.
    """
    taken: list[Box] = []
    offsets = []
    for label in labels:

        def harm(offset: tuple[float, float], label: Label = label) -> tuple[int, int, int]:
            box = _box(label, offset)
            covered = sum(_overlap(box, (x - CLEAR, y - CLEAR, x + CLEAR, y + CLEAR)) for x, y in points)
            return sum(_overlap(box, other) for other in taken), not _inside(box, frame), covered

        best = min(_offsets(label.width), key=harm)
        taken.append(_box(label, best))
        offsets.append(best)
    return offsets


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """The heights moved apart to at least `gap`, in the same order and around the same middle."""
    order = sorted(range(len(heights)), key=lambda place: heights[place])
    moved = list(heights)
    for below, above in pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    shift = (sum(heights) - sum(moved)) / len(heights) if heights else 0.0
    return [height + shift for height in moved]


def _offsets(width: float) -> Iterator[tuple[float, float]]:
    """Places around a point, nearest first."""
    for far in (0.0, 10.0, 22.0, 36.0):
        side, rise = 11 + far, 16 + far
        yield from ((-side - width, -4 - far / 2), (side, 0), (-width / 2, -rise), (-width / 2, rise))
        yield from ((side, rise), (-side - width, -rise), (side, -rise), (-side - width, rise))


def _box(label: Label, offset: tuple[float, float]) -> Box:
    left, middle = label.x + offset[0], label.y + offset[1]
    return left, middle - HEIGHT / 2, left + label.width, middle + HEIGHT / 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _inside(box: Box, frame: Box) -> bool:
    return box[0] >= frame[0] and box[1] >= frame[1] and box[2] <= frame[2] and box[3] <= frame[3]
