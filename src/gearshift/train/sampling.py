"""Which placement a step trains: a pure function of (seed, step), so that ranks agree and resumed runs repeat it.

Each strategy is a part of the recipe. They draw from Philox (Salmon et al. 2011, "Parallel random numbers: as easy as
1, 2, 3") by its raw output, which numpy keeps the same across its versions.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator

from gearshift.spec import Placement, Spec, resolve_placement

Choices = Sequence[Sequence[str]]
"""For every layer, the names of the mixers it offers."""
Presets = Mapping[str, Placement]

DOMAIN = 1
"""The top word of Philox's counter: keeps placements apart from the data order, which uses the same seeds."""


class Stream:
    """Uniform numbers that depend on (seed, step) alone."""

    def __init__(self, seed: int, step: int):
        self._bits = np.random.Philox(key=np.array([seed, step], dtype=np.uint64), counter=[0, 0, 0, DOMAIN])

    def uniforms(self, count: int) -> np.ndarray:
        """The next `count` numbers in [0, 1), float64 with 53 random bits each."""
        return (self._bits.random_raw(count) >> np.uint64(11)) * 2.0**-53

    def integer(self, below: int) -> int:
        """The next integer in [0, below)."""
        return int(self.uniforms(1)[0] * below)

    def order(self, count: int) -> np.ndarray:
        """A uniformly random permutation of range(count)."""
        return np.argsort(self.uniforms(count), kind="stable")

    def weighted(self, weights: Sequence[float]) -> int:
        """An index, drawn in proportion to `weights`, which need not sum to one."""
        shares = np.cumsum(weights)
        drawn = int(np.searchsorted(shares, self.uniforms(1)[0] * shares[-1], side="right"))
        return min(drawn, max(index for index, weight in enumerate(weights) if weight))


class SamplingStrategy(Spec):
    """How the placement of a step is drawn."""

    type: str
    """The strategy."""

    @property
    def named(self) -> tuple[str, ...]:
        """The placements that the settings name."""
        return ()

    def check(self, choices: Choices, presets: Presets) -> None:
        """ValueError if the settings do not fit a model with these choices and presets."""

    def possible(self, choices: Choices, presets: Presets) -> list[set[str]]:
        """For every layer, the mixers that may be drawn."""
        return [set(offered) for offered in choices]

    def draw(self, choices: Choices, presets: Presets, stream: Stream) -> Placement:
        """The next placement of `stream`."""
        raise NotImplementedError

    def sample(self, choices: Choices, presets: Presets, seed: int, step: int) -> Placement:
        """The placement of step `step`. ValueError if the settings do not fit the model."""
        self.check(choices, presets)
        return self.draw(choices, presets, Stream(seed, step))


class UniformSampling(SamplingStrategy):
    """Every layer by itself, each of its mixers as likely as the others."""

    type: Literal["uniform"] = "uniform"
    """Always `uniform`."""

    def draw(self, choices: Choices, presets: Presets, stream: Stream) -> Placement:
        return Placement(offered[stream.integer(len(offered))] for offered in choices)


class WeightedSampling(SamplingStrategy):
    """Every layer by itself, its mixers in proportion to their weights."""

    type: Literal["weighted"] = "weighted"
    """Always `weighted`."""
    weights: dict[str, float]
    """Mixer -> weight. Normalised over what a layer offers; a mixer left out is drawn only where it has no rival."""

    @field_validator("weights")
    @classmethod
    def _check_weights(cls, weights: dict[str, float]) -> dict[str, float]:
        return normalised(weights, "weights")

    def check(self, choices: Choices, presets: Presets) -> None:
        known = dict.fromkeys(name for offered in choices for name in offered)
        for name in self.weights:
            if name not in known:
                raise ValueError(f"the sampling weights name a mixer {name!r}, but the model has {', '.join(known)}")
        for layer, offered in enumerate(choices):
            if len(offered) > 1 and not any(self.weights.get(name) for name in offered):
                raise ValueError(
                    f"the sampling weights leave layer {layer} nothing to draw: it offers {', '.join(offered)}"
                )

    def possible(self, choices: Choices, presets: Presets) -> list[set[str]]:
        return [{name for name in offered if len(offered) == 1 or self.weights.get(name)} for offered in choices]

    def draw(self, choices: Choices, presets: Presets, stream: Stream) -> Placement:
        return Placement(self._choose(offered, stream) for offered in choices)

    def _choose(self, offered: Sequence[str], stream: Stream) -> str:
        if len(offered) == 1:
            return offered[0]
        return offered[stream.weighted([self.weights.get(name, 0.0) for name in offered])]


class AllocationSampling(SamplingStrategy):
    """First how many layers each mixer gets, every split as likely as the others; then who gets which, uniformly.

    Independent draws all but never come near one mixer everywhere; here that is as likely as any other split. Layers
    that offer the same mixers are split together; where offers differ, each group of layers is split by itself.
    """

    type: Literal["allocation"] = "allocation"
    """Always `allocation`."""

    def draw(self, choices: Choices, presets: Presets, stream: Stream) -> Placement:
        groups: dict[frozenset[str], list[int]] = {}
        for layer, offered in enumerate(choices):
            groups.setdefault(frozenset(offered), []).append(layer)
        drawn = [""] * len(choices)
        for layers in groups.values():
            offered = choices[layers[0]]
            # Stars and bars: where the bars lie among the layers says how many layers each mixer gets.
            slots = len(layers) + len(offered) - 1
            bars = np.sort(stream.order(slots)[: len(offered) - 1])
            counts = [right - left - 1 for left, right in pairwise([-1, *bars.tolist(), slots])]
            names = [name for name, count in zip(offered, counts, strict=True) for _ in range(count)]
            for layer, index in zip(layers, stream.order(len(layers)), strict=True):
                drawn[layer] = names[index]
        return Placement(drawn)


class PresetSampling(SamplingStrategy):
    """Named placements, each with its probability. What is left of the probability goes to another strategy."""

    type: Literal["presets"] = "presets"
    """Always `presets`."""
    probabilities: dict[str, float]
    """Placement -> probability: a preset's name, a mixer's name for that mixer everywhere, or a list in text."""
    otherwise: Annotated[UniformSampling | WeightedSampling | AllocationSampling, Field(discriminator="type")] = (
        AllocationSampling()
    )
    """The strategy that the rest of the probability falls through to."""

    @field_validator("probabilities")
    @classmethod
    def _check_probabilities(cls, probabilities: dict[str, float]) -> dict[str, float]:
        normalised(probabilities, "probabilities")
        if sum(probabilities.values()) > 1 + 1e-9:
            raise ValueError(f"the probabilities of the presets sum to {sum(probabilities.values()):g}, more than 1")
        return probabilities

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(self.probabilities)

    def check(self, choices: Choices, presets: Presets) -> None:
        for name in self.probabilities:
            resolve_placement(name, presets, choices)
        self.otherwise.check(choices, presets)

    def possible(self, choices: Choices, presets: Presets) -> list[set[str]]:
        named = [resolve_placement(name, presets, choices) for name, share in self.probabilities.items() if share]
        rest = [self.otherwise.possible(choices, presets)] if sum(self.probabilities.values()) < 1 else []
        return _joined(*rest, *([{name} for name in placement] for placement in named))

    def draw(self, choices: Choices, presets: Presets, stream: Stream) -> Placement:
        shares = list(self.probabilities.values())
        drawn = stream.weighted([*shares, max(0.0, 1 - sum(shares))])
        if drawn == len(shares):
            return self.otherwise.draw(choices, presets, stream)
        return resolve_placement(list(self.probabilities)[drawn], presets, choices)


class SandwichSampling(SamplingStrategy):
    """The cheapest placement, then random ones, then the largest if one is named, and again from the front.

    The sandwich rule of slimmable networks (arXiv 1903.05134) for placements: what lies in between is then
    bounded by the two ends. It turns over the steps of a run, where the paper adds up the gradients of one turn.
    """

    type: Literal["sandwich"] = "sandwich"
    """Always `sandwich`."""
    cheapest: str
    """What begins a turn: a preset's name, a mixer's name for that mixer everywhere, or a placement in text."""
    random: int = Field(default=2, ge=1)
    """How many steps of a turn draw at random."""
    between: Annotated[
        UniformSampling | WeightedSampling | AllocationSampling | PresetSampling, Field(discriminator="type")
    ] = AllocationSampling()
    """The strategy that draws them."""
    largest: str | None = None
    """What ends a turn, named as `cheapest` is. Null: nothing; main is the teacher by default, and learns nothing."""

    @property
    def named(self) -> tuple[str, ...]:
        return (*self._end_names(), *self.between.named)

    def check(self, choices: Choices, presets: Presets) -> None:
        self._ends(choices, presets)
        self.between.check(choices, presets)

    def possible(self, choices: Choices, presets: Presets) -> list[set[str]]:
        ends = ([{name} for name in placement] for placement in self._ends(choices, presets))
        return _joined(self.between.possible(choices, presets), *ends)

    def sample(self, choices: Choices, presets: Presets, seed: int, step: int) -> Placement:
        self.check(choices, presets)
        ends = self._ends(choices, presets)
        place = step % (self.random + len(ends))
        if 1 <= place <= self.random:
            return self.between.sample(choices, presets, seed, step)
        return ends[0 if place == 0 else 1]

    def _ends(self, choices: Choices, presets: Presets) -> list[Placement]:
        return [resolve_placement(name, presets, choices) for name in self._end_names()]

    def _end_names(self) -> list[str]:
        return [name for name in (self.cheapest, self.largest) if name is not None]


Sampling = Annotated[
    UniformSampling | WeightedSampling | AllocationSampling | PresetSampling | SandwichSampling,
    Field(discriminator="type"),
]
"""Any of the strategies, told apart by `type`."""


def _joined(*ways: Iterable[set[str]]) -> list[set[str]]:
    """For every layer, the mixers that any of the ways has there."""
    return [set().union(*names) for names in zip(*ways, strict=True)]


def normalised(weights: Mapping[str, float], what: str) -> dict[str, float]:
    """`weights` with a sum of one. ValueError if one is negative or not finite, or if none is positive."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"{what}: {name!r} has {weight:g}, but only finite numbers from 0 up make sense")
    total = sum(weights.values())
    if not total > 0:
        raise ValueError(f"{what}: at least one of them must be positive")
    return {name: weight / total for name, weight in weights.items()}
