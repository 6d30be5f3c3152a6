"""The best placements for a budget when losses add up: exact dynamic programming over the layers.

The choice of one mixer a layer under a bound on the summed cost is a multiple-choice knapsack (Kellerer, Pferschy and
Pisinger, Knapsack Problems, 2004, chapter 11). Layer by layer, a prefix of a placement is dropped once `keep` others
of the same length use no more and lose no more: each completion of it has `keep` completions at least as good.

Sums are float64, from the first layer to the last, which for whole numbers (bytes) below 2^53 is exact. It is as sound
for other numbers, for rounded addition is monotone: what is no larger before another layer is added is no larger after.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gearshift.search.budget import Budget
from gearshift.search.scores import ScoreTable
from gearshift.spec import CostTable, Placement

Prune = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""(resource used, loss, layers done) -> which prefixes are worth keeping, as indices in the order to keep them in."""


@dataclass(frozen=True)
class Predicted:
    """A placement that the solver proposes."""

    placement: Placement
    cost: float
    """In the unit of the cost table."""
    loss: float
    """The sum of the single-layer losses: a prediction. Lower is better."""


@dataclass(frozen=True)
class _Prefixes:
    """All prefixes kept after the last layer, and how each came about."""

    used: np.ndarray
    """[prefixes], cost or packed counts."""
    loss: np.ndarray
    """[prefixes]"""
    steps: list[tuple[np.ndarray, np.ndarray]]
    """For each layer: the prefix before (index), and the mixer added (number among those the layer offers)."""

    def placement(self, index: int, names: list[list[str]]) -> Placement:
        mixers = []
        for (parent, option), offered in zip(reversed(self.steps), reversed(names), strict=True):
            mixers.append(offered[option[index]])
            index = int(parent[index])
        return Placement(reversed(mixers))


class Solver:
    """Proposes placements by the sum of single-layer losses. Ties go to the mixers that the layers name first."""

    def __init__(self, cost: CostTable, losses: ScoreTable, keep: int = 1):
        """`keep`: how many of the best placements are wanted for a budget; time and memory grow in proportion."""
        assert keep >= 1
        assert [set(layer) for layer in cost.layers] == [set(layer) for layer in losses.layers]
        self.cost = cost
        self.losses = losses
        self.keep = keep
        self._names = [list(layer) for layer in losses.layers]
        self._added = [np.array([layer[name] for name in layer], dtype=np.float64) for layer in losses.layers]

    def front(self) -> list[Predicted]:
        """The whole predicted Pareto front, cheapest first: what no placement beats in both cost and predicted loss."""
        prefixes = self._by_cost
        best = np.minimum.accumulate(prefixes.loss)
        first = np.flatnonzero(prefixes.loss < np.concatenate([[np.inf], best[:-1]]))
        return [self._predicted(prefixes, index) for index in first.tolist()]

    def best(self, budget: Budget) -> list[Predicted]:
        """The `keep` placements of least predicted loss that the (validated) budget allows, best first.

        There are fewer if fewer placements exist.
        """
        if budget.counts is not None:
            return self._best_by_counts(dict(budget.counts))
        limit = budget.limit(self.cost)
        prefixes = self._by_cost
        allowed = np.flatnonzero(prefixes.used <= limit)
        order = allowed[np.lexsort((prefixes.used[allowed], prefixes.loss[allowed]))]
        return [self._predicted(prefixes, index) for index in order[: self.keep].tolist()]

    @cached_property
    def _by_cost(self) -> _Prefixes:
        """The prefixes that matter for some limit on the cost, cheapest first. One run answers every share."""
        spent = [
            np.array([layer[name] for name in names])
            for layer, names in zip(self.cost.layers, self._names, strict=True)
        ]
        return self._run(np.array([self.cost.base]), spent, self._skyband)

    def _best_by_counts(self, counts: dict[str, int]) -> list[Predicted]:
        """Prefixes are told apart by how many layers each named mixer has, packed as the digits of one integer."""
        digit = 1
        digits, packed = {}, 0
        for name, count in counts.items():
            digits[name] = (digit, count)
            packed += digit * count
            digit *= len(self._names) + 1
        assert digit < 2**62, "too many mixers are counted"
        spent = [np.array([digits.get(name, (0, 0))[0] for name in names], dtype=np.int64) for names in self._names]

        def prune(used: np.ndarray, loss: np.ndarray, done: int) -> np.ndarray:
            left = len(self._names) - done
            reachable = np.ones(len(used), dtype=bool)
            missing = np.zeros(len(used), dtype=np.int64)
            for place, count in digits.values():
                lacking = count - used // place % (len(self._names) + 1)
                reachable &= lacking >= 0
                missing += lacking
            return self._best_of_each(used, loss, reachable & (missing <= left))

        prefixes = self._run(np.zeros(1, dtype=np.int64), spent, prune)
        assert (prefixes.used == packed).all()
        order = np.argsort(prefixes.loss, kind="stable")
        return [self._predicted(prefixes, index) for index in order[: self.keep].tolist()]

    def _run(self, used: np.ndarray, spent: list[np.ndarray], prune: Prune) -> _Prefixes:
        """Extend all prefixes by each layer's mixers in turn, dropping those that cannot matter."""
        loss = np.array([self.losses.main])
        steps = []
        for done, (resource, added) in enumerate(zip(spent, self._added, strict=True), start=1):
            extended_used = (used[:, None] + resource).ravel()
            extended_loss = (loss[:, None] + added).ravel()
            kept = prune(extended_used, extended_loss, done)
            used, loss = extended_used[kept], extended_loss[kept]
            parent, option = np.divmod(kept, len(added))
            steps.append((parent.astype(np.int32), option.astype(np.int16)))
        return _Prefixes(used, loss, steps)

    def _skyband(self, used: np.ndarray, loss: np.ndarray, done: int) -> np.ndarray:
        """The prefixes with fewer than `keep` others that use no more and lose no more, cheapest first.

        Among prefixes sorted by cost, one is kept if its loss is below the `keep`-th smallest so far. The running j-th
        smallest for all j come from one pass each: what a pass does not keep as its minimum falls through to the next.
        """
        order = np.lexsort((loss, used))
        falling = loss[order]
        for _ in range(self.keep):
            smallest = np.concatenate([[np.inf], np.minimum.accumulate(falling)[:-1]])
            falling = np.maximum(falling, smallest)
        return order[loss[order] < smallest]

    def _best_of_each(self, used: np.ndarray, loss: np.ndarray, allowed: np.ndarray) -> np.ndarray:
        """The `keep` best of the allowed prefixes that have used the same."""
        index = np.flatnonzero(allowed)
        order = index[np.lexsort((loss[index], used[index]))]
        groups = used[order]
        starts = np.flatnonzero(np.concatenate([[True], groups[1:] != groups[:-1]])) if len(order) else order
        sizes = np.diff(np.append(starts, len(order)))
        rank = np.arange(len(order)) - np.repeat(starts, sizes)
        return order[rank < self.keep]

    def _predicted(self, prefixes: _Prefixes, index: int) -> Predicted:
        placement = prefixes.placement(index, self._names)
        return Predicted(placement, self.cost.of(placement), float(prefixes.loss[index]))
