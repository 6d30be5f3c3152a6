"""Gated DeltaNet as a module: plain PyTorch on any device, flash-linear-attention on CUDA."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gearshift.mixers.activations import activation
from gearshift.mixers.base import MixContext, Mixed, Mixer, MixerState, Sharding
from gearshift.mixers.convolution import ShortConvolution, convolution_initialisers, run_convolutions
from gearshift.mixers.delta_rule import delta_rule, log_decay
from gearshift.mixers.fused_delta_rule import fused_delta_rule
from gearshift.mixers.gated_delta_net import GatedDeltaNetSpec
from gearshift.mixers.gated_norm import GatedRMSNorm
from gearshift.mixers.kernels import check_kernels
from gearshift.mixers.projections import projected
from gearshift.plan import Constant, Initialiser, InverseSoftplusLogUniform, LogUniform, Normal


class Projected(NamedTuple):
    """What the core reads, before the convolutions and the activations of the gates, and what the output step adds."""

    query: Tensor
    """[batch, tokens, key_heads * key_dim]"""
    key: Tensor
    """[batch, tokens, key_heads * key_dim]"""
    value: Tensor
    """[batch, tokens, value_heads * value_dim]"""
    decay: Tensor
    """[batch, tokens, value_heads], `a` of the decay -exp(A_log) softplus(a + dt_bias)."""
    beta: Tensor
    """[batch, tokens, value_heads], before the sigmoid."""
    gate: Tensor
    """[batch, tokens, value_heads, value_dim], the output gate before its activation."""


class GatedDeltaNet(Mixer):
    """The delta rule with a decay a head, between short convolutions and a gated norm (arXiv 2412.06464)."""

    sharding: ClassVar[dict[str, Sharding]] = {
        **{f"{name}_proj.weight": "column" for name in ("q", "k", "v", "a", "b", "gate")},
        **{f"{name}_conv.weight": "column" for name in "qkv"},
        "A_log": "column",
        "dt_bias": "column",
        "norm.weight": "replicated",
        "o_proj.weight": "row",
    }

    def __init__(self, spec: GatedDeltaNetSpec, hidden_size: int):
        super().__init__(spec, hidden_size)
        activation(spec.conv_activation)  # an unknown one is refused when the model is built
        assert spec.value_heads is not None, "a module needs a resolved spec"
        assert spec.key_dim is not None, "a module needs a resolved spec"
        assert spec.value_dim is not None, "a module needs a resolved spec"
        keys, values = spec.key_heads * spec.key_dim, spec.value_heads * spec.value_dim
        self.q_proj = nn.Linear(hidden_size, keys, bias=False)
        self.k_proj = nn.Linear(hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(hidden_size, values, bias=False)
        self.a_proj = nn.Linear(hidden_size, spec.value_heads, bias=False)
        self.b_proj = nn.Linear(hidden_size, spec.value_heads, bias=False)
        self.gate_proj = nn.Linear(hidden_size, values, bias=False)
        self.q_conv = ShortConvolution(keys, spec.conv_kernel)
        self.k_conv = ShortConvolution(keys, spec.conv_kernel)
        self.v_conv = ShortConvolution(values, spec.conv_kernel)
        self.A_log = nn.Parameter(torch.zeros(spec.value_heads))
        self.dt_bias = nn.Parameter(torch.zeros(spec.value_heads))
        self.norm = GatedRMSNorm(spec.value_dim, spec.norm_epsilon, spec.activation)
        self.o_proj = nn.Linear(values, hidden_size, bias=False)

    def project(self, hidden: Tensor, context: MixContext) -> Projected:
        hidden = context.mask_padding(hidden)
        linears = (self.q_proj, self.k_proj, self.v_proj, self.gate_proj, self.a_proj, self.b_proj)
        query, key, value, gate, decay, beta = projected(hidden, *linears)
        return Projected(query, key, value, decay, beta, gate.unflatten(-1, (-1, self.spec.value_dim)))

    def core(self, inputs: Projected, context: MixContext, state: MixerState | None) -> Mixed:
        convolutions = (self.q_conv, self.k_conv, self.v_conv)
        streams = (inputs.query, inputs.key, inputs.value)
        query, key, value = run_convolutions(streams, convolutions, context, state, self.spec.conv_activation)
        query = query.unflatten(-1, (-1, self.spec.key_dim))
        key = key.unflatten(-1, (-1, self.spec.key_dim))
        value = value.unflatten(-1, (-1, self.spec.value_dim))
        if value.is_cuda:
            gates = (inputs.decay, inputs.beta, self.A_log, self.dt_bias)
            output = fused_delta_rule(query, key, value, *gates, context, state, self.spec.negative_eigenvalues)
        else:
            decay = log_decay(inputs.decay[..., None], self.A_log, self.dt_bias)
            beta = inputs.beta.float().sigmoid() * (2 if self.spec.negative_eigenvalues else 1)
            output = delta_rule(query, key, value, decay, beta, context, state)
        return Mixed(output, inputs.gate)

    def features(self, result: Mixed) -> Tensor:
        return self.norm(result.output, result.gate).flatten(2)

    @classmethod
    def check_device(cls, device: torch.device, learning: bool) -> None:
        check_kernels(device, learning)

    @classmethod
    def initialisers(cls, spec: GatedDeltaNetSpec, hidden_size: int) -> dict[str, Initialiser]:
        """Mamba-2's decays (arXiv 2405.21060): a rate uniform in 1 to 16, steps log-uniform in 0.001 to 0.1."""
        projections = ("q", "k", "v", "a", "b", "gate", "o")
        return {
            **{f"{name}_proj.weight": Normal(std=0.02) for name in projections},
            **convolution_initialisers(("q_conv", "k_conv", "v_conv"), spec.conv_kernel),
            "A_log": LogUniform(1.0, 16.0),
            "dt_bias": InverseSoftplusLogUniform(0.001, 0.1, floor=1e-4),
            "norm.weight": Constant(1.0),
        }
