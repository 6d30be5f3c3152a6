"""What nothing beats in both cost and loss."""

import math
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")


def non_dominated(points: Iterable[T], cost: Callable[[T], float], loss: Callable[[T], float]) -> list[T]:
    """The points such that no other is at most as dear and at most as bad, and less in one; cheapest first.

    Of points that are equal in both, the first is kept. A loss that is not a number is beaten by everything.
    """
    real = [point for point in points if not math.isnan(loss(point))]
    ordered = sorted(real, key=lambda point: (cost(point), loss(point)))
    front: list[T] = []
    for point in ordered:
        if not front or loss(point) < loss(front[-1]):
            front.append(point)
    return front
