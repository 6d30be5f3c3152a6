"""Mamba as a module: plain PyTorch on any device, mamba-ssm and flash-linear-attention on CUDA."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.mixers.activations import activation
from gearshift.mixers.base import MixContext, Mixed, Mixer, MixerState, Sharding
from gearshift.mixers.convolution import ShortConvolution, convolution_initialisers, run_convolutions
from gearshift.mixers.kernels import check_kernels, kernel
from gearshift.mixers.mamba import MambaSpec
from gearshift.mixers.norm import norm, norm_start
from gearshift.mixers.projections import projected
from gearshift.mixers.selective_scan import SCAN, selective_scan
from gearshift.plan import Constant, Initialiser, InverseSoftplusLogUniform, LogIndex, Normal, Uniform


class Selection(NamedTuple):
    """What decides how much each token writes, reads and forgets."""

    dt: Tensor
    """[batch, tokens, dt_rank], before the projection to the channels."""
    b: Tensor
    """[batch, tokens, groups, state_size]"""
    c: Tensor
    """[batch, tokens, groups, state_size]"""


class Projected(NamedTuple):
    """What the core reads, before the convolution, and what the output step adds."""

    x: Tensor
    """[batch, tokens, conv_channels]"""
    selection: Selection | None
    """None in a classic projection, whose selection is made from the convolved x."""
    gate: Tensor
    """[batch, tokens, inner_size], the output gate before its activation."""


class Mamba(Mixer):
    """The selective scan between a short convolution and a gate (arXiv 2312.00752; grouped: arXiv 2408.15237)."""

    sharding: ClassVar[dict[str, Sharding]] = {
        **{f"{name}_proj.{kind}": "column" for name in ("gate", "x", "b", "c") for kind in ("weight", "bias")},
        "selection_proj.weight": "row",
        "dt_down_proj.weight": "replicated",
        "dt_down_proj.bias": "replicated",
        **{f"{name}_norm.weight": "replicated" for name in ("dt", "b", "c")},
        "dt_up_proj.weight": "column",
        "dt_bias": "column",
        "conv.weight": "column",
        "conv.bias": "column",
        "A_log": "column",
        "D": "column",
        "o_proj.weight": "row",
        "o_proj.bias": "replicated",
    }

    def __init__(self, spec: MambaSpec, hidden_size: int):
        super().__init__(spec, hidden_size)
        activation(spec.activation)  # an unknown one is refused when the model is built
        assert spec.inner_size is not None, "a module needs a resolved spec"
        assert isinstance(spec.dt_rank, int), "a module needs a resolved spec"
        inner, rank, bias = spec.inner_size, spec.dt_rank, spec.projection_bias
        self.gate_proj = nn.Linear(hidden_size, inner, bias=bias)
        if spec.projection == "classic":
            self.x_proj = nn.Linear(hidden_size, inner, bias=bias)
            self.selection_proj = nn.Linear(inner, rank + 2 * spec.state_size, bias=False)
        else:
            assert spec.xb_size is not None, "a module needs a resolved spec"
            self.x_proj = nn.Linear(hidden_size, spec.xb_size, bias=bias)
            self.b_proj = nn.Linear(hidden_size, spec.xb_size, bias=bias)
            self.c_proj = nn.Linear(hidden_size, inner, bias=bias)
            self.dt_down_proj = nn.Linear(hidden_size, rank, bias=bias)
        if spec.norm is not None:
            self.dt_norm = norm(spec.norm, rank)
            self.b_norm = norm(spec.norm, spec.state_size)
            self.c_norm = norm(spec.norm, spec.state_size)
        self.dt_up_proj = nn.Linear(rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(inner)) if spec.dt_bias else None
        self.conv = ShortConvolution(spec.conv_channels, spec.conv_kernel, spec.conv_bias)
        self.A_log = nn.Parameter(torch.zeros(inner, spec.state_size))
        self.D = nn.Parameter(torch.ones(inner))
        self.o_proj = nn.Linear(inner, hidden_size, bias=bias)

    def project(self, hidden: Tensor, context: MixContext) -> Projected:
        if self.spec.projection == "classic":
            x, gate = projected(hidden, self.x_proj, self.gate_proj)
            return Projected(context.mask_padding(x), None, gate)
        linears = (self.x_proj, self.gate_proj, self.c_proj, self.b_proj, self.dt_down_proj)
        x, gate, c, b, dt = projected(hidden, *linears)
        b, c = (stream.unflatten(-1, (-1, self.spec.state_size)) for stream in (self._shared(b), c))
        x = self._shared(x) if self.spec.repeat_kv_before_conv else x
        return Projected(context.mask_padding(x), Selection(dt, b, c), gate)

    def core(self, inputs: Projected, context: MixContext, state: MixerState | None) -> Mixed:
        (x,) = run_convolutions([inputs.x], [self.conv], context, state, self.spec.activation)
        x = x if self.spec.repeat_kv_before_conv else self._shared(x)
        selection = self._selection(x.to(inputs.x.dtype)) if inputs.selection is None else inputs.selection
        step = self.dt_up_proj(selection.dt).float()
        if self.dt_bias is not None:
            step = step + self.dt_bias.float() * (2 if self.spec.doubled_dt_bias else 1)
        rate = -self.A_log.float().exp()
        output = selective_scan(x, F.softplus(step), rate, selection.b, selection.c, context, state)
        return Mixed(output + self.D.float() * x, inputs.gate)

    def features(self, result: Mixed) -> Tensor:
        return (result.output * F.silu(result.gate.float())).to(result.gate.dtype)

    def _selection(self, x: Tensor) -> Selection:
        """From the convolved x [batch, tokens, inner_size]; one group."""
        sizes = (self.spec.dt_rank, self.spec.state_size, self.spec.state_size)
        dt, b, c = self.selection_proj(x).split(sizes, dim=-1)
        if self.spec.norm is not None:
            dt, b, c = self.dt_norm(dt), self.b_norm(b), self.c_norm(c)
        return Selection(dt, b[:, :, None], c[:, :, None])

    def _shared(self, x: Tensor) -> Tensor:
        """[batch, tokens, xb_size] -> [batch, tokens, inner_size], each head repeated in place."""
        heads = x.unflatten(-1, (-1, self.spec.state_size))
        return heads.repeat_interleave(self.spec.inner_size // self.spec.xb_size, dim=2).flatten(2)

    @classmethod
    def check_device(cls, device: torch.device, learning: bool) -> None:
        # The convolution's gradients are right with every version of Triton, so learning asks for nothing more.
        check_kernels(device, learning=False)
        if device.type == "cuda":
            kernel(SCAN)

    @classmethod
    def initialisers(cls, spec: MambaSpec, hidden_size: int) -> dict[str, Initialiser]:
        """Rates 1, 2, 3, ... and steps log-uniform in 0.001 to 0.1 (arXiv 2312.00752, section 3.6)."""
        assert isinstance(spec.dt_rank, int), "initialisers need a resolved spec"
        grouped = spec.projection == "grouped"
        from_hidden = ("gate", "x", "b", "c", "dt_down") if grouped else ("gate", "x")
        names = (*from_hidden, "o") if grouped else (*from_hidden, "selection", "o")
        rank = spec.dt_rank**-0.5
        started: dict[str, Initialiser] = {
            **{f"{name}_proj.weight": Normal(std=0.02) for name in names},
            "dt_up_proj.weight": Uniform(-rank, rank),
            **convolution_initialisers(["conv"], spec.conv_kernel, spec.conv_bias),
            "A_log": LogIndex(),
            "D": Constant(1.0),
        }
        if spec.projection_bias:
            started |= {f"{name}_proj.bias": Constant(0.0) for name in (*from_hidden, "o")}
        if spec.dt_bias:
            started["dt_bias"] = InverseSoftplusLogUniform(0.001, 0.1, floor=1e-4)
        if spec.norm is not None:
            started |= {f"{name}_norm.weight": norm_start(spec.norm) for name in ("dt", "b", "c")}
        return started
