"""The short causal depthwise convolutions, with an activation, that recurrent mixers put after their projections."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gearshift.mixers import activations
from gearshift.mixers.base import MixContext, MixerState
from gearshift.mixers.footprint import CHUNK, Footprint, declares
from gearshift.mixers.kernels import kernel
from gearshift.plan import Constant, Initialiser, Uniform

_KERNEL = "fla.modules.causal_conv1d:causal_conv1d"
_FUSED = {"silu": "silu", "swish": "silu", "linear": None}
"""The activations that the CUDA kernel knows, by transformers' names."""


class ShortConvolution(nn.Module):
    """The weight of one convolution, [channels, 1, taps], the last tap on the current token. Run by `convolve`.

    With `bias`, a number is added to each channel before the activation, [channels].
    """

    def __init__(self, channels: int, taps: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, taps).uniform_(-(taps**-0.5), taps**-0.5))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None


def convolution_initialisers(names: Sequence[str], taps: int, bias: bool = False) -> dict[str, Initialiser]:
    """The starts of the convolutions called `names`: weights as those of torch's own, biases of zero."""
    bound = taps**-0.5
    started: dict[str, Initialiser] = {f"{name}.weight": Uniform(-bound, bound) for name in names}
    return started | {f"{name}.bias": Constant(0.0) for name in names} if bias else started


def convolve(
    streams: Sequence[Tensor],
    weights: Sequence[Tensor],
    context: MixContext,
    state: MixerState | None,
    biases: Sequence[Tensor] | None = None,
    activation: str = "silu",
) -> Sequence[Tensor]:
    """activation(convolution + bias) of each stream [batch, tokens, channels] with its own weight [channels, 1, taps].

    Documents start from zeros. `state["conv"]` holds the last taps - 1 inputs of all streams' channels, concatenated;
    it is read and written if `state` is given. `biases` are [channels] each; `activation` goes by transformers' names.
    float32 on the plain path, the streams' dtype on CUDA.
    """
    if state is None:
        each = biases if biases is not None else [None] * len(streams)
        parts = zip(streams, weights, each, strict=True)
        return [_convolved(x, weight, bias, activation, context) for x, weight, bias in parts]
    now, weight = torch.cat(tuple(streams), dim=-1), torch.cat(tuple(weights))
    bias = None if biases is None else torch.cat(tuple(biases))
    taps, tokens = weight.shape[-1], now.shape[1]
    past = state.get("conv")
    if past is None:
        past = now.new_zeros(now.shape[0], now.shape[2], taps - 1)
    seen = torch.cat((past.mT.to(now.dtype), now), dim=1)
    state["conv"] = seen[:, tokens:].mT.contiguous()
    if tokens == 1:
        mixed = (seen.float() * weight.squeeze(1).t().float()).sum(1, keepdim=True)
        mixed = activations.activation(activation)(mixed if bias is None else mixed + bias.float())
        mixed = mixed.to(now.dtype) if now.is_cuda else mixed
    else:
        mixed = _convolved(seen, weight, bias, activation, None)[:, taps - 1 :]
    return mixed.split([x.shape[-1] for x in streams], dim=-1)


def run_convolutions(
    streams: Sequence[Tensor],
    convolutions: Sequence[ShortConvolution],
    context: MixContext,
    state: MixerState | None,
    activation: str,
) -> Sequence[Tensor]:
    """`convolve` with the weights of `convolutions`: all have a bias or none has. Padded tokens come out as zeros."""
    biases = [convolution.bias for convolution in convolutions if convolution.bias is not None]
    weights = [convolution.weight for convolution in convolutions]
    mixed = convolve(streams, weights, context, state, biases or None, activation)
    # A bias, or an activation such as the sigmoid, makes something of nothing.
    return [context.mask_padding(x) for x in mixed]


def _convolved(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, context: MixContext | None) -> Tensor:
    if x.is_cuda:
        run = kernel(_KERNEL)
        cu_seqlens = None if context is None else context.cu_seqlens
        fused = _FUSED.get(activation)
        mixed = run(x, weight.squeeze(1), bias=bias, activation=fused, cu_seqlens=cu_seqlens)[0]
        return mixed if activation in _FUSED else activations.activation(activation)(mixed)
    mixed = causal_convolution(x, weight, None if context is None else _places(context))
    return activations.activation(activation)(mixed if bias is None else mixed + bias.float())


def causal_convolution(x: Tensor, weight: Tensor, places: Tensor | None = None) -> Tensor:
    """A causal depthwise convolution in plain float32: x [batch, tokens, channels] with weight [channels, 1, taps].

    `places` [tokens] counts the tokens before each one in its document: taps that would reach further back see zeros.
    """
    tokens, taps = x.shape[1], weight.shape[-1]
    columns = weight.squeeze(1).t().float()
    padded = F.pad(x.float(), (0, 0, taps - 1, 0))
    mixed = padded[:, taps - 1 :] * columns[-1]
    for back in range(1, taps):
        earlier = padded[:, taps - 1 - back : taps - 1 - back + tokens]
        if places is not None:
            earlier = earlier * (places >= back)[:, None]
        mixed = torch.addcmul(mixed, earlier, columns[-1 - back])
    return mixed


def _places(context: MixContext) -> Tensor | None:
    """[tokens], how many tokens of its own document precede each token; None if nothing is packed."""
    documents, cu_seqlens = context.documents, context.cu_seqlens
    if documents is None or cu_seqlens is None:
        return None

    def make() -> Tensor:
        return torch.arange(context.tokens, device=cu_seqlens.device) - cu_seqlens[documents[0]]

    return context.once("places in documents", make)


@declares(_KERNEL)
def _footprint(x: Tensor, weight: Tensor, **rest: Any) -> Footprint:
    """Of flash-linear-attention 0.6.0: it keeps what it read; the weight's gradient is summed up by chunks, float32."""
    by_chunk = -(-x.shape[1] // CHUNK) * x.shape[0] * 4
    return Footprint((torch.empty_like(x), None), (x, weight, rest.get("bias")), backward=by_chunk * weight.numel())
