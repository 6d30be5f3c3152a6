"""Running a plan: tensors in memory, or safetensors shards streamed to a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import torch

from gearshift.files import write_whole
from gearshift.plan.ahead import made_ahead
from gearshift.plan.draws import initialise
from gearshift.plan.expressions import (
    Cast,
    Concatenate,
    Expression,
    Initialise,
    Permute,
    Reference,
    Repeat,
    Reshape,
    Slice,
    Stack,
    widens,
)
from gearshift.plan.plan import Plan, difference
from gearshift.plan.rewrite import bind
from gearshift.plan.shards import Made, Shard, remove_shards, split, write_index, write_shard
from gearshift.plan.sources import (
    CheckedSource,
    FileSource,
    MappingSource,
    Source,
    count_nonfinite,
    info_of,
    region_read,
)

__all__ = ["MappingSource", "Source", "evaluate", "execute", "initialise", "materialise"]

PROGRESS_FILE = ".gearshift-progress.json"

_KEPT_BYTES = 512 * 2**20
"""The most that is held back in memory for targets to come: a layer's shared projections fit, a model does not."""

_AHEAD_BYTES = 128 * 2**20
"""The most that is made before it can be written: enough to keep the disk busy."""

# Goes into the digest of a run: to be raised when the same plan comes to give other bytes.
_BYTES_VERSION = 1


def evaluate(expression: Expression, source: Source, seed: int, name: str) -> torch.Tensor:
    """The tensor that an expression yields for target `name`; `seed` and `name` settle what initialisers draw.

    Of a sliced reference only the region is read. The result may share memory with the source: never write to it.
    Raises ValueError where a cast overflows.
    """
    return _evaluate(bind(expression, name), source, seed, name)


def _evaluate(expression: Expression, source: Source, seed: int, target: str) -> torch.Tensor:
    def below(part: Expression) -> torch.Tensor:
        return _evaluate(part, source, seed, target)

    if (read := region_read(expression, source.schema)) is not None:
        return source.read(*read)
    match expression:
        case Slice(part, dim, start, stop):
            return below(part).narrow(dim, start, stop - start)
        case Concatenate(parts, dim):
            return torch.cat([below(part) for part in parts], dim)
        case Stack(parts, dim):
            return torch.stack([below(part) for part in parts], dim)
        case Reshape(part, shape):
            return below(part).reshape(shape)
        case Permute(part, dims):
            return below(part).permute(dims)
        case Repeat(part, dim, times):
            return below(part).repeat_interleave(times, dim)
        case Cast(part, dtype):
            return _cast(below(part), dtype, target)
        case Initialise(initialiser, shape, dtype, name):
            assert name is not None, "evaluate binds every name"
            return initialise(initialiser, shape, dtype, seed, name)
        case Reference():
            raise AssertionError("a reference is a read")


def _cast(tensor: torch.Tensor, dtype: str, target: str) -> torch.Tensor:
    result = tensor.to(getattr(torch, dtype))
    original = info_of(tensor).dtype
    if not widens(original, dtype) and (count := count_nonfinite(result)):
        raise ValueError(
            f"target {target!r}: {count} of {result.numel()} values are too large for {dtype}, to which they are cast "
            f"from {original}; choose a dtype of wider range"
        )
    return result


def materialise(plan: Plan, source: Source, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every target tensor in memory, in the target's order.

    Plain references share the source's memory, and two of the same tensor share it with each other. Raises
    ValueError for a source that is not the plan's, and for non-finite values in a tensor that is read.
    """
    _check_source(plan, source)
    checked = CheckedSource(source, plan.expressions.values(), _KEPT_BYTES)
    return {name: evaluate(plan.expressions[name], checked, seed, name) for name in plan.target}


def execute(
    plan: Plan,
    source: Source,
    out: Path,
    *,
    seed: int = 0,
    shard_bytes: int = 5_000_000_000,
    metadata: dict[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
    fingerprint: str = "",
) -> None:
    """Write the target to folder `out` as safetensors: one file, or shards of `shard_bytes` bytes and their index.

    The same plan, source, seed, shard size and metadata give the same bytes. Each shard appears under its name only
    when it is whole, so a run that was killed and is repeated into the same folder goes on after the shards it had
    finished; it starts over when anything above differs, the caller's `fingerprint` of the source's contents
    included. `progress` is called with the bytes of each tensor, those of skipped shards too.

    Raises ValueError for a source that is not the plan's and for non-finite values, OSError when the disk is full.
    """
    _check_source(plan, source)
    out.mkdir(parents=True, exist_ok=True)
    shards = split(plan.target, shard_bytes, {"format": "pt", **(metadata or {})})
    _resume_or_start_over(out, _digest(plan, shards, seed, fingerprint))
    report = progress or (lambda count: None)
    unfinished = [shard for shard in shards if not shard.finished(out)]
    names = [name for shard in unfinished for name in shard.names]
    checked = CheckedSource(source, [plan.expressions[name] for name in names], min(_KEPT_BYTES, shard_bytes))

    def make(name: str) -> Made:
        expression = plan.expressions[name]
        read = region_read(expression, source.schema)
        extent = source.extent(*read) if read and isinstance(source, FileSource) else None
        return Made(evaluate(expression, checked, seed, name), extent)

    with closing(made_ahead(names, make, lambda name: plan.target[name].bytes, _AHEAD_BYTES)) as values:
        for shard in shards:
            if shard in unfinished:
                write_shard(shard, out, plan.target, values, report)
            else:
                report(shard.bytes)
    if len(shards) > 1:
        write_index(shards, out, plan.target)
    (out / PROGRESS_FILE).unlink()


def _check_source(plan: Plan, source: Source) -> None:
    if problem := difference(plan.source, source.schema):
        raise ValueError(f"the plan is for other tensors than the source holds: of the plan and the source {problem}")


def _digest(plan: Plan, shards: list[Shard], seed: int, fingerprint: str) -> str:
    """A hash of all that settles the bytes of a run; the shards' headers hold the target and the metadata."""
    hasher = hashlib.sha256()
    for part in (_BYTES_VERSION, seed, fingerprint, sorted(plan.source.items()), sorted(plan.expressions.items())):
        hasher.update(repr(part).encode() + b"\0")
    for shard in shards:
        hasher.update(shard.header)
    return hasher.hexdigest()


def _resume_or_start_over(out: Path, digest: str) -> None:
    """Leave the finished shards of an equal run where they are; otherwise clear the folder of shards."""
    path = out / PROGRESS_FILE
    try:
        recorded = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        recorded = None
    if recorded != {"digest": digest}:
        remove_shards(out)
        write_whole(path, json.dumps({"digest": digest}))
