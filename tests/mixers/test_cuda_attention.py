"""Attention and latent attention on CUDA in bfloat16, through each attention function, against float32 on the CPU."""

import pytest
import torch
from contract_cases import context, packed
from test_cuda_kernels import HIDDEN, OUTPUTS, check, rounded, to_cuda

from gearshift.mixers.base import Mixer, MixerState
from gearshift.spec import MIXERS

LATENT = {
    "type": "multi_head_latent_attention",
    "heads": 4,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
HEADS = {"type": "attention", "heads": 4, "kv_heads": 2, "head_dim": 64}
SPECS = {
    "attention": HEADS,
    "window": {**HEADS, "window": 48, "qk_norm": {}},
    "three share": {**HEADS, "heads": 6},
    "latent": LATENT,
    "latent queries": {**LATENT, "q_lora_rank": 96, "v_head_dim": 64},
}

pytestmark = pytest.mark.gpu


def pair(name: str) -> tuple[Mixer, Mixer]:
    """The same weights, rounded to bfloat16: on CUDA as they are, on the CPU in float32."""
    kind = MIXERS[str(SPECS[name]["type"])]
    spec = kind.spec.model_validate(SPECS[name]).resolved(HIDDEN)
    torch.manual_seed(0)
    wide = kind.load()(spec, HIDDEN)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(parameter.bfloat16())
    narrow = kind.load()(spec, HIDDEN)
    narrow.load_state_dict(wide.state_dict())
    return narrow.bfloat16().cuda(), wide


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_module(name: str, implementation: str) -> None:
    check(*pair(name), context(130, batch=2), 2, implementation)


@pytest.mark.parametrize("name", list(SPECS))
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_packed_documents(name: str, implementation: str) -> None:
    check(*pair(name), packed([5, 130, 1, 64, 77]), 1, implementation)


@pytest.mark.parametrize("name", list(SPECS))
def test_state_hands_over_from_prefill_to_decoding_and_back(name: str) -> None:
    narrow, wide = pair(name)
    here, there = rounded(2, 150, HIDDEN)
    state, past = MixerState(narrow.spec.state()), 0
    with torch.no_grad():
        expected = wide(there, context(150, batch=2))
        for length in (100, 1, 1, 1, 47):
            part = narrow(here[:, past : past + length], to_cuda(context(length, past, batch=2)), state).cpu()
            wanted = expected[:, past : past + length]
            assert (part.float() - wanted).norm() <= 1.5 * OUTPUTS * wanted.norm()
            past += length
