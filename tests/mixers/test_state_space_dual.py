"""The chunked form of state space duality against its definition, and that against the quadratic form."""

import pytest
import torch
from contract_cases import assert_near, check_recurrence, context, gradients, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gearshift.mixers.base import MixerState
from gearshift.mixers.state_space_dual import chunked_state_space_dual, recurrent_state_space_dual, state_space_dual
from gearshift.spec import StateTensor

NAMES = ("query", "key", "value", "decay", "initial state")
RECURRENT = (StateTensor("recurrent", (4, 16, 8), dtype="float32"),)


def inputs(tokens: int, decay: float = 0.2, key_heads: int = 2, seed: int = 0) -> list[Tensor]:
    """Batch 2, 4 heads, keys of 16 and values of 8 channels; decays from 0 down to -`decay` a token."""
    draw = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(2, tokens, key_heads, 16, generator=draw),
        torch.randn(2, tokens, key_heads, 16, generator=draw),
        torch.randn(2, tokens, 4, 8, generator=draw),
        -decay * torch.rand(2, tokens, 4, generator=draw),
        torch.randn(2, 4, 16, 8, generator=draw),
    ]
    return [x.requires_grad_() for x in made]


def quadratic(query: Tensor, key: Tensor, value: Tensor, decay: Tensor) -> Tensor:
    """o_t = sum over s <= t of (q_t . k_s) exp(g_(s+1) + ... + g_t) v_s, in float64, as one matrix for each head."""
    query, key, value, decay = (x.double() for x in (query, key, value, decay))
    heads = [head * key.shape[2] // value.shape[2] for head in range(value.shape[2])]
    total = decay.cumsum(1)
    factors = (total[:, :, None] - total[:, None]).movedim(-1, 1).exp()
    scores = torch.einsum("bthn,bshn->bhts", query[:, :, heads], key[:, :, heads])
    return torch.einsum("bhts,bshp->bthp", (scores * factors).tril(), value)


def check(made: list[Tensor], tolerance: float = 1e-5, **chunks: int) -> None:
    expected, actual = recurrent_state_space_dual(*made), chunked_state_space_dual(*made, **chunks)
    check_recurrence(actual, expected, dict(zip(NAMES, made, strict=True)), tolerance)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 200])
def test_both_are_the_quadratic_form(tokens: int) -> None:
    made = inputs(tokens)[:4]
    wanted = dict(zip(NAMES, made, strict=False))
    matrix = quadratic(*made)
    expected = gradients(matrix, wanted)
    for run in (recurrent_state_space_dual, chunked_state_space_dual):
        output, _ = run(*made)
        assert_near(output, matrix, 1e-4, run.__name__)
        for name, gradient in gradients(output, wanted).items():
            assert_near(gradient, expected[name], 1e-4, f"{run.__name__} {name}")


@pytest.mark.parametrize("chunk_size", [16, 64])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200])
def test_chunks_are_the_recurrence(tokens: int, chunk_size: int) -> None:
    check(inputs(tokens), chunk_size=chunk_size)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 140),
    decay=st.sampled_from([0.0, 1e-3, 1.0, 20.0, 1000.0]),
    key_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_any_length_and_any_decay(tokens: int, decay: float, key_heads: int, seed: int) -> None:
    check(inputs(tokens, decay, key_heads, seed), tolerance=1e-4)


def test_strong_decays_among_weak_ones() -> None:
    made = inputs(130, decay=0.01)
    with torch.no_grad():
        made[3][:, ::7] = -300.0
        made[3][:, 3::11] = 0.0
    check(made)


@pytest.mark.parametrize("lengths", [[5, 1, 70, 64], [1, 1, 1], [3, 0, 4]])
def test_documents_restart(lengths: list[int]) -> None:
    made = [x[:1] for x in inputs(sum(lengths))[:4]]
    together = state_space_dual(*made, packed(lengths), None)
    parts = zip(*(x.split(lengths, 1) for x in made), strict=True)
    apart = [recurrent_state_space_dual(*part)[0] for part in parts if part[0].shape[1]]
    assert_near(together, torch.cat(apart, 1), 1e-5)


def test_the_state_carries_over() -> None:
    made = inputs(90)[:4]
    state, outputs = MixerState(RECURRENT), []
    for part in zip(*(x.split([40, 1, 49], 1) for x in made), strict=True):
        outputs.append(state_space_dual(*part, context(part[0].shape[1], batch=2), state))
    expected, final = recurrent_state_space_dual(*made)
    assert_near(torch.cat(outputs, 1), expected, 1e-5)
    assert_near(state["recurrent"], final, 1e-5)


def test_low_precision_inputs_are_computed_in_float32() -> None:
    made = [x.detach().bfloat16() for x in inputs(70)[:4]]
    with torch.autocast("cpu", torch.bfloat16):
        output = state_space_dual(*made, context(70, batch=2), None)
    assert output.dtype == torch.float32
    assert_near(output, recurrent_state_space_dual(*made)[0], 1e-5)
