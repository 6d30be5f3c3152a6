"""What a placement costs: a number a layer and mixer, and a sum."""

from collections.abc import Mapping
from dataclasses import dataclass

from gearshift.spec.model import ModelSpec
from gearshift.spec.parts import MixerSpec
from gearshift.spec.placement import Placement


@dataclass(frozen=True)
class CostTable:
    """The cost of each mixer in each layer, and of everything that no placement changes. Lower is better."""

    base: float
    """What every placement pays."""
    layers: tuple[Mapping[str, float], ...]
    """For each layer: mixer name -> cost."""
    main: Placement
    """The upper end of the span: the placement of main mixers."""
    unit: str
    """What the numbers count, in words."""

    def of(self, placement: Placement) -> float:
        """The cost of a (valid) placement."""
        return self.base + sum(layer[name] for layer, name in zip(self.layers, placement, strict=True))

    @property
    def cheapest(self) -> Placement:
        """The cheapest placement; of equal mixers, the one named first."""
        return Placement(min(layer, key=lambda name: layer[name]) for layer in self.layers)

    @property
    def span(self) -> tuple[float, float]:
        """The cost of the cheapest placement and of the all-main one."""
        return self.of(self.cheapest), self.of(self.main)

    def at(self, share: float) -> float:
        """The cost at a share of the span: 0 is the cheapest placement, 1 the all-main one. ValueError outside."""
        low, high = self.span
        if not 0 <= share <= 1:
            raise ValueError(f"a budget of {share:g} lies outside the cost span: {self.describe_span()}")
        return low + share * (high - low)

    def describe_span(self) -> str:
        """The span in words, for a person whose budget was impossible."""
        low, high = self.span
        return f"0 is {low:,.0f} {self.unit} ({self.cheapest}), 1 is {high:,.0f} ({self.main})"


def decode_cost(
    spec: ModelSpec,
    weight_bytes: Mapping[tuple[str, str], int],
    shared_bytes: int,
    dtype: str,
    context: int = 8192,
    batch: int = 1,
) -> CostTable:
    """Bytes moved to decode one token of each of `batch` sequences that are `context` tokens long.

    A step reads every weight once, reads the state of each sequence, and writes what changes: the whole of a state of
    fixed size, one token's worth of a growing one. At small batches decoding is bound by these bytes.

    Args:
        spec: the model.
        weight_bytes: size of each mixer's weights, by (block name, mixer name).
        shared_bytes: size of all other weights that a step reads.
        dtype: dtype of activations and of cached keys and values.
        context: tokens before the decoded one.
        batch: sequences decoded together.
    """

    def state_traffic(mixer: MixerSpec) -> int:
        read = sum(tensor.bytes(context, dtype) for tensor in mixer.state())
        written = sum(tensor.bytes(1, dtype) for tensor in mixer.state())
        return batch * (read + written)

    tables = {
        name: {
            choice: float(weight_bytes[name, choice] + state_traffic(mixer)) for choice, mixer in block.mixers.items()
        }
        for name, block in spec.decoder.blocks.items()
    }
    layers = tuple(tables[name] for name in spec.decoder.layout)
    return CostTable(float(shared_bytes), layers, spec.main, f"bytes a token at {context} tokens of context")
