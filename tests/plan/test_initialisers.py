import hashlib

import pytest
import torch
from plan_cases import bits

from gearshift.plan import (
    Concatenate,
    Constant,
    Initialise,
    InverseSoftplusLogUniform,
    LastTap,
    LogIndex,
    LogUniform,
    Normal,
    Plan,
    Reference,
    Slice,
    TensorInfo,
    Uniform,
)
from gearshift.plan.execute import MappingSource, initialise, materialise

DRAWN = [Normal(0.02), Uniform(-1.0, 1.0), LogUniform(1.0, 16.0), InverseSoftplusLogUniform(0.001, 0.1, 1e-4)]


@pytest.mark.parametrize("initialiser", DRAWN)
def test_draws_depend_on_seed_and_name_only(initialiser):
    def draw(seed=0, name="layers.0.w", shape=(64, 3)):
        return initialise(initialiser, shape, "float32", seed, name)

    first = draw()
    torch.manual_seed(5)
    draw(name="another")
    assert torch.equal(draw(), first)
    assert not torch.equal(draw(seed=1), first)
    assert not torch.equal(draw(name="layers.1.w"), first)
    assert first.shape == (64, 3)
    assert first.dtype == torch.float32


def test_the_normal_stream_is_the_same_on_every_machine():
    values = initialise(Normal(1.0), (1000,), "float32", 0, "layers.0.w")
    assert (
        hashlib.sha256(bits(values)).hexdigest() == "0b9d6d7583b8dce99fd372a21c90d08146f7633e9358fa5b5d4f262470f81f08"
    )


def test_lower_precision_is_the_same_draw_rounded():
    wide = initialise(Normal(1.0), (100,), "float32", 0, "w")
    assert torch.equal(initialise(Normal(1.0), (100,), "bfloat16", 0, "w"), wide.bfloat16())
    assert torch.equal(initialise(Normal(1.0), (100,), "float64", 0, "w"), wide.double())


def test_moments_and_ranges():
    def draw(initialiser):
        return initialise(initialiser, (100_000,), "float64", 0, "w")

    normal = draw(Normal(0.5, mean=2.0))
    assert normal.mean().item() == pytest.approx(2.0, abs=0.01)
    assert normal.std().item() == pytest.approx(0.5, abs=0.01)
    uniform = draw(Uniform(-1.0, 3.0))
    assert -1 <= uniform.min() < -0.99
    assert 2.99 < uniform.max() <= 3
    decays = draw(LogUniform(1.0, 16.0)).exp()
    assert 0.999 < decays.min() < 1.01
    assert 15.99 < decays.max() < 16.001
    assert decays.mean().item() == pytest.approx(8.5, abs=0.05)


def test_softplus_of_the_step_bias_is_log_uniform_above_the_floor():
    bias = initialise(InverseSoftplusLogUniform(0.001, 0.1, 0.002), (100_000,), "float32", 0, "dt_bias")
    steps = torch.nn.functional.softplus(bias.double())
    assert steps.min().item() == pytest.approx(0.002, rel=1e-5)
    assert steps.max().item() == pytest.approx(0.1, rel=1e-3)
    assert steps.log().quantile(0.5).exp().item() == pytest.approx(0.01, rel=0.03)


def test_constants_and_taps():
    assert torch.equal(initialise(Constant(3), (2,), "int64", 0, "w"), torch.tensor([3, 3]))
    assert torch.equal(initialise(Constant(0.5), (), "bfloat16", 0, "w"), torch.tensor(0.5, dtype=torch.bfloat16))
    taps = initialise(LastTap(0.5), (3, 1, 4), "float32", 0, "w")
    assert torch.equal(taps, torch.tensor([0, 0, 0, 0.5]).expand(3, 1, 4))
    rates = initialise(LogIndex(), (5, 3), "float32", 0, "A_log").exp()
    torch.testing.assert_close(rates, torch.tensor([1.0, 2.0, 3.0]).expand(5, 3))


def test_no_two_draws_of_one_target_are_the_same():
    draw = Initialise(Normal(1.0), (4,), "float32")
    plan = Plan({}, {"w": TensorInfo((8,), "float32")}, {"w": Concatenate((draw, draw), 0)})
    first, second = materialise(plan, MappingSource({}), seed=0)["w"].chunk(2)
    assert not torch.equal(first, second)
    assert torch.equal(first, initialise(Normal(1.0), (4,), "float32", 0, "w"))


def test_order_and_company_do_not_matter():
    draw, info = Initialise(Normal(1.0), (4,), "float32"), TensorInfo((4,), "float32")
    alone = materialise(Plan({}, {"b": info}, {"b": draw}), MappingSource({}))
    both = materialise(Plan({}, {"a": info, "b": info}, {"b": draw, "a": draw}), MappingSource({}))
    assert torch.equal(alone["b"], both["b"])
    assert not torch.equal(both["a"], both["b"])


def test_a_drawn_tensor_keeps_its_values_when_a_later_plan_renames_it():
    info = TensorInfo((4,), "float32")
    first = Plan({}, {"a": info}, {"a": Initialise(Normal(1.0), (4,), "float32")})
    rename = Plan(
        {"a": info}, {"b": info}, {"b": Concatenate(tuple(Slice(Reference("a"), 0, i, i + 2) for i in (0, 2)), 0)}
    )
    renamed = materialise(first.compose(rename), MappingSource({}))["b"]
    assert torch.equal(renamed, materialise(first, MappingSource({}))["a"])
