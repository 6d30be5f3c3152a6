import pytest
import torch

from gearshift import GearshiftForCausalLM
from gearshift.data import Batch
from gearshift.train.calibration import calibrate
from gearshift.train.engine import Engine, Precision
from gearshift.train.layerwise import LayerwiseRun
from gearshift.train.recipe import LayerwiseStage
from gearshift.train.steps import BlockSteps
from tests.models import supernet, tokens


def student(scale: float = 5.0) -> GearshiftForCausalLM:
    """A supernet whose windows start from the attention, at the wrong scale."""
    model = supernet(layers=3).requires_grad_(False)
    for block in model.model.blocks:
        window = block.mixer_named("window")
        window.load_state_dict(block.mixer_named("attention").state_dict())
        window.o_proj.weight.mul_(scale)
        for name in ("window", "gdn", "kda"):
            block.mixer_named(name).requires_grad_(True)
    return model


def run(model: GearshiftForCausalLM, method: str, **more: float) -> LayerwiseRun:
    stage = LayerwiseStage(steps=1, calibration=method, **more)
    return LayerwiseRun(model, model, Engine(Precision("auto", torch.device("cpu")), BlockSteps()), stage, 0, 8, 4)


def mean(errors: dict[str, list[float | None]], name: str) -> float:
    return sum(errors[name]) / len(errors[name])


@pytest.mark.parametrize("method", ["scale", "ridge"])
def test_the_error_falls_to_what_was_promised(method: str) -> None:
    model = student()
    seen, unseen = Batch(tokens(16, 40)), Batch(tokens(16, 40, seed=1))
    stage = run(model, method)
    errors = stage.calibrate(seen)
    for name in ("window", "gdn", "kda"):
        assert mean(errors["after"], name) <= mean(errors["scaled"], name) + 1e-9
        assert mean(errors["scaled"], name) < min(1, mean(errors["before"], name))
    assert mean(errors["before"], "window") > 5
    assert mean(errors["scaled"], "window") < 0.8
    for name, layer in ((name, layer) for name in ("window", "gdn", "kda") for layer in range(3)):
        measured = stage.measure(seen)[name, layer]
        assert measured.item() == pytest.approx(errors["after"][name][layer], abs=1e-4)
    # It must hold on text that it was not fitted to.
    for name in ("window", "gdn", "kda"):
        fresh = sum(stage.measure(unseen)[name, layer].item() for layer in range(3)) / 3
        assert fresh < mean(errors["scaled"], name) + 0.05


def test_ridge_learns_what_a_factor_cannot() -> None:
    fits = {}
    for method in ("scale", "ridge"):
        model = student()
        with torch.no_grad():
            for block in model.model.blocks:
                block.mixer_named("window").o_proj.weight.copy_(torch.randn(24, 32))
        fits[method] = mean(run(model, method).calibrate(Batch(tokens(16, 40)))["after"], "window")
    assert fits["ridge"] < 0.8 * fits["scale"]


def test_few_tokens_do_not_hurt() -> None:
    """With fewer tokens than features, the fit stays near the scaled projection instead of following the noise."""
    model = student()
    scaled = student()
    run(model, "ridge").calibrate(Batch(tokens(1, 12)))
    run(scaled, "scale").calibrate(Batch(tokens(1, 12)))
    unseen = Batch(tokens(16, 40, seed=1))
    losses = [run(each, "none").measure(unseen)["window", 1].item() for each in (model, scaled)]
    assert losses[0] < losses[1] + 0.1


def test_a_hold_too_weak_to_solve_with_is_refused() -> None:
    """Which finite numbers are not to be blamed for."""
    with pytest.raises(ValueError, match=r"a ridge of 1e-12 holds the calibration too weakly: raise it, or calibrate"):
        run(student(), "ridge", ridge=1e-12).calibrate(Batch(tokens(1, 6)))


def test_only_projections_that_learn_are_fitted() -> None:
    model = student()
    frozen = model.model.blocks[0].mixer_named("gdn").o_proj.weight.requires_grad_(False)
    main = model.model.blocks[0].mixer_named("attention").o_proj.weight
    before = frozen.clone(), main.clone()
    errors = run(model, "ridge").calibrate(Batch(tokens(8, 24)))
    assert errors["after"]["gdn"][0] is None
    assert errors["after"]["gdn"][1] is not None
    assert torch.equal(frozen, before[0])
    assert torch.equal(main, before[1])


def test_parts_change_nothing_but_rounding() -> None:
    weights = []
    for parts in (1, 4):
        model = student()
        precision = Precision("auto", torch.device("cpu"))
        batches = Batch(tokens(8, 24)).split(8 // parts)
        calibrate(model, model, run(model, "ridge").students, batches, "ridge", 1.0, precision)
        weights.append(model.model.blocks[2].mixer_named("kda").o_proj.weight)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-5)
