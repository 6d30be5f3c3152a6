"""The Mamba mixers' CUDA kernels in bfloat16 against the float32 definition on the same rounded numbers."""

import pytest
import torch
from contract_cases import assert_near, context, gradients, packed
from test_cuda_kernels import GRADIENTS, HIDDEN, OUTPUTS, check, check_hand_over, rounded, to_cuda
from torch.nn import functional as F

from gearshift.mixers.base import Mixer
from gearshift.mixers.convolution import causal_convolution, convolve
from gearshift.mixers.gated_norm import GroupedGatedRMSNorm
from gearshift.mixers.kernels import kernel
from gearshift.mixers.state_space_dual import recurrent_state_space_dual, state_space_dual
from gearshift.spec import MIXERS

SPECS = {
    "mamba": {"type": "mamba", "norm": {}},
    "mamba grouped": {"type": "mamba", "projection": "grouped", "inner_size": 256, "xb_size": 64},
    "mamba2": {"type": "mamba2", "state_size": 64},
    "mamba2 grouped": {"type": "mamba2", "heads": 8, "head_dim": 32, "state_size": 32, "groups": 4},
    "discrete": {"type": "discrete_mamba2", "value_heads": 4, "key_heads": 2},
    "discrete silu": {"type": "discrete_mamba2", "value_heads": 4, "activation": "silu", "projection_bias": True},
}


def test_a_missing_scan_names_the_package() -> None:
    with pytest.raises(ImportError, match=r"runs on mamba-ssm, and .*: pip install mamba-ssm"):
        kernel("mamba_ssm.no_such_module:scan")


def pair(name: str) -> tuple[Mixer, Mixer]:
    """The same weights, rounded to bfloat16: on CUDA as they are, on the CPU in float32."""
    kind = MIXERS[str(SPECS[name]["type"])]
    if SPECS[name]["type"] == "mamba":
        pytest.importorskip("mamba_ssm")
    spec = kind.spec.model_validate(SPECS[name]).resolved(HIDDEN)
    torch.manual_seed(0)
    wide = kind.load()(spec, HIDDEN)
    with torch.no_grad():
        for own, parameter in wide.named_parameters():
            if own == "A_log":
                parameter.uniform_(-2.0, 1.0)
            if own == "dt_bias":
                parameter.uniform_(-4.0, 0.0)
            parameter.copy_(parameter.bfloat16())
    narrow = kind.load()(spec, HIDDEN)
    narrow.load_state_dict(wide.state_dict())
    return narrow.bfloat16().cuda(), wide


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500])
def test_module(name: str, tokens: int) -> None:
    check(*pair(name), context(tokens, batch=2), batch=2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SPECS))
def test_packed_documents(name: str) -> None:
    check(*pair(name), packed([5, 130, 1, 64, 77]), batch=1)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SPECS))
def test_state_hands_over_from_prefill_to_decoding_and_back(name: str) -> None:
    check_hand_over(*pair(name))


@pytest.mark.gpu
@pytest.mark.parametrize("rate", [0.1, 20.0], ids=["slow", "strong"])
@pytest.mark.parametrize("tokens", [33, 200])
def test_core(rate: float, tokens: int) -> None:
    """Decays of exp(-20) a token forget everything at once and must give no infinities."""
    shapes = {"query": (1, tokens, 2, 64), "key": (1, tokens, 2, 64), "value": (1, tokens, 4, 64)}
    both = {name: rounded(*shape, seed=number) for number, (name, shape) in enumerate(shapes.items())}
    decay = -rate * torch.rand(1, tokens, 4, generator=torch.Generator().manual_seed(9))
    here = {name: pair[0] for name, pair in both.items()} | {"decay": decay.cuda().requires_grad_()}
    there = {name: pair[1] for name, pair in both.items()} | {"decay": decay.clone().requires_grad_()}
    actual = state_space_dual(*here.values(), context(tokens), None).cpu()
    expected, _ = recurrent_state_space_dual(*there.values())
    assert_near(actual, expected, OUTPUTS, "output")
    found, wanted = gradients(actual, here), gradients(expected, there)
    assert all(gradient.isfinite().all() for gradient in found.values())
    for name in ("query", "key", "value", *(("decay",) if rate < 1 else ())):
        assert_near(found[name].cpu(), wanted[name], GRADIENTS, name)


@pytest.mark.gpu
@pytest.mark.parametrize("activation", ["linear", "silu", "gelu"])
@pytest.mark.parametrize("lengths", [[70], [5, 64, 1]])
def test_convolution_with_a_bias(lengths: list[int], activation: str) -> None:
    (here, there), (narrow, wide) = rounded(1, sum(lengths), 96), rounded(96, 1, 4, seed=1)
    narrow_bias, wide_bias = rounded(96, seed=2)
    where = packed(lengths)
    actual = convolve([here], [narrow], to_cuda(where), None, [narrow_bias], activation)[0].cpu()
    places = torch.cat([torch.arange(length) for length in lengths])
    mixed = causal_convolution(there, wide, places) + wide_bias
    expected = {"linear": mixed, "silu": F.silu(mixed), "gelu": F.gelu(mixed)}[activation]
    assert_near(actual, expected, OUTPUTS)
    found = gradients(actual, {"x": here, "weight": narrow, "bias": narrow_bias})
    for name, gradient in gradients(expected, {"x": there, "weight": wide, "bias": wide_bias}).items():
        assert_near(found[name].cpu(), gradient, GRADIENTS, name)


@pytest.mark.gpu
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("before", [False, True])
def test_grouped_norm(groups: int, before: bool) -> None:
    wide, narrow = (GroupedGatedRMSNorm(128, groups, 1e-5, before) for _ in range(2))
    narrow = narrow.cuda().bfloat16()
    (here, there), (narrow_gate, wide_gate) = rounded(2, 9, 128), rounded(2, 9, 128, seed=1)
    actual, expected = narrow(here, narrow_gate).cpu(), wide(there, wide_gate)
    assert_near(actual, expected, OUTPUTS)
    found = gradients(actual, {"x": here, "gate": narrow_gate, "weight": narrow.weight})
    for name, gradient in gradients(expected, {"x": there, "gate": wide_gate, "weight": wide.weight}).items():
        assert_near(found[name].cpu(), gradient, GRADIENTS, name)
