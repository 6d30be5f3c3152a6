"""Norms over the channels, as blocks and mixers use them."""

import torch.nn.functional as F
from torch import Tensor, nn

from gearshift.plan import Constant
from gearshift.spec import NormSpec


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight over the last dimension (arXiv 1910.07467), in the dtype of `x`.

    Where the weight has another one, as under autocast, computed in float32 and rounded once.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype == x.dtype:
            return super().forward(x)
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """(1 + weight) * x / rms(x) over the last dimension, in float32 inside: Gemma's norm (arXiv 2403.08295)."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.weight is not None
        unit = F.rms_norm(x.float(), self.normalized_shape, eps=self.eps)
        return (unit * (1.0 + self.weight.float())).to(x.dtype)


def norm(spec: NormSpec, channels: int) -> nn.Module:
    """The norm a spec describes, [..., channels] -> [..., channels]."""
    kind = ZeroCenteredRMSNorm if spec.zero_centered else RMSNorm
    return kind(channels, eps=spec.epsilon)


def norm_start(spec: NormSpec) -> Constant:
    """The starting weights that leave the unit norm as it is."""
    return Constant(0.0 if spec.zero_centered else 1.0)
