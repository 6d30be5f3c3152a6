"""What a fused CUDA kernel takes in memory, and a stand-in that takes the same and computes nothing.

Kernels cannot run on tensors without data. So whoever calls one declares its footprint beside the call, from the
kernel's own source: an estimate of a run puts the stand-in in the kernel's place (`gearshift.train.estimate`).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

CHUNK = 64
"""Tokens of a chunk in the kernels of flash-linear-attention."""


@dataclass(frozen=True)
class Footprint:
    """One call of a kernel. Sizes are in bytes."""

    outputs: tuple[Tensor | None, ...]
    """What it returns: empty tensors."""
    keeps: tuple[Tensor | None, ...]
    """Those of its inputs that it keeps for its backward pass."""
    kept: int = 0
    """What it keeps besides, its outputs included where it keeps them beyond their own life."""
    forward: int = 0
    """What it takes in between, at most, beside its outputs and what it keeps."""
    backward: int = 0
    """What its backward pass takes in between, at most, beside the gradients it returns."""
    flops: int = 0
    """Floating-point operations of the forward pass. The backward pass is counted as twice that."""


Declaration = Callable[..., Footprint]
"""The footprint of a call, from the kernel's own arguments. Called without gradients."""
_DECLARED: dict[str, Declaration] = {}
_counter: Callable[[int], None] | None = None


def declares(*paths: str) -> Callable[[Declaration], Declaration]:
    """Marks a function as the footprint of the kernels at `paths` (see `kernel`)."""

    def declare(declaration: Declaration) -> Declaration:
        _DECLARED.update(dict.fromkeys(paths, declaration))
        return declaration

    return declare


@contextmanager
def standing_in(count: Callable[[int], None]) -> Iterator[None]:
    """Within, stand-ins are in the place of kernels; `count` gets the floating-point operations of each pass."""
    global _counter
    before, _counter = _counter, count
    try:
        yield
    finally:
        _counter = before


def stand_in(path: str) -> Callable[..., Any] | None:
    """The stand-in of the kernel at `path`; None outside of `standing_in`. ValueError if nothing was declared."""
    if _counter is None:
        return None
    if path not in _DECLARED:
        raise ValueError(
            f"the memory of the kernel {path} cannot be estimated: nothing declares its footprint"
            " (gearshift.mixers.footprint)"
        )
    return partial(run_stand_in, _DECLARED[path])


def run_stand_in(declaration: Declaration, *args: Any, **kwargs: Any) -> Any:
    """Take what `declaration` says of a call with these arguments, in both passes. Returns its output or outputs."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    made = _StandIn.apply(partial(declaration, *args, **kwargs), *tensors)
    return made[0] if len(made) == 1 else made


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, declared: Callable[[], Footprint], *tensors: Tensor) -> tuple[Tensor | None, ...]:
        footprint = declared()
        ctx.save_for_backward(*footprint.keeps, tensors[0].new_empty(footprint.kept, dtype=torch.uint8))
        ctx.shapes = [(tensor.shape, tensor.dtype) for tensor in tensors]
        ctx.backward_bytes, ctx.flops = footprint.backward, footprint.flops
        tensors[0].new_empty(footprint.forward, dtype=torch.uint8)
        if _counter is not None:
            _counter(footprint.flops)
        return footprint.outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        kept[-1].new_empty(ctx.backward_bytes)
        if _counter is not None:
            _counter(2 * ctx.flops)
        wanted = zip(ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        return None, *(kept[-1].new_empty(shape, dtype=dtype) if need else None for (shape, dtype), need in wanted)
