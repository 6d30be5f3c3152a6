"""The gradients of one mixer's parameters in one tensor, which a GPU changes faster than many small ones."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class JoinedGradients:
    """The gradients of `parameters`: views of one tensor, that stay where they are in memory."""

    def __init__(self, parameters: Sequence[nn.Parameter], memory: Tensor | None = None):
        """`memory` [numbers of the parameters, or more] may be shared with gradients that are used at other times."""
        sizes = [parameter.numel() for parameter in parameters]
        if memory is None:
            memory = torch.zeros(sum(sizes), device=parameters[0].device)
        self.parameters = list(parameters)
        self.whole = memory[: sum(sizes)]
        """[numbers]"""
        shares = self.whole.split(sizes) if sizes else ()
        self._views = [share.view_as(parameter) for share, parameter in zip(shares, parameters, strict=True)]

    def attach(self) -> None:
        """Let the parameters have them; from zero, unless they do already."""
        pairs = list(zip(self.parameters, self._views, strict=True))
        if any(parameter.grad is not view for parameter, view in pairs):
            self.whole.zero_()
            for parameter, view in pairs:
                parameter.grad = view

    def add(self, found: Sequence[Tensor]) -> None:
        """Add a gradient for each of the parameters."""
        if found:
            self.whole.add_(torch.cat([gradient.flatten() for gradient in found]))
