"""Starting new weights: every parameter has a distribution, declared by the module it lies in."""

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from gearshift.mixers.base import Mixer
from gearshift.plan import Initialiser, Normal
from gearshift.plan.execute import initialise

EMBEDDING = Normal(std=0.02)


@runtime_checkable
class Starts(Protocol):
    """A module that answers for parameters of its own or of its children."""

    def starts(self) -> Mapping[str, Initialiser]:
        """The starting distribution of each, by its name in the module."""
        ...


def declared(module: nn.Module) -> Iterator[tuple[str, Initialiser]]:
    """The starting distribution of each parameter that a module answers for, by its name in the module."""
    if isinstance(module, Mixer):
        yield from module.initialisers(module.spec, module.hidden_size).items()
    elif isinstance(module, Starts):
        yield from module.starts().items()


@torch.no_grad()
def start(module: nn.Module) -> None:
    """Draw the parameters that `module` answers for from torch's generator. Conversions use seeded plans instead."""
    for name, initialiser in declared(module):
        parameter = module.get_parameter(name)
        if parameter.device.type == "meta" or getattr(parameter, "_is_hf_initialized", False):
            continue
        seed = int(torch.randint(2**31, ()))
        dtype = str(parameter.dtype).removeprefix("torch.")
        parameter.copy_(initialise(initialiser, tuple(parameter.shape), dtype, seed, name))
