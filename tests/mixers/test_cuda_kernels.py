"""The delta-rule mixers' CUDA kernels in bfloat16 against the float32 definition on the same rounded numbers."""

import pytest
import torch
from contract_cases import assert_near, context, gradients, packed
from torch import Tensor
from torch.nn import functional as F

from gearshift.mixers.base import MixContext, Mixer, MixerState
from gearshift.mixers.convolution import causal_convolution, convolve
from gearshift.mixers.delta_rule import log_decay, recurrent_delta_rule
from gearshift.mixers.fused_delta_rule import fused_delta_rule
from gearshift.mixers.gated_delta_net import GatedDeltaNetSpec
from gearshift.mixers.gated_delta_net.module import GatedDeltaNet
from gearshift.mixers.gated_norm import GatedRMSNorm
from gearshift.mixers.kernels import kernel
from gearshift.mixers.kimi_delta_attention import KimiDeltaAttentionSpec
from gearshift.mixers.kimi_delta_attention.module import KimiDeltaAttention

HIDDEN = 256
OUTPUTS, GRADIENTS = 1e-2, 2e-2
SPECS = {
    "gdn": GatedDeltaNetSpec(key_heads=4),
    "gdn grouped": GatedDeltaNetSpec(key_heads=2, value_heads=4, key_dim=64, value_dim=128, negative_eigenvalues=True),
    "kda": KimiDeltaAttentionSpec(heads=4),
    "kda silu": KimiDeltaAttentionSpec(heads=2, head_dim=128, gate_activation="silu"),
}


def test_a_missing_kernel_names_the_package() -> None:
    with pytest.raises(ImportError, match=r'pip install "gearshift\[gpu\]"'):
        kernel("no_such_package.ops:chunk")


def pair(name: str) -> tuple[Mixer, Mixer]:
    """The same weights, rounded to bfloat16: on CUDA as they are, on the CPU in float32."""
    spec = SPECS[name].resolved(HIDDEN)
    kind = KimiDeltaAttention if name.startswith("kda") else GatedDeltaNet
    torch.manual_seed(0)
    wide = kind(spec, HIDDEN)
    with torch.no_grad():
        wide.A_log.uniform_(-2.0, 1.0)
        wide.dt_bias.uniform_(-4.0, 0.0)
        for parameter in wide.parameters():
            parameter.copy_(parameter.bfloat16())
    narrow = kind(spec, HIDDEN)
    narrow.load_state_dict(wide.state_dict())
    return narrow.bfloat16().cuda(), wide


def rounded(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """The same random numbers on CUDA in bfloat16 and on the CPU in float32."""
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    return made.cuda().requires_grad_(), made.float().requires_grad_()


def to_cuda(context: MixContext, implementation: str = "sdpa") -> MixContext:
    cu_seqlens = None if context.cu_seqlens is None else context.cu_seqlens.cuda()
    return MixContext(
        context.positions.cuda(), past=context.past, cu_seqlens=cu_seqlens, attn_implementation=implementation
    )


def check(narrow: Mixer, wide: Mixer, where: MixContext, batch: int, implementation: str = "sdpa") -> None:
    here, there = rounded(batch, where.tokens, HIDDEN)
    actual, expected = narrow(here, to_cuda(where, implementation)), wide(there, where)
    assert_near(actual.cpu(), expected, OUTPUTS, "output")
    wanted = gradients(expected, {"hidden": there, **dict(wide.named_parameters())})
    # The random projection behind the gradients is drawn on the CPU, so that both sides have the same one.
    found = gradients(actual.cpu(), {"hidden": here, **dict(narrow.named_parameters())})
    # A decay's gradient is a sum that cancels, to nothing at all for one token: below this it is the others' rounding.
    floor = 5e-3 * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    for name, gradient in wanted.items():
        error = (found[name].cpu().double() - gradient.double()).norm()
        assert error <= GRADIENTS * max(gradient.norm(), floor), f"{name}: {error / gradient.norm():.2e}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500])
def test_module(name: str, tokens: int) -> None:
    check(*pair(name), context(tokens, batch=2), batch=2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SPECS))
def test_packed_documents(name: str) -> None:
    check(*pair(name), packed([5, 130, 1, 64, 77]), batch=1)


def check_hand_over(narrow: Mixer, wide: Mixer) -> None:
    """Prefill, single steps and a second prefill on CUDA give what one pass gives, and leave declared state behind."""
    here, there = rounded(2, 150, HIDDEN)
    state, parts, past = MixerState(narrow.spec.state()), [], 0
    with torch.no_grad():
        expected = wide(there, context(150, batch=2))
        for length in (100, 1, 1, 1, 47):
            where = to_cuda(context(length, past, batch=2))
            parts.append(narrow(here[:, past : past + length], where, state).cpu())
            past += length
    # In parts: a state that was lost would hardly show in the error of the whole.
    for part, reference in zip(parts, expected.split([100, 1, 1, 1, 47], 1), strict=True):
        assert_near(part, reference, 1.5 * OUTPUTS)
    assert state["recurrent"].dtype == torch.float32
    assert state["conv"].dtype == torch.bfloat16
    for declared in narrow.spec.state():
        assert state[declared.name].shape == (2, *declared.shape)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SPECS))
def test_state_hands_over_from_prefill_to_decoding_and_back(name: str) -> None:
    check_hand_over(*pair(name))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("channels", "recompute"), [(1, True), (64, True), (64, False)], ids=["gdn", "kda", "kda that keeps all"]
)
@pytest.mark.parametrize("rate", [-2.0, 3.0], ids=["slow", "strong"])
@pytest.mark.parametrize("tokens", [33, 200])
def test_core(channels: int, recompute: bool, rate: float, tokens: int) -> None:
    """Rates of exp(3) = 20 a token forget everything at once and must give no infinities."""
    shapes = dict.fromkeys(("query", "key", "value"), (1, tokens, 3, 64))
    shapes |= {"raw": (1, tokens, 3, channels), "beta": (1, tokens, 3), "dt_bias": (3 * channels,)}
    both = {name: rounded(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    a_log = torch.full((3,), rate)
    here = {name: pair[0] for name, pair in both.items()} | {"a_log": a_log.cuda().requires_grad_()}
    there = {name: pair[1] for name, pair in both.items()} | {"a_log": a_log.clone().requires_grad_()}

    inputs = (here["query"], here["key"], here["value"], here["raw"].squeeze(-1), here["beta"])
    about = context(tokens, recompute=recompute)
    actual = fused_delta_rule(*inputs, here["a_log"], here["dt_bias"], about, None).cpu()
    decay = log_decay(there["raw"], there["a_log"], there["dt_bias"])
    expected, _ = recurrent_delta_rule(there["query"], there["key"], there["value"], decay, there["beta"].sigmoid())

    assert_near(actual, expected, OUTPUTS, "output")
    found, wanted = gradients(actual, here), gradients(expected, there)
    assert all(gradient.isfinite().all() for gradient in found.values())
    for name in ("query", "key", "value", "beta"):
        assert_near(found[name].cpu(), wanted[name], GRADIENTS, name)
    # Next to a strong decay the decay's own gradients are rounding.
    if rate < 0:
        assert_near(found["raw"].cpu(), wanted["raw"], GRADIENTS, "raw")
        # Sums over the tokens of what `raw` gets: they cancel, so their error is measured by the size of the terms.
        terms = wanted["raw"].abs().sum((0, 1)).norm()
        for name in ("a_log", "dt_bias"):
            error = (found[name].cpu() - wanted[name]).norm()
            assert error <= GRADIENTS * terms, f"{name}: {error / terms:.2e} of the terms"


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[70], [5, 64, 1]])
def test_convolution(lengths: list[int]) -> None:
    here, there = rounded(1, sum(lengths), 96)
    narrow, wide = rounded(96, 1, 4, seed=1)
    where = packed(lengths)
    actual = convolve([here], [narrow], to_cuda(where), None)[0].cpu()
    places = torch.cat([torch.arange(length) for length in lengths])
    expected = F.silu(causal_convolution(there, wide, places))
    assert_near(actual, expected, OUTPUTS)
    found = gradients(actual, {"x": here, "weight": narrow})
    for name, gradient in gradients(expected, {"x": there, "weight": wide}).items():
        assert_near(found[name].cpu(), gradient, GRADIENTS, name)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["silu", "sigmoid", "gelu"])
def test_gated_norm(activation: str) -> None:
    wide = GatedRMSNorm(64, 1e-5, activation)
    narrow = GatedRMSNorm(64, 1e-5, activation).cuda().bfloat16()
    (here, there), (narrow_gate, wide_gate) = rounded(2, 9, 3, 64), rounded(2, 9, 3, 64, seed=1)
    actual, expected = narrow(here, narrow_gate).cpu(), wide(there, wide_gate)
    assert_near(actual, expected, OUTPUTS)
    found = gradients(actual, {"x": here, "gate": narrow_gate, "weight": narrow.weight})
    for name, gradient in gradients(expected, {"x": there, "gate": wide_gate, "weight": wide.weight}).items():
        assert_near(found[name].cpu(), gradient, GRADIENTS, name)
