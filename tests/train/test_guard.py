"""A step whose numbers are none ends the run before anything moves, and says what was bad."""

import re

import pytest
import torch

from gearshift import GearshiftForCausalLM
from gearshift.data import TokenSequences
from gearshift.train import (
    DistillationSettings,
    Distiller,
    LayerwiseStage,
    OptimiserSettings,
    PresetSampling,
    StochasticStage,
    TrainingDivergedError,
)
from gearshift.train.guard import first_bad_tensor, guarded_step
from gearshift.train.parallel import local, process_group
from tests.models import supernet, tokens
from tests.train.processes import run_processes
from tests.train.test_parallel import placed

STAGES = {
    "layerwise": LayerwiseStage(steps=9, calibration="none"),
    "stochastic": StochasticStage(steps=9, sampling=PresetSampling(probabilities={"kda,gdn": 1.0})),
}


def distiller(model: GearshiftForCausalLM, stage: LayerwiseStage | StochasticStage, **more) -> Distiller:
    settings = DistillationSettings(stages=(stage,), batch_size=4, gradient_accumulation=2, **more)
    return Distiller(model, TokenSequences(tokens(32, 20)), settings)


def run_until_stopped(run: Distiller) -> tuple[str, int]:
    """The sentence, and the steps done before. Checks that the step which went wrong changed nothing."""
    before = {name: value.detach().clone() for name, value in run.model.state_dict().items()}
    with pytest.raises(TrainingDivergedError) as caught:  # noqa: PT012 - the snapshots belong to the steps
        for _ in run.run():
            before = {name: value.detach().clone() for name, value in run.model.state_dict().items()}
    after = run.model.state_dict()
    assert all(torch.allclose(value, after[name], 0, 0, equal_nan=True) for name, value in before.items())
    assert all(parameter.grad is None for parameter in run.model.parameters())
    assert "\n" not in str(caught.value)
    return str(caught.value), run.progress.step


@pytest.mark.parametrize("kind", STAGES)
@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mixer.mixers.gdn.q_proj.weight", "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"],
)
def test_a_bad_weight_is_named(kind: str, name: str) -> None:
    model = supernet(layers=2)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[5] = float("nan")
        model.get_parameter(name)[:, 3] = float("inf")
    told, steps = run_until_stopped(distiller(model, STAGES[kind]))
    assert steps == 0
    where = {"layerwise": "layerwise", "stochastic": "stochastic, placement kda,gdn"}[kind]
    assert told.startswith(f"the loss became nan at step 0 of stage 0 ({where}). ")
    assert f"The first bad tensor: {name}, whose values are not finite" in told


@pytest.mark.parametrize("kind", STAGES)
def test_an_exploding_rate_is_stopped_with_the_layer(kind: str) -> None:
    model = supernet(layers=2)
    optimiser = OptimiserSettings(clip_norm=None)
    stage = STAGES[kind].model_copy(update={"learning_rate": 1e30})
    told, steps = run_until_stopped(distiller(model, stage, optimiser=optimiser))
    assert steps >= 1
    assert f"at step {steps} of stage 0 ({kind}" in told
    assert re.search(r"The first bad tensor: the output of model\.layers\.\d\.mixer\.mixers\.\w+", told)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_a_calibration_of_bad_numbers_is_stopped() -> None:
    model = supernet(layers=2)
    name = "model.layers.0.mixer.mixers.kda.v_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = float("nan")
    with pytest.raises(TrainingDivergedError, match=r"^the calibration found numbers that are not finite at step 0 of"):
        list(distiller(model, LayerwiseStage(steps=3)).run())
    with pytest.raises(TrainingDivergedError, match=f"tensor: {name}, whose values"):
        list(distiller(model, LayerwiseStage(steps=3)).run())


def test_a_calibration_on_fewer_sequences_than_parts_is_stopped_on_several_processes() -> None:
    run_processes(2, _check_bad_calibration)


def _check_bad_calibration() -> None:
    model = supernet(layers=2)
    with torch.no_grad():
        model.get_parameter("model.layers.0.mixer.mixers.kda.v_proj.weight")[0, 0] = float("nan")
    stage = LayerwiseStage(steps=3, calibration_sequences=2)
    settings = DistillationSettings(stages=(stage,), batch_size=8, gradient_accumulation=4)
    with process_group():
        run = Distiller(model, TokenSequences(tokens(32, 20)), settings, parallel=placed(model, data="ddp"))
        with pytest.raises(TrainingDivergedError, match="the calibration found numbers that are not finite"):
            next(run.run())


def test_a_gradient_alone_can_be_bad() -> None:
    """The loss is finite, and so is every output: only the backward pass loses its numbers."""
    model = supernet(layers=2)
    weight = model.get_parameter("model.layers.1.mixer.mixers.gdn.o_proj.weight")
    weight.register_hook(lambda gradient: gradient * float("inf"))
    told, steps = run_until_stopped(distiller(model, STAGES["stochastic"]))
    assert steps == 0
    assert "the norm of the gradients became" in told
    assert "the gradient of model.layers.1.mixer.mixers.gdn.o_proj.weight" in told


@pytest.mark.parametrize("data", ["fsdp", "ddp"])
def test_what_one_process_loses_all_name(data: str) -> None:
    """What the others find by themselves is the gradient that is exchanged with it."""
    run_processes(2, _check_one_that_loses, data)


def _check_one_that_loses(data: str) -> None:
    bad = "model.layers.1.mixer.mixers.gdn"
    settings = DistillationSettings(stages=(STAGES["layerwise"],), batch_size=4)

    def told() -> str:
        with pytest.raises(TrainingDivergedError) as caught:
            next(run.run())
        return str(caught.value)

    with process_group() as first:
        model = supernet(layers=2)
        layer = model.get_submodule(bad)
        if not first:
            layer.register_forward_hook(lambda module, given, output: output * float("nan"))
        run = Distiller(model, TokenSequences(tokens(32, 20)), settings, parallel=placed(model, data=data))
        assert f"The first bad tensor: the output of {bad}" in told()
        if not first:
            local(layer.q_proj.weight.detach())[0, 0] = float("nan")
        assert f"The first bad tensor: {bad}.q_proj.weight, whose values are not finite" in told()


def test_a_bad_teacher_is_named() -> None:
    model, teacher = supernet(layers=2), supernet(layers=2)
    with torch.no_grad():
        teacher.lm_head.weight[3] = float("inf")
    assert first_bad_tensor(model, teacher, lambda: None) == (
        "the teacher's lm_head.weight, whose values are not finite"
    )
    assert first_bad_tensor(model, model, lambda: None).startswith("the loss itself")


def test_only_a_finite_norm_moves_the_optimiser() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW([parameter], lr=0.1, fused=True)
    for norm, moves in ((float("inf"), False), (float("nan"), False), (1.0, True)):
        parameter.grad = torch.ones(3)
        guarded_step(optimiser, torch.tensor(norm))
        assert torch.equal(parameter.detach(), torch.ones(3)) is not moves
        assert optimiser.state[parameter]["step"] == moves
