"""What training asks of the processes that share its work, and the answers of one that is alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gearshift.data import Batch
from gearshift.model import GearshiftForCausalLM
from gearshift.spec import Placement
from gearshift.train.recipe import DistillationSettings

T = TypeVar("T")
Gradients = Sequence[Tensor]


def local(tensor: Tensor) -> Tensor:
    """What this process has of a tensor, to change in place where no gradients are recorded.

    Through DTensor, an operation on many tensors first works out where they all lie, again for every other set of them:
    with sampled mixers that takes longer than a step.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Parallel:
    """One process, which has nobody to ask. The others are subclasses of it."""

    is_first: bool = True
    """Whether this process writes what the run says of itself."""
    data_ranks: int = 1
    """Into how many slices a batch is cut."""
    data_rank: int = 0
    """Which of them is this process's."""
    compilable: bool = True
    """Whether torch.compile can take what is computed within a mixer or an MLP."""
    recordable: bool = True
    """Whether CUDA graphs can take what is computed between two exchanges."""

    def place(self, model: GearshiftForCausalLM, device: torch.device, half: bool) -> None:
        """Bring `model` to `device` in float32. `half`: whether its matrix products will run in bfloat16."""
        model.float().to(device)

    def within(self, unit: nn.Module, work: Callable[..., T], *given: Any) -> T:
        """`work(unit, *given)`, the parameters of `unit`, a mixer or an MLP, at hand as in its forward."""
        return work(unit, *given)

    def check(self, settings: DistillationSettings) -> None:
        """ValueError if the stages' batches cannot be cut into equal slices."""

    def once(self, make: Callable[[], T]) -> T:
        """What `make` gives on the first process, on all of them. They wait for it."""
        return make()

    def any_of(self, found: T | None) -> T | None:
        """What the first of the processes that has `found` anything has, on all of them. They wait for each other."""
        return found

    def slice(self, batch: Batch) -> Batch:
        """This process's share of `batch`, whose sequences must divide evenly."""
        return batch

    def deal(self, batch: Batch, size: int) -> Sequence[Batch]:
        """`batch`, which is not learnt from, in parts of together `size` sequences a time: as many on every process.

        Where its sequences do not divide evenly, every process gets all of them.
        """
        return batch.split(size)

    def average(self, values: Tensor) -> Tensor:
        """The mean of `values` over all slices, on every process."""
        return values

    def total(self, values: Tensor) -> Tensor:
        """The sum of `values` over all slices, on every process."""
        return values

    def expect(
        self, model: GearshiftForCausalLM, teacher: GearshiftForCausalLM, placement: Placement | None, deep: bool
    ) -> None:
        """Before a step: `model` runs under `placement` beside `teacher`, or only what learns of it if None.

        `deep`: one backward pass goes through all layers; else each mixer has its own, right after its forward.
        """

    def sync(self, last: bool) -> None:
        """Before a part of a step: gradients are exchanged after the `last` part alone."""

    def finish(self, gradients: Iterable[Gradients]) -> None:
        """After the last part: average, in place, those of all gradients that have not been exchanged with it."""

    def norms(self, groups: Sequence[Gradients]) -> Tensor:
        """The norm of the gradients of each group, [groups]."""
        norms = torch.stack(torch._foreach_norm([gradient for group in groups for gradient in group]))
        if len(norms) == len(groups):
            return norms
        return torch.stack([torch.linalg.vector_norm(part) for part in norms.split(list(map(len, groups)))])

    def channels(self, features: Tensor) -> Tensor:
        """All channels of what a mixer's `o_proj` reads here, [..., channels here] -> [..., channels]."""
        return features

    def whole(self, tensor: Tensor) -> Tensor:
        """All of a parameter, or of a tensor that lies on the processes as it does."""
        return tensor

    def weights(self, model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        """All weights of `model` in `dtypes` on the CPU, by their names in a checkpoint, on the first process."""
        kept = {}
        for name, tensor in model.state_dict().items():
            whole = self.whole(tensor)
            if self.is_first:
                kept[name] = whole.to("cpu", dtypes[name])
        return kept

    def assign(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Give `parameter` the value `whole`, which every process has."""
        parameter.data.copy_(whole)


ALONE = Parallel()
