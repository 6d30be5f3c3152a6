"""What is recorded of a student's layers, done here as it is: recording itself needs a GPU, see `test_compiled.py`."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from gearshift.model import GearshiftForCausalLM
from gearshift.train import graphs, recording
from gearshift.train.engine import FrozenWeights, Precision
from gearshift.train.graphs import GraphedLayers
from gearshift.train.steps import BlockSteps
from tests.models import MIXERS, supernet

EVERYWHERE = {"address": 0, "total_size": 1 << 64, "blocks": []}


@pytest.fixture(autouse=True)
def _unrecorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be recorded is computed, in memory that counts as the recordings'."""

    @contextmanager
    def computing(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(graphs, "recording", computing)
    monkeypatch.setattr(graphs, "side_stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(recording, "_segments", lambda _: [EVERYWHERE])


def layers_of(model: GearshiftForCausalLM, autocast: Literal["none", "bfloat16"]) -> GraphedLayers:
    precision = Precision(autocast, torch.device("cpu"))
    hidden = torch.zeros(2, 20, model.spec.hidden_size, dtype=precision.residual)
    return GraphedLayers(model, BlockSteps(), precision, FrozenWeights([model], precision), hidden)


def passes(layers: GraphedLayers, layer: int, name: str) -> dict[str, Tensor]:
    """What a recording of a layer makes: its output, and the gradients of what it read and of what learns."""
    torch.manual_seed(layer)
    layers._hidden[layer].normal_()
    layers._upstream[(layer + 1) % 2].normal_()
    layers._gradients[layer].zero_()
    made = layers._record(layer, name)
    names = {parameter: key for key, parameter in layers.model.model.blocks[layer].mixer_named(name).named_parameters()}
    pairs = zip(made.gradients.parameters, made.gradients._views, strict=True)
    learnt = {names[parameter]: view for parameter, view in pairs}
    return {"output": layers._hidden[layer + 1], "read": layers._upstream[layer % 2], **learnt}


def plain_passes(layers: GraphedLayers, layer: int, name: str) -> dict[str, Tensor]:
    """The same by the block as it is."""
    block = layers.model.model.blocks[layer]
    read = layers._hidden[layer].clone().requires_grad_()
    with layers.precision():
        output = block(read, layers._context, name)
    output.backward(layers._upstream[(layer + 1) % 2])
    found = {name: p.grad for name, p in block.mixer_named(name).named_parameters() if p.grad is not None}
    layers.model.zero_grad()
    assert read.grad is not None
    return {"output": output.detach(), "read": read.grad, **found}


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("name", list(MIXERS))
def test_a_layer_gives_what_its_block_does(name: str, autocast: Literal["none", "bfloat16"]) -> None:
    """Where, of the same block, more learns in one layer than in another too."""
    model = supernet(layers=3)
    for key, parameter in model.named_parameters():
        frozen = "layers.0." in key or ("layers.1." in key and "q_proj" in key)
        parameter.requires_grad_(f".{name}." in key and not frozen)
    layers = layers_of(model, autocast)
    for layer in range(3):
        found, expected = passes(layers, layer, name), plain_passes(layers, layer, name)
        assert found.keys() == expected.keys()
        assert (len(found) == 2) == (layer == 0)
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype
            spread = 2e-2 if autocast == "bfloat16" else 1e-5
            assert (found[key] - tensor).norm() <= spread * tensor.norm(), (layer, key)
