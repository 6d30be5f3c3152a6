"""Dropout in attention: it acts where a mixer learns and nowhere else, and a run can be repeated."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gearshift import GearshiftForCausalLM
from gearshift.data import TokenSequences
from gearshift.train import DistillationSettings, Distiller, LayerwiseStage, StochasticStage, distil
from gearshift.train.checkpoint import Checkpoints
from gearshift.train.metrics import CalibrationRecord
from tests.models import MIXERS, supernet, tokens

STAGES = (LayerwiseStage(steps=2, learning_rate=1e-2), StochasticStage(steps=3))


def dropping(rate: float) -> GearshiftForCausalLM:
    """A supernet whose attention, its windows included, drops weights in training."""
    mixers = {
        name: mixer | ({"dropout": rate} if mixer["type"] == "attention" else {}) for name, mixer in MIXERS.items()
    }
    return supernet(layers=2, mixers=mixers)


def settings(*stages: Any) -> DistillationSettings:
    return DistillationSettings(stages=stages or STAGES, batch_size=4)


def sequences() -> TokenSequences:
    return TokenSequences(tokens(8, 20))


def changed(model: GearshiftForCausalLM, before: Mapping[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def test_it_is_no_tensor_and_does_nothing_where_a_model_only_runs() -> None:
    plain, noisy = supernet(layers=2), dropping(0.4)
    assert not changed(noisy, plain.state_dict())
    assert torch.equal(noisy(tokens(2, 9)).logits, plain(tokens(2, 9)).logits)
    assert not torch.equal(noisy.train()(tokens(2, 9)).logits, plain(tokens(2, 9)).logits)


def test_the_teacher_and_calibration_drop_nothing() -> None:
    records: list[Any] = []
    plain, noisy = supernet(layers=2), dropping(0.4)
    for model in (plain, noisy):
        distil(model, sequences(), settings(STAGES[0]), records.append, held_out=sequences())
    one, other = (record for record in records if isinstance(record, CalibrationRecord))
    assert one.after == other.after
    assert not any(".attention." in name or ".gdn." in name for name in changed(noisy, plain.state_dict()))


def test_it_acts_where_a_window_learns_and_leaves_the_generators_alone() -> None:
    plain, noisy = supernet(layers=2), dropping(0.4)
    state = torch.get_rng_state()
    for model in (plain, noisy):
        distil(model, sequences(), settings(*STAGES[:1]))
    assert changed(noisy, plain.state_dict())
    assert all(".mixers.window." in name for name in changed(noisy, plain.state_dict()))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_goes_on_as_if_unbroken(tmp_path: Path) -> None:
    whole = dropping(0.4)
    distil(whole, sequences(), settings())
    torch.manual_seed(7)
    checkpoints, first = Checkpoints(tmp_path), Distiller(dropping(0.4), sequences(), settings())
    records = first.run()
    for _ in range(5):  # the calibration, the first stage's steps and its end, a step of the second
        next(records)
    checkpoints.save(first)
    records.close()
    second = Distiller(dropping(0.4), sequences(), settings())
    assert checkpoints.restore(second)
    list(second.run())
    assert not changed(second.model, whole.state_dict())
