"""Several projections of the same hidden states."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ALIGNED = 16
"""Matrix products are slow on rows that are no multiple of so many numbers."""


def projected(hidden: Tensor, *linears: nn.Linear) -> Sequence[Tensor]:
    """What each of `linears` makes of `hidden` [..., channels].

    Compiled to learn, it is one product with all their weights, forwards and backwards, unless one is more than a
    linear layer: adapted, or split over processes. For a few tokens, as in generation, joining the weights costs more.
    """
    learning = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if not learning or any(type(linear) is not nn.Linear for linear in linears):
        return [linear(hidden) for linear in linears]
    sizes = [linear.out_features for linear in linears]
    spare = -sum(sizes) % ALIGNED
    weight, bias = F.pad(torch.cat([linear.weight for linear in linears]), (0, 0, 0, spare)), None
    if any(linear.bias is not None for linear in linears):
        bias = F.pad(torch.cat([_bias(linear) for linear in linears]), (0, spare))
    return F.linear(hidden, weight, bias).split([*sizes, spare], dim=-1)[:-1]


def _bias(linear: nn.Linear) -> Tensor:
    return linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
