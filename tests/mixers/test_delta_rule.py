"""The chunked delta rule against its definition."""

import pytest
import torch
from contract_cases import assert_near, check_recurrence, context, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gearshift.mixers.base import MixerState
from gearshift.mixers.chunked_delta_rule import chunked_delta_rule
from gearshift.mixers.convolution import causal_convolution
from gearshift.mixers.delta_rule import _normalised, delta_rule, recurrent_delta_rule
from gearshift.spec import StateTensor

NAMES = ("query", "key", "value", "decay", "beta", "initial state")
RECURRENT = (StateTensor("recurrent", (4, 16, 8), dtype="float32"),)


def inputs(tokens: int, channels: int, decay: float = 0.2, key_heads: int = 4, seed: int = 0) -> list[Tensor]:
    """Batch 2, 4 heads, keys of 16 and values of 8 channels; decays from 0 down to -`decay` a token."""
    draw = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(2, tokens, key_heads, 16, generator=draw),
        torch.randn(2, tokens, key_heads, 16, generator=draw),
        torch.randn(2, tokens, 4, 8, generator=draw),
        -decay * torch.rand(2, tokens, 4, channels, generator=draw),
        2 * torch.rand(2, tokens, 4, generator=draw),
        torch.randn(2, 4, 16, 8, generator=draw),
    ]
    return [x.requires_grad_() for x in made]


def chunked(query: Tensor, key: Tensor, value: Tensor, *rest: Tensor, chunk_size: int = 64) -> tuple[Tensor, Tensor]:
    query, key = _normalised(query, key, value.shape[2])
    return chunked_delta_rule(query, key, value, *rest, chunk_size=chunk_size)


def check(made: list[Tensor], chunk_size: int = 64, tolerance: float = 1e-5) -> None:
    expected = recurrent_delta_rule(*made)
    actual = chunked(*made, chunk_size=chunk_size)
    check_recurrence(actual, expected, dict(zip(NAMES, made, strict=True)), tolerance)


@pytest.mark.parametrize("channels", [1, 16])
@pytest.mark.parametrize("chunk_size", [16, 32, 64])
@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 150])
def test_chunks_are_the_recurrence(tokens: int, chunk_size: int, channels: int) -> None:
    check(inputs(tokens, channels), chunk_size)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 140),
    channels=st.sampled_from([1, 16]),
    decay=st.sampled_from([0.0, 1e-3, 1.0, 20.0, 1000.0]),
    key_heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_any_length_and_any_decay(tokens: int, channels: int, decay: float, key_heads: int, seed: int) -> None:
    check(inputs(tokens, channels, decay, key_heads, seed), tolerance=1e-4)


@pytest.mark.parametrize("channels", [1, 16])
def test_strong_decays_among_weak_ones(channels: int) -> None:
    """One token that forgets everything does not spoil the ones after it: no sum over it is ever taken apart."""
    made = inputs(130, channels, decay=0.01)
    with torch.no_grad():
        made[3][:, ::7] = -300.0
        made[3][:, 3::11] = 0.0
    check(made)


@pytest.mark.parametrize("channels", [1, 16])
def test_equal_keys_do_not_blow_up(channels: int) -> None:
    """With one key for all tokens the triangular system is at its worst."""
    made = inputs(128, channels, decay=0.0)
    with torch.no_grad():
        made[1][:] = made[1][:, :1]
    check(made)


def test_consecutive_value_heads_share_a_key_head() -> None:
    query, key, *rest = inputs(20, 1, key_heads=2)
    shared, _ = recurrent_delta_rule(query, key, *rest)
    repeated, _ = recurrent_delta_rule(query[:, :, [0, 0, 1, 1]], key[:, :, [0, 0, 1, 1]], *rest)
    assert torch.equal(shared, repeated)


@pytest.mark.parametrize("lengths", [[5, 1, 70, 64], [1, 1, 1], [3, 0, 4]])
def test_documents_restart(lengths: list[int]) -> None:
    made = [x[:1] for x in inputs(sum(lengths), 16)][:5]
    together = delta_rule(*made, packed(lengths), None)
    parts = zip(*(x.split(lengths, 1) for x in made), strict=True)
    apart = [recurrent_delta_rule(*part)[0] for part in parts if part[0].shape[1]]
    assert_near(together, torch.cat(apart, 1), 1e-5)


def test_the_state_carries_over() -> None:
    made = inputs(90, 16)[:5]
    state, outputs = MixerState(RECURRENT), []
    for part in zip(*(x.split([40, 1, 49], 1) for x in made), strict=True):
        outputs.append(delta_rule(*part, context(part[0].shape[1], batch=2), state))
    expected, final = recurrent_delta_rule(*made)
    assert_near(torch.cat(outputs, 1), expected, 1e-5)
    assert_near(state["recurrent"], final, 1e-5)


def test_low_precision_inputs_are_computed_in_float32() -> None:
    made = [x.detach().bfloat16() for x in inputs(70, 16)[:5]]
    with torch.autocast("cpu", torch.bfloat16):
        output = delta_rule(*made, context(70, batch=2), None)
    assert output.dtype == torch.float32
    assert_near(output, recurrent_delta_rule(*(x.float() for x in made))[0], 1e-5)


def test_convolution_is_torchs() -> None:
    x, weight = torch.randn(2, 9, 6), torch.randn(6, 1, 4)
    padded = torch.nn.functional.pad(x.mT, (3, 0))
    assert_near(causal_convolution(x, weight), torch.nn.functional.conv1d(padded, weight, groups=6).mT, 1e-6)
