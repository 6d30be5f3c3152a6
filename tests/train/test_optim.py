import math

import pytest
import torch

from gearshift.train import OptimiserSettings, ScheduleSettings
from gearshift.train.optim import (
    clip,
    learning_rate_scales,
    main_parameters,
    make_optimiser,
    schedule,
    set_learning_rate,
)
from tests.models import supernet


def test_the_main_placement_is_frozen_by_default() -> None:
    model = supernet(layers=2)
    main = main_parameters(model)
    scales = learning_rate_scales(model, {}, (), own_teacher=True)
    assert main | scales.keys() == {name for name, _ in model.named_parameters()}
    assert not main & scales.keys()
    assert set(scales.values()) == {1.0}
    assert all(any(f".mixers.{name}." in path for name in ("window", "gdn", "kda")) for path in scales)


def test_globs_scale_and_freeze() -> None:
    model = supernet(layers=2)
    scales = learning_rate_scales(model, {"*.gdn.*": 0.5, "*.A_log": 0.1}, ("*.layers.1.*.kda.*",), own_teacher=True)
    assert scales["model.layers.0.mixer.mixers.gdn.q_proj.weight"] == 0.5
    assert scales["model.layers.0.mixer.mixers.gdn.A_log"] == 0.1
    assert scales["model.layers.0.mixer.mixers.kda.q_proj.weight"] == 1.0
    assert not any("layers.1" in name and "kda" in name for name in scales)
    frozen = learning_rate_scales(model, {"*.window.*": 0}, (), own_teacher=True)
    assert not any("window" in name for name in frozen)


def test_what_cannot_learn_is_refused() -> None:
    model = supernet(layers=2)
    with pytest.raises(ValueError, match=r"'model.embed_tokens.weight' would learn, but the main placement uses it"):
        learning_rate_scales(model, {"*embed*": 1.0}, (), own_teacher=True)
    assert "model.embed_tokens.weight" in learning_rate_scales(model, {"*embed*": 1.0}, (), own_teacher=False)
    with pytest.raises(ValueError, match=r"the glob '\*.mamba.\*' matches no parameter: .*mixers"):
        learning_rate_scales(model, {}, ("*.mamba.*",), own_teacher=True)
    with pytest.raises(ValueError, match="nothing can learn"):
        learning_rate_scales(model, {}, ("*",), own_teacher=True)
    with pytest.raises(ValueError, match=r"is torch\.bfloat16, too coarse to learn in"):
        learning_rate_scales(model.bfloat16(), {}, (), own_teacher=True)


def test_groups_have_their_rate_and_decay() -> None:
    model = supernet(layers=1)
    scales = learning_rate_scales(model, {"*.gdn.*": 0.5}, (), own_teacher=True)
    optimiser = make_optimiser(model, scales, OptimiserSettings(weight_decay=0.1))
    set_learning_rate(optimiser, 0.02)
    grouped = {id(p): group for group in optimiser.param_groups for p in group["params"]}
    assert len(grouped) == len(scales)
    for name, parameter in model.named_parameters():
        if name in scales:
            group = grouped[id(parameter)]
            assert group["lr"] == 0.02 * scales[name]
            assert group["weight_decay"] == (0.1 if parameter.ndim >= 2 else 0.0)


def test_the_schedule_rises_then_falls() -> None:
    settings = ScheduleSettings(warmup=0.2, final=0.1)
    course = [schedule(step, 20, settings) for step in range(20)]
    assert course[:4] == [0.25, 0.5, 0.75, 1.0]
    assert course[3:] == sorted(course[3:], reverse=True)
    assert course[-1] == pytest.approx(0.1)
    assert schedule(0, 1, ScheduleSettings()) == pytest.approx(0.1)
    assert schedule(0, 5, ScheduleSettings(warmup=1, final=0)) == pytest.approx(0.2)


def test_groups_are_clipped_by_themselves() -> None:
    first, second, third = torch.tensor([3.0, 4.0]), torch.tensor([0.3, 0.4]), torch.tensor([[6.0], [8.0]])
    groups = [[first, third], [second], []]
    norm = math.sqrt(125.25)
    assert clip(groups, None).item() == pytest.approx(norm)
    assert torch.equal(first, torch.tensor([3.0, 4.0]))
    assert clip(groups, 1.0).item() == pytest.approx(norm)
    torch.testing.assert_close(first, torch.tensor([3.0, 4.0]) / math.sqrt(125))
    torch.testing.assert_close(third, torch.tensor([[6.0], [8.0]]) / math.sqrt(125))
    assert torch.equal(second, torch.tensor([0.3, 0.4]))
    assert clip([[third], [second]], 0.1).item() == pytest.approx(math.sqrt(100 / 125 + 0.25))
    torch.testing.assert_close(third, torch.tensor([[0.06], [0.08]]), rtol=1e-4, atol=0)
    torch.testing.assert_close(second, torch.tensor([0.06, 0.08]), rtol=1e-4, atol=0)
    assert clip([[]], 1.0) == 0
