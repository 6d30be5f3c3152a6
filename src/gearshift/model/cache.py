"""The generation cache: for every layer, the state that its mixer declares."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from gearshift.mixers.base import MixerState
from gearshift.spec import ModelSpec, Placement


class StateLayer(CacheLayerMixin):
    """One layer's state behind the interface that transformers' generation drives."""

    supports_early_init = False

    def __init__(self, state: MixerState):
        super().__init__()
        self.state = state
        self.seen = 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def reset(self) -> None:
        self.state.tensors.clear()
        self.seen = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.state.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for tensor in self.state.tensors.values():
            index = torch.arange(tensor.shape[0], device=tensor.device).repeat_interleave(repeats)
            self.state.select(index)
            break

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove == 0:
            return
        self.state.crop(abs(tokens_to_remove))
        self.seen -= abs(tokens_to_remove)

    @property
    def is_croppable(self) -> bool:
        return self.state.croppable

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("a Gearshift cache is filled by its mixers, not by `update`")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise TypeError("a Gearshift cache is filled by its mixers, not by `update`")


class GearshiftCache(Cache):
    """The state of a batch of sequences under one placement.

    A cache belongs to the placement it was made for: the mixers' states differ, so another placement needs a new one.
    """

    def __init__(self, spec: ModelSpec, placement: Placement):
        super().__init__(layers=[StateLayer(MixerState(declared)) for declared in spec.state(placement)])
        self.placement = placement

    @property
    def states(self) -> list[MixerState]:
        """Each layer's state."""
        return [layer.state for layer in self.layers]

    def advance(self, tokens: int) -> None:
        """Count `tokens` more tokens as seen, in every layer."""
        for layer in self.layers:
            layer.seen += tokens

    @property
    def batch(self) -> int:
        """How many sequences the states are of; 1 before the first token."""
        return next((tensor.shape[0] for state in self.states for tensor in state.tensors.values()), 1)

    @property
    def bytes(self) -> int:
        """The size of all states now, in bytes."""
        return sum(state.bytes for state in self.states)
