"""Text from a model under a placement, with what it took."""

import time
from dataclasses import dataclass
from typing import Any

import torch

from gearshift.model import GearshiftCache, GearshiftForCausalLM
from gearshift.spec import Placement


@dataclass(frozen=True)
class Written:
    """What a model wrote."""

    placement: Placement
    prompt: str
    text: str
    """The continuation alone."""
    tokens: int
    """Tokens written."""
    seconds: float
    """Wall-clock time of the tokens after the first: of decoding, not of reading the prompt."""
    state_bytes: int
    """The sequence's state at its end, as measured."""

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed."""
        return (self.tokens - 1) / self.seconds if self.seconds else 0.0


def write(
    model: GearshiftForCausalLM,
    tokenizer: Any,
    prompt: str,
    placement: str | Placement | None = None,
    max_new_tokens: int = 64,
    **settings: Any,
) -> Written:
    """Continue `prompt` under a placement. `settings` go to transformers' `generate`; greedy if they say nothing."""
    encoded = tokenizer(prompt, return_tensors="pt").to(model.device)
    if encoded["input_ids"].shape[1] == 0:
        raise ValueError("the prompt is empty: give the model at least one token to start from")
    chosen = model.placement(placement)
    cache = GearshiftCache(model.spec, chosen)
    clock = _Clock()
    produced = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded["attention_mask"],
        placement=chosen,
        past_key_values=cache,
        max_new_tokens=max_new_tokens,
        stopping_criteria=[clock],
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **{"do_sample": False, **settings},
    )
    new = produced[0, encoded["input_ids"].shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    return Written(chosen, prompt, text, len(new), clock.since_first(), cache.bytes // cache.batch)


class _Clock:
    """Called by `generate` after every token: knows when the first one was there."""

    def __init__(self) -> None:
        self.first: float | None = None
        self.last = 0.0

    def __call__(self, ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.last = time.perf_counter()
        self.first = self.first or self.last
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)

    def since_first(self) -> float:
        """Seconds from the first token to the last."""
        return self.last - self.first if self.first else 0.0
