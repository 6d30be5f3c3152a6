"""Discrete Mamba-2 as a module: plain PyTorch on any device, flash-linear-attention on CUDA."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.mixers.activations import activation
from gearshift.mixers.base import MixContext, Mixed, Mixer, MixerState, Sharding
from gearshift.mixers.convolution import ShortConvolution, convolution_initialisers, run_convolutions
from gearshift.mixers.discrete_mamba2 import DiscreteMamba2Spec
from gearshift.mixers.kernels import check_kernels
from gearshift.mixers.projections import projected
from gearshift.mixers.state_space_dual import state_space_dual
from gearshift.plan import Constant, Initialiser, Normal

PROJECTIONS = ("gate_proj", "x_proj", "b_proj", "c_proj", "a_proj", "o_proj")
CONVOLUTIONS = ("x_conv", "b_conv", "c_conv")


class Projected(NamedTuple):
    """What the core reads, before the convolutions, and what the output step adds."""

    x: Tensor
    """[batch, tokens, value_heads * head_dim]"""
    b: Tensor
    """[batch, tokens, key_heads * state_size]"""
    c: Tensor
    """[batch, tokens, key_heads * state_size]"""
    decay: Tensor
    """[batch, tokens, value_heads], `a` of the decay exp(-softplus(a))."""
    gate: Tensor
    """[batch, tokens, value_heads * head_dim], the output gate before its activation."""


class DiscreteMamba2(Mixer):
    """Linear attention with a decay a head between short convolutions and a gate (arXiv 2408.10189)."""

    sharding: ClassVar[dict[str, Sharding]] = {
        **{f"{name}.{kind}": "column" for name in PROJECTIONS[:-1] for kind in ("weight", "bias")},
        **{f"{name}.{kind}": "column" for name in CONVOLUTIONS for kind in ("weight", "bias")},
        "D": "column",
        "o_proj.weight": "row",
        "o_proj.bias": "replicated",
    }

    def __init__(self, spec: DiscreteMamba2Spec, hidden_size: int):
        super().__init__(spec, hidden_size)
        activation(spec.activation)  # an unknown one is refused when the model is built
        assert spec.key_heads is not None, "a module needs a resolved spec"
        assert spec.head_dim is not None, "a module needs a resolved spec"
        inner, shared, bias = spec.value_heads * spec.head_dim, spec.key_heads * spec.state_size, spec.projection_bias
        self.gate_proj = nn.Linear(hidden_size, inner, bias=True)
        self.x_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.b_proj = nn.Linear(hidden_size, shared, bias=bias)
        self.c_proj = nn.Linear(hidden_size, shared, bias=bias)
        self.a_proj = nn.Linear(hidden_size, spec.value_heads, bias=bias)
        self.x_conv = ShortConvolution(inner, spec.conv_kernel, spec.conv_bias)
        self.b_conv = ShortConvolution(shared, spec.conv_kernel, spec.conv_bias)
        self.c_conv = ShortConvolution(shared, spec.conv_kernel, spec.conv_bias)
        self.D = nn.Parameter(torch.ones(spec.value_heads))
        self.o_proj = nn.Linear(inner, hidden_size, bias=bias)

    def project(self, hidden: Tensor, context: MixContext) -> Projected:
        linears = (self.gate_proj, self.x_proj, self.b_proj, self.c_proj, self.a_proj)
        gate, x, b, c, decay = projected(hidden, *linears)
        x, b, c = map(context.mask_padding, (x, b, c))
        return Projected(x, b, c, decay, gate)

    def core(self, inputs: Projected, context: MixContext, state: MixerState | None) -> Mixed:
        convolutions = (self.x_conv, self.b_conv, self.c_conv)
        streams = (inputs.x, inputs.b, inputs.c)
        x, b, c = run_convolutions(streams, convolutions, context, state, self.spec.activation)
        x = x.unflatten(-1, (-1, self.spec.head_dim))
        b, c = (stream.unflatten(-1, (-1, self.spec.state_size)) for stream in (b, c))
        output = state_space_dual(c, b, x, -F.softplus(inputs.decay.float()), context, state)
        output = output + self.D.float()[:, None] * x
        return Mixed(output.flatten(2), inputs.gate)

    def features(self, result: Mixed) -> Tensor:
        return (result.output * F.silu(result.gate.float())).to(result.gate.dtype)

    @classmethod
    def check_device(cls, device: torch.device, learning: bool) -> None:
        check_kernels(device, learning=False)  # what learning needs is chosen with the kernel

    @classmethod
    def initialisers(cls, spec: DiscreteMamba2Spec, hidden_size: int) -> dict[str, Initialiser]:
        """Projections that start small, so that the decay starts at exp(-softplus(0)) = 0.5 a token."""
        started: dict[str, Initialiser] = {
            **{f"{name}.weight": Normal(std=0.02) for name in PROJECTIONS},
            **convolution_initialisers(CONVOLUTIONS, spec.conv_kernel, spec.conv_bias),
            "gate_proj.bias": Constant(0.0),
            "D": Constant(1.0),
        }
        if spec.projection_bias:
            started |= {f"{name}.bias": Constant(0.0) for name in PROJECTIONS}
        return started
