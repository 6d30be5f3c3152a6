"""Which files of a folder hold its weights: one file, or shards and the index that says how they belong together."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gearshift.formats.documents import read_json


class Layout(NamedTuple):
    """How transformers names the files of weights of one kind."""

    kind: str
    suffix: str
    single: str

    @property
    def index_file(self) -> str:
        """The file that names the shards."""
        return f"{self.single}.index.json"

    def weight_files(self, folder: Path) -> list[Path]:
        """The files of this kind that hold the weights of a folder; none if there are none.

        Raises ValueError, naming the file, for an index that is no good, a shard that is missing, and for several
        files without an index.
        """
        index = folder / self.index_file
        if index.is_file():
            named = sorted(set(_weight_map(index).values()))
            for name in named:
                if Path(name).name != name or not name.endswith(self.suffix):
                    raise ValueError(f"{index} names {name!r}, which is no {self.kind} file of its folder")
                if not (folder / name).is_file():
                    raise ValueError(f"{index} names the shard {name!r}, which is not there")
            return [folder / name for name in named]
        if (folder / self.single).is_file():
            return [folder / self.single]
        found = sorted(folder.glob(f"*{self.suffix}"))
        if len(found) > 1:
            raise ValueError(
                f"{folder} holds {len(found)} {self.kind} files, but no {self.index_file} that says how they belong "
                "together"
            )
        return found

    def check_index(self, folder: Path, found: Mapping[str, str]) -> None:
        """ValueError if the index, where there is one, does not say of `found` tensors which file holds which."""
        index = folder / self.index_file
        if not index.is_file():
            return
        weight_map = _weight_map(index)
        for name, file in weight_map.items():
            if found.get(name) != file:
                elsewhere = f", but {found[name]} does" if name in found else ""
                raise ValueError(f"{index} says that {file} holds the tensor {name!r}, which it does not{elsewhere}")
        for name, file in found.items():
            if name not in weight_map:
                raise ValueError(f"{index} does not name the tensor {name!r}, which {file} holds")


SAFETENSORS = Layout("safetensors", ".safetensors", "model.safetensors")
PICKLE = Layout("pickle", ".bin", "pytorch_model.bin")


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not all(isinstance(name, str) for name in weight_map.values())
        or not weight_map
    ):
        raise ValueError(f"{index} has no 'weight_map' from tensor names to file names")
    return weight_map
