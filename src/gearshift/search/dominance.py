"""Mixers that others beat."""

from collections import Counter
from collections.abc import Iterable, Mapping

from gearshift.search.result import Dominated
from gearshift.search.scores import ScoreTable
from gearshift.spec import CostTable, Placement


def dominated(cost: CostTable, table: ScoreTable, chosen: Iterable[Placement]) -> tuple[Dominated, ...]:
    """The mixers that none of the chosen placements uses, or that single-layer scores find beaten in every layer."""
    used = {name for placement in chosen for name in placement}
    found = []
    for mixer in dict.fromkeys(name for layer in table.layers for name in layer):
        rivals = [_rival(mixer, cost.layers[i], layer) for i, layer in enumerate(table.layers) if mixer in layer]
        everywhere = None not in rivals
        if mixer not in used or everywhere:
            found.append(Dominated(mixer, mixer not in used, everywhere, _reason(rivals)))
    return tuple(found)


def _rival(mixer: str, costs: Mapping[str, float], losses: Mapping[str, float]) -> str | None:
    """The best mixer of a layer that is no dearer and no worse than `mixer`; of equal ones the first beats the rest."""
    order = list(losses)
    beating = [
        name
        for name in order
        if costs[name] <= costs[mixer]
        and losses[name] <= losses[mixer]
        and (costs[name], losses[name], order.index(name)) < (costs[mixer], losses[mixer], order.index(mixer))
    ]
    return min(beating, key=lambda name: losses[name], default=None)


def _reason(rivals: list[str | None]) -> str:
    """In one sentence, why a mixer loses, from what beats it in each layer that offers it."""
    beaten = Counter(rival for rival in rivals if rival is not None)
    layers = f"each of the {len(rivals)} layers" if len(rivals) > 1 else "the one layer"
    if not beaten:
        return "no other mixer is both no dearer and no worse in any layer, but no budget was met best with it"
    if beaten.total() == len(rivals) and len(beaten) == 1:
        return f"in {layers} {next(iter(beaten))} is no dearer and scores no worse"
    by_rival = ", ".join(f"{rival} in {count}" for rival, count in beaten.most_common())
    if beaten.total() == len(rivals):
        return f"in {layers} another mixer is no dearer and scores no worse: {by_rival}"
    return (
        f"in {beaten.total()} of the {len(rivals)} layers that offer it another mixer is no dearer and scores no worse"
        f" ({by_rival}), and no budget was met best with it in the others"
    )
