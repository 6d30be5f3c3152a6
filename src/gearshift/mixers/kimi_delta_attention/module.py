"""Kimi Delta Attention as a module: plain PyTorch on any device, flash-linear-attention on CUDA."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gearshift.mixers.activations import activation
from gearshift.mixers.base import MixContext, Mixed, Mixer, MixerState, Sharding
from gearshift.mixers.convolution import ShortConvolution, convolution_initialisers, run_convolutions
from gearshift.mixers.delta_rule import delta_rule, log_decay
from gearshift.mixers.fused_delta_rule import fused_delta_rule
from gearshift.mixers.gated_norm import GatedRMSNorm
from gearshift.mixers.kernels import check_kernels
from gearshift.mixers.kimi_delta_attention import KimiDeltaAttentionSpec
from gearshift.mixers.projections import projected
from gearshift.plan import Constant, Initialiser, InverseSoftplusLogUniform, LogUniform, Normal


class Projected(NamedTuple):
    """What the core reads, before the convolutions and the activations of the gates, and what the output step adds."""

    query: Tensor
    """[batch, tokens, heads * head_dim]"""
    key: Tensor
    """[batch, tokens, heads * head_dim]"""
    value: Tensor
    """[batch, tokens, heads * head_dim]"""
    decay: Tensor
    """[batch, tokens, heads, head_dim], `f` of the decay -exp(A_log) softplus(f + dt_bias)."""
    beta: Tensor
    """[batch, tokens, heads], before the sigmoid."""
    gate: Tensor
    """[batch, tokens, heads, head_dim], the output gate before its activation."""


class KimiDeltaAttention(Mixer):
    """The delta rule with a decay a channel, between short convolutions and a gated norm (arXiv 2510.26692)."""

    sharding: ClassVar[dict[str, Sharding]] = {
        **{f"{name}_proj.weight": "column" for name in ("q", "k", "v", "b", "decay_up", "gate_up")},
        "decay_down_proj.weight": "replicated",
        "gate_down_proj.weight": "replicated",
        **{f"{name}_conv.weight": "column" for name in "qkv"},
        "A_log": "column",
        "dt_bias": "column",
        "norm.weight": "replicated",
        "o_proj.weight": "row",
    }

    def __init__(self, spec: KimiDeltaAttentionSpec, hidden_size: int):
        super().__init__(spec, hidden_size)
        activation(spec.conv_activation)  # an unknown one is refused when the model is built
        assert spec.head_dim is not None, "a module needs a resolved spec"
        assert spec.decay_rank is not None, "a module needs a resolved spec"
        assert spec.gate_rank is not None, "a module needs a resolved spec"
        channels = spec.heads * spec.head_dim
        self.q_proj = nn.Linear(hidden_size, channels, bias=False)
        self.k_proj = nn.Linear(hidden_size, channels, bias=False)
        self.v_proj = nn.Linear(hidden_size, channels, bias=False)
        self.b_proj = nn.Linear(hidden_size, spec.heads, bias=False)
        self.decay_down_proj = nn.Linear(hidden_size, spec.decay_rank, bias=False)
        self.decay_up_proj = nn.Linear(spec.decay_rank, channels, bias=False)
        self.gate_down_proj = nn.Linear(hidden_size, spec.gate_rank, bias=False)
        self.gate_up_proj = nn.Linear(spec.gate_rank, channels, bias=False)
        self.q_conv = ShortConvolution(channels, spec.conv_kernel)
        self.k_conv = ShortConvolution(channels, spec.conv_kernel)
        self.v_conv = ShortConvolution(channels, spec.conv_kernel)
        self.A_log = nn.Parameter(torch.zeros(spec.heads))
        self.dt_bias = nn.Parameter(torch.zeros(channels))
        self.norm = GatedRMSNorm(spec.head_dim, spec.norm_epsilon, spec.gate_activation)
        self.o_proj = nn.Linear(channels, hidden_size, bias=False)

    def project(self, hidden: Tensor, context: MixContext) -> Projected:
        hidden = context.mask_padding(hidden)
        linears = (self.q_proj, self.k_proj, self.v_proj, self.decay_down_proj, self.gate_down_proj, self.b_proj)
        query, key, value, decay, gate, beta = projected(hidden, *linears)
        decay, gate = self._heads(self.decay_up_proj(decay)), self._heads(self.gate_up_proj(gate))
        return Projected(query, key, value, decay, beta, gate)

    def core(self, inputs: Projected, context: MixContext, state: MixerState | None) -> Mixed:
        convolutions = (self.q_conv, self.k_conv, self.v_conv)
        streams = (inputs.query, inputs.key, inputs.value)
        convolved = run_convolutions(streams, convolutions, context, state, self.spec.conv_activation)
        query, key, value = map(self._heads, convolved)
        if value.is_cuda:
            gates = (inputs.decay, inputs.beta, self.A_log, self.dt_bias)
            output = fused_delta_rule(query, key, value, *gates, context, state)
        else:
            decay = log_decay(inputs.decay, self.A_log, self.dt_bias)
            output = delta_rule(query, key, value, decay, inputs.beta.float().sigmoid(), context, state)
        return Mixed(output, inputs.gate)

    def features(self, result: Mixed) -> Tensor:
        return self.norm(result.output, result.gate).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads * head_dim] -> [batch, tokens, heads, head_dim]."""
        return x.unflatten(-1, (-1, self.spec.head_dim))

    @classmethod
    def check_device(cls, device: torch.device, learning: bool) -> None:
        check_kernels(device, learning)

    @classmethod
    def initialisers(cls, spec: KimiDeltaAttentionSpec, hidden_size: int) -> dict[str, Initialiser]:
        """Mamba-2's decays (arXiv 2405.21060): a rate uniform in 1 to 16, steps log-uniform in 0.001 to 0.1."""
        projections = ("q", "k", "v", "b", "decay_down", "decay_up", "gate_down", "gate_up", "o")
        return {
            **{f"{name}_proj.weight": Normal(std=0.02) for name in projections},
            **convolution_initialisers(("q_conv", "k_conv", "v_conv"), spec.conv_kernel),
            "A_log": LogUniform(1.0, 16.0),
            "dt_bias": InverseSoftplusLogUniform(0.001, 0.1, floor=1e-4),
            "norm.weight": Constant(1.0),
        }
