"""Sequences in memory, and the batches that steps read."""

import torch
from tests.models import tokens

from gearshift.data import Batch, TokenSequences


def test_each_epoch_draws_every_sequence_once() -> None:
    sequences = TokenSequences(torch.arange(60).view(12, 5))
    epochs = [sequences.draw(range(12 * epoch, 12 * epoch + 12), 3).tokens for epoch in (0, 1)]
    assert all(torch.equal(epoch[:, 0].sort().values, torch.arange(0, 60, 5)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(sequences.draw([14, 2], 3).tokens, torch.stack([epochs[1][2], epochs[0][2]]))
    assert not torch.equal(sequences.draw(range(12), 4).tokens, epochs[0])


def test_starts_stay_with_their_tokens() -> None:
    ids = torch.arange(60).view(12, 5)
    sequences = TokenSequences(ids, ids % 3 == 0)
    for part in (sequences.draw(range(30)), *(half.all for half in sequences.split(4)), *sequences.all.split(5)):
        assert torch.equal(part.starts, part.tokens % 3 == 0)


def test_the_ends_of_rows_are_boundaries_too() -> None:
    starts = torch.zeros(3, 4, dtype=torch.bool)
    starts[0, 2] = starts[1, 0] = True
    batch = Batch(tokens(3, 4), starts)
    assert batch.cu_seqlens.tolist() == [0, 2, 4, 8, 12]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.inputs.shape == (1, 12)
    assert torch.equal(batch.by_row(batch.inputs[..., None])[..., 0], batch.tokens)
    assert [part.cu_seqlens.tolist() for part in batch.split(2)] == [[0, 2, 4, 8], [0, 4]]
    assert starts[2].sum() == 0, "the starts that came in are not changed"
    assert Batch(tokens(3, 4)).cu_seqlens is None
    assert torch.equal(Batch(tokens(3, 4)).inputs, tokens(3, 4))
