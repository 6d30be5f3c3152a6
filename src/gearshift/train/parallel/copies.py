"""Many processes with a copy of the model each: each computes as if alone, and then they average their gradients."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

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
        # One exchange is always under way while the last one's result is put in its place.
        before: _Exchange | None = None
        for bucket in chain.from_iterable(map(_buckets, gradients)):
            exchange = _Exchange(bucket)
            if before is not None:
                before.end()
            before = exchange
        if before is not None:
            before.end()


class _Exchange:
    """The sum over all processes of a bucket of tensors, which begins at once and becomes their mean at the end."""

    def __init__(self, bucket: Sequence[Tensor]):
        self.bucket = bucket
        self.in_place = len(bucket) == 1 and bucket[0].is_contiguous()
        self.whole = bucket[0] if self.in_place else torch.cat([tensor.flatten() for tensor in bucket])
        self.work = dist.all_reduce(self.whole, async_op=True)

    def end(self) -> None:
        self.work.wait()
        self.whole.div_(dist.get_world_size())
        if not self.in_place:
            parts = self.whole.split([tensor.numel() for tensor in self.bucket])
            pairs = zip(parts, self.bucket, strict=True)
            torch._foreach_copy_(list(self.bucket), [part.view_as(tensor) for part, tensor in pairs])


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
