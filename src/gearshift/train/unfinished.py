"""A run as a checkpoint: its finished model, or the model that it started from with what its shards say was learnt."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gearshift.formats import Checkpoint, open_checkpoint
from gearshift.formats.documents import read_json
from gearshift.plan import Box, Schema
from gearshift.plan.execute import Source
from gearshift.train.checkpoint import Checkpoints, learnt, read_learnt


def open_run(folder: Path) -> Checkpoint:
    """What a run has learnt up to its last checkpoint, or all of it. ValueError if it has no checkpoint yet."""
    if (folder / "model").exists():
        return open_checkpoint(folder / "model")
    shards = Checkpoints(folder / "checkpoints").latest()
    if shards is None:
        raise ValueError(f"the run in {folder} has neither a model nor a checkpoint yet: let it train for longer")
    base = open_checkpoint(read_json(folder / "recipe.json")["recipe"]["model"])
    return replace(base, source=_Learnt(base.source, shards), fingerprint=f"{base.fingerprint} {shards.resolve()}")


class _Learnt:
    """The tensors of `base`, and in place of those that learn what the checkpoint `shards` holds, in the same dtype.

    Of parameters that are averaged, the average: what the run would write if its stage ended here.
    """

    def __init__(self, base: Source, shards: Path):
        self._base = base
        self._shards = shards
        self._keys = learnt(shards)
        if missing := self._keys.keys() - base.schema.keys():
            raise ValueError(f"the model that the run started from has changed: it has no {min(missing)!r} any more")
        self._last: tuple[str, Tensor] | None = None

    @property
    def schema(self) -> Schema:
        return self._base.schema

    def read(self, name: str, box: Box | None = None) -> Tensor:
        if name not in self._keys:
            return self._base.read(name, box)
        if self._last is None or self._last[0] != name:
            info = self.schema[name]
            self._last = name, read_learnt(self._shards, self._keys[name], info.shape).to(getattr(torch, info.dtype))
        tensor = self._last[1]
        return tensor if box is None else tensor[tuple(slice(*bounds) for bounds in box)]
