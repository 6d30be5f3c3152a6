"""The sft stage: only what the assistant says counts, and it counts as transformers would have it."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer
from transformers.loss.loss_utils import ForCausalLMLoss

from gearshift import GearshiftForCausalLM
from gearshift.data import Batch, TokenSequences
from gearshift.report.history import read_history
from gearshift.report.run_page import render_run
from gearshift.settings import load_settings
from gearshift.train import (
    ChatLossWeights,
    DistillationSettings,
    Distiller,
    LayerwiseStage,
    PresetSampling,
    Recipe,
    SftStage,
    StageEndRecord,
    StepRecord,
    StochasticStage,
    UniformSampling,
    distil,
    train,
)
from gearshift.train.stochastic import StochasticRun
from tests.models import supernet, tokens
from tests.train.test_run import Interrupt, timeless

PLACEMENT = "gdn,window,kda"
ALL = ChatLossWeights(cross_entropy=1, forward_kl=0.5, reverse_kl=0.25)
COUNTED = [range(5, 9), range(2, 4), range(12, 20), range(7, 8)]
"""Of four rows of 20 tokens."""


def chats(packed: bool = False) -> TokenSequences:
    counted, starts = torch.zeros(2, 4, 20, dtype=torch.bool)
    for row, said in enumerate(COUNTED):
        counted[row, list(said)] = True
    starts[:, 0] = starts[2, 11] = True
    return TokenSequences(tokens(4, 20), starts if packed else None, counted)


def only(placement: str) -> PresetSampling:
    return PresetSampling(probabilities={placement: 1.0})


def sft(steps: int = 1, **more) -> SftStage:
    return SftStage(steps=steps, **{"sampling": only(PLACEMENT)} | more)


def distiller(model: GearshiftForCausalLM, stage: SftStage, teacher=None, **more) -> Distiller:
    settings = DistillationSettings(stages=(stage,), **{"batch_size": 4} | more)
    return Distiller(model, None, settings, teacher, chats=chats())


def gradients(model: GearshiftForCausalLM) -> dict[str, torch.Tensor]:
    made = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return made


def judged(batch: Batch, stage: SftStage, teacher=None) -> tuple[dict, dict[str, torch.Tensor]]:
    """The terms and the gradients of all parameters."""
    model = supernet(layers=3)
    terms = distiller(model, stage, teacher)._stage_run(0).learn(batch, 0, 1.0)
    return terms, gradients(model)


def close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_the_loss_is_that_of_transformers_with_ignored_labels() -> None:
    batch = chats().all
    terms, ours = judged(batch, sft())
    model = supernet(layers=3)
    labels = batch.tokens.masked_fill(~batch.counted, -100)
    loss = ForCausalLMLoss(model(batch.tokens, placement=PLACEMENT).logits, labels, 61)
    loss.backward()
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert terms.keys() == {"loss", "cross_entropy"}
    close(ours, gradients(model))


@pytest.mark.parametrize("chunk", [3, 256])
def test_divergences_count_at_the_same_positions(chunk: int) -> None:
    batch, model, teacher = chats().all, supernet(layers=3), supernet(seed=1, layers=3)
    terms, ours = judged(batch, sft(losses=ALL, temperature=2.0), teacher)
    with torch.no_grad():
        theirs = (teacher(batch.tokens).logits / 2).log_softmax(-1)
    logits = model(batch.tokens, placement=PLACEMENT).logits
    student = (logits / 2).log_softmax(-1)
    before = [(row, place - 1) for row, said in enumerate(COUNTED) for place in said]
    student, theirs = (torch.stack([x[at] for at in before]) for x in (student, theirs))
    wanted = {
        "forward_kl": 4 * F.kl_div(student, theirs, log_target=True, reduction="batchmean"),
        "reverse_kl": 4 * F.kl_div(theirs, student, log_target=True, reduction="batchmean"),
        "cross_entropy": ForCausalLMLoss(logits, batch.tokens.masked_fill(~batch.counted, -100), 61),
    }
    sum(value * getattr(ALL, name) for name, value in wanted.items()).backward()
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value.item(), rel=1e-4)
    close(ours, gradients(model))


def test_what_the_user_says_last_teaches_nothing() -> None:
    batch = chats().all
    other = batch.tokens.clone()
    for row, said in enumerate(COUNTED):
        other[row, said.stop :] = tokens(1, 20, seed=9)[0, said.stop :]
    before, after = judged(batch, sft(losses=ALL)), judged(Batch(other, None, batch.counted), sft(losses=ALL))
    assert before[0]["loss"].item() == pytest.approx(after[0]["loss"].item(), rel=1e-6)
    close(before[1], after[1])
    other[0, COUNTED[0].stop - 1] += 1
    changed, _ = judged(Batch(other, None, batch.counted), sft(losses=ALL))
    assert changed["loss"].item() != pytest.approx(before[0]["loss"].item(), rel=1e-4)


def test_packed_chats_are_chats_apart() -> None:
    batch = chats(packed=True).all
    whole, together = judged(batch, sft(losses=ALL), supernet(seed=1, layers=3))
    apart = {row: Batch(batch.tokens[row : row + 1], None, batch.counted[row : row + 1]) for row in (0, 1, 3)}
    apart[2] = Batch(batch.tokens[2:3, 11:], None, batch.counted[2:3, 11:])
    loss, summed = 0.0, {name: torch.zeros_like(gradient) for name, gradient in together.items()}
    for part in apart.values():
        terms, made = judged(part, sft(losses=ALL), supernet(seed=1, layers=3))
        share = part.weight / batch.weight
        loss += share * terms["loss"].item()
        for name, gradient in made.items():
            summed[name] += share * gradient
    assert whole["loss"].item() == pytest.approx(loss, rel=1e-4)
    close(together, summed)


@pytest.mark.parametrize("losses", [ChatLossWeights(), ALL], ids=["cross-entropy", "all"])
def test_parts_weigh_what_they_count(losses: ChatLossWeights) -> None:
    """The rows hold 4, 2, 8 and 1 tokens of the assistant, and a fifth and sixth none at all."""
    given = chats()
    silent = TokenSequences(torch.cat([given.tokens, tokens(2, 20, seed=3)]), None, F.pad(given.counted, (0, 0, 0, 2)))
    records, weights = [], []
    for parts in (1, 2, 6):
        model, made = supernet(layers=3), []
        settings = DistillationSettings(
            stages=(sft(2, losses=losses),), batch_size=6, gradient_accumulation=parts, optimiser={"epsilon": 1e-3}
        )
        distil(model, None, settings, made.append, chats=silent)
        records.append(made)
        weights.append(model.state_dict())
    for made, state in zip(records[1:], weights[1:], strict=True):
        for ours, theirs in zip(records[0][:2], made[:2], strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-4)
            assert ours.gradient_norm == pytest.approx(theirs.gradient_norm, rel=1e-3)
        for name, value in weights[0].items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-5)


def test_a_step_with_nothing_to_learn_moves_nothing() -> None:
    model, records = supernet(layers=3), []
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = TokenSequences(tokens(4, 20), None, torch.zeros(4, 20, dtype=torch.bool))
    settings = DistillationSettings(stages=(sft(2),), batch_size=4, optimiser={"weight_decay": 0.1})
    distil(model, None, settings, records.append, chats=given)
    assert [record.loss for record in records[:2]] == [None, None]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_presets_are_sampled_with_their_probabilities() -> None:
    model = supernet(layers=3)
    model.config.presets = {"fast": PLACEMENT}
    sampling = PresetSampling(probabilities={"window": 0.5, "fast": 0.3}, otherwise=UniformSampling())
    run = distiller(model, sft(sampling=sampling))._stage_run(0)
    counts = Counter(str(run.placement(step)) for step in range(2000))
    assert counts.pop("window*3") / 2000 == pytest.approx(0.5, abs=0.04)
    assert counts.pop(PLACEMENT) / 2000 == pytest.approx(0.3, abs=0.04)
    assert len(counts) > 40
    assert run.describe_step(7) == {"placement": run.placement(7)}


def test_learning_lowers_the_loss_and_leaves_the_main_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    """With cross-entropy alone no teacher runs."""
    monkeypatch.setattr(StochasticRun, "_taught", lambda self, batch: pytest.fail("the teacher ran"))
    model, records = supernet(layers=3), []
    before = model(tokens(2, 30)).logits
    settings = DistillationSettings(stages=(sft(12, learning_rate=1e-2),), batch_size=4)
    distil(model, None, settings, records.append, chats=chats(), held_out_chats=chats())
    steps = [record for record in records if isinstance(record, StepRecord)]
    assert steps[-1].loss < 0.8 * steps[0].loss
    assert {record.type for record in steps} == {"sft"}
    assert torch.equal(model(tokens(2, 30)).logits, before)


def test_held_out_chats_are_judged_by_cross_entropy() -> None:
    model, records = supernet(layers=3), []
    model.config.presets = {"fast": PLACEMENT}
    settings = DistillationSettings(stages=(sft(0, sampling=only("fast")),), batch_size=4, gradient_accumulation=4)
    distil(model, None, settings, records.append, chats=chats(), held_out_chats=chats())
    (end,) = records
    assert isinstance(end, StageEndRecord)
    batch = chats().all
    labels = batch.tokens.masked_fill(~batch.counted, -100)
    assert end.held_out.keys() == {"cross_entropy"}
    assert end.held_out["cross_entropy"].keys() == {"attention", "window", "gdn", "kda", "fast"}
    for name, value in end.held_out["cross_entropy"].items():
        loss = ForCausalLMLoss(model(batch.tokens, placement=name).logits, labels, 61)
        assert value == pytest.approx(loss.item(), rel=1e-4)


def test_without_a_teacher_everything_may_learn() -> None:
    everything = {"learning_rate_scales": {"*": 1.0}}
    model = supernet(layers=3)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    made = distiller(model, sft(2, sampling=only("attention")), **everything)
    steps = [record for record in made.run() if isinstance(record, StepRecord)]
    assert all(record.loss is not None for record in steps)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} & changed
    assert not any(f".{mixer}." in name for name in changed for mixer in ("gdn", "kda", "window"))
    with pytest.raises(ValueError, match="learn in sft stages by cross_entropy alone"):
        distiller(supernet(layers=3), sft(losses=ALL), **everything)
    assert distiller(supernet(layers=3), sft(losses=ALL), supernet(seed=1, layers=3), **everything).scales
    stages = sft(), LayerwiseStage(steps=1)
    settings = DistillationSettings(stages=stages, **everything)
    with pytest.raises(ValueError, match="name a separate reference model as teacher"):
        Distiller(supernet(layers=3), chats(), settings, chats=chats())


def test_memory_may_be_saved_by_computing_layers_again() -> None:
    results = [judged(chats().all, sft(losses=ALL, recompute=recompute)) for recompute in (False, True)]
    assert results[0][0]["loss"].item() == pytest.approx(results[1][0]["loss"].item(), rel=1e-6)
    close(results[0][1], results[1][1])


def test_stages_of_text_and_of_chats_go_through_each_in_an_order_of_its_own() -> None:
    model, text = supernet(layers=2), TokenSequences(tokens(16, 20, seed=4))
    marked = TokenSequences(tokens(16, 20, seed=5), None, torch.ones(16, 20, dtype=torch.bool))
    any_mixer = {"sampling": UniformSampling()}
    stages = LayerwiseStage(steps=2), sft(2, **any_mixer), StochasticStage(steps=2), sft(2, **any_mixer)
    made = Distiller(model, text, DistillationSettings(stages=stages, batch_size=4), chats=marked)
    for first, second, given in ((0, 2, text), (1, 3, marked)):
        batches = [made._batch(stage, step, 4) for stage in (first, second) for step in (0, 1)]
        assert torch.equal(torch.cat([batch.tokens for batch in batches]), given.draw(range(16)).tokens)
        assert all((batch.counted is not None) == (given is marked) for batch in batches)


def test_a_stage_without_its_data_is_refused() -> None:
    settings = DistillationSettings(stages=(LayerwiseStage(steps=1), sft(sampling=UniformSampling())))
    with pytest.raises(ValueError, match="stage 1 is sft and learns from chats, but got none"):
        distil(supernet(layers=2), chats(), settings)
    with pytest.raises(ValueError, match="stage 0 is layerwise and learns from text, but got none"):
        distil(supernet(layers=2), None, settings, chats=chats())


TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role[0] | upper + '>' + m.content + '#' }}{% endfor %}"
    "{% if add_generation_prompt %}<A>{% endif %}"
)


@pytest.fixture(scope="module")
def source(source: Path) -> Path:
    """The folder of other runs, whose tokenizer has no chat template, with chats and a template beside the text."""
    (source / "template.jinja").write_text(TEMPLATE)
    rows = [
        [{"role": "user", "content": f"ADD {n} TO {n}"}, {"role": "assistant", "content": f"THAT IS {2 * n}."}]
        for n in range(40)
    ]
    (source / "chats.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return source


def recipe(source: Path, output: Path, **more) -> Recipe:
    sampling = {"type": "presets", "probabilities": {"gdn": 0.5, "kda,window": 0.3}, "otherwise": {"type": "uniform"}}
    given = {
        "model": str(source / "model"),
        "output": str(output),
        "text": str(source / "text.txt"),
        "chats": [{"path": str(source / "chats.jsonl")}],
        "chat_template": str(source / "template.jinja"),
        "data_cache": str(output.parent / "cache"),
        "sequence_length": 64,
        "documents": "packed",
        "held_out": 2,
        "batch_size": 4,
        "gradient_accumulation": 2,
        "checkpoint_every": 2,
        "device": "cpu",
        "stages": [
            {"type": "stochastic", "steps": 2},
            {"type": "sft", "steps": 5, "sampling": sampling, "losses": {"forward_kl": 0.5}},
        ],
    }
    return Recipe.model_validate(given | more)


def test_a_run_with_chats_is_resumed_exactly(source: Path, tmp_path: Path) -> None:
    train(recipe(source, tmp_path / "unbroken"))
    record = timeless(tmp_path / "unbroken")
    assert [said["type"] for said in record if said["event"] == "step"] == ["stochastic"] * 2 + ["sft"] * 5
    assert record[-1]["held_out"].keys() == {"cross_entropy"}
    assert next(said for said in record if said["type"] == "sft")["terms"].keys() == {"cross_entropy", "forward_kl"}
    assert "sft: cross-entropy, nats a token" in render_run(read_history(tmp_path / "unbroken"))
    assert AutoTokenizer.from_pretrained(tmp_path / "unbroken" / "model").chat_template == TEMPLATE
    for at in (1, 4):
        broken = recipe(source, tmp_path / f"broken-{at}")
        with pytest.raises(KeyboardInterrupt):
            train(broken, callbacks=[Interrupt(at)])
        assert train(broken).resumed_at == {1: None, 4: 4}[at]
        assert timeless(tmp_path / f"broken-{at}") == record
        written = [tmp_path / name / "model" / "model.safetensors" for name in ("unbroken", f"broken-{at}")]
        assert written[0].read_bytes() == written[1].read_bytes()


def test_other_chats_or_another_template_are_refused(source: Path, tmp_path: Path) -> None:
    template, given = tmp_path / "template.jinja", source / "template.jinja"
    template.write_text(given.read_text())
    run = recipe(source, tmp_path / "run", chat_template=str(template))
    with pytest.raises(KeyboardInterrupt):
        train(run, callbacks=[Interrupt(3)])
    template.write_text(TEMPLATE.replace("#", "$"))
    with pytest.raises(ValueError, match="the text has changed since the run in"):
        train(run)


def test_a_run_of_sft_alone_reads_no_text(source: Path, tmp_path: Path) -> None:
    stages = [{"type": "sft", "steps": 1}]
    train(recipe(source, tmp_path / "run", stages=stages, text="/nowhere.txt", held_out=0))
    assert len(list((tmp_path / "cache").glob("*/tokens.bin"))) == 1


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"chat_template": None}, "has no chat template: give a template file as chat_template in the recipe"),
        ({"chat_template": "/nowhere.jinja"}, "no text at /nowhere.jinja"),
        ({"chats": [{"path": "{text}"}]}, "no chats in .*text.txt"),
        ({"chats": [{"path": "{chats}", "field": "turns"}]}, "line 1: there is no column 'turns'; there is messages"),
    ],
)
def test_what_cannot_run_is_refused(source: Path, tmp_path: Path, changes: dict, sentence: str) -> None:
    places = {"{text}": str(source / "text.txt"), "{chats}": str(source / "chats.jsonl")}
    if changes.get("chats"):
        changes = {"chats": [{key: places.get(value, value) for key, value in one.items()} for one in changes["chats"]]}
    with pytest.raises(ValueError, match=sentence):
        train(recipe(source, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"stages": "[{type: sft, steps: 1}]"}, "an sft stage learns from chats: name their sources in chats"),
        ({"chats": "[{path: a}]", "stages": "[{type: stochastic, steps: 1}]"}, "there is none: leave chats out"),
        (
            {"chats": "[{path: a}]", "stages": "[{type: sft, steps: 1, losses: {activation: 1}}]"},
            "unknown key .*activa",
        ),
        ({"stages": "[{type: sft, steps: 1, losses: {cross_entropy: 0}}]"}, "at least one of them must be positive"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load_settings(Recipe, None, ["model=m", "output=o", *(f"{key}={value}" for key, value in changes.items())])


def test_by_default_cross_entropy_alone_counts() -> None:
    assert SftStage(steps=1).losses.model_dump() == {"cross_entropy": 1, "forward_kl": 0, "reverse_kl": 0}
    assert not SftStage(steps=1).needs_teacher
    assert SftStage(steps=1, losses={"forward_kl": 0.3}).needs_teacher
