"""The guard against numbers that are none: a step whose loss or gradient is not finite moves nothing and ends the run.

A good step pays nothing for it: the loss and the norm of the gradients are read in any case, and whether the optimiser
may move is decided on the device, by the tensor that AMP's gradient scaler uses for the same purpose. What went wrong
is looked for afterwards, by running the step again under hooks.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.train.parallel import ALONE, Parallel


class TrainingDivergedError(RuntimeError):
    """The loss, or the norm of the gradients, is no number any more."""


def guarded_step(optimiser: torch.optim.Optimizer, *numbers: Tensor) -> None:
    """Step a fused optimiser, unless one of `numbers` (scalars) is not finite: then nothing of it changes."""
    optimiser.found_inf = (~torch.stack(numbers).isfinite().all()).float()  # type: ignore[attr-defined]
    try:
        optimiser.step()
    finally:
        del optimiser.found_inf  # type: ignore[attr-defined]


def first_bad_tensor(
    model: nn.Module, teacher: nn.Module, learn_again: Callable[[], object], parallel: Parallel = ALONE
) -> str:
    """What the numbers of a step that went wrong were lost in, in words.

    The first in the order of computation: a parameter's value, in the order of the model; a module's output, in the
    order of the forward pass; a parameter's gradient, in the order of the backward pass, from the model's end. All
    processes call this, and get the same: what one has lost, the others have by its gradient at most.

    Args:
        model: the model that learns, its parameters as the step found them.
        teacher: what teaches it; may be the model itself.
        learn_again: does the step's forward and backward passes once more, with nothing compiled: hooks see it all.
        parallel: the processes that share the step.
    """
    sides = {"": model} if teacher is model else {"": model, "the teacher's ": teacher}
    values = ((owner + name, parameter) for owner, side in sides.items() for name, parameter in side.named_parameters())
    bad = next((f"{name}, whose values are not finite" for name, value in values if not _finite(value)), None)
    if bad := parallel.any_of(bad):
        return bad
    model.zero_grad(set_to_none=True)
    with _watched(sides) as outputs:
        learn_again()
    if bad := parallel.any_of(f"the output of {outputs[0]}" if outputs else None):
        return bad
    gradients = ((name, parameter.grad) for name, parameter in reversed(list(model.named_parameters())))
    lost = (f"the gradient of {name}" for name, grad in gradients if grad is not None and not _finite(grad))
    return parallel.any_of(next(lost, None)) or "the loss itself: every layer's output and every gradient is finite"


@contextmanager
def _watched(sides: dict[str, nn.Module]) -> Iterator[list[str]]:
    """Collects the names of the modules whose output is not finite, in the order in which they run.

    It lets the pass run to its end: in a distributed run, the other processes wait for every part of it.
    """
    found: list[str] = []
    handles = []
    for owner, side in sides.items():
        for name, module in side.named_modules():

            def watch(module: nn.Module, inputs: Any, output: Any, named: str = owner + name) -> None:
                if not all(map(_finite, _tensors(output))):
                    found.append(named)

            handles.append(module.register_forward_hook(watch))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor.detach()).all())
