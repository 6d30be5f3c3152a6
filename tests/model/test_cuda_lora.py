"""Adapters on CUDA: the outputs and the gradients of the CPU."""

import pytest
import torch
from tests.model.test_cuda import MIXERS
from tests.model.test_lora import adapted
from tests.models import tokens

from gearshift.model.adapter_names import is_adapter

pytestmark = pytest.mark.gpu
SETTINGS = {"layers": 2, "hidden_size": 128, "mixers": MIXERS}


@pytest.mark.parametrize("placement", list(MIXERS))
def test_outputs_and_gradients(placement: str) -> None:
    there, here = adapted(**SETTINGS), adapted(**SETTINGS)
    for model in (there, here):
        for parameter in model.parameters():
            # Small weights, for large ones make attention a choice of one token, which rounding alone changes.
            parameter.data = (parameter.data / (4 if parameter.ndim == 2 else 1)).bfloat16().float()
    here = here.bfloat16().cuda()
    batch = tokens(2, 70)
    actual = here(batch.cuda(), placement=placement).logits
    expected = there(batch, placement=placement).logits
    assert (actual.cpu().float() - expected).norm() <= 3e-2 * expected.norm()
    for logits in (actual, expected):
        logits.float().square().mean().backward()
    wanted = {name: p.grad for name, p in there.named_parameters() if is_adapter(name) and p.grad is not None}
    found = {name: p.grad for name, p in here.named_parameters() if is_adapter(name) and p.grad is not None}
    assert found.keys() == wanted.keys()
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    error = torch.stack([(found[name].cpu().float() - wanted[name]).norm() for name in wanted]).norm()
    assert error <= 5e-2 * total
