"""What the two stages have in common: a model, a teacher, a precision, and what a part of a step's batch teaches."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from gearshift.data import Batch
from gearshift.mixers.base import Mixer
from gearshift.model import GearshiftForCausalLM
from gearshift.spec import Placement
from gearshift.train.engine import Engine, FrozenWeights
from gearshift.train.recipe import LayerwiseStage, SampledStage

Terms = dict[Any, Tensor]
"""What a batch was judged by: key -> scalar, detached."""
LayerErrors = dict[str, list[float | None]]
"""Mixer -> its normalised activation error in each layer, None where it was not judged."""


class StageRun(ABC):
    """A stage at work on a model."""

    def __init__(
        self,
        model: GearshiftForCausalLM,
        teacher: GearshiftForCausalLM,
        engine: Engine,
        stage: LayerwiseStage | SampledStage,
        seed: int,
    ):
        self.model = model
        self.teacher = teacher
        self.stage = stage
        self.seed = seed
        self.choices = model.spec.choices
        self.presets = model.presets
        self.precision = engine.precision
        self.steps = engine.steps
        self.graphs = engine.graphs
        # Beside the long kernels of a wide model, the time is not worth the memory.
        self.frozen = FrozenWeights({model, teacher} if engine.layer_graphs else (), self.precision)

    def placement(self, step: int) -> Placement:
        """The placement of step `step`, counted over all stages."""
        return self.stage.sampling.sample(self.choices, self.presets, self.seed, step)

    @property
    def own_teacher(self) -> bool:
        """Whether the model under its main placement is the teacher."""
        return self.teacher is self.model

    @property
    def through_depth(self) -> bool:
        """Whether gradients flow from layer to layer."""
        return False

    def calibration_sequences(self) -> int:
        """How many sequences the stage wants to calibrate on before its first step; 0 if it does not."""
        return 0

    def calibrate(self, batch: Batch) -> dict[str, LayerErrors]:
        """Calibrate on `batch`. Returns the errors `before`, `scaled` and `after`."""
        raise NotImplementedError

    @abstractmethod
    def learn(self, batch: Batch, step: int, share: float) -> Terms | None:
        """Add the gradient of `share` times the loss on `batch`. None if step `step` has none to add.

        `step` counts from the start of the run, over all stages.
        """

    @abstractmethod
    def measure(self, batch: Batch) -> Terms:
        """Judge `batch`, which is not trained on."""

    @abstractmethod
    def describe(self, values: Mapping[Any, float]) -> dict[str, Any]:
        """The terms of a step or of a measurement, averaged over its parts, as a record holds them."""

    def describe_step(self, step: int) -> dict[str, Any]:
        """What a record says of step `step` whatever came of it."""
        return {}

    def close(self) -> None:
        """Give back the memory of what was recorded."""
        self.frozen.close()

    @abstractmethod
    def gradients(self) -> Iterator[list[Tensor]]:
        """The gradients there are, in groups that are clipped together."""

    def forget_gradients(self) -> None:
        """Begin the next step without any."""
        for parameter in self.learning:
            parameter.grad = None

    @cached_property
    def students(self) -> list[dict[str, Mixer]]:
        """For every layer, the mixers that learn, by name."""
        return [block.learning for block in self.model.model.blocks]

    @cached_property
    def learning(self) -> list[nn.Parameter]:
        """The parameters that learn. A large model takes milliseconds to look for them."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


def gradients_of(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Those that some of `parameters` have."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]
