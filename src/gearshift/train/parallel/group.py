"""What the processes of one torchrun have in common, however the model lies on them."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.data import Batch
from gearshift.train.parallel.base import Parallel, T
from gearshift.train.parallel.split import summed
from gearshift.train.recipe import DistillationSettings


class Group(Parallel):
    """Processes that are told the same. `sharing` neighbours have the same slice of each batch."""

    def __init__(self, sharing: int = 1):
        self.is_first = dist.get_rank() == 0
        self.size = dist.get_world_size()
        self.data_ranks = self.size // sharing
        self.data_rank = dist.get_rank() // sharing

    def check(self, settings: DistillationSettings) -> None:
        for index, stage in enumerate(settings.stages):
            size, parts = settings.batch_size_of(index), settings.parts_of(index)
            counts = {f"{size} sequences a step in {parts} parts": settings.part_size_of(index)}
            calibrated = getattr(stage, "calibration_sequences", None)
            if calibrated:
                counts[f"{calibrated} calibration_sequences"] = calibrated
            for what, count in counts.items():
                if count % self.data_ranks:
                    raise ValueError(f"stage {index}: {what} cannot be shared by {self.data_ranks} data-parallel ranks")

    def once(self, make: Callable[[], T]) -> T:
        made = [make() if self.is_first else None]
        dist.broadcast_object_list(made, src=0, device=torch.device("cpu"))
        return made[0]  # type: ignore[return-value]

    def any_of(self, found: T | None) -> T | None:
        every: list[T | None] = [None] * self.size
        dist.all_gather_object(every, found)
        return next((one for one in every if one is not None), None)

    def slice(self, batch: Batch) -> Batch:
        assert len(batch) % self.data_ranks == 0, "an even batch was checked for"
        return batch.split(len(batch) // self.data_ranks)[self.data_rank]

    def deal(self, batch: Batch, size: int) -> Sequence[Batch]:
        mine = batch if len(batch) % self.data_ranks else self.slice(batch)
        return mine.split(size // self.data_ranks)

    def average(self, values: Tensor) -> Tensor:
        # Those that share a slice have the same values, so the mean over all processes is the mean over slices.
        return summed(values) / self.size

    def total(self, values: Tensor) -> Tensor:
        return summed(values) / (self.size // self.data_ranks)
