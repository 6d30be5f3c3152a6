"""The average of what learns: what it means, which parameters it follows, and that a stage ends on it."""

import pytest
import torch

from gearshift.data import TokenSequences
from gearshift.train import (
    DistillationSettings,
    Distiller,
    LayerwiseStage,
    PresetSampling,
    StageEndRecord,
    StepRecord,
    StochasticStage,
)
from gearshift.train.ema import Average
from tests.models import supernet, tokens


def test_the_average_of_what_moves() -> None:
    moving, resting = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(2))
    average = Average([("moving", moving), ("resting", resting)], decay=0.5)
    expected = 0.0
    for move in range(1, 31):
        with torch.no_grad():
            moving.fill_(float(move))
        moving.grad = torch.ones(2)
        average.update()
        kept = 0.0 if move == 1 else min(0.5, move / (9 + move))
        expected = kept * expected + (1 - kept) * move
    assert average.averages["moving"].tolist() == pytest.approx([expected] * 2)
    assert 28 < expected < 30
    average.apply()
    assert moving.tolist() == pytest.approx([expected] * 2)
    assert average.averages.keys() == {"moving"}


def test_a_step_that_does_not_move_a_parameter_leaves_its_average() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = Average([("it", parameter)], decay=0.9)
    for value, moved in ((1.0, True), (5.0, False), (2.0, True)):
        with torch.no_grad():
            parameter.fill_(value)
        parameter.grad = torch.ones(2) if moved else None
        average.update()
    assert average.moves == {"it": 2}
    assert average.averages["it"].tolist() == pytest.approx([1 * 2 / 11 + 2 * 9 / 11] * 2)


def test_a_stage_ends_on_its_average() -> None:
    """Judged, handed on and left in the model; each stage has averages of its own."""
    stages = (
        LayerwiseStage(steps=4, learning_rate=1e-2),
        StochasticStage(steps=4, sampling=PresetSampling(probabilities={"kda,gdn": 1.0}), learning_rate=1e-2),
    )
    held_out = TokenSequences(tokens(4, 20, seed=5))
    run = Distiller(
        supernet(layers=2),
        TokenSequences(tokens(32, 20)),
        DistillationSettings(stages=stages, batch_size=4, ema=0.9),
        held_out=held_out,
    )
    last: dict[str, torch.Tensor] = {}
    for record in run.run():
        if isinstance(record, StepRecord):
            assert run.average is not None
            last = {name: average.clone() for name, average in run.average.averages.items()}
            sampled = (
                run.scales.keys()
                if record.type == "layerwise"
                else {name for name in run.scales if ".0.mixer.mixers.kda." in name or ".1.mixer.mixers.gdn." in name}
            )
            assert last.keys() == sampled
            raw = {name: run.model.get_parameter(name).detach().clone() for name in last}
        if isinstance(record, StageEndRecord):
            assert run.average is None
            assert all(torch.equal(run.model.get_parameter(name), average) for name, average in last.items())
            assert any(not torch.equal(raw[name], average) for name, average in last.items())
            judged = run._stage_run(record.stage).measure(held_out.all)
            if record.type == "stochastic":
                assert {name: value.item() for name, value in judged.items()} == pytest.approx(
                    record.held_out["forward_kl"]
                )
