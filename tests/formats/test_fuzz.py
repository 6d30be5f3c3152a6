"""Damaged checkpoints: some hundred cases of the fuzzer, and what it has found before (see `tests/formats/fuzz.py`)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gearshift.formats import open_checkpoint
from gearshift.model import schema
from tests.formats.fuzz import Case, case, check, make_sources, run
from tests.models import supernet_spec

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
KDA = ("spec", "decoder", "blocks", "layer", "mixer", "mixers", "kda")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_sources(folder)
    return folder


def test_damaged_checkpoints_are_read_or_refused_clearly(sources: Path, tmp_path: Path) -> None:
    problems: list[str] = []

    def failed(number: int, damaged: Case, problem: str) -> None:
        problems.append(f"case {number}, {damaged.source}/{damaged.file}: {problem}")

    assert run(sources, tmp_path / "case", iter(range(400)), failed) == 400
    assert not problems


def test_a_number_is_always_the_same_case(sources: Path) -> None:
    assert [case(number, sources) for number in range(30)] == [case(number, sources) for number in range(30)]


def with_value(*path: str, value: Any) -> Callable[[bytes], bytes]:
    """A change of one value in a JSON document."""

    def change(text: bytes) -> bytes:
        document = json.loads(text)
        holder = document
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = value
        return json.dumps(document).encode()

    return change


def in_header(change: Callable[[bytes], bytes]) -> Callable[[bytes], bytes]:
    """The same in the header of a safetensors file."""

    def changed(data: bytes) -> bytes:
        end = 8 + int.from_bytes(data[:8], "little")
        header = change(data[8:end])
        return len(header).to_bytes(8, "little") + header + data[end:]

    return changed


def nested(depth: int) -> Any:
    value: Any = 0
    for _ in range(depth):
        value = [value]
    return value


FOUND: dict[str, tuple[str, str, Callable[[bytes], bytes], str]] = {
    "no object": ("llama", CONFIG, lambda _: b"1.5", "does not hold a JSON object"),
    "no object in an index": ("llama-sharded", INDEX, lambda _: b"true", "does not hold a JSON object"),
    "no object in a header": (
        "llama-sharded",
        "model-00001-of-00005.safetensors",
        in_header(lambda _: b"2.5 "),
        "not a JSON",
    ),
    "brackets without an end": ("llama", CONFIG, lambda _: b"[" * 100_000, "config.json is not valid JSON"),
    "nesting that JSON reads": ("llama", CONFIG, with_value("pad_token_id", value=nested(900)), "nested too deep"),
    "nesting in a header": ("llama", WEIGHTS, in_header(with_value("__metadata__", value=nested(900))), "too deep"),
    "digits without an end": (
        "llama",
        CONFIG,
        lambda text: text.replace(b" 32,", b"9" * 5000 + b",", 1),
        "is not valid JSON",
    ),
    "sizes beyond any tensor": ("llama", CONFIG, with_value("vocab_size", value=2**62), "there can be no model"),
    "sizes beyond any number": ("llama", CONFIG, with_value("vocab_size", value=2**63), "there can be no model"),
    "layers without an end": (
        "dream-yarn",
        CONFIG,
        with_value("num_hidden_layers", value=2**31),
        "at most 4096 layers",
    ),
    "long values": ("qwen2", CONFIG, with_value("layer_types", value=["x"] * 3000), "config.json: .* \\.\\.\\. "),
    "NUL in a name": ("gearshift", CONFIG, with_value("spec", "\x00", value=1), r"spec\.\\x00"),
    "half a character": ("llama", WEIGHTS, in_header(with_value("lm_head.weight", value="\ud800")), r"\\ud800"),
    "long dtypes": (
        "llama",
        WEIGHTS,
        in_header(with_value("lm_head.weight", "dtype", value="x" * 5000)),
        "the tensor 'lm_head.weight' in .*model.safetensors has an unknown dtype 'xxx",
    ),
    "infinite numbers": ("gearshift", CONFIG, with_value(*KDA, "norm_epsilon", value=float("inf")), "norm_epsilon"),
    "a list for a type": ("gearshift", CONFIG, with_value(*KDA, "type", value=[]), "type"),
    "a mapping for a mixer's type": (
        "gearshift",
        CONFIG,
        with_value("spec", "decoder", "blocks", "layer", "mixer", "type", value={}),
        "type",
    ),
    "a list for a preset": ("gearshift", CONFIG, with_value("default_preset", value=[[]]), "default preset"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_the_fuzzer_found(name: str, sources: Path, tmp_path: Path) -> None:
    source, file, change, says = FOUND[name]
    damaged = Case(source, file, change((sources / source / file).read_bytes()))
    assert check(damaged, sources, tmp_path / "case") == ""
    with pytest.raises(ValueError, match=says):
        open_checkpoint(tmp_path / "case")


def test_a_model_of_very_many_layers_is_laid_out_without_drawing_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four thousand layers, which a damaged config can ask for, took longer than the fuzzer waits."""

    def drawn(*_: object, **__: object) -> None:
        raise AssertionError("weights were drawn")

    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", drawn)
    spec = supernet_spec(layers=3, vocab_size=59)
    assert schema(spec, "float32")["lm_head.weight"].shape == (59, spec.hidden_size)
