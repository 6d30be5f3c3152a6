"""What recordings do with memory. Recording itself needs a GPU: see `test_compiled.py`."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from gearshift.train import recording
from gearshift.train.recording import Arena, Kept


def spans(pieces: list[Tensor]) -> list[tuple[int, int]]:
    return sorted((piece.data_ptr(), piece.data_ptr() + piece.numel()) for piece in pieces)


def test_an_arena_gives_pieces_that_do_not_overlap_and_stay() -> None:
    arena = Arena(torch.device("cpu"))
    first = arena.pieces([1000, 5, 3000])
    assert [len(piece) for piece in first] == [1000, 5, 3000]
    assert all(end <= start for (_, end), (start, _) in pairwise(spans(first)))
    assert spans(arena.pieces([1000, 5, 3000])) == spans(first)
    larger = arena.pieces([2000, 2000, 2000])
    assert all(end <= start for (_, end), (start, _) in pairwise(spans(larger)))
    assert sum(len(buffer) for buffer in arena._buffers) <= 2000 * 3 + 1024 + 3000  # the first memory serves again
    assert spans(arena.pieces([1000, 5, 3000])) == spans(first)


class Squashed(torch.autograd.Function):
    """tanh(x weight), which keeps its result and returns it turned."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        made = (x @ weight).tanh()
        ctx.save_for_backward(x, weight, made)
        return made.t()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, made = ctx.saved_tensors
        inner = upstream[0].t() * (1 - made.square())
        return inner @ weight.t(), x.t() @ inner


def test_what_a_backward_pass_reads_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 5, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    expected = torch.autograd.grad(Squashed.apply(x, weight).pow(3).sum(), [x, weight])
    pool: list[Tensor] = []
    monkeypatch.setattr(recording, "_segments", lambda _: [segment(tensor) for tensor in pool])
    kept = Kept("pool")
    with kept.noticing():
        made = Squashed.apply(x, weight)
    pool.append(made)
    with pytest.raises(RuntimeError, match="a mixer keeps 48 bytes that autograd does not know of"):
        kept.check()
    sizes = kept.sizes(made)
    assert sizes == [3 * 4 * 4]  # result and what was saved are one; x and the weight lie elsewhere
    moved = kept.moved(made, Arena(torch.device("cpu")).pieces(sizes))
    assert torch.equal(moved, made)
    assert moved.stride() == made.stride()
    made.detach().zero_()  # as others do who use the pool
    pool.clear()
    kept.check()
    found = torch.autograd.grad(moved.pow(3).sum(), [x, weight])
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def segment(tensor: Tensor) -> dict[str, Any]:
    storage = tensor.untyped_storage()
    blocks = [{"size": storage.nbytes(), "state": "active_allocated"}]
    return {"address": storage.data_ptr(), "total_size": storage.nbytes(), "blocks": blocks}
