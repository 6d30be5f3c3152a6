"""The judge's numbers against the definitions on whole logits, and what it promises about reuse."""

import math

import pytest
import torch
from tests.models import supernet, tokens

from gearshift.data import TokenSequences
from gearshift.evaluate import Judge, JudgeSettings, Score
from gearshift.search import single_changes
from gearshift.spec import Placement

MIXED = Placement.parse("window,gdn,attention,kda")


@pytest.fixture(scope="module")
def model():
    return supernet()


@pytest.fixture(scope="module")
def sequences() -> TokenSequences:
    return TokenSequences(tokens(5, 19))


@torch.no_grad()
def by_definition(model, sequences, placement, skip=0, stride=1, teacher=None) -> Score:
    """The same numbers from the definitions, in float64."""
    ids = sequences.tokens
    teacher_logits = (teacher or model)(ids, placement=(teacher or model).spec.main).logits
    judged = slice(skip, ids.shape[1] - 1, stride)
    said = teacher_logits[:, judged].double().log_softmax(-1)
    got = model(ids, placement=placement).logits[:, judged].double().log_softmax(-1)
    labels = ids[:, 1:][:, judged]
    return Score(
        placement,
        float((said.exp() * (said - got)).sum(-1).mean()),
        math.exp(float(-got.gather(-1, labels[..., None]).mean())),
        float((said.argmax(-1) == got.argmax(-1)).double().mean()),
    )


@pytest.mark.parametrize("settings", [{}, {"skip": 7}, {"stride": 3}, {"skip": 4, "stride": 5, "batch": 5}], ids=str)
def test_numbers_agree_with_the_definitions(model, sequences, settings) -> None:
    judge = Judge(model, sequences, JudgeSettings(chunk=16, **settings))
    settings.pop("batch", None)
    for score in judge.score([MIXED, Placement(["kda"] * 4), model.spec.main]):
        expected = by_definition(model, sequences, score.placement, **settings)
        assert score.divergence == pytest.approx(expected.divergence, rel=1e-4, abs=1e-6)
        assert score.perplexity == pytest.approx(expected.perplexity, rel=1e-4)
        assert score.agreement == pytest.approx(expected.agreement)


def test_the_teacher_diverges_from_itself_by_exactly_zero(model, sequences) -> None:
    judge = Judge(model, sequences)
    for _ in range(2):
        score = judge.score([MIXED, model.spec.main])[1]
        assert (score.divergence, score.agreement) == (0.0, 1.0)


def test_company_changes_no_bit(model, sequences) -> None:
    placements = [MIXED, *single_changes(model.spec), model.spec.main]
    together = Judge(model, sequences).score(placements)
    alone = [Judge(model, sequences).score([placement])[0] for placement in placements]
    assert together == alone
    forgetful = Judge(model, sequences, JudgeSettings(teacher_bytes=0))
    assert forgetful.score(placements) == together
    assert forgetful.score(reversed(placements)) == together[::-1]


def test_layer_evaluations_are_those_that_happen(model, sequences) -> None:
    runs: list[int] = []
    hooks = [block.register_forward_hook(lambda *_: runs.append(1)) for block in model.model.blocks]
    judge = Judge(model, sequences, JudgeSettings(batch=2))
    placements = single_changes(model.spec)
    progress: list[float] = []
    planned = judge.planned(placements)
    judge.score([*placements, *placements], progress.append)
    for hook in hooks:
        hook.remove()
    batches, layers, mixers = 3, 4, 4
    evaluated = layers + (mixers - 1) * layers * (layers + 1) // 2
    assert len(runs) == batches * evaluated
    assert judge.layer_evaluations == evaluated == planned == pytest.approx(sum(progress))
    assert judge.layer_evaluations_saved == layers * (1 + (mixers - 1) * layers) - evaluated
    # The teacher is known now, and not run again.
    judge.score([placements[-1]])
    assert judge.layer_evaluations == evaluated + layers


def test_another_model_can_be_the_teacher(model, sequences) -> None:
    teacher = supernet(seed=1, layers=2)
    judge = Judge(model, sequences, teacher=teacher)
    score = judge.score([MIXED])[0]
    assert score.divergence == pytest.approx(
        by_definition(model, sequences, MIXED, teacher=teacher).divergence, rel=1e-4
    )
    assert judge.layer_evaluations == 4
    assert judge.score([model.spec.main])[0].divergence > 0


def test_an_interrupted_first_call_does_no_harm(model, sequences) -> None:
    def interrupt(amount: float) -> None:
        raise KeyboardInterrupt

    judge = Judge(model, sequences)
    with pytest.raises(KeyboardInterrupt):
        judge.score([MIXED], interrupt)
    assert judge.score([MIXED]) == Judge(model, sequences).score([MIXED])


def test_the_mode_is_put_back_and_gradients_still_flow(model, sequences) -> None:
    model.train()
    Judge(model, sequences).score([MIXED])
    assert model.training
    model(sequences.tokens, placement=MIXED).logits.sum().backward()
    model.zero_grad()
    model.eval()


def test_broken_weights_are_told_not_raised(sequences) -> None:
    broken = supernet(seed=2)
    with torch.no_grad():
        broken.model.blocks[1].mixer_named("gdn").o_proj.weight.fill_(math.nan)
    fine, bad = Judge(broken, sequences).score([MIXED.replace(1, "kda"), MIXED])
    assert math.isfinite(fine.divergence)
    assert math.isnan(bad.divergence)


def test_nothing_to_judge(model, sequences) -> None:
    assert Judge(model, sequences).score([]) == []
    with pytest.raises(ValueError, match="no position is left to judge: 5 sequences of 19 tokens, the first 18"):
        Judge(model, sequences, JudgeSettings(skip=18))
    with pytest.raises(ValueError, match="the teacher has a vocabulary of 31"):
        Judge(model, sequences, teacher=supernet(vocab_size=31))
