"""Attention as a module, on transformers' attention interface."""

from types import SimpleNamespace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from gearshift.mixers.attention import AttentionSpec
from gearshift.mixers.attention.rotary import Rotary, rotate
from gearshift.mixers.attention_function import attention_function, can_learn
from gearshift.mixers.attention_mask import attention_mask, packing
from gearshift.mixers.base import MixContext, Mixer, MixerState, Sharding
from gearshift.mixers.norm import norm, norm_start
from gearshift.plan import Constant, Initialiser, Normal


class Heads(NamedTuple):
    """What attention's core reads: queries, keys and values, rotated, each [batch, tokens, heads, head_dim]."""

    query: Tensor
    key: Tensor
    value: Tensor


class Attention(Mixer):
    """Softmax attention over all tokens before, or over a window of them; over those behind too, if not causal."""

    sharding: ClassVar[dict[str, Sharding]] = {
        **{f"{name}_proj.{kind}": "column" for name in "qkv" for kind in ("weight", "bias")},
        "o_proj.weight": "row",
        "o_proj.bias": "replicated",
        "q_norm.weight": "replicated",
        "k_norm.weight": "replicated",
    }

    def __init__(self, spec: AttentionSpec, hidden_size: int):
        super().__init__(spec, hidden_size)
        assert spec.head_dim is not None, "a module needs a resolved spec"
        assert spec.kv_heads is not None, "a module needs a resolved spec"
        self.q_proj = nn.Linear(hidden_size, spec.heads * spec.head_dim, bias=spec.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, spec.kv_heads * spec.head_dim, bias=spec.qkv_bias)
        self.o_proj = nn.Linear(spec.heads * spec.head_dim, hidden_size, bias=spec.output_bias)
        if spec.qk_norm is not None:
            across = spec.qk_norm_across_heads
            self.q_norm = norm(spec.qk_norm, spec.head_dim * (spec.heads if across else 1))
            self.k_norm = norm(spec.qk_norm, spec.head_dim * (spec.kv_heads if across else 1))
        self.rotary = None if spec.rotary is None else Rotary(spec.rotary, spec.head_dim)
        self.recordable = self.rotary is None or not self.rotary.reads_positions
        # Transformers' attention functions read these from the module they are given.
        self.is_causal = spec.causal
        self.num_key_value_groups = spec.heads // spec.kv_heads
        self.config = SimpleNamespace(_attn_implementation=None)
        # The attention functions apply its rate; it stands here so that training sees that something is random.
        self.dropout = nn.Dropout(spec.dropout) if spec.dropout else None

    def supports_attention(self, function: str) -> bool:
        return can_learn(function, self.spec.dropout, self.spec.head_dim)

    def prepare(self, context: MixContext, dtype: torch.dtype) -> None:
        if self.rotary is not None:
            self.rotary.tables(dtype, context)

    def project(self, hidden: Tensor, context: MixContext) -> Heads:
        query, key, value = self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden)
        normed = self.spec.qk_norm is not None
        if normed and self.spec.qk_norm_across_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (x.unflatten(-1, (-1, self.spec.head_dim)) for x in (query, key, value))
        if normed and not self.spec.qk_norm_across_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary is not None:
            cosine, sine = (table.transpose(1, 2) for table in self.rotary.tables(hidden.dtype, context))
            query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
        return Heads(query, key, value)

    def core(self, inputs: Heads, context: MixContext, state: MixerState | None) -> Tensor:
        """The heads' outputs, [batch, tokens, heads, head_dim]."""
        query, key, value = (x.transpose(1, 2) for x in inputs)
        if state is not None:
            if not self.spec.causal:
                raise ValueError("attention that sees later tokens has no cache: pass use_cache=False")
            key, value = state.append("key", key), state.append("value", value)
        name = context.attn_implementation
        self.config._attn_implementation = name
        output, _ = attention_function(name)(
            self,
            query,
            key,
            value,
            attention_mask(query, key.shape[2], context, self.spec.window, self.spec.causal),
            scaling=(self.spec.scale_dim or self.spec.head_dim) ** -0.5,
            dropout=self.spec.dropout if self.training else 0.0,
            sliding_window=self.spec.window,
            **packing(context),
        )
        return output

    def features(self, result: Tensor) -> Tensor:
        return result.flatten(2)

    @classmethod
    def initialisers(cls, spec: AttentionSpec, hidden_size: int) -> dict[str, Initialiser]:
        """Normal weights of standard deviation 0.02, zero biases, norms that change nothing."""
        started: dict[str, Initialiser] = {f"{name}_proj.weight": Normal(std=0.02) for name in "qkvo"}
        biased = ("qkv" if spec.qkv_bias else "") + ("o" if spec.output_bias else "")
        started |= {f"{name}_proj.bias": Constant(0.0) for name in biased}
        if spec.qk_norm is not None:
            started |= {f"{name}_norm.weight": norm_start(spec.qk_norm) for name in "qk"}
        return started
