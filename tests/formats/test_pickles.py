"""Pickles are refused unless they are allowed, and then hold tensors and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from gearshift.cli import app
from gearshift.formats import open_checkpoint
from gearshift.plan.execute import materialise
from tests.formats.folders import save

INDEX = "pytorch_model.bin.index.json"


class Trap:
    """An object whose pickle, when it is loaded without care, makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def tensors(tmp_path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a model whose folder, `tmp_path / "model"`, has lost its weights."""
    save(tmp_path / "model")
    found: dict[str, torch.Tensor] = load_file(tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "model.safetensors").unlink()
    return found


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A model in one pickle."""
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    return tmp_path / "model"


@pytest.fixture
def sharded(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The same in two, with an index."""
    names = list(tensors)
    weight_map = {name: f"pytorch_model-0000{1 + (number % 2)}-of-00002.bin" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: tensors[name] for name in names if weight_map[name] == file}, tmp_path / "model" / file)
    (tmp_path / "model" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path / "model"


def refused(path: Path, says: str, allow_pickle: bool = True) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        open_checkpoint(path, allow_pickle=allow_pickle)
    assert "\n" not in str(caught.value)


def test_they_are_refused_unless_they_are_allowed(folder: Path) -> None:
    says = r"pytorch_model\.bin is a pickle, which can run code .* --allow-pickle"
    refused(folder, says, allow_pickle=False)
    refused(folder / "pytorch_model.bin", says, allow_pickle=False)
    (folder / "pytorch_model.bin").unlink()
    refused(folder, "holds no safetensors file")


def test_shards_are_refused_unless_they_are_allowed(sharded: Path) -> None:
    refused(sharded, r"pytorch_model-00001-of-00002\.bin is a pickle", allow_pickle=False)


@pytest.mark.parametrize("kind", ["folder", "sharded"])
def test_a_folder_is_read_as_its_tensors_are(
    kind: str, tensors: dict[str, torch.Tensor], request: pytest.FixtureRequest
) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(kind), allow_pickle=True)
    ours = materialise(checkpoint.plan, checkpoint.source)
    assert ours["model.embed_tokens.weight"].equal(tensors["model.embed_tokens.weight"])
    assert checkpoint.source.schema.keys() == tensors.keys()
    part = checkpoint.source.read("model.embed_tokens.weight", ((3, 5), (2, 9)))
    assert part.equal(tensors["model.embed_tokens.weight"][3:5, 2:9])


def test_one_file_is_read_by_any_name(folder: Path) -> None:
    (folder / "pytorch_model.bin").rename(folder / "weights.pt")
    named = open_checkpoint(folder / "weights.pt", allow_pickle=True)
    assert named.plan == open_checkpoint(folder, allow_pickle=True).plan
    torch.save({}, folder / "other.pt")
    refused(folder, "holds 2 pickles: name the one to read")


def test_safetensors_are_preferred(folder: Path, tmp_path: Path) -> None:
    save(tmp_path / "again").save_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")
    assert open_checkpoint(folder, allow_pickle=True).plan == open_checkpoint(folder).plan


def test_the_command_line(folder: Path, tmp_path: Path) -> None:
    arguments = ["convert", str(folder), str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "is a pickle" in result.output
    assert not (tmp_path / "out").exists()
    assert CliRunner().invoke(app, [*arguments, "--allow-pickle"]).exit_code == 0
    assert open_checkpoint(tmp_path / "out").format.name == "gearshift"


def test_nothing_is_run(folder: Path, tmp_path: Path) -> None:
    torch.save({"model.norm.weight": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    refused(folder, r"pytorch_model\.bin is damaged, or holds more than tensors by name")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.ones(2)], "does not hold tensors by name"),
        ({3: torch.ones(2)}, "does not hold tensors by name"),
        ({"state_dict": {"w": torch.ones(2)}}, "holds 'state_dict', which is no plain tensor but dict"),
        ({"w": torch.ones(2, 2).to_sparse()}, "holds 'w', which is no plain tensor"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' in .* has an unknown dtype 'complex64'"),
        ({"w": torch.ones(1).expand(1 << 40)}, "'w' in .* is larger than what is stored of it"),
    ],
)
def test_what_is_no_table_of_tensors(folder: Path, content: Any, says: str) -> None:
    torch.save(content, folder / "pytorch_model.bin")
    refused(folder, says)


def test_damaged_files(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    for content in (b"", b"\x80\x02", whole[:1000], whole[: len(whole) // 2]):
        path.write_bytes(content)
        refused(folder, r"pytorch_model\.bin is damaged, or holds more than tensors by name")


def test_indices_that_do_not_fit(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.bin"))
    whole = second.read_bytes()
    second.write_bytes(first.read_bytes())
    refused(sharded, f"is in two files, {first.name} and {second.name}")
    second.unlink()
    refused(sharded, f"names the shard '{second.name}', which is not there")
    second.write_bytes(whole)
    index = json.loads((sharded / INDEX).read_text())
    name = index["weight_map"].popitem()[0]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, f"does not name the tensor '{name}'")


def test_files_from_before_archives(folder: Path) -> None:
    path = folder / "pytorch_model.bin"
    before = open_checkpoint(folder, allow_pickle=True)
    # Clones: what is read from an archive stays in the file, which is overwritten here.
    expected = {name: tensor.clone() for name, tensor in materialise(before.plan, before.source).items()}
    torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    again = open_checkpoint(folder, allow_pickle=True)
    found = materialise(again.plan, again.source)
    assert all(found[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("allow_pickle", [True, False])
def test_a_pickle_is_one_whatever_its_name(
    folder: Path, tensors: dict[str, torch.Tensor], zipped: bool, allow_pickle: bool
) -> None:
    (folder / "pytorch_model.bin").unlink()
    torch.save(tensors, folder / "model.safetensors", _use_new_zipfile_serialization=zipped)
    refused(folder, r"model\.safetensors is a pickle, .* ends in \.bin .* --allow-pickle", allow_pickle)
    (folder / "model.safetensors").rename(folder / "model.bin")
    assert open_checkpoint(folder, allow_pickle=True).source.schema.keys() == tensors.keys()
