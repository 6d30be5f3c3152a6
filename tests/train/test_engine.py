"""In what precision the stages compute."""

from typing import Any

import pytest
import torch

from gearshift.train import LayerwiseStage
from gearshift.train.engine import Engine, FrozenWeights, Precision
from gearshift.train.layerwise import LayerwiseRun
from gearshift.train.steps import BlockSteps
from tests.models import supernet, tokens
from tests.train.test_compiled import learnt

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"autocast": "bfloat16"}, torch.bfloat16),
        ({"autocast": "bfloat16", "residual": "float32"}, torch.float32),
        ({"autocast": "auto"}, torch.float32),
        ({"autocast": "none"}, torch.float32),
    ],
)
def test_hidden_states_between_layers(settings: dict[str, Any], expected: torch.dtype) -> None:
    model = supernet(layers=2)
    precision = Precision(device=CPU, **settings)
    hidden = precision.embed(model, tokens(1, 5))
    assert hidden.dtype == expected
    context = model.model.context(hidden)
    for name in ("attention", "window", "gdn", "kda"):
        with precision():
            assert model.model.blocks[0](hidden, context, name).dtype == expected


@pytest.mark.parametrize("stage", ["layerwise", "layerwise, students", "stochastic", "sft"])
def test_what_is_learnt_does_not_depend_on_it(stage: str) -> None:
    """But for rounding: bfloat16 has 8 bits."""
    _, expected = learnt(stage)
    for residual in ("auto", "float32"):
        _, losses = learnt(stage, autocast="bfloat16", residual=residual)
        assert losses != expected
        assert losses == pytest.approx(expected, rel=5e-3)


def test_frozen_weights_are_lowered_for_a_while() -> None:
    model = supernet(layers=2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".gdn." in name)
    before = {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}
    frozen = FrozenWeights([model], Precision("bfloat16", CPU))
    copies = []

    def look() -> None:
        with frozen():
            block = model.model.blocks[1]
            assert block.mlp.up_proj.weight.dtype == torch.bfloat16
            assert block.mixer_named("gdn").o_proj.weight.dtype == torch.float32  # learns
            assert block.mlp_norm.weight.dtype == torch.float32  # no product reads it
            assert model.lm_head.weight.dtype == torch.float32
            copies.append(block.mlp.up_proj.weight.data_ptr())
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            look()
        assert before == {name: (parameter.data_ptr(), parameter.dtype) for name, parameter in model.named_parameters()}
    assert copies[0] == copies[1]  # what is recorded reads them where they were
    with FrozenWeights([model], Precision("none", CPU))():
        assert model.model.blocks[1].mlp.up_proj.weight.dtype == torch.float32


@pytest.mark.parametrize("narrow", [True, False])
def test_a_stage_lowers_the_weights_of_narrow_models_until_it_closes(narrow: bool) -> None:
    model = supernet(layers=1)
    weight = model.model.blocks[0].mlp.up_proj.weight.requires_grad_(False)
    engine = Engine(Precision("bfloat16", CPU), BlockSteps(), layer_graphs=narrow)
    run = LayerwiseRun(model, model, engine, LayerwiseStage(steps=1), seed=0, batch_size=4, part_size=4)
    with run.frozen():
        assert weight.dtype == (torch.bfloat16 if narrow else torch.float32)
    run.close()
    assert "_lowered" not in vars(run.frozen)
