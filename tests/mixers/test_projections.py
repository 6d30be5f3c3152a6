"""Projections that are compiled together give what each gives by itself."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from gearshift.mixers.projections import projected

SIZES = (12, 9, 5, 16)


def layers(biased: tuple[int, ...] = ()) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(8, size, bias=index in biased) for index, size in enumerate(SIZES))


def hidden() -> Tensor:
    return torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(1))


def products(linears: nn.ModuleList) -> tuple[int, list[Tensor]]:
    """How many matrix products a compiled forward pass has, and what it gives."""
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, example_inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    made = torch.compile(projected, backend=count, fullgraph=True)(hidden(), *linears)
    linear = [node for node in graphs[0].graph.nodes if node.target is torch._C._nn.linear]
    return len(linear), list(made)


def test_weights_are_joined_only_to_learn() -> None:
    with torch.no_grad():
        assert products(layers())[0] == len(SIZES)


@pytest.mark.parametrize("biased", [(), (2,), (0, 1, 2, 3)])
def test_linear_layers_are_one_product(biased: tuple[int, ...]) -> None:
    linears = layers(biased)
    count, made = products(linears)
    assert count == 1
    expected = projected(hidden(), *linears)
    assert [x.shape[-1] for x in expected] == list(SIZES)
    torch.testing.assert_close(made, list(expected))
    gradients = [
        torch.autograd.grad([x.square().sum() for x in xs], list(linears.parameters())) for xs in (made, expected)
    ]
    torch.testing.assert_close(*gradients)


def test_adapted_layers_keep_their_adapters() -> None:
    linears = layers()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["1"], init_lora_weights=False), linears)
    _, made = products(linears)
    for x, linear in zip(made, linears, strict=True):
        torch.testing.assert_close(x, linear(hidden()))
