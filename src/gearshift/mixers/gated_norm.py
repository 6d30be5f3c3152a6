"""The normalisation of recurrent mixers' outputs: RMS over a head or a group of channels, and a gate."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.mixers import activations
from gearshift.mixers.footprint import Footprint, declares
from gearshift.mixers.kernels import kernel

_NORM, _GROUPED_NORM = "fla.modules.norm.fused_norm_gate:rms_norm_gated", "fla.modules.norm.layernorm_gated:rmsnorm_fn"
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
        activations.activation(activation)  # an unknown one is refused when the model is built

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if _has_kernel(x) and self.activation in _FUSED:
            run = kernel(_NORM)
            return run(x, gate, self.weight, None, _FUSED[self.activation], eps=self.epsilon).to(gate.dtype)
        normed = self.weight.float() * _unit(x.float(), self.epsilon)
        return (normed * activations.activation(self.activation)(gate.float())).to(gate.dtype)


class GroupedGatedRMSNorm(nn.Module):
    """The norm of Mamba-2 (arXiv 2405.21060, section 7.1): each of `groups` slices of the channels has its own RMS.

    weight * y / rms(y) with y = x * silu(gate), or, with the norm before the gate, weight * x / rms(x) * silu(gate).
    x and gate [..., channels] -> [..., channels] in the gate's dtype, in float32 inside.
    """

    def __init__(self, channels: int, groups: int, epsilon: float, norm_before_gate: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.group_size = channels // groups
        self.epsilon = epsilon
        self.norm_before_gate = norm_before_gate

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if _has_kernel(x):
            run = kernel(_GROUPED_NORM)
            order = {"group_size": self.group_size, "norm_before_gate": self.norm_before_gate}
            return run(x, self.weight, None, gate.to(x.dtype), self.epsilon, **order).to(gate.dtype)
        open_gate = F.silu(gate.float())
        wide = x.float() if self.norm_before_gate else x.float() * open_gate
        unit = _unit(wide.unflatten(-1, (-1, self.group_size)), self.epsilon).flatten(-2)
        normed = self.weight.float() * unit
        return (normed * open_gate if self.norm_before_gate else normed).to(gate.dtype)


@declares(_NORM)
def _footprint(x: Tensor, gate: Tensor, weight: Tensor, *rest: Any, **more: Any) -> Footprint:
    """Of flash-linear-attention 0.6.0: it keeps what it read, and the root of each norm."""
    return Footprint((torch.empty_like(x),), (x, gate, weight), kept=4 * x.shape[:-1].numel())


@declares(_GROUPED_NORM)
def _grouped_footprint(
    x: Tensor, weight: Tensor, bias: None, gate: Tensor, epsilon: float, *, group_size: int, **rest: Any
) -> Footprint:
    """As of the other norm."""
    return Footprint((torch.empty_like(x),), (x, gate, weight), kept=4 * x.numel() // group_size)


def _has_kernel(x: Tensor) -> bool:
    """Whether a package's kernel runs on `x`. A compiler fuses the formula with what stands around it instead."""
    return x.is_cuda and not torch.compiler.is_compiling()


def _unit(x: Tensor, epsilon: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)
