"""A checkpoint is written whole or not at all, and an interrupted run goes on where it stopped."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from gearshift.formats import Checkpoint, open_checkpoint
from gearshift.plan import Box, Schema
from gearshift.plan.execute import Source
from tests.formats.folders import convert, edit_tensors, files, save

SHARD = 16_000


class Failing:
    """A source that raises at its `count`-th read."""

    def __init__(self, source: Source, count: int, error: BaseException):
        self.source, self.left, self.error = source, count, error

    @property
    def schema(self) -> Schema:
        return self.source.schema

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return self.source.read(name, box)


class Usage(NamedTuple):
    free: int


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    save(tmp_path / "source")
    (tmp_path / "source" / "README.md").write_text("not ours")
    (tmp_path / "source" / "tokenizer.json").write_text("{}")
    settings = {"temperature": 0.5, "transformers_version": "4.0", "cache_implementation": "static"}
    (tmp_path / "source" / "generation_config.json").write_text(json.dumps(settings))
    return open_checkpoint(tmp_path / "source")


@pytest.fixture
def names(tmp_path: Path) -> Iterator[set[str]]:
    """What may lie in the folder of the test at its end."""
    allowed = {"source"}
    yield allowed
    assert {path.name for path in tmp_path.iterdir()} == allowed


def failing(checkpoint: Checkpoint, count: int, error: BaseException) -> Checkpoint:
    object.__setattr__(checkpoint, "source", Failing(checkpoint.source, count, error))
    return checkpoint


def test_what_a_folder_holds(checkpoint: Checkpoint, tmp_path: Path, names: set[str]) -> None:
    names.add("out")
    written: list[int] = []
    convert(checkpoint, tmp_path / "out", progress=written.append)
    expected = {"config.json", "generation_config.json", "model.safetensors", "modeling_gearshift.py", "tokenizer.json"}
    assert set(files(tmp_path / "out")) == expected
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"temperature": 0.5}
    assert sum(written) == sum(info.bytes for info in checkpoint.schema.values())


def test_the_same_input_gives_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name in ("one", "two"):
        convert(checkpoint, tmp_path / name, shard_bytes=SHARD)
    assert files(tmp_path / "one") == files(tmp_path / "two")
    assert open_checkpoint(tmp_path / "one").native == open_checkpoint(tmp_path / "two").native


def test_a_killed_run_goes_on_to_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path, names: set[str]) -> None:
    names |= {"whole", "out"}
    convert(checkpoint, tmp_path / "whole", shard_bytes=SHARD)
    with pytest.raises(KeyboardInterrupt):
        convert(failing(checkpoint, 12, KeyboardInterrupt()), tmp_path / "out", shard_bytes=SHARD)
    assert not (tmp_path / "out").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in (tmp_path / ".out.partial").glob("*.safetensors")}
    assert finished

    again = open_checkpoint(tmp_path / "source")
    convert(again, tmp_path / "out", shard_bytes=SHARD)
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for name, time in finished.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == time


def test_another_source_does_not_go_on(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        convert(failing(checkpoint, 12, KeyboardInterrupt()), tmp_path / "out", shard_bytes=SHARD)
    edit_tensors(tmp_path / "source", model__embed_tokens__weight=torch.zeros(61, 32))
    changed = open_checkpoint(tmp_path / "source")
    convert(changed, tmp_path / "out", shard_bytes=SHARD)
    assert not open_checkpoint(tmp_path / "out").source.read("model.embed_tokens.weight").any()


def test_what_exists_is_not_replaced_unasked(checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert(checkpoint, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(ValueError, match=r"out exists already: choose another folder, or pass --overwrite"):
        convert(checkpoint, tmp_path / "out", shard_bytes=SHARD)
    assert files(tmp_path / "out") == before
    convert(checkpoint, tmp_path / "out", shard_bytes=SHARD, overwrite=True)
    assert "model.safetensors" not in files(tmp_path / "out")


def test_only_checkpoints_are_overwritten(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(ValueError, match=r"photos is not a checkpoint .* remove it yourself"):
        convert(checkpoint, tmp_path / "photos", overwrite=True)
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="file is a file"):
        convert(checkpoint, tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    convert(checkpoint, tmp_path / "empty")
    assert "config.json" in files(tmp_path / "empty")


@pytest.mark.parametrize(
    "error", [ValueError("bad"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full"), OSError("io")]
)
def test_a_failed_overwrite_leaves_what_was_there(checkpoint: Checkpoint, tmp_path: Path, error: Any) -> None:
    convert(checkpoint, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises((ValueError, KeyboardInterrupt, OSError)):
        convert(failing(checkpoint, 5, error), tmp_path / "out", overwrite=True, shard_bytes=SHARD)
    assert files(tmp_path / "out") == before


def test_a_full_disk_is_seen_beforehand(
    checkpoint: Checkpoint, tmp_path: Path, names: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage(free=1000))
    with pytest.raises(ValueError, match=r"no space left: .* has 0\.00 GB free, of 0\.05 GB needed"):
        convert(checkpoint, tmp_path / "out")


def test_a_disk_that_fills_up(checkpoint: Checkpoint, tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(ValueError, match=r"no space is left for .*out: free some and run the same again"):
        convert(failing(checkpoint, 12, full), tmp_path / "out", shard_bytes=SHARD)
    assert not (tmp_path / "out").exists()
    assert not [path for path in (tmp_path / ".out.partial").iterdir() if path.suffix == ".partial"]


def test_a_value_that_is_not_finite(checkpoint: Checkpoint, tmp_path: Path, names: set[str]) -> None:
    weight = torch.ones(61, 32)
    weight[3, 4] = torch.nan
    edit_tensors(tmp_path / "source", model__embed_tokens__weight=weight)
    with pytest.raises(ValueError, match=r"'model\.embed_tokens\.weight' holds 1 non-finite value"):
        convert(open_checkpoint(tmp_path / "source"), tmp_path / "out")


def test_a_bad_generation_config_is_named(checkpoint: Checkpoint, tmp_path: Path, names: set[str]) -> None:
    (tmp_path / "source" / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        convert(checkpoint, tmp_path / "out")
