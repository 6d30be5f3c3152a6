"""The chunked selective scan against its definition."""

import pytest
import torch
from contract_cases import assert_near, check_recurrence, context, packed
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gearshift.mixers import selective_scan as module
from gearshift.mixers.base import MixContext, MixerState
from gearshift.mixers.selective_scan import chunked_selective_scan, recurrent_selective_scan, selective_scan
from gearshift.spec import StateTensor

NAMES = ("x", "step", "rate", "b", "c", "initial state")
RECURRENT = (StateTensor("recurrent", (6, 5), dtype="float32"),)


def inputs(tokens: int, step: float = 0.2, groups: int = 2, seed: int = 0) -> list[Tensor]:
    """Batch 2, 6 channels with 5 numbers of state each; steps up to `step`."""
    draw = torch.Generator().manual_seed(seed)
    made = [
        torch.randn(2, tokens, 6, generator=draw),
        step * torch.rand(2, tokens, 6, generator=draw),
        -torch.randn(6, 5, generator=draw).exp(),
        torch.randn(2, tokens, groups, 5, generator=draw),
        torch.randn(2, tokens, groups, 5, generator=draw),
        torch.randn(2, 6, 5, generator=draw),
    ]
    return [x.requires_grad_() for x in made]


def check(made: list[Tensor], tolerance: float = 1e-5, **chunks: int) -> None:
    expected, actual = recurrent_selective_scan(*made), chunked_selective_scan(*made, **chunks)
    check_recurrence(actual, expected, dict(zip(NAMES, made, strict=True)), tolerance)


@pytest.mark.parametrize("chunk_size", [8, 32])
@pytest.mark.parametrize("tokens", [1, 2, 63, 64, 65, 200])
def test_chunks_are_the_recurrence(tokens: int, chunk_size: int) -> None:
    check(inputs(tokens), chunk_size=chunk_size)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 100),
    step=st.sampled_from([0.0, 1e-3, 1.0, 20.0, 1000.0]),
    groups=st.sampled_from([1, 3, 6]),
    seed=st.integers(0, 1000),
)
def test_any_length_and_any_step(tokens: int, step: float, groups: int, seed: int) -> None:
    check(inputs(tokens, step, groups, seed), tolerance=1e-4)


def test_strong_decays_among_weak_ones() -> None:
    made = inputs(130, step=0.01)
    with torch.no_grad():
        made[1][:, ::7] = 300.0
        made[1][:, 3::11] = 0.0
    check(made)


@pytest.mark.parametrize("lengths", [[5, 1, 70, 64], [1, 1, 1], [3, 0, 4]])
def test_documents_restart(lengths: list[int]) -> None:
    x, step, rate, b, c, _ = inputs(sum(lengths))
    over_tokens = [tensor[:1] for tensor in (x, step, b, c)]
    x, step, b, c = over_tokens
    together = selective_scan(x, step, rate, b, c, packed(lengths), None)
    parts = zip(*(tensor.split(lengths, 1) for tensor in over_tokens), strict=True)
    apart = [recurrent_selective_scan(px, ps, rate, pb, pc)[0] for px, ps, pb, pc in parts if px.shape[1]]
    assert_near(together, torch.cat(apart, 1), 1e-5)


def test_the_state_carries_over() -> None:
    x, step, rate, b, c, _ = inputs(90)
    state, outputs = MixerState(RECURRENT), []
    for px, ps, pb, pc in zip(*(tensor.split([40, 1, 49], 1) for tensor in (x, step, b, c)), strict=True):
        outputs.append(selective_scan(px, ps, rate, pb, pc, context(px.shape[1], batch=2), state))
    expected, final = recurrent_selective_scan(x, step, rate, b, c)
    assert_near(torch.cat(outputs, 1), expected, 1e-5)
    assert_near(state["recurrent"], final, 1e-5)


def scanned(
    u: Tensor, delta: Tensor, rate: Tensor, b: Tensor, c: Tensor, return_last_state: bool
) -> tuple[Tensor, Tensor]:
    """What mamba-ssm's `selective_scan_fn` computes.

    u and delta [batch, channels, tokens], b and c [batch, groups, state_size, tokens].
    """
    assert return_last_state
    share = u.shape[1] // b.shape[1]
    b, c = (tensor.repeat_interleave(share, dim=1) for tensor in (b, c))
    state, outputs = torch.zeros(u.shape[0], *rate.shape), []
    for token in range(u.shape[2]):
        now = delta[:, :, token, None]
        state = (now * rate).exp() * state + now * u[:, :, token, None] * b[..., token]
        outputs.append((state * c[..., token]).sum(-1))
    return torch.stack(outputs, dim=2), state


@pytest.fixture
def kernel_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "kernel", lambda path: scanned)


def check_fused(made: list[Tensor], where: MixContext, expected: Tensor, final: Tensor | None) -> None:
    output, state = module._fused(*made, where)
    assert_near(output, expected, 1e-5)
    if final is not None:
        assert_near(state, final, 1e-5)
    wanted = [x for x in made if x is not None]
    found = torch.autograd.grad(output.square().sum(), wanted)
    for a, e in zip(found, torch.autograd.grad(expected.square().sum(), wanted), strict=True):
        assert_near(a, e, 1e-5)


@pytest.mark.usefixtures("kernel_on_the_cpu")
@pytest.mark.parametrize("lengths", [[5, 1, 30, 3], [3, 0, 4], [9]])
def test_the_kernel_is_cleared_between_documents(lengths: list[int]) -> None:
    x, step, rate, b, c, _ = inputs(sum(lengths))
    over_tokens = [tensor[:1] for tensor in (x, step, b, c)]
    parts = zip(*(tensor.split(lengths, 1) for tensor in over_tokens), strict=True)
    apart = [recurrent_selective_scan(px, ps, rate, pb, pc)[0] for px, ps, pb, pc in parts if px.shape[1]]
    x, step, b, c = over_tokens
    check_fused([x, step, rate, b, c, None], packed(lengths), torch.cat(apart, 1), None)


@pytest.mark.usefixtures("kernel_on_the_cpu")
def test_what_the_first_state_adds_to_the_kernel() -> None:
    made = inputs(20)
    check_fused(made, context(20, batch=2), *recurrent_selective_scan(*made))
