"""Norms over the channels, in the dtype of what they read."""

import pytest
import torch

from gearshift.mixers.norm import norm
from gearshift.spec import NormSpec


@pytest.mark.parametrize("zero_centered", [False, True])
def test_the_dtype_is_that_of_the_input(zero_centered: bool) -> None:
    torch.manual_seed(0)
    made = norm(NormSpec(type="rms_norm", epsilon=1e-6, zero_centered=zero_centered), 48)
    made.weight.data.normal_()  # type: ignore[union-attr, operator]
    x = torch.randn(3, 7, 48).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = made(x)
    expected = made(wide := x.detach().float().requires_grad_())
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())  # rounded once
    upstream = torch.randn(3, 7, 48).bfloat16()
    found.backward(upstream)
    expected.backward(upstream.float())
    assert torch.equal(x.grad, wide.grad.bfloat16())  # type: ignore[union-attr, arg-type]
