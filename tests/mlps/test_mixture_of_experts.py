"""The mixture of experts against transformers' sparse blocks on the same weights."""

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, KimiLinearConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearMoE
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.mlps.mixture_of_experts import MixtureOfExpertsSpec
from gearshift.mlps.mixture_of_experts.module import MixtureOfExperts
from gearshift.model.schema import initial, schema
from gearshift.spec import MLPS

HIDDEN = 24
SIZES = {"experts": 12, "experts_per_token": 3, "intermediate_size": 20}
DEEPSEEK = {
    **SIZES,
    "scoring": "sigmoid",
    "scaling": 2.4,
    "groups": 4,
    "groups_per_token": 2,
    "correction_bias": True,
    "shared": {"intermediate_size": 40},
}
KIMI_KEYS = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": 20,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "routed_scaling_factor": 2.4,
    "n_group": 4,
    "topk_group": 2,
}
QWEN_KEYS = {"hidden_size": HIDDEN, "moe_intermediate_size": 20, "num_experts": 12, "num_experts_per_tok": 3}


def mixtral() -> nn.Module:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=20, num_local_experts=12, num_experts_per_tok=3)
    return MixtralSparseMoeBlock(_eager(config))


def qwen3(normalise: bool) -> nn.Module:
    return Qwen3MoeSparseMoeBlock(_eager(Qwen3MoeConfig(**QWEN_KEYS, norm_topk_prob=normalise)))


def qwen2() -> nn.Module:
    config = Qwen2MoeConfig(**QWEN_KEYS, norm_topk_prob=False, shared_expert_intermediate_size=28)
    return Qwen2MoeSparseMoeBlock(_eager(config))


def kimi(normalise: bool) -> nn.Module:
    return KimiLinearMoE(_eager(KimiLinearConfig(**KIMI_KEYS, num_local_experts=12, norm_topk_prob=normalise)))


def deepseek() -> nn.Module:
    return DeepseekV3MoE(_eager(DeepseekV3Config(**KIMI_KEYS, n_routed_experts=12, norm_topk_prob=True)))


def _eager(config: object) -> object:
    config._experts_implementation = "eager"  # type: ignore[attr-defined]
    return config


CASES = {
    "mixtral": (SIZES, mixtral),
    "qwen3_moe": ({**SIZES, "normalise": True}, lambda: qwen3(True)),
    "qwen3_moe plain": ({**SIZES, "normalise": False}, lambda: qwen3(False)),
    "qwen2_moe": ({**SIZES, "normalise": False, "shared": {"intermediate_size": 28}, "shared_gate": True}, qwen2),
    "kimi_linear": (DEEPSEEK, lambda: kimi(True)),
    "kimi_linear plain": ({**DEEPSEEK, "normalise": False}, lambda: kimi(False)),
    "deepseek_v3": (DEEPSEEK, deepseek),
}


def mixture(settings: Mapping[str, object], seed: int = 0) -> MixtureOfExperts:
    """Weights large enough that routing is decided and every part matters."""
    module = MixtureOfExperts(MixtureOfExpertsSpec.model_validate(settings), HIDDEN)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.3 * noise if name == "router.correction_bias" else 1.5 * noise / parameter.shape[-1] ** 0.5
    return module


def spec_with(settings: Mapping[str, object]) -> ModelSpec:
    """A small model with mixtures of experts."""
    block = {"mixer": {"type": "attention", "heads": 4}, "mlp": {"type": "mixture_of_experts", **settings}}
    decoder = {"num_layers": 2, "pattern": ["block"], "blocks": {"block": block}}
    return ModelSpec.model_validate({"vocab_size": 31, "hidden_size": HIDDEN, "max_positions": 64, "decoder": decoder})


def own_name(theirs: str) -> str:
    return (
        theirs.replace("shared_expert_gate", "shared_gate")
        .replace("shared_experts.", "shared.")
        .replace("shared_expert.", "shared.")
        .replace("gate.weight", "router.weight" if theirs == "gate.weight" else "gate.weight")
        .replace("gate.e_score_correction_bias", "router.correction_bias")
    )


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def gradients(output: Tensor, wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a fixed random projection of `output`."""
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    return dict(zip(wanted, torch.autograd.grad((output * weights).sum(), list(wanted.values())), strict=True))


def learning(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def assert_near(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape, what
    error, scale = (actual.detach().double() - expected.detach().double()).norm(), expected.detach().double().norm()
    assert scale > 0, what
    assert error <= tolerance * scale, f"{what}: relative error {error / scale:.2e}"


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [1, 37])
def test_transformers_block(case: str, tokens: int) -> None:
    settings, make = CASES[case]
    ours, theirs = mixture(settings), make()
    theirs.load_state_dict({name: ours.state_dict()[own_name(name)] for name in theirs.state_dict()})
    assert {own_name(name) for name in theirs.state_dict()} == set(ours.state_dict())
    x = inputs(2, tokens)
    here, there = ours(x), theirs(x)
    assert_near(here, there, "output")
    own = gradients(here, {"hidden": x, **learning(ours)})
    for name, expected in gradients(there, {"hidden": x, **learning(theirs)}).items():
        assert_near(own.pop(own_name(name)), expected, name)
    assert not own


@pytest.mark.parametrize("change", [{"groups_per_token": 4}, {"correction_bias": False}])
def test_what_the_choice_depends_on(change: dict[str, object]) -> None:
    """The agreement above would not notice a rule that changes no choice."""
    plain, changed = mixture(DEEPSEEK).router, mixture({**DEEPSEEK, **change}).router
    changed.load_state_dict(plain.state_dict(), strict="correction_bias" not in change)
    x = inputs(50).detach()
    assert not torch.equal(plain(x)[0].sort().values, changed(x)[0].sort().values)


@pytest.mark.parametrize("implementation", ["grouped_mm", "batched_mm"])
def test_experts_implementations_agree(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = ALL_EXPERTS_FUNCTIONS[implementation], []

    def recorded(experts: nn.Module, *args: Tensor) -> Tensor:
        calls.append(implementation)
        return original(experts, *args)

    monkeypatch.setitem(ALL_EXPERTS_FUNCTIONS, implementation, recorded)
    eager, other = mixture(DEEPSEEK), mixture(DEEPSEEK)
    config = SimpleNamespace(_experts_implementation="eager")
    other.configure(config)
    x = inputs(3, 15)
    expected = eager(x)
    assert torch.equal(other(x), expected)
    assert not calls
    config._experts_implementation = implementation
    actual = other(x)
    assert calls == [implementation]
    assert_near(actual, expected, "output")
    wanted = gradients(expected, {"hidden": x, **learning(eager)})
    for name, gradient in gradients(actual, {"hidden": x, **learning(other)}).items():
        assert_near(gradient, wanted[name], name)


def test_an_unknown_implementation_is_named() -> None:
    module = mixture(SIZES)
    module.configure(SimpleNamespace(_experts_implementation="magic"))
    with pytest.raises(KeyError, match="magic"):
        module(inputs(2))


def test_tokens_are_independent_whatever_their_arrangement() -> None:
    module, x = mixture(DEEPSEEK), inputs(2, 3, 4)
    whole = module(x)
    assert_near(module(x.flatten(0, 2)), whole.flatten(0, 2), "flattened")
    assert_near(module(x[1, 2, 3]), whole[1, 2, 3], "alone")


def test_the_correction_bias_keeps_float32_whatever_the_model_is_loaded_in(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GearshiftForCausalLM(GearshiftConfig(spec_with(DEEPSEEK)))
    bias = {name: parameter for name, parameter in model.named_parameters() if name.endswith("correction_bias")}
    for parameter in bias.values():
        parameter.data.normal_()
    model.save_pretrained(tmp_path)
    for dtype in (torch.bfloat16, torch.float16):
        loaded = dict(GearshiftForCausalLM.from_pretrained(tmp_path, dtype=dtype).named_parameters())
        assert bias
        assert all(torch.equal(loaded[name], parameter) for name, parameter in bias.items())
        assert {parameter.dtype for name, parameter in loaded.items() if name not in bias} == {dtype}


def test_low_precision_stays_in_its_dtype() -> None:
    low, high = mixture(SIZES).bfloat16(), mixture(SIZES)
    high.load_state_dict(low.state_dict())
    x = inputs(64).detach().bfloat16()
    output = low(x)
    assert output.dtype == torch.bfloat16
    chosen = [router(part)[0].sort().values for router, part in ((low.router, x), (high.router, x.float()))]
    agreed = (chosen[0] == chosen[1]).all(-1)  # a near tie may go either way
    assert agreed.float().mean() > 0.8
    assert_near(output[agreed].float(), high(x.float())[agreed], "output", 2e-2)


def test_idle_parameters_are_those_a_token_leaves_untouched() -> None:
    module = mixture(DEEPSEEK)
    spec = MixtureOfExpertsSpec.model_validate(DEEPSEEK)
    grads = gradients(module(inputs(1)), learning(module))
    experts = (grads["experts.gate_up_proj"].abs().amax((1, 2)) > 0).sum()
    assert experts == spec.experts_per_token
    idle = sum(grad[grad.abs().amax((1, 2)) == 0].numel() for name, grad in grads.items() if "experts" in name)
    assert spec.idle_parameters(HIDDEN) == idle
    assert spec.idle_parameters(HIDDEN, tokens=2) == round(idle * 9 / 12)
    assert spec.idle_parameters(HIDDEN, tokens=1000) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts_per_token": 13}, "13 of 12 experts"),
        ({"groups": 5, "groups_per_token": 2}, "12 experts do not divide into 5 groups"),
        ({"groups": 2, "groups_per_token": 3}, "3 of 2 groups"),
        ({"groups": 6, "groups_per_token": 1}, "do not fit into 1 groups of 2"),
        ({"groups": 12, "groups_per_token": 6}, "one expert each"),
        ({"shared_gate": True}, "needs a shared MLP"),
        ({"scaling": 0}, "greater than 0"),
    ],
)
def test_settings_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MixtureOfExpertsSpec.model_validate({**SIZES, **change})


@pytest.mark.parametrize("settings", [SIZES, CASES["qwen2_moe"][0], DEEPSEEK], ids=["plain", "gated", "shared"])
def test_a_model_of_it(settings: dict[str, object]) -> None:
    """Every tensor has a starting distribution, and every parameter but the correction bias learns."""
    assert MLPS["mixture_of_experts"].load() is MixtureOfExperts
    spec = spec_with(settings)
    assert ModelSpec.model_validate_json(spec.model_dump_json()) == spec
    assert set(initial(spec)) == set(schema(spec, "float32"))
    torch.manual_seed(0)
    model = GearshiftForCausalLM(GearshiftConfig(spec))
    ids = torch.randint(31, (2, 20))
    model(ids, labels=ids).loss.backward()
    still = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert still == {name for name, _ in model.named_parameters() if name.endswith("correction_bias")}
    assert model.model.blocks[0].mlp.experts.down_proj.std().item() == pytest.approx(0.02, rel=0.05)
