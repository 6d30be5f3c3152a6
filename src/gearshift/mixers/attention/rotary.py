"""Rotary tables, from transformers' frequency functions. Stateless: made once a forward, by value."""

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gearshift.mixers.attention import RotarySpec
from gearshift.mixers.base import MixContext

BY_LENGTH = ("dynamic", "longrope")
"""Types whose frequencies depend on the longest position of the batch, which has to be read back from a GPU."""


def frequencies(spec: RotarySpec, head_dim: int, max_positions: int, positions: Tensor) -> tuple[Tensor, float]:
    """Inverse frequencies [rotated channels / 2] in float32, and the factor on the tables.

    Those of the types in `BY_LENGTH` depend on the longest position of the batch.
    """
    if spec.type == "default":
        rotated = int(head_dim * spec.share)
        exponents = torch.arange(0, rotated, 2, dtype=torch.float, device=positions.device) / rotated
        return 1.0 / (spec.theta**exponents), 1.0
    parameters = {
        name: value for name, value in spec.model_dump(exclude={"type", "theta", "share"}).items() if value is not None
    }
    config = LlamaConfig(
        head_dim=head_dim,
        hidden_size=head_dim,
        num_attention_heads=1,
        max_position_embeddings=max_positions,
        rope_parameters={
            "rope_type": spec.type,
            "rope_theta": spec.theta,
            "partial_rotary_factor": spec.share,
            **parameters,
        },
    )
    length = int(positions.max()) + 1 if spec.type in BY_LENGTH else None
    return ROPE_INIT_FUNCTIONS[spec.type](config, positions.device, seq_len=length)


class Rotary:
    """The rotary positions of a mixer's heads: tables for `channels` channels of a head, as `spec` describes them."""

    def __init__(self, spec: RotarySpec, channels: int):
        self.spec = spec
        self.channels = channels
        self.reads_positions = spec.type in BY_LENGTH
        self.key = repr((spec, channels))  # plain text, for compiled code cannot hash a spec

    @torch.no_grad()
    def tables(self, dtype: torch.dtype, context: MixContext) -> tuple[Tensor, Tensor]:
        """Cosines and sines, each [batch, 1, tokens, rotated channels] in `dtype`, made once a forward.

        Compiled code only finds them: a mixer's `prepare` makes them beforehand.
        """

        def make() -> tuple[Tensor, Tensor]:
            inverse, scale = frequencies(self.spec, self.channels, context.max_positions, context.positions)
            angles = context.positions[:, None, :, None].float() * inverse
            angles = torch.cat((angles, angles), dim=-1)
            return (angles.cos() * scale).to(dtype), (angles.sin() * scale).to(dtype)

        return context.once(("rotary", self.key, dtype), make)


def rotate(heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn each pair (i, i + n / 2) of the first n channels of `heads` [..., head_dim] by its angle.

    n is the width of the tables, which fit the other dimensions; the channels behind them pass. In the dtype of
    `heads`, however exact the tables are.
    """
    turned, passed = heads.tensor_split((cosine.shape[-1],), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    turned = (turned * cosine + torch.cat((-second, first), dim=-1) * sine).to(heads.dtype)
    return turned if passed.shape[-1] == 0 else torch.cat((turned, passed), dim=-1)
