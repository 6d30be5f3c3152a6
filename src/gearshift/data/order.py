"""Orders that are functions: any place in them is computed by itself, so nothing is stored and nothing is replayed."""

from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b

ROUNDS = 4


def shuffled(position: int, size: int, *key: int) -> int:
    """Where the permutation of range(size) that `key` chooses sends `position`.

    A Feistel network (Luby and Rackoff 1988) permutes the numbers of an even number of bits. What falls outside
    range(size) goes through again: that is at most three numbers of four.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = position >> half, position & mask
        for turn in range(ROUNDS):
            left, right = right, left ^ (_hash(*key, turn, right) & mask)
        position = left << half | right
        if position < size:
            return position


def shares(weights: Sequence[float]) -> list[Fraction]:
    """Weights, all positive, as exact shares of 1."""
    exact = [Fraction(weight) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def interleaved(number: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """(which source the draw `number` takes, how many draws before it took the same), counted from 0.

    Of the first n draws, each source has its share of n to within one draw, and one more for each source before it.
    """
    left = Fraction(1)
    for source, share in enumerate(shares):
        part = share / left  # of the draws that the sources before leave
        before, after = (at * part.numerator // part.denominator for at in (number, number + 1))
        if after > before:
            return source, before
        number -= before
        left -= share
    raise AssertionError("shares must add up to 1")


def _hash(*numbers: int) -> int:
    return int.from_bytes(blake2b(repr(numbers).encode(), digest_size=8).digest())
