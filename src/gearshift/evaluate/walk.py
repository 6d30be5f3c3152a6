"""Many placements over one batch: each is run from the first layer where it leaves the placement before it."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from gearshift.model import GearshiftModel
from gearshift.spec import ModelSpec, Placement


class Stop(NamedTuple):
    """One placement of a route, and the first layer that must be run for it: the layers before are those just run."""

    placement: Placement
    first_layer: int

    @property
    def layer_evaluations(self) -> int:
        """How many layers are run to get here."""
        return len(self.placement) - self.first_layer


def route(spec: ModelSpec, placements: Iterable[Placement]) -> list[Stop]:
    """The distinct placements in the order that runs the fewest layers: depth first through the trie they form.

    Every prefix that some placements share is then run once. The main mixer comes first in each layer, so that the
    all-main placement, where it is asked for, is the first stop.
    """
    order = [
        {name: rank for rank, name in enumerate(sorted(offered, key=lambda name, main=main: name != main))}  # type: ignore[misc]
        for offered, main in zip(spec.choices, spec.main, strict=True)
    ]

    def key(placement: Placement) -> tuple[int, ...]:
        return tuple(rank[name] for rank, name in zip(order, placement.validate(spec.choices), strict=True))

    stops: list[Stop] = []
    for placement in sorted(set(placements), key=key):
        shared = 0
        if stops:
            pairs = zip(stops[-1].placement, placement, strict=True)
            shared = next(layer for layer, (before, now) in enumerate(pairs) if before != now)
        stops.append(Stop(placement, shared))
    return stops


def walk(model: GearshiftModel, tokens: Tensor, stops: Sequence[Stop]) -> Iterator[Tensor]:
    """The hidden states [batch, tokens, hidden] after the last block (before the final norm), for each stop in turn.

    `tokens` is [batch, tokens]. The states after every layer of the current placement are kept, layers x batch x tokens
    x hidden numbers in all; so is what the layers share (masks, rotary tables), which no placement changes. The numbers
    are those of a plain forward, bit for bit: the same operations run on the same inputs.
    """
    hidden = model.embed(tokens)
    context = model.context(hidden)
    blocks = model.blocks
    path = [hidden]
    for placement, first_layer in stops:
        del path[first_layer + 1 :]
        for layer in range(first_layer, len(blocks)):
            path.append(blocks[layer](path[-1], context, placement[layer]))
        yield path[-1]
