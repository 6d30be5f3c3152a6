"""Writing a checkpoint folder: whole or not at all, and resumable."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gearshift.files import NO_SPACE
from gearshift.formats.documents import write_json
from gearshift.plan import Plan
from gearshift.plan.execute import PROGRESS_FILE, Source, execute

SHARD_BYTES = 5_000_000_000
_SLACK_BYTES = 50_000_000
"""Beside the tensors: headers, config, tokenizer."""


def write_checkpoint(
    out: Path,
    *,
    plan: Plan,
    source: Source,
    config: dict[str, Any],
    extras: Callable[[Path], None] | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    seed: int = 0,
    metadata: dict[str, str] | None = None,
    fingerprint: str = "",
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `plan`'s target, `config` as `config.json`, and whatever `extras` writes into the folder it is called with.

    All of it goes to a hidden folder beside `out`, which takes the name `out` when it is complete. A run that was
    interrupted leaves that folder; the same run goes on from there, after the shards it had finished. With
    `overwrite`, an earlier checkpoint at `out` stays until the new one is complete.

    Args:
        fingerprint: tells one content of the source from another (see `Checkpoint.fingerprint`).
        progress: called with the number of bytes of each tensor that was written, or need not be written again.

    Raises ValueError if `out` is there already, if the disk is or becomes full, and for what is wrong with the tensors.
    """
    check_writable(out, overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial"
    _check_space(partial, plan)
    partial.mkdir(exist_ok=True)
    try:
        # The small files come first: what is wrong with them then shows before the long work.
        _clear_documents(partial)
        write_json(partial / "config.json", config)
        if extras is not None:
            extras(partial)
        execute(
            plan,
            source,
            partial,
            seed=seed,
            shard_bytes=shard_bytes,
            metadata=metadata,
            progress=progress,
            fingerprint=fingerprint,
        )
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise ValueError(
            f"no space is left for {out}: free some and run the same again to go on, or remove {partial}"
        ) from error
    except ValueError:
        # The input is at fault, so that no later run could go on from here.
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _replace(partial, out)


def check_writable(out: Path, overwrite: bool) -> None:
    """ValueError if `out` is there and may not be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file: name a folder that does not exist yet")
    if not overwrite:
        raise ValueError(f"{out} exists already: choose another folder, or pass --overwrite to replace it")
    if not (out / "config.json").is_file():
        raise ValueError(
            f"{out} is not a checkpoint (it has no config.json), so it will not be overwritten: remove it yourself"
        )


def _check_space(partial: Path, plan: Plan) -> None:
    done = sum(path.stat().st_size for path in partial.glob("*.safetensors")) if partial.is_dir() else 0
    needed = sum(info.bytes for info in plan.target.values()) + _SLACK_BYTES - done
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise ValueError(
            f"no space left: {partial.parent.absolute()} has {free / 1e9:.2f} GB free, of {needed / 1e9:.2f} GB needed"
        )


def _clear_documents(partial: Path) -> None:
    """Remove what an interrupted run left beside its shards."""
    for path in partial.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.suffix != ".safetensors" and path.name != PROGRESS_FILE:
            path.unlink()


def _replace(partial: Path, out: Path) -> None:
    """Give the finished folder its name, in place of what had it."""
    if not out.exists():
        partial.rename(out)
        return
    if not any(out.iterdir()):
        out.rmdir()
        partial.rename(out)
        return
    old = out.parent / f".{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    try:
        partial.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)
