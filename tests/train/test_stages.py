import dataclasses
import io
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec, Placement
from gearshift.data import Batch, TokenSequences
from gearshift.train import (
    CalibrationRecord,
    DistillationSettings,
    Distiller,
    LayerwiseStage,
    LossWeights,
    OptimiserSettings,
    PresetSampling,
    Record,
    SandwichSampling,
    SftStage,
    StageEndRecord,
    StepRecord,
    StochasticStage,
    TrainingDivergedError,
    UniformSampling,
    WeightedSampling,
    distil,
    loop,
    metrics,
    step_lines,
    step_progress,
)
from gearshift.train.layerwise import LayerwiseRun
from tests.models import ATTENTION, supernet, tokens

ALL_LOSSES = LossWeights(forward_kl=1, reverse_kl=0.5, cross_entropy=0.1, activation=0.2)


def only(placement: str) -> PresetSampling:
    return PresetSampling(probabilities={placement: 1.0})


def sequences(count: int = 32, length: int = 20) -> TokenSequences:
    return TokenSequences(tokens(count, length))


def settings(*stages, **more) -> DistillationSettings:
    return DistillationSettings(stages=stages, **{"batch_size": 4, **more})


def train(model: GearshiftForCausalLM, *stages, teacher: GearshiftForCausalLM | None = None, **more) -> list[Record]:
    records: list[Record] = []
    distil(model, sequences(), settings(*stages, **more), records.append, teacher=teacher)
    return records


def test_both_stages_learn_and_the_main_placement_stays_what_it_was() -> None:
    model = supernet(layers=3)
    main = model.spec.main
    before = model(tokens(2, 30), placement=main).logits
    records: list[Record] = []
    stages = LayerwiseStage(steps=15, learning_rate=1e-2), StochasticStage(steps=6, losses=ALL_LOSSES)
    held_out = TokenSequences(tokens(4, 20, seed=5))
    distil(model, TokenSequences(tokens(4, 20)), settings(*stages), records.append, held_out=held_out)
    assert torch.equal(model(tokens(2, 30), placement=main).logits, before)
    calibration, *steps = records
    assert isinstance(calibration, CalibrationRecord)
    layerwise = [record for record in steps if isinstance(record, StepRecord) and record.type == "layerwise"]
    assert layerwise[-1].loss < 0.93 * layerwise[0].loss
    assert layerwise[0].layers.keys() == {"window", "gdn", "kda"}
    assert layerwise[0].loss == pytest.approx(sum(layerwise[0].mixers.values()) / 3)
    ends = [record for record in steps if isinstance(record, StageEndRecord)]
    assert [end.stage for end in ends] == [0, 1]
    assert ends[0].held_out["layers"].keys() == {"window", "gdn", "kda"}
    assert ends[1].held_out["forward_kl"]["attention"] == 0
    assert ends[1].held_out["forward_kl"]["kda"] > 0
    stochastic = [record for record in steps if isinstance(record, StepRecord) and record.type == "stochastic"]
    assert [record.global_step for record in stochastic] == list(range(15, 21))
    assert all(record.placement is not None for record in stochastic)
    assert all(record.terms.keys() == dict(ALL_LOSSES).keys() for record in stochastic if record.loss is not None)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not model.training


def test_held_out_text_is_judged_without_the_temperature() -> None:
    """So that what was learnt at different temperatures compares."""
    ends = []
    for temperature in (1.0, 3.0):
        records: list[Record] = []
        stage = StochasticStage(steps=0, temperature=temperature)
        distil(supernet(layers=2), sequences(), settings(stage), records.append, held_out=sequences(4))
        ends.append(records[-1].held_out)
    assert ends[0] == ends[1]


def test_what_no_teacher_judges_is_judged_by_cross_entropy_on_held_out_text_too() -> None:
    """The main placement, which would teach, may learn then: a divergence from it would be one from a moving model."""
    records: list[Record] = []
    stage = StochasticStage(steps=2, losses=LossWeights(forward_kl=0.0, cross_entropy=1.0))
    every = DistillationSettings(stages=(stage,), batch_size=4, learning_rate_scales={"*": 1.0})
    distil(supernet(layers=2), sequences(), every, records.append, held_out=sequences(4))
    assert records[-1].held_out.keys() == {"cross_entropy"}
    assert records[-1].held_out["cross_entropy"]["attention"] > 0


def test_the_time_of_a_step_has_the_wait_for_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a run that waits for its text would look as fast as one that does not."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    class Slow(TokenSequences):
        def draw(self, numbers: Iterable[int], seed: int = 0) -> Batch:
            clock.now += 100.0
            return super().draw(numbers, seed)

    records: list[Record] = []
    distil(supernet(layers=2), Slow(tokens(8, 12)), settings(StochasticStage(steps=1)), records.append)
    assert records[0].seconds == 100.0


def test_progress_moves_by_steps_over_all_stages_and_tells_the_stage_and_the_loss() -> None:
    moves: list[tuple[float, str | None]] = []
    records = train(supernet(layers=2), LayerwiseStage(steps=2), StochasticStage(steps=2, sampling=only("gdn*2")))
    watch = step_progress(lambda amount, note=None: moves.append((amount, note)), stages=3)
    for record in records[2:]:  # what a run resumed after the calibration and one step would say
        watch(record)
    steps = [record for record in records[2:] if isinstance(record, StepRecord)]
    assert [amount for amount, _ in moves if amount] == [2, 1, 1]
    assert [note for amount, note in moves if amount] == [
        f"stage 1/3 layerwise, loss {steps[0].loss:.4g}",
        f"stage 2/3 stochastic, loss {steps[1].loss:.4g}",
        f"stage 2/3 stochastic, loss {steps[2].loss:.4g}",
    ]
    skipped = dataclasses.replace(steps[2], loss=None, global_step=4)
    watch(skipped)
    assert moves[-1] == (1, moves[-2][1])
    watch(dataclasses.replace(skipped, stage=2, global_step=5))
    assert moves[-1] == (1, "stage 3/3 stochastic")


def test_without_a_bar_a_line_is_printed_for_each_stage_and_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    shown, clock = io.StringIO(), SimpleNamespace(now=100.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: clock.now))
    watch = step_lines(Console(file=shown, width=20), stages=2)
    place = {"stage": 0, "type": "layerwise", "step": 0, "global_step": 0}
    rates = {"learning_rate": 1.0, "gradient_norm": 1.0, "tokens": 2048, "seconds": 0.5}
    step = StepRecord(**place, total_steps=2000, loss=0.5, terms={}, **rates)
    sft = dataclasses.replace(step, stage=1, type="sft", loss=None)
    records: list[tuple[float, Record]] = [
        (0, CalibrationRecord(**place, before={}, scaled={}, after={}, seconds=1)),
        (29, step),
        (30, dataclasses.replace(step, global_step=1, seconds=1.5)),
        (90, StageEndRecord(**place)),
        (91, dataclasses.replace(sft, global_step=2)),
        (92, dataclasses.replace(sft, global_step=3)),
        (121, dataclasses.replace(sft, global_step=4)),
    ]
    for seconds, record in records:
        clock.now = 100.0 + seconds
        watch(record)
    assert shown.getvalue().splitlines() == [
        "stage 1/2 layerwise",
        "step 2/2,000, stage 1/2 layerwise, loss 0.5, 2,048 tokens/s",
        "step 3/2,000, stage 2/2 sft, 4,096 tokens/s",
        "step 5/2,000, stage 2/2 sft, 4,096 tokens/s",
    ]


def test_the_stochastic_loss_falls_on_one_placement() -> None:
    model = supernet(layers=3)
    stage = StochasticStage(steps=25, sampling=only("gdn,attention,kda"), learning_rate=1e-2)
    records = []
    distil(model, TokenSequences(tokens(4, 20)), settings(stage), records.append)
    losses = [record.loss for record in records if isinstance(record, StepRecord)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_recomputing_changes_no_bit(autocast: str) -> None:
    trained = []
    for recompute in (False, True):
        model = supernet(layers=3)
        train(model, StochasticStage(steps=3, losses=ALL_LOSSES, recompute=recompute), autocast=autocast)
        trained.append(model.state_dict())
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_activations_alone_can_be_learnt_from() -> None:
    stage = StochasticStage(steps=2, sampling=only("kda"), losses=LossWeights(forward_kl=0, activation=1))
    records = train(supernet(layers=2), stage)
    assert [records[0].terms.keys(), records[0].loss] == [{"activation"}, records[0].terms["activation"]]


def test_the_stages_gradient_is_that_of_the_plain_loss() -> None:
    """The shortcuts (the teacher's hidden states up to the first difference, chunks of the head) change nothing."""
    model, batch = supernet(layers=3), tokens(2, 20)
    placement = Placement(["attention", "gdn", "attention"])
    distiller = Distiller(model, sequences(), settings(StochasticStage(steps=1, sampling=only(str(placement)))))
    with distiller._learning():
        distiller._stage_run(0).learn(Batch(batch), 0, 1.0)
        wanted = model.model.blocks[1].mixer_named("gdn").q_proj.weight
        ours = wanted.grad.clone()
    wanted.grad = None
    teacher = model(batch).logits.detach().log_softmax(-1).flatten(0, 1)
    student = model(batch, placement=placement).logits.log_softmax(-1).flatten(0, 1)
    torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="batchmean").backward()
    torch.testing.assert_close(ours, wanted.grad, rtol=1e-4, atol=1e-6)


def snapshot(distiller: Distiller) -> dict[str, list[torch.Tensor]]:
    """Each parameter with its optimiser state."""
    state = distiller.optimiser.state
    return {
        name: [parameter.detach().clone(), *(value.clone() for value in state.get(parameter, {}).values())]
        for name, parameter in distiller.model.named_parameters()
    }


def test_mixers_that_were_not_sampled_are_left_alone() -> None:
    model = supernet(layers=3)
    stage = StochasticStage(steps=12, sampling=UniformSampling(), losses=ALL_LOSSES)
    optimiser = OptimiserSettings(weight_decay=0.1)
    distiller = Distiller(model, sequences(), settings(stage, optimiser=optimiser))
    steps = distiller.run()
    before, touched = None, 0
    for record in steps:
        if not isinstance(record, StepRecord):
            break
        after = snapshot(distiller)
        if before is not None:
            for name, tensors in after.items():
                path = name.split(".")  # model.layers.LAYER.mixer.mixers.MIXER.parameter
                mixer = path[5] if "mixers" in path else "attention"
                sampled = mixer != "attention" and record.placement[int(path[2])] == mixer
                same = len(tensors) == len(before[name]) and all(map(torch.equal, tensors, before[name]))
                assert same is not sampled, (record.step, name)
                touched += sampled
        before = after
    assert touched > 50


def test_all_main_has_nothing_to_learn() -> None:
    model = supernet(layers=2)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    last = SandwichSampling(cheapest="attention", random=2, between=only("attention"), largest="gdn")
    records = train(model, StochasticStage(steps=2, sampling=last, losses=LossWeights(cross_entropy=1)))
    assert [record.loss for record in records[:2]] == [None, None]
    assert records[0].placement == model.spec.main
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("stage", [StochasticStage, SftStage])
@pytest.mark.parametrize(
    "sampling",
    [
        only("attention"),
        WeightedSampling(weights={"attention": 1, "gdn": 0}),
        SandwichSampling(cheapest="main", between=only("window"), largest="attention"),
    ],
    ids=lambda sampling: sampling.type,
)
def test_a_stage_in_which_nothing_ever_learns_is_refused(stage, sampling) -> None:
    model = supernet(layers=2)
    model.config.presets = {"main": "attention*2"}
    kinds = {"chats": sequences()} if stage is SftStage else {}
    refused = settings(stage(steps=1, sampling=sampling), freeze=("*.window.*",))
    with pytest.raises(ValueError, match=f"the {refused.stages[0].type} stage has nothing to do: under none"):
        Distiller(model, sequences(), refused, **kinds)
    learning = {"learning_rate_scales": {"*": 1.0}, "freeze": ()}
    assert Distiller(model, sequences(), refused.model_copy(update=learning), supernet(layers=2), **kinds)
    measured = settings(stage(steps=0, sampling=sampling), freeze=("*.window.*",))
    assert Distiller(model, sequences(), measured, **kinds)


@pytest.mark.parametrize(
    "stage",
    [LayerwiseStage(steps=2, calibration="none"), StochasticStage(steps=2, losses=ALL_LOSSES, sampling=only("gdn*3"))],
    ids=lambda stage: stage.type,
)
def test_accumulated_gradients_are_those_of_the_whole_batch(stage) -> None:
    gradients, losses = [], []
    for parts in (1, 2, 4):
        model = supernet(layers=3)
        distiller = Distiller(model, sequences(), settings(stage, gradient_accumulation=parts))
        with distiller._learning():
            run = distiller._stage_run(0)
            terms = [run.learn(part, 0, 1 / parts) for part in distiller._batch(0, 0, 4).split(4 // parts)]
            gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        losses.append({key: sum(term[key] for term in terms) / parts for key in terms[0]})
    assert gradients[0]
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in other.items():
            wrong = (gradient - gradients[0][name]).norm()
            assert wrong <= 1e-4 * gradients[0][name].norm() + 1e-7, name
    for other in losses[1:]:
        for key, value in other.items():
            torch.testing.assert_close(value, losses[0][key], rtol=1e-4, atol=1e-6)


def shared_model() -> GearshiftForCausalLM:
    mixers = {"attention": ATTENTION, "window": {**ATTENTION, "window": 4}}
    mlp = {"type": "gated", "intermediate_size": 40}
    choice = {
        "mixer": {"type": "stochastic", "main": "attention", "mixers": mixers},
        "mlp": mlp,
        "shared_weights": True,
    }
    blocks = {"choice": choice, "plain": {"mixer": ATTENTION, "mlp": mlp}}
    decoder = {"num_layers": 5, "pattern": ["choice", "plain"], "blocks": blocks}
    torch.manual_seed(0)
    spec = ModelSpec.model_validate({"vocab_size": 61, "hidden_size": 24, "max_positions": 64, "decoder": decoder})
    return GearshiftForCausalLM(GearshiftConfig(spec))


def test_every_layer_of_a_shared_block_contributes() -> None:
    model = shared_model()
    records = train(model, LayerwiseStage(steps=2), StochasticStage(steps=3))
    step = next(record for record in records if isinstance(record, StepRecord))
    assert [error is not None for error in step.layers["window"]] == [True, False, True, False, True]
    calibration = records[0]
    assert calibration.after["window"][0] == calibration.after["window"][4]
    last = [record for record in records if isinstance(record, StepRecord)][-1]
    assert all(last.placement[layer] == "attention" for layer in (1, 3))


def test_a_separate_teacher_lets_everything_learn() -> None:
    model, teacher = supernet(layers=2), supernet(layers=2, seed=1)
    scales = {"*": 1.0}
    stages = LayerwiseStage(steps=2), StochasticStage(steps=3, sampling=only("attention"), losses=ALL_LOSSES)
    with pytest.raises(ValueError, match="name a separate reference model as teacher"):
        train(supernet(layers=2), *stages, learning_rate_scales=scales)
    before = {name: p.clone() for name, p in (*model.named_parameters(), *teacher.named_parameters(prefix="teacher"))}
    records: list[Record] = []
    distil(model, sequences(), settings(*stages, learning_rate_scales=scales), records.append, teacher=teacher)
    assert {"attention", "window", "gdn", "kda"} == records[1].layers.keys()
    assert not torch.equal(model.model.embed_tokens.weight, before["model.embed_tokens.weight"])
    assert all(torch.equal(p, before[f"teacher.{name}"]) for name, p in teacher.named_parameters())
    with pytest.raises(ValueError, match="a teacher of 3 layers of 24 channels cannot teach a model of 2 layers"):
        Distiller(model, sequences(), settings(*stages), teacher=supernet(layers=3))


def test_bfloat16_products_learn_too() -> None:
    model = supernet(layers=2)
    before = model(tokens(1, 12)).logits
    records = train(model, LayerwiseStage(steps=2), StochasticStage(steps=2, losses=ALL_LOSSES), autocast="bfloat16")
    assert all(record.loss is None or record.loss > 0 for record in records if isinstance(record, StepRecord))
    assert torch.equal(model(tokens(1, 12)).logits, before)


def test_a_stage_checks_its_settings_before_anything_runs() -> None:
    model = supernet(layers=2)
    with pytest.raises(ValueError, match="'gnd' is no preset and no mixer"):
        Distiller(model, sequences(), settings(LayerwiseStage(steps=1), StochasticStage(steps=1, sampling=only("gnd"))))
    with pytest.raises(ValueError, match="nothing can learn"):
        Distiller(model, sequences(), settings(LayerwiseStage(steps=1), freeze=("*",)))


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    model = supernet(layers=2)
    with torch.no_grad():
        model.model.blocks[1].mixer_named("kda").q_proj.weight.fill_(float("nan"))
    with pytest.raises(TrainingDivergedError, match="became nan at step 0 of stage 0"):
        train(model, StochasticStage(steps=1, sampling=only("kda")))


def test_stages_go_on_through_the_text_in_one_order() -> None:
    model = supernet(layers=2)
    stages = LayerwiseStage(steps=3, batch_size=2), StochasticStage(steps=2, batch_size=5)
    distiller = Distiller(model, sequences(16), settings(*stages))
    batches = [distiller._batch(0, step, 2) for step in range(3)] + [distiller._batch(1, step, 5) for step in (0, 1)]
    drawn = torch.cat([batch.tokens for batch in batches])
    assert torch.equal(drawn, sequences(16).draw(range(16)).tokens)


def test_a_stage_that_joins_its_gradients_leaves_none_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with CUDA graphs: what the next stage does not sample must not move or gain moments because of them."""
    stages = (LayerwiseStage(steps=3), StochasticStage(steps=1, sampling=only("gdn,kda,window,attention")))
    ends = []
    for joins in (False, True):
        monkeypatch.setattr(LayerwiseRun, "joins_gradients", property(lambda run, joined=joins: joined))
        distiller = Distiller(supernet(), sequences(), settings(*stages))
        for record in distiller.run():
            if isinstance(record, StepRecord) and record.stage == 1:
                ends.append((snapshot(distiller), len(distiller.optimiser.state)))
    assert ends[0][1] == ends[1][1]
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("stage", "recompute"),
    [(LayerwiseStage(steps=1, calibration="none"), False), (StochasticStage(steps=1, sampling=only("kda,kda")), True)],
    ids=["layerwise", "stochastic"],
)
def test_kernels_compute_again_where_all_layers_wait_for_their_backward_pass(stage, recompute: bool) -> None:
    model, seen = supernet(layers=2), []
    mixer = model.model.blocks[1].mixer_named("kda")
    mixer.register_forward_hook(lambda module, given, output: seen.append(given[1].recompute))
    train(model, stage)
    assert seen == [recompute]


def test_a_separate_teacher_drops_nothing() -> None:
    """However it comes: a model that was just made is in training mode."""
    dropping = {"attention": {**ATTENTION, "dropout": 0.5}}
    taught = []
    for seed in (0, 1):
        teacher = supernet(mixers=dropping, layers=2).train()
        torch.manual_seed(seed)
        model = supernet(layers=2)
        taught.append(train(model, StochasticStage(steps=1), teacher=teacher)[0].loss)
        assert teacher.training
    assert taught[0] == taught[1]


@pytest.mark.parametrize("method", ["scale", "ridge"])
def test_a_calibration_on_lost_numbers_says_so(method: str) -> None:
    model = supernet(layers=2)
    with torch.no_grad():
        model.model.blocks[1].mixer_named("gdn").q_proj.weight[0, 0] = float("nan")
    stage = LayerwiseStage(steps=1, calibration=method, calibration_sequences=1, gradient_accumulation=2)
    with pytest.raises(TrainingDivergedError, match=r"calibration found numbers that are not finite .*gdn\.q_proj"):
        train(model, stage)
