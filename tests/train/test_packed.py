"""Packed documents in the stages: what a step makes of them is what it makes of each document by itself."""

import pytest
import torch

from gearshift import GearshiftForCausalLM
from gearshift.data import Batch, TokenSequences
from gearshift.train import (
    DistillationSettings,
    Distiller,
    LayerwiseStage,
    LossWeights,
    PresetSampling,
    StepRecord,
    StochasticStage,
    distil,
)
from gearshift.train.losses import IGNORED, activation_error, next_tokens
from gearshift.train.stage import StageRun
from tests.models import ATTENTION, supernet, tokens

BOUNDS = [(0, 7), (7, 8), (8, 20), (20, 31), (31, 40)]
"""Five documents in two rows of 20 tokens."""
LOSSES = LossWeights(forward_kl=1, reverse_kl=0.5, cross_entropy=0.3)


def packed(ids: torch.Tensor) -> Batch:
    starts = torch.zeros(ids.shape, dtype=torch.bool)
    starts.view(-1)[[begin for begin, _ in BOUNDS]] = True
    return Batch(ids, starts)


def stage_run(model: GearshiftForCausalLM, stage, teacher: GearshiftForCausalLM | None = None) -> StageRun:
    settings = DistillationSettings(stages=(stage,), batch_size=2)
    return Distiller(model, TokenSequences(tokens(4, 20)), settings, teacher)._stage_run(0)


def stochastic(**more) -> StochasticStage:
    sampling = PresetSampling(probabilities={"gdn,window,kda": 1.0})
    return StochasticStage(steps=1, sampling=sampling, **{"losses": LOSSES} | more)


def gradients(model: GearshiftForCausalLM) -> dict[str, torch.Tensor]:
    made = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return made


@pytest.mark.parametrize("separate", [False, True], ids=["own teacher", "separate teacher"])
def test_the_stochastic_loss_is_that_of_the_documents_apart(separate: bool) -> None:
    model, ids = supernet(layers=3), tokens(2, 20)
    run = stage_run(model, stochastic(), supernet(seed=1, layers=3) if separate else None)
    whole = run.learn(packed(ids), 0, 1.0)
    together = gradients(model)
    apart = {name: torch.zeros(()) for name in ("forward_kl", "reverse_kl", "cross_entropy")}
    summed: dict[str, torch.Tensor] = {}
    followed = 2 * 19  # a document's last token has nothing to predict, but counts, so that parts of a batch add up
    for begin, end in BOUNDS:
        document = Batch(ids.view(1, -1)[:, begin:end])
        share = dict.fromkeys(apart, (end - begin) / 40) | {"cross_entropy": (end - begin - 1) / followed}
        terms = run.learn(document, 0, 1.0)
        gradients(model)
        for name in apart:
            apart[name] += share[name] * terms[name]
            alone = stage_run(model, stochastic(losses=_only(name)), run.teacher if separate else None)
            alone.learn(document, 0, share[name] * getattr(LOSSES, name))
            for parameter, gradient in gradients(model).items():
                summed[parameter] = summed.get(parameter, 0) + gradient
    for name in apart:
        assert whole[name].item() == pytest.approx(apart[name].item(), rel=1e-4)
    assert together.keys() == summed.keys()
    for name, gradient in together.items():
        assert (gradient - summed[name]).norm() <= 1e-3 * gradient.norm() + 1e-7, name


def _only(name: str) -> LossWeights:
    return LossWeights(**{"forward_kl": 0} | {name: 1})


@torch.no_grad()
@pytest.mark.parametrize("separate", [False, True], ids=["own teacher", "separate teacher"])
def test_the_layerwise_error_is_that_of_the_documents_apart(separate: bool) -> None:
    model, ids = supernet(layers=1), tokens(2, 20)
    teacher = supernet(seed=1, layers=1) if separate else model
    measured = stage_run(model, LayerwiseStage(steps=1), teacher if separate else None).measure(packed(ids))

    def apart(owner: GearshiftForCausalLM, mixer: str) -> torch.Tensor:
        block, parts = owner.model.blocks[0], []
        for begin, end in BOUNDS:
            hidden = teacher.model.embed(ids.view(1, -1)[:, begin:end])
            parts.append(block.mixer_named(mixer)(block.mixer_norm(hidden), owner.model.context(hidden)))
        return torch.cat(parts, 1).view(2, 20, -1)

    for name in ("window", "gdn", "kda"):
        wanted = activation_error(apart(model, name), apart(teacher, "attention"))
        assert measured[name, 0].item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("stage", [LayerwiseStage(steps=1), stochastic(losses=LossWeights(activation=0.5))])
def test_rows_of_one_document_each_are_a_plain_batch(stage) -> None:
    """The error is taken by row, packed or not; so are the weights of a calibration's sequences."""
    ids = tokens(4, 20)
    starts = torch.zeros(4, 20, dtype=torch.bool)
    runs, terms = [], []
    for batch in (Batch(ids), Batch(ids, starts)):
        runs.append(stage_run(supernet(layers=3), stage))
        if runs[-1].calibration_sequences():
            runs[-1].calibrate(batch)
        terms.append(runs[-1].learn(batch, 0, 1.0))
    for key, value in terms[0].items():
        assert value.item() == pytest.approx(terms[1][key].item(), rel=1e-3), key


def test_what_comes_before_a_document_does_not_matter() -> None:
    run = stage_run(supernet(layers=3), LayerwiseStage(steps=1))
    ids = tokens(2, 20)
    other = ids.clone()
    other[0, :8] = tokens(1, 8, seed=9)
    hidden = {}
    for name, made in (("ours", ids), ("other", other)):
        batch = packed(made)
        hidden[name] = run.model.model(batch.inputs, cu_seqlens=batch.cu_seqlens, placement="kda").last_hidden_state
    assert not torch.allclose(hidden["ours"][:, :8], hidden["other"][:, :8], atol=1e-3)
    torch.testing.assert_close(hidden["ours"][:, 8:], hidden["other"][:, 8:], atol=1e-5, rtol=1e-5)


def test_no_label_crosses_a_document() -> None:
    ids = tokens(2, 20)
    batch = packed(ids)
    labels = next_tokens(batch.inputs, batch.cu_seqlens)[0]
    ends = {end - 1 for _, end in BOUNDS}
    assert {place for place in range(40) if labels[place] == IGNORED} == ends
    assert all(labels[place] == ids.view(-1)[place + 1] for place in range(40) if place not in ends)


def test_a_run_on_packed_documents_learns_and_is_judged() -> None:
    ids = tokens(6, 20)
    starts = torch.rand(6, 20, generator=torch.Generator().manual_seed(0)) < 0.2
    records = []
    stages = (LayerwiseStage(steps=2), stochastic(losses=LossWeights(cross_entropy=1, activation=1)))
    settings = DistillationSettings(stages=stages, batch_size=4, gradient_accumulation=2)
    held_out = TokenSequences(ids[:2], starts[:2])
    distil(supernet(layers=3), TokenSequences(ids, starts), settings, records.append, held_out=held_out)
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert [record.tokens for record in steps] == [80, 80, 80]
    assert records[-1].held_out["forward_kl"].keys() == {"attention", "window", "gdn", "kda"}


@pytest.mark.gpu
def test_batches_for_cuda_wait_in_pinned_memory_and_give_the_same_loss() -> None:
    mixers = {"attention": ATTENTION, "window": {**ATTENTION, "window": 6}}
    starts = torch.zeros(8, 20, dtype=torch.bool)
    starts[:, 9] = True
    stage = StochasticStage(steps=2, sampling=PresetSampling(probabilities={"window": 1.0}))
    settings = DistillationSettings(stages=(stage,), batch_size=4, autocast="none")
    losses = []
    for device in ("cpu", "cuda"):
        model = supernet(layers=2, mixers=mixers).to(device)
        distiller = Distiller(model, TokenSequences(tokens(8, 20), starts), settings)
        assert distiller._batch(0, 0, 4).tokens.is_pinned() == (device == "cuda")
        losses.append([record.loss for record in distiller.run() if isinstance(record, StepRecord)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_a_step_is_the_same_in_parts() -> None:
    """Although the parts hold different numbers of documents, and so of tokens with a next one."""
    ids = tokens(4, 20)
    starts = torch.zeros(ids.shape, dtype=torch.bool)
    starts[0, ::2] = True
    losses = []
    for parts in (1, 2, 4):
        settings = DistillationSettings(stages=(stochastic(),), batch_size=4, gradient_accumulation=parts)
        distiller = Distiller(supernet(layers=3), TokenSequences(ids, starts), settings)
        losses += [record.terms["cross_entropy"] for record in distiller.run() if isinstance(record, StepRecord)]
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-5)
