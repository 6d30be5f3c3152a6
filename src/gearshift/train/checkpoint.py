"""Checkpoints: what a run needs to go on as if it had never stopped, on as many processes as there are then.

Every process writes and reads its own shards, through torch.distributed.checkpoint. A checkpoint is written aside and
renamed, so always whole.
"""

import errno
import json
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from gearshift.files import write_whole, writing
from gearshift.train.loop import Distiller, Progress
from gearshift.train.parallel import ALONE

# It says so of every process that runs alone, although it was told.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

WEIGHT, MOMENT, AVERAGE = "weight/", "optimiser/", "average/"
"""What the names in a checkpoint begin with: `weight/NAME`, `optimiser/KEY/NAME` and `average/NAME`."""


class Checkpoints:
    """The checkpoints of a run, of which the last one is kept."""

    def __init__(self, folder: Path, background: bool = False):
        """`background`: whether the run goes on while a checkpoint is written: see `wait`."""
        self.folder = folder
        self.background = background
        self._pending: tuple[Distiller, Path, Path, Future[Any]] | None = None
        self._group: dist.ProcessGroup | None = None
        self._moving = Lock()

    def latest(self) -> Path | None:
        """The last checkpoint, None if there is none."""
        return max(self.folder.glob("step-*"), default=None)

    @property
    def steps(self) -> int:
        """Steps done, over all stages, by the last checkpoint; 0 if there is none."""
        last = self.latest()
        return 0 if last is None else int(last.name.split("-")[1])

    def save(self, distiller: Distiller) -> None:
        """Write a checkpoint, then remove those before it."""
        self.wait()
        target = self.folder / f"step-{distiller.global_step:08d}-stage-{distiller.progress.stage:02d}"
        fresh = target.with_name(f".{target.name}.tmp")
        progress: dict[str, Any] = {"stage": distiller.progress.stage, "step": distiller.progress.step}
        if distiller.average is not None:
            progress["moves"] = distiller.average.moves
        distiller.parallel.once(lambda: _start(fresh, progress))
        alone = distiller.parallel is ALONE
        state = _weights(distiller) | _moments(distiller) | _averages(distiller)
        if not self.background:
            with _causes(fresh):
                dcp.save(state, checkpoint_id=fresh, no_dist=alone)
            self._finish(distiller, fresh, target)
            return
        if self._group is None and not alone:
            # What is exchanged in the background must not come between what the run exchanges.
            self._group = dist.new_group(backend="gloo")
        pending = dcp.async_save(state, checkpoint_id=fresh, process_group=self._group, no_dist=alone)
        assert isinstance(pending, Future)

        def finish(done: Future[Any]) -> None:
            if done.exception() is None:
                self._finish(distiller, fresh, target)

        pending.add_done_callback(finish)
        self._pending = (distiller, fresh, target, pending)

    def wait(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._pending is not None:
            distiller, fresh, target, pending = self._pending
            self._pending = None
            with _causes(fresh):
                pending.result()
            self._finish(distiller, fresh, target)

    def remove(self) -> None:
        """Remove them all."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def restore(self, distiller: Distiller) -> bool:
        """Bring a fresh distiller to the last checkpoint; False if there is none. ValueError if it cannot be read."""
        path = distiller.parallel.once(self.latest)
        if path is None:
            return False
        written = _names(path)
        state = _weights(distiller)
        if _learnt(written) != distiller.scales.keys():
            raise ValueError(f"the checkpoint {path} holds other parameters than those that learn in this run")
        parameters = {name: p for name, p in distiller.model.named_parameters() if name in distiller.scales}
        moments: dict[str, dict[str, Tensor]] = {}
        for key, name in (name.removeprefix(MOMENT).split("/", 1) for name in written if name.startswith(MOMENT)):
            blank = torch.zeros((), device=distiller.device) if key == "step" else torch.zeros_like(parameters[name])
            moments.setdefault(name, {})[key] = state[f"{MOMENT}{key}/{name}"] = blank.detach()
        averages: dict[str, Tensor] = {}
        for name in (name.removeprefix(AVERAGE) for name in written if name.startswith(AVERAGE)):
            averages[name] = state[AVERAGE + name] = torch.zeros_like(parameters[name]).detach()
        progress = _load(state, path, distiller.parallel is ALONE)
        distiller.progress = Progress(progress["stage"], progress["step"])
        if progress["step"]:
            distiller.optimiser, distiller.average = distiller.make_optimiser(), distiller.make_average()
            distiller.optimiser.state.update({parameters[name]: values for name, values in moments.items()})
        if distiller.average is not None:
            distiller.average.moves, distiller.average.averages = progress["moves"], averages
        return True

    def _finish(self, distiller: Distiller, fresh: Path, target: Path) -> None:
        """Put a checkpoint that is written into its place, unless that was done, and remove those before it."""
        with self._moving:
            if not distiller.parallel.is_first or not fresh.exists():
                return
            if target.exists():
                shutil.rmtree(target)
            fresh.rename(target)
            for path in self.folder.glob("*step-*"):  # whatever else may lie there is not ours
                if path != target:
                    shutil.rmtree(path)


def learnt(path: Path) -> dict[str, str]:
    """Of the parameters in the checkpoint `path`, the key of what a stage would end on: of the average if there is one.

    ValueError if it cannot be read.
    """
    written = _names(path)
    return {name: (AVERAGE if AVERAGE + name in written else WEIGHT) + name for name in _learnt(written)}


def _learnt(names: set[str]) -> set[str]:
    return {name.removeprefix(WEIGHT) for name in names if name.startswith(WEIGHT)}


def read_learnt(path: Path, key: str, shape: tuple[int, ...]) -> Tensor:
    """What the checkpoint `path` holds under `key`, put together from its shards, in float32 on the CPU."""
    whole = torch.empty(shape)
    _load({key: whole}, path, alone=True)
    return whole


def _start(fresh: Path, progress: dict[str, Any]) -> None:
    """A new folder for a checkpoint of a run that is at `progress`."""
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    write_whole(fresh / "progress.json", json.dumps(progress))


def _weights(distiller: Distiller) -> dict[str, Tensor]:
    """The parameters that learn, as they lie on this process; what is read into them is theirs."""
    parameters = dict(distiller.model.named_parameters())
    return {WEIGHT + name: parameters[name].detach() for name in distiller.scales}


def _moments(distiller: Distiller) -> dict[str, Tensor]:
    """The optimiser's state of the parameters that have any."""
    if distiller.optimiser is None:
        return {}
    state = distiller.optimiser.state
    names = ((name, p) for name, p in distiller.model.named_parameters() if p in state)
    return {f"{MOMENT}{key}/{name}": value for name, p in names for key, value in state[p].items()}


def _averages(distiller: Distiller) -> dict[str, Tensor]:
    """The averages of the parameters that have moved."""
    averages = {} if distiller.average is None else distiller.average.averages
    return {AVERAGE + name: average for name, average in averages.items()}


def _names(path: Path) -> set[str]:
    """What a checkpoint holds."""
    try:
        return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
    except Exception as error:  # the metadata is a pickle, and broken ones raise anything
        raise _unreadable(path, error) from None


def _load(state: dict[str, Tensor], path: Path, alone: bool) -> dict[str, Any]:
    """Read a checkpoint into the tensors of `state`. Returns how far its run was."""
    try:
        with _causes():
            dcp.load(state, checkpoint_id=path, no_dist=alone)
        return json.loads((path / "progress.json").read_text())
    except Exception as error:  # whatever a file that is cut short leads to
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ValueError:
    if not path.exists():
        return ValueError(f"the checkpoint {path} went while it was read, as a run's next one came: try again")
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(f"the checkpoint {path} cannot be read ({reason}): remove it to start over")


@contextmanager
def _causes(written: Path | None = None) -> Iterator[None]:
    """Raise what went wrong (a full disk, Ctrl-C, ...) in place of torch's list of what went wrong where.

    `written` is the folder, if it is being written.
    """
    try:
        yield
    except dcp.api.CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if written is not None and "inline_container" in str(cause):
            # Torch's writer of archives says that a write fell short, and keeps the reason to itself.
            raise OSError(errno.ENOSPC, "a checkpoint could not be written", str(written)) from None
        with nullcontext() if written is None else writing(written):
            raise cause from None


class replacing:  # noqa: N801 - reads as a verb
    """A folder to write into that takes the place of `target` once all went well, and vanishes if not."""

    def __init__(self, target: Path):
        self.target = target
        self.fresh = target.with_name(f".{target.name}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.fresh, ignore_errors=True)
        self.fresh.mkdir(parents=True)
        return self.fresh

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            with suppress(OSError):
                shutil.rmtree(self.fresh)
            return
        if self.target.exists():
            shutil.rmtree(self.target)
        self.fresh.rename(self.target)
