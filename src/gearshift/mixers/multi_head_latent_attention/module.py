"""Multi-head latent attention as a module, on transformers' attention interface."""

from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gearshift.mixers.attention.rotary import Rotary, rotate
from gearshift.mixers.attention_function import attention_function, can_learn
from gearshift.mixers.attention_mask import attention_mask, packing
from gearshift.mixers.base import MixContext, Mixer, MixerState, Sharding
from gearshift.mixers.multi_head_latent_attention import MultiHeadLatentAttentionSpec
from gearshift.mixers.norm import norm, norm_start
from gearshift.plan import Constant, Initialiser, Normal


class Latents(NamedTuple):
    """What the core reads."""

    query: Tensor
    """[batch, heads, tokens, qk_nope_head_dim + qk_rope_head_dim], its last channels rotated."""
    latent: Tensor
    """[batch, tokens, kv_lora_rank], normed: what keys and values are made from."""
    rope_key: Tensor
    """[batch, tokens, qk_rope_head_dim], rotated: the part of the key that all heads share."""


class MultiHeadLatentAttention(Mixer):
    """Softmax attention whose keys and values are linear in a small latent (arXiv 2405.04434, section 2.1)."""

    sharding: ClassVar[dict[str, Sharding]] = {
        "q_proj.weight": "column",
        **{f"q_down_proj.{kind}": "replicated" for kind in ("weight", "bias")},
        "q_norm.weight": "replicated",
        "q_up_proj.weight": "column",
        **{f"kv_down_proj.{kind}": "replicated" for kind in ("weight", "bias")},
        "kv_norm.weight": "replicated",
        "kv_up_proj.weight": "column",
        "o_proj.weight": "row",
        "o_proj.bias": "replicated",
    }

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, spec: MultiHeadLatentAttentionSpec, hidden_size: int):
        super().__init__(spec, hidden_size)
        queries = spec.heads * (spec.qk_nope_head_dim + spec.qk_rope_head_dim)
        if spec.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden_size, queries, bias=False)
        else:
            self.q_down_proj = nn.Linear(hidden_size, spec.q_lora_rank, bias=spec.bias)
            self.q_norm = norm(spec.norm, spec.q_lora_rank)
            self.q_up_proj = nn.Linear(spec.q_lora_rank, queries, bias=False)
        self.kv_down_proj = nn.Linear(hidden_size, spec.kv_lora_rank + spec.qk_rope_head_dim, bias=spec.bias)
        self.kv_norm = norm(spec.norm, spec.kv_lora_rank)
        keys_values = spec.heads * (spec.qk_nope_head_dim + spec.v_head_dim)
        self.kv_up_proj = nn.Linear(spec.kv_lora_rank, keys_values, bias=False)
        self.o_proj = nn.Linear(spec.heads * spec.v_head_dim, hidden_size, bias=spec.bias)
        self.rotary = None if spec.rotary is None else Rotary(spec.rotary, spec.qk_rope_head_dim)
        self.recordable = self.rotary is None or not self.rotary.reads_positions
        # Transformers' attention functions read it from the module they are given, like the class attributes above.
        self.config = SimpleNamespace(_attn_implementation=None)
        # The attention functions apply its rate; it stands here so that training sees that something is random.
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else None

    def supports_attention(self, function: str) -> bool:
        narrowest = min(self.spec.qk_nope_head_dim + self.spec.qk_rope_head_dim, self.spec.v_head_dim)
        return can_learn(function, self.spec.dropout, narrowest)

    def prepare(self, context: MixContext, dtype: torch.dtype) -> None:
        if self.rotary is not None:
            self.rotary.tables(dtype, context)

    def project(self, hidden: Tensor, context: MixContext) -> Latents:
        nope, rope = self.spec.qk_nope_head_dim, self.spec.qk_rope_head_dim
        if self.spec.q_lora_rank is None:
            query = self.q_proj(hidden)
        else:
            query = self.q_up_proj(self.q_norm(self.q_down_proj(hidden)))
        query = query.unflatten(-1, (-1, nope + rope)).transpose(1, 2)
        latent, rope_key = self.kv_down_proj(hidden).split((self.spec.kv_lora_rank, rope), dim=-1)
        if self.rotary is not None:
            tables = self.rotary.tables(hidden.dtype, context)
            plain, turned = query.split((nope, rope), dim=-1)
            query = torch.cat((plain, self._rotate(turned, *tables)), dim=-1)
            rope_key = self._rotate(rope_key[:, None], *tables)[:, 0]
        return Latents(query, self.kv_norm(latent), rope_key)

    def core(self, inputs: Latents, context: MixContext, state: MixerState | None) -> Tensor:
        """The heads' outputs, [batch, tokens, heads, v_head_dim]."""
        query, latent, rope_key = inputs
        if state is not None:
            latent, rope_key = state.append("latent", latent), state.append("rope_key", rope_key)
        key, value = self._expand(latent, rope_key)
        name = context.attn_implementation
        self.config._attn_implementation = name
        output, _ = attention_function(name)(
            self,
            query,
            key,
            value,
            attention_mask(query, key.shape[2], context),
            scaling=self.spec.scale,
            dropout=self.spec.dropout if self.training else 0.0,
            **packing(context),
        )
        return output

    def features(self, result: Tensor) -> Tensor:
        return result.flatten(2)

    def _rotate(self, heads: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        """`heads` [batch, heads, tokens, qk_rope_head_dim] rotated.

        Interleaved pairs come out apart, first halves then second ones, in queries and keys alike.
        """
        if self.spec.interleaved:
            heads = heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        return rotate(heads, cosine, sine)

    def _expand(self, latent: Tensor, rope_key: Tensor) -> tuple[Tensor, Tensor]:
        """The heads' keys and values, [batch, heads, tokens, channels], from what the state keeps."""
        nope, value_dim = self.spec.qk_nope_head_dim, self.spec.v_head_dim
        heads = self.kv_up_proj(latent).unflatten(-1, (-1, nope + value_dim)).transpose(1, 2)
        key, value = heads.split((nope, value_dim), dim=-1)
        shared = rope_key[:, None].expand(-1, key.shape[1], -1, -1)
        return torch.cat((key, shared), dim=-1), value

    @classmethod
    def initialisers(cls, spec: MultiHeadLatentAttentionSpec, hidden_size: int) -> dict[str, Initialiser]:
        """Normal weights of standard deviation 0.02, zero biases, norms that change nothing."""
        queries = ("q_proj",) if spec.q_lora_rank is None else ("q_down_proj", "q_up_proj")
        names = (*queries, "kv_down_proj", "kv_up_proj", "o_proj")
        norms = ("kv_norm",) if spec.q_lora_rank is None else ("q_norm", "kv_norm")
        biased = [name for name in names if name in ("q_down_proj", "kv_down_proj", "o_proj")] if spec.bias else []
        return {
            **{f"{name}.weight": Normal(std=0.02) for name in names},
            **{f"{name}.weight": norm_start(spec.norm) for name in norms},
            **{f"{name}.bias": Constant(0.0) for name in biased},
        }
