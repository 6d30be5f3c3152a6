"""Layerwise learning on a student's stream of hidden states."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from gearshift import GearshiftForCausalLM, Placement
from gearshift.data import Batch, TokenSequences
from gearshift.train import (
    AllocationSampling,
    DistillationSettings,
    Distiller,
    LayerwiseStage,
    PresetSampling,
    StageEndRecord,
    StepRecord,
    UniformSampling,
    distil,
    train,
)
from gearshift.train.losses import activation_error
from tests.models import supernet, tokens
from tests.train.processes import run_processes
from tests.train.test_parallel import check_same
from tests.train.test_run import Interrupt, recipe, timeless

STUDENT = "gdn,attention,window"


def distiller(
    model: GearshiftForCausalLM, teacher: GearshiftForCausalLM | None = None, stage: Any = None, **more: Any
) -> Distiller:
    sampling = PresetSampling(probabilities={STUDENT: 1.0})
    stage = stage or LayerwiseStage(steps=2, calibration="none", stream="student", sampling=sampling)
    settings = DistillationSettings(stages=(stage,), batch_size=4, **more)
    return Distiller(model, TokenSequences(tokens(32, 20)), settings, teacher)


def naive_gradients(
    model: GearshiftForCausalLM, teacher: GearshiftForCausalLM, batch: torch.Tensor, placement: Placement
) -> dict[str, torch.Tensor]:
    """Two whole forwards, of teacher and student, in which every layer is looked at by itself."""
    targets: list[torch.Tensor] = []
    hidden = teacher.model.embed(batch)
    context = teacher.model.context(hidden)
    for block in teacher.model.blocks:
        targets.append(block.mixer_named("attention")(block.mixer_norm(hidden), context).detach())
        hidden = block(hidden, context, "attention")
    hidden = model.model.embed(batch)
    context = model.model.context(hidden)
    for block, name, target in zip(model.model.blocks, placement, targets, strict=True):
        hidden = hidden.detach()
        for mixer in block.spec.mixers:
            output = block.mixer_named(mixer)(block.mixer_norm(hidden).detach(), context)
            if output.requires_grad:
                activation_error(output, target).backward()
        hidden = block(hidden, context, name)
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("separate", [False, True])
def test_the_gradient_is_that_of_a_naive_loop(separate: bool) -> None:
    """Also where main mixers and embeddings are not the teacher's."""
    model = supernet(layers=3)
    teacher = supernet(layers=3, seed=1) if separate else model
    batch = tokens(4, 20)
    scales = {"*": 1.0} if separate else {}
    made = distiller(model, teacher if separate else None, learning_rate_scales=scales)
    with made._learning():
        run = made._stage_run(0)
        terms = run.learn(Batch(batch), 0, 1.0)
        assert terms is not None
        ours = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        expected = naive_gradients(model, teacher, batch, Placement.parse(STUDENT))
        on_teacher = run.measure(Batch(batch))
    assert ours.keys() == expected.keys()
    assert any(".attention." in name for name in ours) is separate
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)
    # Before the first layer the streams differ where the embeddings do, behind a student's mixer always.
    assert torch.equal(terms["kda", 0], on_teacher["kda", 0]) is not separate
    assert not torch.isclose(terms["kda", 1], on_teacher["kda", 1])


def test_it_learns_and_says_whom_it_followed() -> None:
    model, records = supernet(layers=3), []
    stage = LayerwiseStage(steps=15, learning_rate=1e-2, stream="student")
    main = model(tokens(2, 20)).logits
    held_out = TokenSequences(tokens(4, 20, seed=5))
    settings = DistillationSettings(stages=(stage,), batch_size=4, seed=3)
    distil(model, TokenSequences(tokens(4, 20)), settings, records.append, held_out=held_out)
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert sum(step.loss for step in steps[-4:]) < 0.95 * sum(step.loss for step in steps[:4])
    drawn = [AllocationSampling().sample(model.spec.choices, {}, 3, step) for step in range(15)]
    assert [step.placement for step in steps] == drawn
    assert all(step.layers.keys() == {"window", "gdn", "kda"} for step in steps)
    assert torch.equal(model(tokens(2, 20)).logits, main)
    assert isinstance(records[-1], StageEndRecord)


def test_all_main_is_the_teachers_stream() -> None:
    found = []
    main = PresetSampling(probabilities={"attention": 1.0})
    for stage in (LayerwiseStage(steps=2), LayerwiseStage(steps=2, stream="student", sampling=main)):
        made = distiller(supernet(layers=3), stage=stage)
        found.append([record.loss for record in made.run() if isinstance(record, StepRecord)])
    assert found[0] == found[1]


def test_a_resumed_run_follows_the_same_students(source: Path, tmp_path: Path) -> None:
    stages = ({"type": "layerwise", "steps": 4, "stream": "student", "sampling": {"type": "uniform"}},)
    whole, broken = (recipe(source, tmp_path / name, stages=stages, held_out=3) for name in ("whole", "broken"))
    train(whole)
    with pytest.raises(KeyboardInterrupt):
        train(broken, callbacks=[Interrupt(2)])
    assert train(broken).resumed_at == 2
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "whole")


@pytest.mark.parametrize("name", ["shards", "slices", "separate teacher"])
def test_two_processes_learn_what_one_does(source: Path, tmp_path: Path, name: str) -> None:
    parallel = {"tensor": 2} if name == "slices" else None
    how: dict[str, Any] = {"stages": ({"type": "layerwise", "steps": 3, "stream": "student"},), "held_out": 3}
    if name == "separate teacher":  # of its own mixers, the main ones would learn rounding from themselves
        how |= {"teacher": str(source / "model"), "learning_rate_scales": {"*": 0.5}, "freeze": ("*.attention.*",)}
    train(recipe(source, tmp_path / "alone", **how))
    run_processes(2, train, recipe(source, tmp_path / "run", parallel=parallel, **how))
    check_same(tmp_path / "run", tmp_path / "alone")


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValidationError, match="sampling uniform draws students: set stream to student"):
        LayerwiseStage(steps=1, sampling=UniformSampling())
    stage = LayerwiseStage(steps=1, stream="student", sampling=PresetSampling(probabilities={"gnd": 1}))
    with pytest.raises(ValueError, match="'gnd' is no preset"):
        distiller(supernet(layers=2), stage=stage)
