"""Comparison of two models' next-token distributions, a chunk of positions at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Totals(NamedTuple):
    """Sums over positions, in float64 precision."""

    divergence: float
    """Forward KL divergence KL(teacher || student), nats."""
    negative_log_likelihood: float
    """Of the tokens that really come next, nats."""
    agreements: float
    """Positions where the student's likeliest token is the teacher's."""


class TeacherChunk(NamedTuple):
    """What the teacher says at some positions."""

    probabilities: Tensor
    """[positions, vocabulary], float32."""
    negative_entropy: Tensor
    """[positions], float32, nats."""
    likeliest: Tensor
    """[positions, 1], int64."""


@dataclass
class Targets:
    """What the students of one batch are measured against.

    The teacher's hidden states are kept; its probabilities too where `keep` says that memory allows, else they are made
    again for every student.
    """

    hidden: Tensor
    """[positions, teacher's hidden], after the final norm."""
    labels: Tensor
    """[positions], the tokens that come next."""
    head: nn.Module
    """The teacher's head."""
    chunk: int
    """Positions whose logits are alive at a time."""
    keep: bool
    _kept: list[TeacherChunk] = field(default_factory=list)

    def chunks(self) -> Iterator[TeacherChunk]:
        """The teacher's distributions, `chunk` positions at a time."""
        if not self.keep:
            return self._made()
        if not self._kept:
            self._kept = list(self._made())
        return iter(self._kept)

    def _made(self) -> Iterator[TeacherChunk]:
        for hidden in self.hidden.split(self.chunk):
            log_probabilities = self.head(hidden).float().log_softmax(-1)
            probabilities = log_probabilities.exp()
            negative_entropy = torch.linalg.vecdot(probabilities, log_probabilities)
            yield TeacherChunk(probabilities, negative_entropy, log_probabilities.argmax(-1, keepdim=True))

    def compare(self, hidden: Tensor, head: nn.Module) -> Totals:
        """The student whose normed hidden states [positions, hidden] go through `head`, against the teacher.

        The cross term of the divergence is one dot product over the vocabulary, the same one that gave the teacher's
        entropy. So a student that equals the teacher bit for bit diverges from it by exactly zero.
        """
        totals = torch.zeros(3, dtype=torch.float64, device=hidden.device)
        parts = zip(hidden.split(self.chunk), self.labels.split(self.chunk), self.chunks(), strict=True)
        for states, labels, teacher in parts:
            log_probabilities = head(states).float().log_softmax(-1)
            crossed = torch.linalg.vecdot(teacher.probabilities, log_probabilities)
            agreed = log_probabilities.gather(-1, teacher.likeliest)[:, 0] >= log_probabilities.amax(-1)
            divergence = (teacher.negative_entropy - crossed).clamp_(min=0)
            surprise = -log_probabilities.gather(-1, labels[:, None])[:, 0]
            totals += torch.stack([part.double().sum() for part in (divergence, surprise, agreed)])
        return Totals(*totals.tolist())
