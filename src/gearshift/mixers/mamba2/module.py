"""Mamba-2 as a module: plain PyTorch on any device, flash-linear-attention on CUDA."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.mixers.activations import activation
from gearshift.mixers.base import MixContext, Mixed, Mixer, MixerState, Sharding
from gearshift.mixers.convolution import ShortConvolution, convolution_initialisers, run_convolutions
from gearshift.mixers.gated_norm import GroupedGatedRMSNorm
from gearshift.mixers.kernels import check_kernels
from gearshift.mixers.mamba2 import Mamba2Spec
from gearshift.mixers.projections import projected
from gearshift.mixers.state_space_dual import state_space_dual
from gearshift.plan import Constant, Initialiser, InverseSoftplusLogUniform, LogUniform, Normal

PROJECTIONS = ("gate_proj", "x_proj", "b_proj", "c_proj", "dt_proj", "o_proj")
CONVOLUTIONS = ("x_conv", "b_conv", "c_conv")


class Projected(NamedTuple):
    """What the core reads, before the convolutions, and what the output step adds."""

    x: Tensor
    """[batch, tokens, heads * head_dim]"""
    b: Tensor
    """[batch, tokens, groups * state_size]"""
    c: Tensor
    """[batch, tokens, groups * state_size]"""
    dt: Tensor
    """[batch, tokens, heads], before its bias and its softplus."""
    gate: Tensor
    """[batch, tokens, heads * head_dim], the output gate before its activation."""


class Mamba2(Mixer):
    """State space duality between short convolutions and a gated norm (arXiv 2405.21060)."""

    sharding: ClassVar[dict[str, Sharding]] = {
        **{f"{name}.{kind}": "column" for name in PROJECTIONS[:-1] for kind in ("weight", "bias")},
        **{f"{name}.{kind}": "column" for name in CONVOLUTIONS for kind in ("weight", "bias")},
        "A_log": "column",
        "D": "column",
        "dt_bias": "column",
        "norm.weight": "column",
        "o_proj.weight": "row",
        "o_proj.bias": "replicated",
    }

    def __init__(self, spec: Mamba2Spec, hidden_size: int):
        super().__init__(spec, hidden_size)
        activation(spec.activation)  # an unknown one is refused when the model is built
        assert spec.heads is not None, "a module needs a resolved spec"
        assert spec.norm_groups is not None, "a module needs a resolved spec"
        inner, shared, bias = spec.heads * spec.head_dim, spec.groups * spec.state_size, spec.projection_bias
        self.gate_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.x_proj = nn.Linear(hidden_size, inner, bias=bias)
        self.b_proj = nn.Linear(hidden_size, shared, bias=bias)
        self.c_proj = nn.Linear(hidden_size, shared, bias=bias)
        self.dt_proj = nn.Linear(hidden_size, spec.heads, bias=bias)
        self.x_conv = ShortConvolution(inner, spec.conv_kernel, spec.conv_bias)
        self.b_conv = ShortConvolution(shared, spec.conv_kernel, spec.conv_bias)
        self.c_conv = ShortConvolution(shared, spec.conv_kernel, spec.conv_bias)
        self.A_log = nn.Parameter(torch.zeros(spec.heads))
        self.D = nn.Parameter(torch.ones(spec.heads))
        self.dt_bias = nn.Parameter(torch.zeros(spec.heads))
        self.norm = GroupedGatedRMSNorm(inner, spec.norm_groups, spec.norm_epsilon, spec.norm_before_gate)
        self.o_proj = nn.Linear(inner, hidden_size, bias=bias)

    def project(self, hidden: Tensor, context: MixContext) -> Projected:
        linears = (self.gate_proj, self.x_proj, self.b_proj, self.c_proj, self.dt_proj)
        gate, x, b, c, dt = projected(hidden, *linears)
        x, b, c = map(context.mask_padding, (x, b, c))
        return Projected(x, b, c, dt, gate)

    def core(self, inputs: Projected, context: MixContext, state: MixerState | None) -> Mixed:
        convolutions = (self.x_conv, self.b_conv, self.c_conv)
        streams = (inputs.x, inputs.b, inputs.c)
        x, b, c = run_convolutions(streams, convolutions, context, state, self.spec.activation)
        x = x.unflatten(-1, (-1, self.spec.head_dim))
        b, c = (stream.unflatten(-1, (-1, self.spec.state_size)) for stream in (b, c))
        step = F.softplus(inputs.dt.float() + self.dt_bias.float()).clamp(*self.spec.time_step_limit)
        decay = -self.A_log.float().exp() * step
        output = state_space_dual(c, b, (x * step[..., None]).to(x.dtype), decay, context, state)
        output = (output + self.D.float()[:, None] * x).to(x.dtype)
        return Mixed(output.flatten(2), inputs.gate)

    def features(self, result: Mixed) -> Tensor:
        return self.norm(result.output, result.gate)

    @classmethod
    def check_device(cls, device: torch.device, learning: bool) -> None:
        check_kernels(device, learning=False)  # what learning needs is chosen with the kernel

    @classmethod
    def initialisers(cls, spec: Mamba2Spec, hidden_size: int) -> dict[str, Initialiser]:
        """Rates uniform in 1 to 16 and steps log-uniform in 0.001 to 0.1, as published (arXiv 2405.21060)."""
        started: dict[str, Initialiser] = {
            **{f"{name}.weight": Normal(std=0.02) for name in PROJECTIONS},
            **convolution_initialisers(CONVOLUTIONS, spec.conv_kernel, spec.conv_bias),
            "A_log": LogUniform(1.0, 16.0),
            "D": Constant(1.0),
            "dt_bias": InverseSoftplusLogUniform(0.001, 0.1, floor=1e-4),
            "norm.weight": Constant(1.0),
        }
        if spec.projection_bias:
            started |= {f"{name}.bias": Constant(0.0) for name in PROJECTIONS}
        return started
