"""Every family, every key of its config: in, the same logits, and out again as it was. Nothing can be left out."""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gearshift.formats import FORMATS, open_checkpoint
from gearshift.formats.family import FamilyFormat
from gearshift.formats.fates import RUNTIME_ONLY, Fixed, Mapped, Nullable
from gearshift.formats.tensors import Tensors
from gearshift.model import schema
from gearshift.plan import Plan
from tests.formats.families import SET_BY_NOBODY, families
from tests.formats.folders import convert, export

FAMILIES = families()
SWEEP = [(name, settings) for name, family in FAMILIES.items() for settings in family.sweep]


def format_of(name: str) -> FamilyFormat:
    found = FORMATS[name]
    assert isinstance(found, FamilyFormat)
    return found


def raw(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config of the family as transformers writes it."""
    family = FAMILIES[name]
    return json.loads(family.config_class(**copy.deepcopy({**family.sizes, **settings})).to_json_string())


def full(name: str) -> dict[str, Any]:
    """A config with which every template of the family has a tensor."""
    return raw(name, FAMILIES[name].full)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_sweep_leaves_no_key_out(name: str) -> None:
    family = FAMILIES[name]
    swept = {key for settings in (*family.sweep, family.refused) for key in settings}
    assert {key.name for key in fields(family.config_class)} - SET_BY_NOBODY <= swept


@pytest.mark.parametrize(("name", "settings"), SWEEP, ids=lambda value: str(value)[:60])
def test_there_and_back(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    theirs = FAMILIES[name].save(tmp_path / "source", **settings)
    convert(open_checkpoint(tmp_path / "source"), tmp_path / "native")
    export(open_checkpoint(tmp_path / "native"), tmp_path / "back", name)

    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "back"))
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].dtype == after[tensor].dtype
        assert before[tensor].equal(after[tensor]), tensor
    configs = [
        FAMILIES[name].config_class.from_pretrained(tmp_path / folder).to_dict() for folder in ("source", "back")
    ]
    before, after = ({key: config[key] for key in config if key != "transformers_version"} for config in configs)
    assert before == after

    if reason := FAMILIES[name].runs_otherwise(theirs):
        pytest.skip(f"all but the logits is the same: {reason}")
    if theirs.dtype == torch.float32:
        ours = load_model(tmp_path / "native")
        ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected, actual = theirs(ids).logits, ours(ids).logits
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", FAMILIES)
def test_what_attention_drops_in_training_is_what_theirs_drops(tmp_path: Path, name: str) -> None:
    theirs = FAMILIES[name].save(tmp_path / "source", attention_dropout=0.25).train()
    if reason := FAMILIES[name].runs_otherwise(theirs):
        pytest.skip(reason)
    convert(open_checkpoint(tmp_path / "source"), tmp_path / "native")
    ours = load_model(tmp_path / "native").train()
    ids = torch.randint(3, 60, (2, 40), generator=torch.Generator().manual_seed(1))
    drawn = []
    for model in (theirs, ours):
        torch.manual_seed(2)
        with torch.no_grad():
            drawn.append(model(ids).logits)
    assert (drawn[0] - drawn[1]).abs().max() <= 1e-5 * drawn[0].abs().max()
    with torch.no_grad():
        assert (ours.eval()(ids).logits - drawn[1]).abs().max() > 1e-2 * drawn[1].abs().max()


def load_model(folder: Path) -> Any:
    from gearshift import GearshiftForCausalLM

    return GearshiftForCausalLM.from_pretrained(folder).eval()


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, family in FAMILIES.items() for key in family.refused])
def test_values_that_we_cannot_say_are_refused(name: str, key: str) -> None:
    with pytest.raises(ValueError, match=f"'{key}'"):
        FORMATS[name].to_native({**full(name), key: FAMILIES[name].refused[key]})


@pytest.mark.parametrize("name", FAMILIES)
def test_every_fate_is_needed(name: str) -> None:
    """Deleting one is caught when the format is built, unless it only adds keys that the class does not know."""
    whole = format_of(name)
    known = set(whole._table.class_keys()) - RUNTIME_ONLY
    for fate in (*whole.fates, *whole.layers):
        rest = tuple(other for other in whole.fates if other is not fate)
        layers = tuple(other for other in whole.layers if other is not fate)
        if isinstance(fate, Mapped | Fixed) or fate.key in known:
            with pytest.raises(ValueError, match="no fate"):
                replace(whole, fates=rest, layers=layers)
        elif isinstance(fate, Nullable):
            nulls = [raw(name, settings) for settings in FAMILIES[name].sweep]
            with pytest.raises(ValueError, match=fate.key):
                assert [replace(whole, fates=rest).to_native(config) for config in nulls]
        else:
            outer, _, inner = fate.key.partition(".")
            changed = {**full(name), outer: {inner: None} if inner else None}
            with pytest.raises(ValueError, match=f"unknown key '{fate.key}'"):
                replace(whole, fates=rest, layers=layers).to_native(changed)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_template_is_needed(name: str) -> None:
    whole = format_of(name)
    spec = whole.to_native(full(name)).spec
    target = schema(spec, "float32")
    assert whole.plan(spec, target).target == target
    weights = whole.tensors.weights
    for index, weight in enumerate(weights):
        fewer = replace(whole.tensors, weights=(*weights[:index], *weights[index + 1 :]))
        with pytest.raises(ValueError, match="a template for it is missing"):
            replace(whole, tensors=fewer).plan(spec, target)
        with pytest.raises(ValueError, match="two tensor templates"):
            Tensors((*weights, weight))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_entry_of_a_plan_is_needed(name: str) -> None:
    whole = format_of(name)
    spec = whole.to_native(full(name)).spec
    plan = whole.plan(spec, schema(spec, "float32"))
    for entry in plan.expressions:
        rest = {other: expression for other, expression in plan.expressions.items() if other != entry}
        with pytest.raises(ValueError, match=re.escape(entry)):
            Plan(plan.source, plan.target, rest)
        # Without the target too, what it was made of is left over.
        target = {other: info for other, info in plan.target.items() if other != entry}
        with pytest.raises(ValueError, match="neither uses nor discards"):
            Plan(plan.source, target, rest)
