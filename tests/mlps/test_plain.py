"""The MLP without a gate against transformers' own."""

import pytest
import torch
from transformers import PhiConfig
from transformers.models.phi.modeling_phi import PhiMLP

from gearshift.mlps.plain import PlainMLPSpec
from gearshift.mlps.plain.module import PlainMLP
from gearshift.plan.execute import initialise


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
@pytest.mark.parametrize(("up_bias", "down_bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_outputs_and_gradients_are_phis(activation: str, up_bias: bool, down_bias: bool) -> None:
    torch.manual_seed(0)
    theirs = PhiMLP(PhiConfig(hidden_size=12, intermediate_size=28, hidden_act=activation))
    spec = PlainMLPSpec(intermediate_size=28, activation=activation, up_bias=up_bias, down_bias=down_bias)
    ours = PlainMLP(spec, 12)
    with torch.no_grad():
        for mine, other, biased in ((ours.up_proj, theirs.fc1, up_bias), (ours.down_proj, theirs.fc2, down_bias)):
            mine.weight.copy_(other.weight)
            if biased:
                mine.bias.copy_(other.bias)
            else:
                other.bias.zero_()
    one, two = (torch.randn(3, 5, 12, generator=torch.Generator().manual_seed(1), requires_grad=True) for _ in range(2))
    expected, actual = theirs(one), ours(two)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
    expected.square().sum().backward()
    actual.square().sum().backward()
    torch.testing.assert_close(two.grad, one.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.up_proj.weight.grad, theirs.fc1.weight.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.down_proj.weight.grad, theirs.fc2.weight.grad, rtol=1e-5, atol=1e-6)


def test_every_parameter_has_a_start() -> None:
    spec = PlainMLPSpec(intermediate_size=28, up_bias=True, down_bias=True)
    starts = PlainMLP.initialisers(spec, 12)
    shapes = {name: tuple(parameter.shape) for name, parameter in PlainMLP(spec, 12).named_parameters()}
    assert starts.keys() == shapes.keys()
    drawn = {name: initialise(starts[name], shape, "float32", 0, name) for name, shape in shapes.items()}
    assert 0.01 < drawn["up_proj.weight"].std() < 0.03
    assert not drawn["down_proj.bias"].any()
