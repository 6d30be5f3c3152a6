"""Averages of the parameters that learn: smoother than any one step's, and what a stage ends on.

In a supernet, a step moves the mixers of one placement alone. So each parameter has a clock of its own, which counts
the steps that moved it: the average of a mixer that is not sampled stays as it is, instead of running up to the
mixer's latest values, and costs such a step nothing.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gearshift.train.parallel import local


class Average:
    """Exponential moving averages of parameters, in their own dtype, made as each of them first moves."""

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], decay: float):
        """Average named `parameters`. `decay` is the weight, below 1, that an average keeps as its parameter moves.

        A young average forgets faster: after `n` moves it keeps min(decay, (1 + n) / (10 + n)), as in TensorFlow's
        `ExponentialMovingAverage(num_updates=n)`, so that a run's first values do not weigh on a short one.
        """
        self.parameters = dict(parameters)
        self.decay = decay
        self.averages: dict[str, Tensor] = {}
        self.moves: dict[str, int] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the values of the parameters that have a gradient: those that the step has just moved."""
        averages, values, weights = list[Tensor](), list[Tensor](), list[float]()
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            moves = self.moves[name] = self.moves.get(name, 0) + 1
            if moves == 1:
                self.averages[name] = parameter.detach().clone()
                continue
            averages.append(local(self.averages[name]))
            values.append(local(parameter))
            weights.append(1 - min(self.decay, moves / (9 + moves)))
        if averages:
            torch._foreach_lerp_(averages, values, weights)

    @torch.no_grad()
    def apply(self) -> None:
        """Give every parameter that has moved its average."""
        for name, average in self.averages.items():
            self.parameters[name].copy_(average)
