"""What `diff` finds between two checkpoints of any formats, what it prints, and how it exits."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gearshift import ModelSpec
from gearshift.diff import Missing, bytes_to_compare, compare, compare_configs
from gearshift.formats import Checkpoint, NativeConfig, open_checkpoint
from gearshift.plan import Concatenate, Expression, Permute, Plan, Reference, Stack
from gearshift.plan.execute import MappingSource, materialise
from gearshift.tiny import write_tiny_model
from tests.models import ATTENTION
from tests.test_inspect import MLP, TEXT, five_blocks, gearshift, save

SURGERY = Path(__file__).parents[1] / "recipes" / "quickstart" / "surgery.yaml"
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as transformers saves it, its native conversion, its supernet, and a model of five kinds of blocks."""
    folder = tmp_path_factory.mktemp("work")
    write_tiny_model(folder / "llama", TEXT)
    for target, options in (("native", []), ("supernet", ["--surgery", SURGERY])):
        assert gearshift("convert", folder / "llama", folder / target, *options).exit_code == 0
    spec = five_blocks()
    save(spec, folder / "five", presets={"fast": str(spec.main)}, default_preset="fast")
    return folder


def edited(source: Path, target: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a native checkpoint with other tensors."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = load_file(source / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def difference(a: Path, b: Path) -> dict[str, Any]:
    """What `diff --json` says, its exit status checked."""
    result = gearshift("diff", a, b, "--json")
    found = json.loads(result.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert result.exit_code == (0 if found["equal"] else 1)
    return found


def test_two_formats_of_one_model_are_equal(work: Path) -> None:
    result = gearshift("diff", work / "llama", work / "native")
    assert result.exit_code == 0, result.output
    count = len(open_checkpoint(work / "llama").schema)
    assert result.output == f"{count} tensors equal, 0 differ\n"
    assert difference(work / "native", work / "llama")["equal_tensors"] == count


def test_a_supernet_has_its_source_within(work: Path) -> None:
    found = difference(work / "llama", work / "supernet")
    assert found["tensors"] == []
    assert found["only_in_a"] == {}
    assert found["equal_tensors"] == len(open_checkpoint(work / "llama").schema)
    mixers = "spec.decoder.blocks.layer.mixer"
    changes = {change["path"]: change for change in found["config"]}
    assert list(changes) == [f"{mixers}.type", *(f"{mixers}.mixers.{name}" for name in ("window", "gdn", "kda"))]
    assert changes[f"{mixers}.type"] == {"path": f"{mixers}.type", "a": "attention", "b": "stochastic"}
    assert "a" not in changes[f"{mixers}.mixers.window"]
    assert changes[f"{mixers}.mixers.window"]["b"]["window"] == 128
    assert {name.split(".")[5] for name in found["only_in_b"]} == {"window", "gdn", "kda"}
    reverse = difference(work / "supernet", work / "llama")
    assert reverse["only_in_a"] == found["only_in_b"]
    text = gearshift("diff", work / "llama", work / "supernet").output
    assert "model.layers.0-3.mixer.mixers.gdn.A_log  [4] float32" in text
    assert "which --all shows" in text
    everything = gearshift("diff", work / "llama", work / "supernet", "--all").output
    assert all(f"  {name}  " in everything for name in found["only_in_b"])


def test_one_changed_value_is_found(work: Path, tmp_path: Path) -> None:
    before = load_file(work / "native" / "model.safetensors")[WEIGHT]

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHT][3, 5] += 0.5

    found = difference(work / "native", edited(work / "native", tmp_path / "b", change))
    assert found["config"] == []
    [tensor] = found["tensors"]
    apart = float((before[3, 5] + 0.5).double() - before[3, 5].double())
    assert tensor["name"] == WEIGHT
    assert tensor["values"]["elements"] == 1
    assert tensor["values"]["max_absolute"] == apart
    assert tensor["values"]["max_relative"] == apart / float(before.abs().max())
    text = gearshift("diff", work / "native", tmp_path / "b").output
    assert f"{found['equal_tensors']} tensors equal, 1 differ\n" in text
    assert f"  {WEIGHT} " in text


def test_another_dtype_shows_with_what_was_rounded(work: Path, tmp_path: Path) -> None:
    assert gearshift("convert", work / "llama", tmp_path / "b", "--dtype", "bfloat16").exit_code == 0
    found = difference(work / "llama", tmp_path / "b")
    assert found["config"] == [{"path": "dtype", "a": "float32", "b": "bfloat16"}]
    assert found["equal_tensors"] == 0
    tensors = {tensor["name"]: tensor for tensor in found["tensors"]}
    weight = load_file(work / "native" / "model.safetensors")[WEIGHT]
    assert tensors[WEIGHT]["b"] == {"shape": list(weight.shape), "dtype": "bfloat16"}
    assert tensors[WEIGHT]["values"]["max_absolute"] == float((weight - weight.bfloat16().float()).abs().max())
    assert tensors["model.norm.weight"]["values"] is None  # ones are ones in either
    relative = [tensor["values"]["max_relative"] if tensor["values"] else 0 for tensor in found["tensors"]]
    assert relative == sorted(relative, reverse=True)
    text = gearshift("diff", work / "llama", tmp_path / "b").output
    assert "model.layers.0-3.mlp.up_proj.weight" in text
    assert "float32 -> bfloat16" in text
    everything = gearshift("diff", work / "llama", tmp_path / "b", "--all").output
    assert f"  {WEIGHT} " in everything


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((math.nan, 1.0), (math.nan, 1.0), None),
        ((math.inf, -0.0), (math.inf, 0.0), None),
        ((math.nan, 1.0), (2.0, 1.0), {"max_absolute": None, "max_relative": None, "elements": 1, "nan": 1}),
        ((1.0, 4.0), (math.nan, 4.5), {"max_absolute": None, "max_relative": None, "elements": 2, "nan": 1}),
        ((math.inf, 4.0), (-math.inf, 4.0), {"max_absolute": None, "max_relative": None, "elements": 1, "nan": 0}),
        ((math.nan, -4.0), (math.nan, -3.0), {"max_absolute": 1.0, "max_relative": 0.25, "elements": 1, "nan": 0}),
        ((0.0, 0.0), (0.0, 2.0), {"max_absolute": 2.0, "max_relative": None, "elements": 1, "nan": 0}),
    ],
)
def test_numbers_that_are_none_or_infinite_or_zero(
    work: Path, tmp_path: Path, a: tuple[float, float], b: tuple[float, float], expected: dict[str, Any] | None
) -> None:
    def fill(values: tuple[float, float]) -> Callable[[dict[str, Tensor]], None]:
        def fill(tensors: dict[str, Tensor]) -> None:
            tensors["model.norm.weight"].zero_()[:2] = torch.tensor(values)

        return fill

    folders = [edited(work / "native", tmp_path / str(i), fill(values)) for i, values in enumerate((a, b))]
    found = difference(*folders)
    assert [tensor["values"] for tensor in found["tensors"]] == ([expected] if expected else [])
    assert gearshift("diff", *folders).exit_code == (1 if expected else 0)


def rearranged(checkpoint: Checkpoint) -> Checkpoint:
    """The same model in a layout of its own: matrices transposed, in halves, or row by row."""
    tensors: dict[str, Tensor] = {}
    expressions: dict[str, Expression] = {}
    for number, (name, tensor) in enumerate(materialise(checkpoint.plan, checkpoint.source).items()):
        if tensor.ndim == 2 and number % 3 == 0:
            tensors[name] = tensor.t().contiguous()
            expressions[name] = Permute(Reference(name), (1, 0))
        elif tensor.ndim == 2 and number % 3 == 1:
            tensors[f"{name}.0"], tensors[f"{name}.1"] = tensor.chunk(2)
            expressions[name] = Concatenate((Reference(f"{name}.0"), Reference(f"{name}.1")), 0)
        elif tensor.ndim == 2:
            tensors |= {f"{name}.{row}": part for row, part in enumerate(tensor)}
            expressions[name] = Stack(tuple(Reference(f"{name}.{row}") for row in range(len(tensor))), 0)
        else:
            tensors[name], expressions[name] = tensor, Reference(name)
    source = MappingSource(tensors)
    return replace(checkpoint, source=source, plan=Plan(source.schema, checkpoint.schema, expressions))


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 22])
def test_tensors_are_compared_in_pieces_through_any_plan(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        for number, tensor in enumerate(tensors.values()):
            tensor[-1 - number % 2] += 0.25

    a = open_checkpoint(work / "llama")
    b = open_checkpoint(edited(work / "native", tmp_path / "b", change))
    expected = compare(a, b)
    assert expected.equal_tensors == 0
    assert all(tensor.values and 0.24 < tensor.values.absolute < 0.26 for tensor in expected.tensors)
    monkeypatch.setattr("gearshift.diff._COMPARED_AT_ONCE", at_once)
    progress: list[float] = []
    assert compare(rearranged(a), b, progress.append) == expected
    assert sum(progress) == pytest.approx(bytes_to_compare(a, b))
    assert compare(a, rearranged(a)).equal


def test_shapes_blocks_patterns_and_presets_that_differ(work: Path, tmp_path: Path) -> None:
    spec = five_blocks()
    raw = spec.model_dump(mode="json")
    raw["decoder"] |= {"num_layers": 47}
    raw["decoder"]["blocks"]["narrow"] = raw["decoder"]["blocks"].pop("wide")
    raw["decoder"]["pattern"][-1] = "narrow"
    raw["decoder"]["blocks"]["linear"]["mlp"]["intermediate_size"] = 56
    save(ModelSpec.model_validate(raw), tmp_path / "b")
    found = difference(work / "five", tmp_path / "b")
    changes = {change["path"].removeprefix("spec.decoder."): change for change in found["config"]}
    assert (changes["num_layers"]["a"], changes["num_layers"]["b"]) == (48, 47)
    assert changes["pattern"]["a"].endswith("linear x 3, wide)")
    assert "b" not in changes["blocks.wide"]
    assert "a" not in changes["blocks.narrow"]
    assert changes["blocks.linear.mlp.intermediate_size"] == {
        "path": "spec.decoder.blocks.linear.mlp.intermediate_size",
        "a": 48,
        "b": 56,
    }
    assert "b" not in changes["presets.fast"]
    assert {name.split(".")[2] for name in found["only_in_a"]} == {"47"}
    [gate] = [tensor for tensor in found["tensors"] if tensor["name"] == "model.layers.12.mlp.gate_proj.weight"]
    assert (gate["a"]["shape"], gate["b"]["shape"], gate["values"]) == ([48, 24], [56, 24], None)
    assert "[48, 24] float32 -> [56, 24] float32" in gearshift("diff", work / "five", tmp_path / "b").output


def test_settings_in_lists_go_by_their_number() -> None:
    head = {"block": {"mixer": ATTENTION, "mlp": MLP}}
    wider = {"block": {"mixer": ATTENTION, "mlp": {**MLP, "intermediate_size": 48}}}
    plain = five_blocks().model_dump()
    one, two = (
        NativeConfig(ModelSpec.model_validate({**plain, "prediction_heads": heads}))
        for heads in ([head], [wider, head])
    )
    changes = compare_configs(one, two)
    assert [change.path for change in changes] == [
        "spec.prediction_heads.0.block.mlp.intermediate_size",
        "spec.prediction_heads.1",
    ]
    assert (changes[0].a, changes[0].b, changes[1].a) == (40, 48, Missing.MISSING)


def test_a_pattern_written_out_is_the_same_pattern(work: Path, tmp_path: Path) -> None:
    same = edited(work / "five", tmp_path / "b", lambda tensors: None)
    config = json.loads((same / "config.json").read_text())
    config["spec"]["decoder"]["pattern"] *= 3
    (same / "config.json").write_text(json.dumps(config))
    assert difference(work / "five", same)["equal"]
    config["default_preset"] = None
    (same / "config.json").write_text(json.dumps(config))
    assert difference(work / "five", same)["config"] == [{"path": "default_preset", "a": "fast", "b": None}]


def test_bad_input_is_one_sentence(work: Path) -> None:
    for args, message in ((("nowhere",), "there is no"), ((work,), "config.json"), ((), "Missing argument")):
        result = gearshift("diff", work / "llama", *args)
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
        assert "Traceback" not in result.output
