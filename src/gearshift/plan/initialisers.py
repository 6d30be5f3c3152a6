"""What a tensor that no pretrained weight feeds starts as: data only, drawn by `gearshift.plan.execute.initialise`."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Constant:
    """Every element is `value`."""

    value: float


@dataclass(frozen=True, slots=True)
class Normal:
    """Independent normal draws of the given mean and standard deviation."""

    std: float
    mean: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.std < math.inf:
            raise ValueError(f"Normal: std is {self.std}; give a finite number that is not negative")


@dataclass(frozen=True, slots=True)
class Uniform:
    """Independent draws, uniform between `low` and `high`."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"Uniform: low {self.low} is above high {self.high}; swap them")


@dataclass(frozen=True, slots=True)
class LogUniform:
    """The logarithm of a draw uniform between `low` and `high`: `A_log` of Gated DeltaNet (arXiv 2412.06464)."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_positive_range(self)


@dataclass(frozen=True, slots=True)
class InverseSoftplusLogUniform:
    """`dt_bias` of Mamba (arXiv 2312.00752, section 3.6): softplus of it is log-uniform between `low` and `high`.

    The step sizes exp(uniform(log low, log high)) are raised to `floor` where they are below it, then put through the
    inverse of softplus.
    """

    low: float
    high: float
    floor: float

    def __post_init__(self) -> None:
        _check_positive_range(self)
        if self.floor <= 0:
            raise ValueError(f"InverseSoftplusLogUniform: floor is {self.floor}; softplus is positive, so must it be")


@dataclass(frozen=True, slots=True)
class LastTap:
    """Zeros, with `value` at the last index of the last dimension: a causal depthwise convolution [channels, 1, taps]
    that starts as a scaled identity."""

    value: float


@dataclass(frozen=True, slots=True)
class LogIndex:
    """log 1, log 2, log 3, ... along the last dimension: `A_log` of Mamba (arXiv 2312.00752, section 3.6)."""


Initialiser = Constant | Normal | Uniform | LogUniform | InverseSoftplusLogUniform | LastTap | LogIndex


def _check_positive_range(initialiser: LogUniform | InverseSoftplusLogUniform) -> None:
    if not 0 < initialiser.low <= initialiser.high:
        raise ValueError(
            f"{type(initialiser).__name__}: needs 0 < low <= high, got low {initialiser.low}, high {initialiser.high}"
        )
