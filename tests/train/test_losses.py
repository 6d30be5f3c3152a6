import pytest
import torch
import torch.nn.functional as F

from gearshift.train.losses import IGNORED, activation_error, head_losses, next_tokens

BATCH, TOKENS, HIDDEN, TEACHER, VOCABULARY = 2, 9, 6, 5, 17


def operands(dtype: torch.dtype = torch.float64, trainable_head: bool = True) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "student": draw(BATCH, TOKENS, HIDDEN).requires_grad_(),
        "teacher": draw(BATCH, TOKENS, TEACHER),
        "labels": next_tokens(torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)),
        "student_head": draw(VOCABULARY, HIDDEN).requires_grad_(trainable_head),
        "teacher_head": draw(VOCABULARY, TEACHER),
    }


def naive(student, teacher, labels, student_head, teacher_head, weights, temperature) -> dict[str, torch.Tensor]:
    logits, against = F.linear(student, student_head), F.linear(teacher, teacher_head)
    ours = (logits / temperature).log_softmax(-1).flatten(0, 1)
    theirs = (against / temperature).log_softmax(-1).flatten(0, 1)
    terms = {
        "forward_kl": temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean"),
        "reverse_kl": temperature**2 * F.kl_div(theirs, ours, log_target=True, reduction="batchmean"),
        "cross_entropy": F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED),
    }
    return {name: terms[name] for name in weights if weights[name]}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 256])
@pytest.mark.parametrize(
    "weights",
    [
        {"forward_kl": 1.0},
        {"reverse_kl": 2.0},
        {"cross_entropy": 0.5},
        {"forward_kl": 0.3, "reverse_kl": 0.7, "cross_entropy": 0.2, "activation": 1.0},
    ],
    ids=lambda weights: "+".join(weights),
)
def test_chunks_give_the_plain_losses_and_gradients(weights, chunk, temperature) -> None:
    given = operands(torch.float32)
    loss, terms = head_losses(**given, weights=weights, temperature=temperature, chunk=chunk)
    (3 * loss).backward()
    exact = operands()
    expected = naive(**exact, weights={k: v for k, v in weights.items() if k != "activation"}, temperature=temperature)
    total = sum(weights[name] * value for name, value in expected.items())
    (3 * total).backward()
    torch.testing.assert_close(loss.double(), total, rtol=1e-5, atol=1e-6)
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name].double(), value, rtol=1e-5, atol=1e-6)
    for name in ("student", "student_head"):
        torch.testing.assert_close(given[name].grad.double(), exact[name].grad, rtol=1e-4, atol=1e-6)


def test_a_frozen_head_gets_no_gradient_and_nothing_needs_one_in_measuring() -> None:
    given = operands(torch.float32, trainable_head=False)
    loss, _ = head_losses(**given, weights={"forward_kl": 1.0})
    loss.backward()
    assert given["student_head"].grad is None
    assert given["student"].grad.abs().sum() > 0
    with torch.no_grad():
        again, _ = head_losses(**given, weights={"forward_kl": 1.0})
    assert torch.equal(loss, again)


def test_equal_distributions_diverge_by_nothing() -> None:
    given = operands(torch.float32)
    given |= {"teacher": given["student"].detach(), "teacher_head": given["student_head"].detach()}
    loss, _ = head_losses(**given, weights={"forward_kl": 1.0, "reverse_kl": 1.0})
    loss.backward()
    assert loss == 0
    assert given["student"].grad.abs().max() == 0


def test_without_weights_there_is_nothing_to_compute() -> None:
    loss, terms = head_losses(**operands(torch.float32), weights={"activation": 1.0, "forward_kl": 0.0})
    assert loss == 0
    assert not terms


def test_autocast_computes_in_its_precision() -> None:
    given = operands(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_losses(**given, weights={"forward_kl": 1.0}, chunk=4)
    loss.backward()
    exact = operands()
    total = naive(**exact, weights={"forward_kl": 1.0}, temperature=1.0)["forward_kl"]
    total.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(total.item(), rel=0.02)
    for name in ("student", "student_head"):
        wrong = given[name].grad.double() - exact[name].grad
        assert given[name].grad.dtype == torch.float32
        assert wrong.norm() < 0.03 * exact[name].grad.norm()


def test_the_activation_error_is_relative_and_taken_by_sequence() -> None:
    target = torch.randn(3, 5, 4)
    assert activation_error(target, target) == 0
    assert activation_error(torch.zeros_like(target), target) == pytest.approx(1)
    assert activation_error(3 * target, target) == pytest.approx(4)
    output = torch.randn(3, 5, 4)
    parts = [activation_error(output[i : i + 1], target[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(activation_error(output, target), torch.stack(parts).mean())
