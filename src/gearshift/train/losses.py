"""What a student is judged by. All of it in float32, whatever the activations are in."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gearshift.model.head import soft_capped

IGNORED = -100
"""The label of a position that has no next token."""


def activation_error(output: Tensor, target: Tensor) -> Tensor:
    """||output - target||^2 / ||target||^2 of each sequence, averaged. Both [batch, tokens, hidden]; a scalar.

    Taken by sequence, so that the error of a batch is the mean of its parts' errors, however it is cut.
    """
    target = target.float()
    wrong = (output.float() - target).square().sum((1, 2))
    return (wrong / target.square().sum((1, 2)).clamp_min(torch.finfo(torch.float).tiny)).mean()


def next_tokens(tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
    """The label of each position of `tokens` [batch, tokens]: the token after it, `IGNORED` at the end.

    The end is each document's if `cu_seqlens` (see `MixContext`, on the tokens' device) says where documents are.
    """
    labels = F.pad(tokens[:, 1:], (0, 1), value=IGNORED)
    return labels if cu_seqlens is None else labels.index_fill(1, cu_seqlens[1:].long() - 1, IGNORED)


def head_losses(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    student_head: Tensor,
    teacher_head: Tensor | None,
    weights: Mapping[str, float],
    temperature: float = 1.0,
    chunk: int = 256,
    softcaps: tuple[float | None, float | None] = (None, None),
    compiled: bool = False,
    ragged: bool = False,
    followed: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of the losses on next-token distributions, and each of them, in nats a token.

    The logits of `chunk` positions at a time live in memory, never those of the whole batch: the gradient with respect
    to the hidden states (and to the student's head, if that learns) is computed in the same pass, from its formula.

    Args:
        student: [batch, tokens, hidden], the student's final hidden states.
        teacher: [batch, tokens, hidden of the teacher], the teacher's. No gradient goes there. None, as its head, if
            there is no divergence to compute.
        labels: [batch, tokens], the next token of each position, `IGNORED` where there is none.
        student_head: [vocabulary, hidden].
        teacher_head: [vocabulary, hidden of the teacher].
        weights: `forward_kl` (teacher to student), `reverse_kl`, `cross_entropy` -> weight; 0 is not computed.
        temperature: divides the logits of both divergences, which are multiplied by its square (arXiv 1503.02531).
        chunk: positions.
        softcaps: the student's and the teacher's soft cap on logits (`ModelSpec.logit_softcap`).
        compiled: whether to compile what is done with a chunk, so that its logits are read fewer times.
        ragged: whether there is another number of positions each time, all of them labelled. Nothing that depends on
            the number is then compiled, for that would be done anew at every step.
        followed: what the cross-entropy is divided by where it is not `ragged`, so that a batch of packed documents
            gives the same however it is cut: its positions but the last of each sequence. None: those with a label.
    """
    names = [name for name in HEAD_TERMS if weights.get(name, 0.0) > 0]
    if not names:
        return student.new_zeros((), dtype=torch.float), {}
    loss, terms = _HeadLosses.apply(
        student.flatten(0, 1),
        student_head,
        None if teacher is None else teacher.flatten(0, 1),
        teacher_head,
        labels.flatten(),
        {name: weights[name] for name in names},
        temperature,
        chunk,
        softcaps,
        compiled,
        ragged,
        followed,
    )
    return loss, dict(zip(names, terms.unbind(), strict=True))


HEAD_TERMS = ("forward_kl", "reverse_kl", "cross_entropy")
"""The losses on next-token distributions."""


class _HeadLosses(torch.autograd.Function):
    """Loss and gradient of a head in one pass over chunks of positions."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        student_head: Tensor,
        teacher: Tensor | None,
        teacher_head: Tensor | None,
        labels: Tensor,
        weights: dict[str, float],
        temperature: float,
        chunk: int,
        softcaps: tuple[float | None, float | None],
        compiled: bool,
        ragged: bool,
        followed: int | None,
    ) -> tuple[Tensor, Tensor]:
        of_hidden, of_head = ctx.needs_input_grad[:2]
        hidden_gradient = torch.empty_like(student) if of_hidden else None
        head_gradient = torch.zeros_like(student_head) if of_head else None
        student_head = _autocast(student_head)
        teacher_head = None if teacher_head is None else _autocast(teacher_head)
        totals = torch.zeros(len(weights), device=student.device)
        labelled = (labels != IGNORED).sum().clamp_min(1) if ragged or followed is None else max(1, followed)
        by_label = {"cross_entropy"} if not ragged else weights.keys()
        per_position = {name: 1 / labelled if name in by_label else 1 / len(student) for name in weights}
        scaled = {name: weight * per_position[name] for name, weight in weights.items()}
        heads = (student_head, teacher_head)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            full = start + chunk <= len(student)
            judge = _compiled_chunk_terms() if compiled and (full or not ragged) else _chunk_terms
            hidden = (student[part], None if teacher is None else teacher[part])
            sums, of_hidden_part, of_head_part = judge(
                hidden, heads, labels[part], scaled, temperature, softcaps, (of_hidden, of_head)
            )
            totals += torch.stack([sums[name] * per_position[name] for name in weights])
            if hidden_gradient is not None and of_hidden_part is not None:
                hidden_gradient[part] = of_hidden_part
            if head_gradient is not None and of_head_part is not None:
                head_gradient += of_head_part
        ctx.save_for_backward(hidden_gradient, head_gradient)
        loss = torch.stack([weights[name] * total for name, total in zip(weights, totals, strict=True)]).sum()
        ctx.mark_non_differentiable(totals)
        return loss, totals

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (None if made is None else made * upstream[0].to(made.dtype) for made in ctx.saved_tensors)
        return (*gradients, *[None] * 10)


def _autocast(head: Tensor) -> Tensor:
    """The head in the precision of its products, so that it is not converted again for every chunk."""
    device = head.device.type
    return head.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else head


def _chunk_terms(
    hidden: tuple[Tensor, Tensor | None],
    heads: tuple[Tensor, Tensor | None],
    labels: Tensor,
    weights: Mapping[str, Any],
    temperature: float,
    softcaps: tuple[float | None, float | None],
    wanted: tuple[bool, bool],
) -> tuple[dict[str, Tensor], Tensor | None, Tensor | None]:
    """The sum of each loss over a chunk's positions, and the gradients of their weighted sum: of the student's hidden
    states and of its head, where `wanted`. Pairs are of student and teacher.
    """
    logits = soft_capped(F.linear(hidden[0], heads[0]).float(), softcaps[0])
    against = None
    if weights.keys() - {"cross_entropy"}:
        assert hidden[1] is not None
        assert heads[1] is not None
        against = soft_capped(F.linear(hidden[1], heads[1]).float(), softcaps[1])
    sums, gradient = _terms(logits, against, labels, weights, temperature, any(wanted))
    if softcaps[0] is not None:
        gradient = gradient * (1 - (logits / softcaps[0]).square())
    # Spelled as F.linear, which autocast knows: the products run in the precision of the forward one.
    of_hidden = F.linear(gradient, heads[0].t()).to(hidden[0].dtype) if wanted[0] else None
    of_head = F.linear(gradient.t(), hidden[0].t()) if wanted[1] else None
    return sums, of_hidden, of_head


@cache
def _compiled_chunk_terms() -> Callable[..., tuple[dict[str, Tensor], Tensor | None, Tensor | None]]:
    return torch.compile(_chunk_terms, dynamic=False)


def _terms(
    logits: Tensor,
    against: Tensor | None,
    labels: Tensor,
    weights: Mapping[str, Any],
    temperature: float,
    differentiate: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """The sum of each loss over positions, and the gradient of their weighted sum, [positions, vocabulary].

    With logits z, temperature T and softmax p of z / T, q of the teacher's:
    d T^2 KL(q | p) / dz = T (p - q);  d T^2 KL(p | q) / dz = T p (log p - log q - KL(p | q)).
    """
    sums: dict[str, Tensor] = {}
    gradient = torch.zeros_like(logits) if differentiate else logits
    if against is not None:
        student = F.log_softmax(logits / temperature if temperature != 1 else logits, dim=-1)
        teacher = F.log_softmax(against / temperature if temperature != 1 else against, dim=-1)
        ratio = student - teacher
        student_share = student.exp_()
        if "forward_kl" in weights:
            teacher_share = teacher.exp_()
            sums["forward_kl"] = -(temperature**2) * torch.linalg.vecdot(teacher_share, ratio).sum()
            if differentiate:
                gradient += (student_share - teacher_share).mul_(temperature * weights["forward_kl"])
        if "reverse_kl" in weights:
            divergence = torch.linalg.vecdot(student_share, ratio)
            sums["reverse_kl"] = temperature**2 * divergence.sum()
            if differentiate:
                pull = ratio.sub_(divergence[:, None]).mul_(student_share)
                gradient += pull.mul_(temperature * weights["reverse_kl"])
    if "cross_entropy" in weights:
        sums["cross_entropy"] = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        if differentiate:
            labelled = labels != IGNORED
            pull = logits.softmax(-1)
            pull.scatter_add_(1, labels.clamp_min(0)[:, None], -torch.ones_like(pull[:, :1]))
            gradient += pull.mul_(labelled[:, None] * weights["cross_entropy"])
    return sums, gradient
