"""Planning for a model of real size: 48 layers with four mixers each, the weights of which nobody ever looks at."""

import json
import math
import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.tree import Tree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typer.testing import CliRunner

from gearshift.cli import app
from gearshift.conversion import convert
from gearshift.formats.folder import SafetensorsSource
from gearshift.plan import describe, render
from gearshift.surgery import load_surgery

SURGERY = Path(__file__).parents[2] / "recipes" / "quickstart" / "surgery.yaml"
LAYERS, HIDDEN, WIDE, KEYS, VOCABULARY = 48, 4096, 11008, 1024, 32000


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Llama of 17.5 GB in a file that is all hole: its header is real, its size is too, and the disk holds 60 kB."""
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    path = tmp_path / "large"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    shapes |= {"lm_head.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qo"}
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (KEYS, HIDDEN) for name in "kv"}
        shapes |= {f"{prefix}mlp.{name}_proj.weight": (WIDE, HIDDEN) for name in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (HIDDEN, WIDE)}
        shapes |= {f"{prefix}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    entries, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    header = json.dumps(entries).encode()
    with (path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path


class LargestTensor(TorchDispatchMode):
    """The bytes of the largest tensor that torch makes outside the meta device."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return result


def test_a_large_plan_reads_and_makes_no_weight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: object) -> torch.Tensor:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(SafetensorsSource, "read", read)
    with LargestTensor() as largest:
        conversion = convert(folder, [load_surgery(SURGERY)])
    assert conversion.native.spec.choices == (("attention", "window", "gdn", "kda"),) * LAYERS
    assert conversion.bytes > 36e9
    assert largest.bytes < 2 * HIDDEN  # as much as the smallest weight
    with largest:
        torch.empty(HIDDEN)
    assert largest.bytes == 4 * HIDDEN


def test_a_large_plan_prints_each_kind_of_layer_once(folder: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(folder), str(tmp_path / "out"), "--surgery", str(SURGERY), "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) < 70
    assert sum("layers.0-47" in line for line in lines) == 1
    assert any(
        "{q_proj, o_proj}.weight  [4096, 4096] bfloat16 ← model.layers.*.self_attn.*.weight" in line for line in lines
    )
    assert not (tmp_path / "out").exists()


def five_blocks(more: dict[str, Any], lora: dict[str, Any] | None) -> dict[str, Any]:
    """A spec of 48 layers of five blocks with four mixers and `more`, which differ in windows and MLPs."""
    attention = {"type": "attention", "heads": 32, "kv_heads": 8}
    blocks = {}
    for number, name in enumerate(("alice", "bob", "claire", "dave", "erin"), 1):
        mixers = {
            "attention": attention,
            "window": {**attention, "window": 512 * number},
            "gdn": {"type": "gated_delta_net", "key_heads": 16, "value_heads": 32},
            "mamba2": {"type": "mamba2"},
            **more,
        }
        blocks[name] = {
            "mixer": {"type": "stochastic", "main": "attention", "mixers": mixers},
            "mlp": {"type": "gated", "intermediate_size": WIDE + 256 * number},
            "lora": lora,
        }
    pattern = ["alice", "bob", "claire", "bob", "dave", "erin", "alice"]
    decoder = {"num_layers": LAYERS, "pattern": pattern, "blocks": blocks}
    return {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "max_positions": 4096, "decoder": decoder}


def lines_of(tree: Tree, above: str = "") -> Iterator[tuple[list[str], str]]:
    """The names that each line of a printed plan stands for, and what it says of them."""
    for child in tree.children:
        label, _, said = str(child.label).partition("  ")
        path = f"{above}.{label}".removeprefix(".")
        if said:
            parts = re.split(r"\.(?![^{]*})", path)
            yield [".".join(name) for name in product(*map(expanded, parts))], said
        yield from lines_of(child, path)


def expanded(part: str) -> list[str]:
    if part.startswith("{"):
        return part[1:-1].split(", ")
    if not re.fullmatch(r"[0-9,-]+", part):
        return [part]
    runs = (run.partition("-") for run in part.split(","))
    return [str(number) for first, _, last in runs for number in range(int(first), int(last or first) + 1)]


@pytest.mark.parametrize(
    ("more", "lora", "most"),
    [
        ({}, None, 60),
        ({"kda": {"type": "kimi_delta_attention", "heads": 32}}, {"rank": 8, "alpha": 16}, 130),
    ],
    ids=["plain", "lora"],
)
def test_a_plan_of_five_blocks_is_short_and_complete(
    tmp_path: Path, more: dict[str, Any], lora: dict[str, Any] | None, most: int
) -> None:
    (tmp_path / "five.json").write_text(json.dumps(five_blocks(more, lora)))
    plan = convert(tmp_path / "five.json").plan
    console = Console(width=400)
    with console.capture() as capture:
        console.print(render(plan))
    assert len(capture.get().splitlines()) <= most
    left = dict(plan.target)
    for names, said in lines_of(render(plan)):
        for name in names:
            assert said == f"{left.pop(name)} ← {describe(plan.expressions[name])}"
    assert not left
