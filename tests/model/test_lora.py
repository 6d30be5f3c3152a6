"""Adapters, against PEFT's own: the same outputs and gradients, and files that PEFT loads."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from tests.models import ATTENTION, supernet, supernet_spec, tokens
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.model import initial, schema
from gearshift.model.adapter_names import is_adapter
from gearshift.model.adapters import load_adapters, save_adapters
from gearshift.plan import Plan
from gearshift.plan.execute import MappingSource, materialise
from gearshift.spec import MIXERS
from gearshift.surgery import Surgery, operate, prune

logging.disable_progress_bar()
LORA = {"rank": 3, "alpha": 6}
EXPERTS = {
    "experts": 3,
    "experts_per_token": 2,
    "intermediate_size": 8,
    "shared": {"type": "gated", "intermediate_size": 8},
}


def with_lora(spec: ModelSpec, **lora: Any) -> ModelSpec:
    dump = spec.model_dump(mode="json")
    for block in dump["decoder"]["blocks"].values():
        block["lora"] = LORA | lora
    return ModelSpec.model_validate(dump)


def adapted(seed: int = 1, lora: dict[str, Any] | None = None, **settings: Any) -> GearshiftForCausalLM:
    """The supernet of `tests.models` with adapters that have learnt something."""
    base = supernet(**settings)
    model = GearshiftForCausalLM(GearshiftConfig(with_lora(base.spec, **(lora or {})))).eval()
    torch.manual_seed(seed)
    moved = {name: torch.randn_like(t) / 4 for name, t in model.state_dict().items() if is_adapter(name)}
    model.load_state_dict({**base.state_dict(), **moved})
    return model


def bare(model: GearshiftForCausalLM) -> GearshiftForCausalLM:
    """The same model without its adapters."""
    dump = model.spec.model_dump(mode="json")
    for block in dump["decoder"]["blocks"].values():
        block["lora"] = None
    without = GearshiftForCausalLM(GearshiftConfig(ModelSpec.model_validate(dump))).eval()
    without.load_state_dict({name: t for name, t in model.state_dict().items() if not is_adapter(name)})
    return without


def operated(model: GearshiftForCausalLM, *edits: dict[str, Any]) -> tuple[GearshiftForCausalLM, Plan]:
    source = MappingSource(dict(model.state_dict()))
    spec, plan = operate(model.spec, source.schema, [Surgery.model_validate({"edits": list(edits)})])
    result = GearshiftForCausalLM(GearshiftConfig(spec)).eval()
    result.load_state_dict(materialise(plan, source))
    return result, plan


def by_hand(model: GearshiftForCausalLM, **config: Any) -> peft.PeftModel:
    """PEFT's own model: its layers put into `model` without adapters, with the same adapter weights."""
    layers = r"model\.layers\..*\.(mixer|mlp)\..*_proj"
    hand = peft.get_peft_model(bare(model), peft.LoraConfig(r=3, lora_alpha=6, target_modules=layers, **config)).eval()
    ours = {f"base_model.model.{name}": t for name, t in model.state_dict().items() if is_adapter(name)}
    theirs = {name for name, _ in hand.named_parameters() if is_adapter(name)}
    assert theirs == ours.keys()
    hand.load_state_dict(ours, strict=False)
    return hand


@pytest.mark.parametrize("placement", ["attention", "window", "gdn", "kda"])
def test_outputs_and_gradients_are_those_of_peft(placement: str) -> None:
    model = adapted(layers=2)
    hand, batch = by_hand(model), tokens(2, 11)
    ours, theirs = model(batch, placement=placement).logits, hand(batch, placement=placement).logits
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, bare(model)(batch, placement=placement).logits, atol=0.1)
    for logits in (ours, theirs):
        logits.square().mean().backward()
    gradients = {name.replace("base_layer.", ""): p.grad for name, p in model.named_parameters() if is_adapter(name)}
    others = {name.removeprefix("base_model.model."): p.grad for name, p in hand.named_parameters() if is_adapter(name)}
    assert gradients.keys() == others.keys()
    learnt = {name for name, gradient in gradients.items() if gradient is not None}
    assert {name for name in learnt if ".mixers." in name} == {name for name in gradients if f".{placement}." in name}
    assert all(torch.equal(gradients[name], others[name]) for name in learnt)


@pytest.mark.parametrize("kind", [name for name in MIXERS.names() if MIXERS[name].transfer_from("attention")])
def test_no_mixer_goes_past_its_adapters(kind: str) -> None:
    wrap, add = {"wrap": {"main": "main"}}, {"add": {"name": "new", "mixer": {"type": kind}}}
    plain = supernet_spec(layers=1).model_dump(mode="json")
    plain["decoder"]["blocks"]["block"]["mixer"] = ATTENTION
    torch.manual_seed(0)
    model = GearshiftForCausalLM(GearshiftConfig(ModelSpec.model_validate(plain)))
    model, _ = operated(model, wrap, add, {"change": {"lora": LORA}})
    adapters = {name: p for name, p in model.named_parameters() if is_adapter(name) and ".mixers.main." not in name}
    for parameter in adapters.values():
        torch.nn.init.normal_(parameter)
    model(tokens(2, 9), placement="new").logits.square().mean().backward()
    assert any(".mixers.new.o_proj." in name for name in adapters)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.values())


def test_fresh_adapters_are_more_tensors_that_change_nothing() -> None:
    model = supernet(layers=2)
    made, plan = operated(model, {"change": {"lora": LORA}})
    again, _ = operated(model, {"change": {"lora": LORA}})
    state, before = made.state_dict(), model.state_dict()
    assert {name for name in state if not is_adapter(name)} == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in state.items())
    assert not plan.discards
    query = "model.layers.0.mixer.mixers.attention.q_proj.lora_A.default.weight"
    assert state[query].shape == (3, 24)
    assert 0.8 * 24**-0.5 < state[query].abs().max() <= 24**-0.5
    assert not torch.equal(state[query], state[query.replace("layers.0", "layers.1")])
    assert all(not tensor.any() for name, tensor in state.items() if ".lora_B." in name)
    for placement in ("attention", "kda"):
        assert torch.equal(
            made(tokens(2, 9), placement=placement).logits, model(tokens(2, 9), placement=placement).logits
        )


def test_every_tensor_has_a_start() -> None:
    dump = with_lora(supernet_spec(layers=2)).model_dump(mode="json")
    head = {"mixer": ATTENTION, "mlp": {"type": "mixture_of_experts", **EXPERTS}, "lora": LORA}
    spec = ModelSpec.model_validate(dump | {"prediction_heads": [{"block": head}]})
    assert "model.prediction_heads.0.block.mlp.shared.up_proj.lora_A.default.weight" in initial(spec)
    assert initial(spec).keys() == schema(spec, "float32").keys()
    torch.manual_seed(0)
    fresh = GearshiftForCausalLM(GearshiftConfig(spec)).state_dict()
    assert all(tensor.any() == (".lora_B." not in name) for name, tensor in fresh.items() if is_adapter(name))


def test_adapters_can_be_taken_away() -> None:
    model = adapted(layers=2)
    made, plan = operated(model, {"change": {"lora": None}})
    assert made.spec == supernet_spec(layers=2)
    assert {discard.name for discard in plan.discards} == {name for name in model.state_dict() if is_adapter(name)}
    assert {discard.reason for discard in plan.discards} == {"its layer has no adapter any more"}
    assert torch.equal(made(tokens(2, 9), placement="gdn").logits, bare(model)(tokens(2, 9), placement="gdn").logits)


def test_targets_do_not_depend_on_the_mixers_names() -> None:
    model = adapted(layers=2, lora={"targets": ["mixer.[qo]_proj", "mlp.down_proj"]})
    found = {
        name.rpartition(".lora_")[0].split("layers.0.")[1]
        for name in model.state_dict()
        if "0" in name and is_adapter(name)
    }
    mixers = [f"mixer.mixers.{name}.{layer}_proj" for name in ("attention", "window", "gdn", "kda") for layer in "qo"]
    assert found == {*mixers, "mlp.down_proj"}


def test_surgery_carries_adapters_along() -> None:
    model = adapted(layers=3)
    grown, _ = operated(
        model, {"drop": {"name": "window"}}, {"add": {"name": "narrow", "mixer": {"type": "attention", "window": 3}}}
    )
    assert torch.equal(grown(tokens(2, 9), placement="kda").logits, model(tokens(2, 9), placement="kda").logits)
    assert not grown.state_dict()["model.layers.2.mixer.mixers.narrow.q_proj.lora_B.default.weight"].any()
    placement = grown.placement("gdn,attention,narrow")
    source = MappingSource(dict(grown.state_dict()))
    spec, plan = prune(grown.spec, source.schema, placement)
    pruned = GearshiftForCausalLM(GearshiftConfig(spec)).eval()
    pruned.load_state_dict(materialise(plan, source))
    assert torch.equal(pruned(tokens(2, 9)).logits, grown(tokens(2, 9), placement=placement).logits)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 5}, "block 'block' has adapters of rank 3, which cannot become 5: merge them"),
        ({"targets": ["mixer.nothing"]}, r"the targets of lora \(mixer.nothing\) match no linear layer of the block"),
        ({"rank": 0}, "lora.rank"),
        ({"ranks": 8}, "lora.ranks: unknown key"),
    ],
)
def test_bad_settings_are_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"edit 0 cannot be carried out: .*{message}"):
        operated(adapted(layers=2), {"change": {"lora": lora}})


def test_a_shared_block_has_one_adapter() -> None:
    dump = with_lora(supernet_spec(layers=3)).model_dump(mode="json")
    dump["decoder"]["blocks"]["block"]["shared_weights"] = True
    names = schema(ModelSpec.model_validate(dump), "float32")
    assert sum(".mlp.up_proj.lora_A." in name for name in names) == 1


@pytest.mark.parametrize("lora", [{}, {"dropout": 0.5}])
def test_a_saved_model_loads_as_it_was(tmp_path: Path, lora: dict[str, Any]) -> None:
    model = adapted(layers=2, lora=lora)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == schema(model.spec, "float32").keys()
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(loaded(tokens(2, 9), placement="kda").logits, model(tokens(2, 9), placement="kda").logits)
    inside = {name for name, p in loaded.named_parameters() if p.requires_grad and "layers" in name}
    assert inside == {name for name, _ in model.named_parameters() if is_adapter(name)}
    options = {"max_new_tokens": 8, "do_sample": False, "placement": "gdn,kda", "pad_token_id": 0}
    recomputed = loaded.generate(tokens(2, 9), use_cache=False, **options)
    assert torch.equal(loaded.generate(tokens(2, 9), **options), recomputed)


def test_adapters_alone_are_what_peft_writes_and_reads(tmp_path: Path) -> None:
    model, batch = adapted(layers=2), tokens(2, 9)
    expected = model(batch, placement="gdn").logits
    save_adapters(model, tmp_path / "adapters")
    stored = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    theirs = get_peft_model_state_dict(by_hand(model), save_embedding_layers=False)
    assert stored.keys() == theirs.keys()
    assert all(torch.equal(stored[name], theirs[name]) for name in stored)
    loaded = peft.PeftModel.from_pretrained(bare(model), tmp_path / "adapters").eval()
    assert torch.equal(loaded(batch, placement="gdn").logits, expected)
    copy = adapted(seed=2, layers=2)
    load_adapters(copy, tmp_path / "adapters")
    assert torch.equal(copy(batch, placement="gdn").logits, expected)
    by_hand(model).save_pretrained(tmp_path / "peft")
    copy = adapted(seed=2, layers=2)
    load_adapters(copy, tmp_path / "peft")
    assert torch.equal(copy(batch, placement="gdn").logits, expected)


def test_blocks_may_differ_in_rank_and_alpha(tmp_path: Path) -> None:
    base = supernet(layers=2)
    lay = {"layout": {"pattern": ["block", "other"], "copies": {"other": "block"}}}
    first, second = (
        {"change": {"blocks": [name], "lora": {"rank": rank, "alpha": alpha}}}
        for name, rank, alpha in (("block", 2, 4), ("other", 5, 1.5))
    )
    model, _ = operated(base, lay, first, second)
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            torch.nn.init.normal_(parameter, std=0.3)
    save_adapters(model, tmp_path / "adapters")
    loaded = peft.PeftModel.from_pretrained(bare(model), tmp_path / "adapters").eval()
    assert torch.equal(loaded(tokens(2, 9), placement="kda").logits, model(tokens(2, 9), placement="kda").logits)
    load_adapters(model, tmp_path / "adapters")
    assert (tmp_path / "adapters" / "adapter_config.json").read_text().count('"model.layers.1.mlp.up_proj": 5') == 1


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 4}, r"is \[3, 24\], not \[4, 24\]: the rank in the spec's lora must be the same"),
        ({"alpha": 7}, "has alpha 6, and the spec's lora 7"),
        ({"targets": ["mlp.*"]}, "are of other layers than the model's: they have .*attention.k_proj.lora_A.weight'"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, lora: dict[str, Any], message: str) -> None:
    save_adapters(adapted(layers=2), tmp_path / "adapters")
    with pytest.raises(ValueError, match=message):
        load_adapters(adapted(layers=2, lora=lora), tmp_path / "adapters")


def test_adapters_replace_nothing_but_adapters(tmp_path: Path) -> None:
    model = adapted(layers=2)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds something else than adapters"):
        save_adapters(model, tmp_path, overwrite=True)
    save_adapters(model, tmp_path / "adapters")
    with pytest.raises(ValueError, match="exists already"):
        save_adapters(model, tmp_path / "adapters")
    first = (tmp_path / "adapters" / "adapter_config.json").read_bytes()
    save_adapters(model, tmp_path / "adapters", overwrite=True)
    assert (tmp_path / "adapters" / "adapter_config.json").read_bytes() == first
    with pytest.raises(ValueError, match="has no LoRA adapters"):
        save_adapters(bare(model), tmp_path / "none")


def test_without_peft_the_package_is_named() -> None:
    script = (
        "import sys; sys.modules['peft'] = None\n"
        "from gearshift.model import schema\n"
        "from tests.models import supernet_spec\n"
        "spec = supernet_spec(layers=1)\n"
        "schema(spec, 'float32')\n"
        "block = spec.decoder.blocks['block'].model_dump() | {'lora': {'rank': 1, 'alpha': 1}}\n"
        "schema(type(spec).model_validate(spec.model_dump() | {'decoder': {'num_layers': 1, 'pattern': ['block'],"
        " 'blocks': {'block': block}}}), 'float32')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "ImportError: this model has LoRA adapters, which need the package peft" in ran.stderr
    assert 'pip install "gearshift[lora]"' in ran.stderr
