"""Many processes with a copy of the model each: each computes as if alone, and then they average their gradients."""

from collections.abc import Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gearshift.train.parallel.base import Gradients
from gearshift.train.parallel.group import Group

BUCKET = 2**26
"""Numbers that are exchanged at once, unless one tensor has more: enough for the network, and little memory."""


class Copies(Group):
    """The processes of one torchrun. All touch the same parameters in a step, and end it with the same gradients."""

    def finish(self, gradients: Iterable[Gradients]) -> None:
        for group in gradients:
            for bucket in _buckets(group):
                self._average_in_place(bucket)

    def _average_in_place(self, bucket: Sequence[Tensor]) -> None:
        alone = len(bucket) == 1 and bucket[0].is_contiguous()
        whole = bucket[0] if alone else torch.cat([tensor.flatten() for tensor in bucket])
        dist.all_reduce(whole)
        whole.div_(self.size)
        if not alone:
            parts = whole.split([tensor.numel() for tensor in bucket])
            torch._foreach_copy_(list(bucket), [part.view_as(t) for part, t in zip(parts, bucket, strict=True)])


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """`tensors` in their order, in lists of together `BUCKET` numbers at most."""
    bucket: list[Tensor] = []
    numbers = 0
    for tensor in tensors:
        if bucket and numbers + tensor.numel() > BUCKET:
            yield bucket
            bucket, numbers = [], 0
        bucket.append(tensor)
        numbers += tensor.numel()
    if bucket:
        yield bucket
