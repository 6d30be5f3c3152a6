"""The normalisation of recurrent mixers' outputs: RMS a head, then a gate."""

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from gearshift.mixers.kernels import kernel

_FUSED = {"silu": "silu", "swish": "silu", "sigmoid": "sigmoid"}
"""The activations that the CUDA kernel knows, by transformers' names."""


class GatedRMSNorm(nn.Module):
    """weight * x / rms(x) * activation(gate), over the last dimension, in float32 inside.

    x and gate [..., channels] -> [..., channels] in the gate's dtype (arXiv 2412.06464, section 3.4).
    """

    def __init__(self, channels: int, epsilon: float, activation: str):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.epsilon = epsilon
        self.activation = activation

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if x.is_cuda and self.activation in _FUSED:
            run = kernel("fla.modules.norm.fused_norm_gate:rms_norm_gated")
            return run(x, gate, self.weight, None, _FUSED[self.activation], eps=self.epsilon).to(gate.dtype)
        wide = x.float()
        unit = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return (self.weight.float() * unit * ACT2FN[self.activation](gate.float())).to(gate.dtype)
