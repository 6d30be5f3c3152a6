"""The contract between a mixer and everything that runs it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from gearshift.plan import Expression, Initialiser
from gearshift.spec import MixerSpec, StateTensor

T = TypeVar("T")
Start = Expression | Initialiser
"""Where a tensor of a new mixer comes from: an expression over another mixer's tensors, or a distribution."""
Sharding = Literal["column", "row", "replicated"]


@dataclass
class MixContext:
    """What all layers of one forward share. Made once a forward; what it derives is made on first use."""

    positions: Tensor
    """[batch, tokens], the position of each token in its sequence (in its document, if packed)."""
    past: int = 0
    """Tokens of every sequence that were processed before these (padding included): the length of the cache."""
    padding: Tensor | None = None
    """[batch, past + tokens], bool, False at padding. None if nothing is padded."""
    cu_seqlens: Tensor | None = None
    """[documents + 1], int32: where each packed document starts, and the end of the last. Batch 1 and no cache."""
    max_positions: int = 8192
    """The context length that the model was made for: some rotary tables are scaled by it."""
    attn_implementation: str = "sdpa"
    """Which of transformers' attention functions attention runs on."""
    recompute: bool = True
    """Whether kernels that can compute again for the backward pass what they might keep do so, to save memory."""
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value under `key`, made on first use. The key must hold every value that the result depends on."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def tokens(self) -> int:
        """How many tokens of each sequence this forward processes."""
        return self.positions.shape[1]

    @property
    def documents(self) -> Tensor | None:
        """[1, tokens], the number of the document that each token belongs to; None if nothing is packed."""
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is None:
            return None
        index = torch.arange(self.tokens, device=cu_seqlens.device)
        return self.once("documents", lambda: torch.searchsorted(cu_seqlens[1:], index, right=True)[None])

    @property
    def document_lengths(self) -> list[int] | None:
        """The number of tokens of each packed document; None if nothing is packed. Reads `cu_seqlens` once."""
        cu_seqlens = self.cu_seqlens
        if cu_seqlens is None:
            return None
        return self.once("document lengths", lambda: cu_seqlens.diff().tolist())

    def mask_padding(self, hidden: Tensor) -> Tensor:
        """`hidden` [batch, tokens, channels] with padded tokens zeroed: how a recurrence is kept from seeing them."""
        padding = self.padding
        if padding is None:
            return hidden
        keep = self.once("keep", lambda: padding[:, -self.tokens :, None])
        return hidden * keep.to(hidden.dtype)


class MixerState:
    """The tensors that one layer keeps of the sequences it has seen, by the names its spec declares.

    Empty until the mixer's core writes to it. Every tensor's first dimension is the batch.
    """

    def __init__(self, declared: tuple[StateTensor, ...]):
        self.declared = {tensor.name: tensor for tensor in declared}
        self.tensors: dict[str, Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None if nothing was written yet."""
        return self.tensors.get(name)

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        assert name in self.declared, f"the spec declares no state {name!r}"
        self.tensors[name] = tensor

    def append(self, name: str, new: Tensor) -> Tensor:
        """Add `new` tokens to a growing tensor. Returns the kept and the new tokens; keeps at most `max_tokens`."""
        declared = self.declared[name]
        dim = declared.token_dim
        assert dim is not None, f"the state {name!r} does not grow"
        whole = torch.cat([self.tensors[name], new], dim) if name in self.tensors else new
        kept = whole.shape[dim] if declared.max_tokens is None else min(declared.max_tokens, whole.shape[dim])
        self.tensors[name] = whole.narrow(dim, whole.shape[dim] - kept, kept)
        return whole

    def select(self, indices: Tensor) -> None:
        """Keep the sequences `indices` [new batch], in that order: beam reordering, selection and repetition."""
        self.tensors = {
            name: tensor.index_select(0, indices.to(tensor.device)) for name, tensor in self.tensors.items()
        }

    @property
    def croppable(self) -> bool:
        """Whether the last tokens can be taken back: only where every tensor holds all of its tokens."""
        return all(tensor.grows and tensor.max_tokens is None for tensor in self.declared.values())

    def crop(self, tokens: int) -> None:
        """Take the last `tokens` tokens back. ValueError where the state has folded or dropped tokens."""
        if not self.croppable:
            raise ValueError("a recurrent or windowed state cannot be cropped: start a new cache from the shorter text")
        for name, tensor in self.tensors.items():
            dim = self.declared[name].token_dim
            assert dim is not None
            self.tensors[name] = tensor.narrow(dim, 0, tensor.shape[dim] - tokens)

    @property
    def bytes(self) -> int:
        """The size of what is kept now, in bytes, all sequences together."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


class Mixed(NamedTuple):
    """What the core of a gated mixer gives: its result, beside the gate of the same shape that waits for it."""

    output: Tensor
    gate: Tensor


class Mixer(nn.Module, ABC):
    """A token mixer. Knows nothing of its layer number, of the cache's layout or of other mixers.

    It works in three steps that can be used apart; only `core` touches state. A server that pages its own state
    replaces `core` and keeps the rest. The last projection is linear and called `o_proj`. `initialisers` gives every
    parameter its starting distribution.
    """

    o_proj: nn.Linear
    """The last projection, [features] -> [hidden]. What calibration fits."""
    recordable: bool = True
    """Whether it launches the same kernels for all inputs of a shape and reads nothing back: CUDA graphs need that."""
    sharding: ClassVar[Mapping[str, Sharding]] = {}
    """How tensor parallelism splits a parameter: name -> column (its outputs), row (its inputs) or replicated."""

    def __init__(self, spec: MixerSpec, hidden_size: int):
        super().__init__()
        self.spec: Any = spec
        self.hidden_size = hidden_size

    def prepare(self, context: MixContext, dtype: torch.dtype) -> None:
        """Make what `project` takes from `context` for hidden states of `dtype`: compiled code only finds it there."""

    @abstractmethod
    def project(self, hidden: Tensor, context: MixContext) -> Any:
        """hidden [batch, tokens, hidden] -> what the core reads, and what the output step needs beside its result."""

    @abstractmethod
    def core(self, inputs: Any, context: MixContext, state: MixerState | None) -> Any:
        """Mix over tokens. Reads and updates `state` if given."""

    @abstractmethod
    def features(self, result: Any) -> Tensor:
        """The core's result -> [batch, tokens, features], the input of the output projection `o_proj`."""

    def output(self, result: Any) -> Tensor:
        """The core's result -> [batch, tokens, hidden]."""
        return self.o_proj(self.features(result))

    def forward(self, hidden: Tensor, context: MixContext, state: MixerState | None = None) -> Tensor:
        """hidden [batch, tokens, hidden] -> [batch, tokens, hidden]."""
        return self.output(self.core(self.project(hidden, context), context, state))

    def supports_attention(self, function: str) -> bool:
        """Whether the mixer can learn on this attention function of transformers. True if it uses none."""
        return True

    @classmethod
    def check_device(cls, device: torch.device, learning: bool) -> None:
        """Called before a long job on `device`. ImportError if what the mixer runs on is missing or wrong there."""

    @classmethod
    @abstractmethod
    def initialisers(cls, spec: Any, hidden_size: int) -> dict[str, Initialiser]:
        """The starting distribution of every parameter, by its name in the module."""


@dataclass(frozen=True)
class Transfer:
    """How a mixer starts from the weights of another kind: its sizes and its tensors."""

    infer: Callable[[MixerSpec, int, Mapping[str, Any]], MixerSpec]
    """(source spec, hidden size, the settings a person gave) -> the complete target spec."""
    plan: Callable[[MixerSpec, MixerSpec, int], Mapping[str, Start]]
    """(source spec, target spec, hidden size) -> target parameter name -> where it comes from.

    Parameters left out start from the mixer's initialisers. ValueError if the weights cannot be carried over.
    """
