"""Scores a layer and mixer: what single changes of the all-main placement do, and their sum as a prediction."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from gearshift.spec import ModelSpec, Placement

BROKEN = 1e30
"""What a mixer adds whose loss is not finite: more than any real loss, yet finite, so that fewer of them still win."""


def single_changes(spec: ModelSpec) -> list[Placement]:
    """Every placement that differs from the all-main one in exactly one layer, first layer first."""
    main = spec.main
    return [
        main.replace(layer, name)
        for layer, offered in enumerate(spec.choices)
        for name in offered
        if name != main[layer]
    ]


def pure_placements(spec: ModelSpec) -> dict[str, Placement]:
    """For each mixer, the placement that runs it in every layer which offers it, and the main mixer elsewhere."""
    names = dict.fromkeys(name for offered in spec.choices for name in offered)
    layers = list(zip(spec.choices, spec.main, strict=True))
    return {name: Placement(name if name in offered else main for offered, main in layers) for name in names}


@dataclass(frozen=True)
class ScoreTable:
    """What each mixer in each layer adds to the loss of the all-main placement. Lower is better.

    The loss of any placement is predicted as the plain sum. It ranks placements well where each change does little harm
    by itself; it knows nothing of how changes interact, so predictions are proposals, to be verified by evaluation.
    """

    main: float
    """The loss of the all-main placement."""
    layers: tuple[Mapping[str, float], ...]
    """For each layer: mixer name -> change of the loss. 0 for the main mixer."""

    @classmethod
    def from_losses(cls, spec: ModelSpec, losses: Mapping[Placement, float]) -> "ScoreTable":
        """The table from the measured losses of the all-main placement and of every single change.

        A mixer whose loss is not finite is never proposed while there is another way.
        ValueError if the all-main placement itself has no finite loss.
        """
        main = losses[spec.main]
        if not math.isfinite(main):
            raise ValueError(
                f"the all-main placement {spec.main} scores {main}: there is nothing to compare others with"
            )
        layers = []
        for layer, offered in enumerate(spec.choices):
            measured = {name: losses[spec.main.replace(layer, name)] for name in offered}
            layers.append({name: loss - main if math.isfinite(loss) else BROKEN for name, loss in measured.items()})
        return cls(main, tuple(layers))

    def of(self, placement: Placement) -> float:
        """The predicted loss of a (valid) placement, added up from the first layer to the last."""
        loss = self.main
        for layer, name in zip(self.layers, placement, strict=True):
            loss += layer[name]
        return loss

    def without(self, mixer: str) -> "ScoreTable":
        """The table of a model in which `mixer` is broken: it is not proposed while there is another way."""
        layers = ({name: BROKEN if name == mixer else loss for name, loss in layer.items()} for layer in self.layers)
        return ScoreTable(self.main, tuple(layers))
