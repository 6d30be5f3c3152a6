"""Training a model with adapters: they learn, what they stand beside does not, and their dropout can be repeated."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift import GearshiftForCausalLM
from gearshift.data import TokenSequences
from gearshift.model.adapter_names import is_adapter
from gearshift.plan.execute import MappingSource, materialise
from gearshift.surgery import Surgery, operate
from gearshift.train import (
    DistillationSettings,
    Distiller,
    LayerwiseStage,
    LossWeights,
    PresetSampling,
    StageEndRecord,
    StochasticStage,
    distil,
)
from gearshift.train.checkpoint import Checkpoints
from gearshift.train.optim import learning_rate_scales
from tests.models import supernet, tokens

STAGES = (
    LayerwiseStage(steps=2, learning_rate=1e-2),
    StochasticStage(steps=3, losses=LossWeights(forward_kl=1, activation=0.2)),
)


def adapted(layers: int = 2, **lora: Any) -> GearshiftForCausalLM:
    model = supernet(layers=layers)
    source = MappingSource(dict(model.state_dict()))
    surgery = Surgery.model_validate({"edits": [{"change": {"lora": {"rank": 3, "alpha": 6, **lora}}}]})
    spec, plan = operate(model.spec, source.schema, [surgery])
    made = GearshiftForCausalLM._from_config(type(model.config)(spec)).eval()
    made.load_state_dict(materialise(plan, source))
    return made


def settings(*stages: Any, **more: Any) -> DistillationSettings:
    return DistillationSettings(stages=stages or STAGES, **{"batch_size": 4, **more})


def sequences() -> TokenSequences:
    return TokenSequences(tokens(8, 20))


def changed(model: GearshiftForCausalLM, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}


def copied(model: GearshiftForCausalLM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_adapters_of_the_other_mixers_learn_and_nothing_else() -> None:
    model = adapted()
    before, teacher = copied(model), model(tokens(2, 9)).logits
    distil(model, sequences(), settings(LayerwiseStage(steps=3, learning_rate=1e-2)))
    others = tuple(f".mixers.{name}." for name in ("window", "gdn", "kda"))
    assert changed(model, before) == {n for n in before if is_adapter(n) and any(mixer in n for mixer in others)}
    assert torch.equal(model(tokens(2, 9)).logits, teacher)


def test_what_was_not_sampled_does_not_change() -> None:
    model = adapted()
    before = copied(model)
    stage = StochasticStage(steps=3, sampling=PresetSampling(probabilities={"gdn,attention": 1.0}))
    distil(model, sequences(), settings(stage))
    assert changed(model, before) == {n for n in before if is_adapter(n) and "layers.0.mixer.mixers.gdn." in n}


def test_adapters_of_the_main_mixer_learn_from_another_teacher() -> None:
    model, teacher = adapted(), supernet(layers=2, seed=3)
    before = copied(model)
    stage = StochasticStage(steps=2, sampling=PresetSampling(probabilities={"attention": 1.0}))
    distil(model, sequences(), settings(stage, learning_rate_scales={"*.lora_*": 1.0}), teacher=teacher)
    assert changed(model, before) == {n for n in before if is_adapter(n) and (".attention." in n or ".mlp." in n)}


def test_globs_know_the_names_of_a_checkpoint() -> None:
    model = adapted()
    kept = learning_rate_scales(model, {"*.kda.*": 2.0}, ["*.window.*", "*.gdn.q_proj.*"], own_teacher=True)
    assert all(is_adapter(name) for name in kept)
    assert {scale for name, scale in kept.items() if ".kda." in name} == {2.0}
    assert not any(".window." in name or ".gdn.q_proj." in name for name in kept)
    with pytest.raises(ValueError, match="nothing can learn"):
        learning_rate_scales(model, {"*.kda.q_proj.weight": 1.0}, ["*.lora_?.*"], own_teacher=True)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_resumed_run_goes_on_as_if_unbroken(tmp_path: Path, dropout: float) -> None:
    whole = adapted(dropout=dropout)
    distil(whole, sequences(), settings())
    torch.manual_seed(7)
    checkpoints, first = Checkpoints(tmp_path), Distiller(adapted(dropout=dropout), sequences(), settings())
    records = first.run()
    for _ in range(5):  # the calibration, the first stage's steps and its end, a step of the second
        next(records)
    checkpoints.save(first)
    records.close()
    second = Distiller(adapted(dropout=dropout), sequences(), settings())
    assert checkpoints.restore(second)
    list(second.run())
    assert not changed(second.model, whole.state_dict())


def test_dropout_acts_in_training_on_what_learns_alone() -> None:
    plain, noisy = adapted(), adapted(dropout=0.4)
    state = torch.get_rng_state()
    records: list[Any] = []
    for model in (plain, noisy):
        distil(model, sequences(), settings(), records.append, held_out=sequences())
    assert changed(noisy, plain.state_dict())
    assert torch.equal(torch.get_rng_state(), state)
    ends = [record.held_out for record in records if isinstance(record, StageEndRecord)]
    assert [end["forward_kl"]["attention"] for end in ends if "forward_kl" in end] == [0, 0]
    quiet = copy.deepcopy(noisy)
    distil(quiet, sequences(), settings(LayerwiseStage(steps=0)), records.append, held_out=sequences())
    distil(quiet, sequences(), settings(LayerwiseStage(steps=0)), records.append, held_out=sequences())
    assert records[-1].held_out == records[-2].held_out


def test_recomputing_drops_the_same_inputs() -> None:
    trained = []
    for recompute in (False, True):
        model = adapted(dropout=0.4)
        distil(model, sequences(), settings(StochasticStage(steps=3, recompute=recompute)))
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
