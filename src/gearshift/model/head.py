"""The language-modelling head."""

import torch
from torch import Tensor, nn


class Head(nn.Linear):
    """The language-modelling head, [..., hidden] -> logits [..., vocabulary], soft-capped where the model says so."""

    def __init__(self, hidden_size: int, vocab_size: int, softcap: float | None):
        super().__init__(hidden_size, vocab_size, bias=False)
        self.softcap = softcap

    def forward(self, hidden: Tensor) -> Tensor:
        return soft_capped(super().forward(hidden), self.softcap)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(logits / softcap), the logits as they are without one (arXiv 2408.00118)."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)
