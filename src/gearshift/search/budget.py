"""Budgets: a share of the cost span, or an exact number of layers for some mixers."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import combinations

from gearshift.spec import CostTable, ModelSpec, Placement
from gearshift.spec.placement import NAME

COUNT = re.compile(rf"\s*({NAME.pattern})\s*=\s*(\d+)\s*")


def total(cost: CostTable, placement: Placement) -> float:
    """The cost of a placement, added up strictly from the first layer to the last.

    The solver adds in this order too, and the two must agree to the last bit where a placement just meets its budget.
    `CostTable.of` may differ by a rounding: from Python 3.12 on the built-in `sum` compensates for rounding errors.
    """
    spent = cost.base
    for layer, name in zip(cost.layers, placement, strict=True):
        spent += layer[name]
    return spent


@dataclass(frozen=True)
class Budget:
    """What a placement may cost: exactly one of a share of the cost span and counts by mixer."""

    share: float | None = None
    """Of the span from the cheapest placement, 0, to the all-main one, 1."""
    counts: tuple[tuple[str, int], ...] | None = None
    """Mixer, number of layers: exactly so many. The other layers go to mixers that are not named here."""

    def __post_init__(self) -> None:
        assert (self.share is None) != (self.counts is None), "a budget is a share or counts"

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """Read `0.5`, or `attention=8,window=12`. ValueError if the text is neither."""
        try:
            return cls(share=float(text))
        except ValueError:
            pass
        counts: dict[str, int] = {}
        for item in text.split(","):
            match = COUNT.fullmatch(item)
            if not match:
                raise ValueError(
                    f"cannot read {item.strip()!r} in the budget {text!r}: a budget is a share of the cost span, such"
                    " as 0.5, or numbers of layers, such as attention=8,window=12"
                )
            if match[1] in counts:
                raise ValueError(f"the budget {text!r} names {match[1]!r} twice")
            counts[match[1]] = int(match[2])
        return cls(counts=tuple(counts.items()))

    def __str__(self) -> str:
        if self.counts is None:
            return f"{self.share:.15g}"
        return ",".join(f"{name}={count}" for name, count in self.counts)

    def validate(self, spec: ModelSpec, cost: CostTable) -> "Budget":
        """Check that some placement meets the budget; returns itself. ValueError with what is possible if none does."""
        if self.counts is None:
            assert self.share is not None
            cost.at(self.share)
        else:
            try:
                _check_counts(str(self), dict(self.counts), spec.choices)
            except ValueError as error:
                raise ValueError(f"{error}; as shares of the cost span, {cost.describe_span()}") from None
        return self

    def limit(self, cost: CostTable) -> float | None:
        """The largest cost allowed, in the table's unit; None for a budget of counts."""
        if self.share is None:
            return None
        low, high = total(cost, cost.cheapest), total(cost, cost.main)
        # low + (high - low) may round to less than high, and would then refuse the all-main placement.
        return high if self.share == 1 else low + self.share * (high - low)

    def allows(self, placement: Placement, cost: CostTable) -> bool:
        """Whether a (valid) placement keeps to the budget."""
        if self.counts is not None:
            there = placement.counts()
            return all(there.get(name, 0) == count for name, count in self.counts)
        limit = self.limit(cost)
        assert limit is not None
        return total(cost, placement) <= limit


def _check_counts(text: str, counts: Mapping[str, int], choices: tuple[tuple[str, ...], ...]) -> None:
    """ValueError unless each layer can be given a mixer so that the counts hold.

    By Hall's theorem that is so unless some set of mixers is wanted by more layers than offer any of them. The mixers
    that no count names are wanted, together, by the layers left over.
    """
    offered = dict.fromkeys(name for layer in choices for name in layer)
    for name in counts:
        if name not in offered:
            near = get_close_matches(name, offered)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(offered)}"
            raise ValueError(f"the budget {text!r} counts an unknown mixer {name!r}: {hint}")
    asked = sum(counts.values())
    if asked > len(choices):
        raise ValueError(f"the budget {text!r} asks for {asked} layers, but the model has {len(choices)}")
    names = list(counts)
    for size in range(1, len(names) + 1):
        for group in combinations(names, size):
            wanted = sum(counts[name] for name in group)
            most = sum(any(name in layer for name in group) for layer in choices)
            least = sum(all(name in group for name in layer) for layer in choices)
            if not least <= wanted <= most:
                raise ValueError(
                    f"the budget {text!r} gives {wanted} layers to {' and '.join(group)}: of the {len(choices)} layers"
                    f" {least} offer nothing else and {most} offer {'one of them' if size > 1 else 'it'}, so the number"
                    f" must {f'lie from {least} to {most}' if least < most else f'be {least}'}"
                )


def name_budgets(texts: Iterable[str]) -> dict[str, Budget]:
    """Budgets by name. `NAME:BUDGET` names its own; the others are called `budget-1`, `budget-2`, ... by their place.

    ValueError for a budget that cannot be read, and for a name that comes twice.
    """
    named: dict[str, Budget] = {}
    for number, text in enumerate(texts, 1):
        name, colon, budget = text.partition(":")
        key = name.strip() if colon else f"budget-{number}"
        if not NAME.fullmatch(key):
            raise ValueError(f"{key!r} in {text!r} is no name: use letters, digits, '_' and '-', a letter first")
        if key in named:
            raise ValueError(f"two budgets are called {key!r}: give each its own name")
        named[key] = Budget.parse(budget if colon else text)
    return named
