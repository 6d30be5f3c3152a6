"""A run's curves in TensorBoard, Weights & Biases and trackio. The record in `metrics.jsonl` is there in any case."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from gearshift.files import write_whole
from gearshift.records import Tally, read_records
from gearshift.train.metrics import Callback, Record, StageEndRecord, StepRecord, close

PROJECT = "gearshift"
"""What trackers with projects file every run under."""


def check_trackers(names: Iterable[str]) -> None:
    """ValueError if a tracker's package, which is called like it and like our extra, is not installed."""
    for name in names:
        if find_spec(name) is None:
            raise ValueError(
                f'the recipe\'s trackers name {name}, which is not installed: pip install "gearshift[{name}]"'
            )


def make_trackers(names: Sequence[str], output: Path, every: int, config: Mapping[str, Any]) -> "list[Tracker]":
    """The trackers that `names` ask for. If one of them cannot begin, those before it are closed.

    Args:
        names: of trackers, their packages installed.
        output: the run's folder, whose record ends where the run goes on.
        every: steps between points.
        config: the recipe, for trackers that show one.
    """
    kinds: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": WandB, "trackio": Trackio}
    history = read_records(output / "metrics.jsonl") if names else []
    made: list[Tracker] = []
    try:
        for name in names:
            made.append(kinds[name](output, every, config, history))
    except BaseException:
        close(made)
        raise
    return made


class Tracker(Callback):
    """Takes every `every`-th step as named numbers, and the held-out numbers of each stage's end."""

    def __init__(self, output: Path, every: int, config: Mapping[str, Any], history: Sequence[dict[str, Any]]):
        self.every = every
        self._stage = history[-1]["stage"] if history else 0
        self._tally = Tally(record for record in history if record["stage"] == self._stage)
        steps = [record["global_step"] for record in history if record["event"] == "step"]
        self.open(output, config, next_step=steps[-1] + 1 if steps else 0)

    def on_record(self, record: Record) -> None:
        if record.stage != self._stage:
            self._stage, self._tally = record.stage, Tally()
        if isinstance(record, StepRecord):
            if record.placement is not None:
                self._tally.add(record.placement, record.loss)
            if record.global_step % self.every == 0:
                self.log(step_curves(record, self._tally), record.global_step)
        elif isinstance(record, StageEndRecord) and record.held_out:
            # At the stage's last step: a run that goes on from there hides what stands at the next one.
            self.log(_named("held out", record.held_out), max(0, record.global_step - 1))

    @abstractmethod
    def open(self, output: Path, config: Mapping[str, Any], next_step: int) -> None:
        """Begin, or go on with step `next_step`."""

    @abstractmethod
    def log(self, curves: dict[str, float], step: int) -> None:
        """Take one point of each curve."""


def step_curves(record: StepRecord, tally: Tally) -> dict[str, float]:
    """Curve -> its value at a step: the losses, by mixer and by layer too, what was sampled so far, the rates."""
    curves = _named("terms", record.terms) | _named("mixers", record.mixers) | _named("layers", record.layers)
    if record.loss is not None:
        curves["loss"] = record.loss
    if record.placement is not None:
        counts = record.placement.counts()
        curves |= {f"share of layers/{name}": count / len(record.placement) for name, count in counts.items()}
        curves |= _named("times sampled", tally.times()) | _named("loss when sampled", tally.mean_loss())
    curves["learning rate"] = record.learning_rate
    curves["gradient norm"] = record.gradient_norm
    curves["tokens a second"] = record.tokens / record.seconds
    return curves


def _named(name: str, values: Any) -> dict[str, float]:
    """The numbers in nested mappings and lists, under a path such as `layers/kda/07`; what is not known is left out."""
    if isinstance(values, Mapping):
        items: Iterable[tuple[str, Any]] = values.items()
    elif isinstance(values, list):
        items = ((f"{place:02}", value) for place, value in enumerate(values))
    else:
        return {} if values is None else {name: values}
    return {path: number for key, value in items for path, number in _named(f"{name}/{key}", value).items()}


class TensorBoard(Tracker):
    """Curves for TensorBoard, in the folder `tensorboard`."""

    def open(self, output: Path, config: Mapping[str, Any], next_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier run wrote from the step on that this one goes on with is hidden.
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=next_step)

    def log(self, curves: dict[str, float], step: int) -> None:
        for name, value in curves.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandB(Tracker):
    """Curves for Weights & Biases. With WANDB_MODE=offline they stay in the folder `wandb`: no account is needed."""

    def open(self, output: Path, config: Mapping[str, Any], next_step: int) -> None:
        import wandb

        name, identity = _identity(output)
        try:
            self._run = wandb.init(
                project=PROJECT, name=name, id=identity, resume="allow", dir=str(output), config=dict(config)
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"Weights & Biases cannot begin ({str(error).splitlines()[0]}): log in, or set WANDB_MODE=offline"
            ) from None
        # An axis of our own: a resumed run may repeat steps, which wandb's own counter would refuse.
        self._run.define_metric("*", step_metric="step")

    def log(self, curves: dict[str, float], step: int) -> None:
        self._run.log({**curves, "step": step})

    def close(self) -> None:
        self._run.finish()


class Trackio(Tracker):
    """Curves for trackio, which keeps them on this machine (in TRACKIO_DIR) unless told otherwise."""

    def open(self, output: Path, config: Mapping[str, Any], next_step: int) -> None:
        import trackio

        name, identity = _identity(output)
        self._run = trackio.init(
            project=PROJECT,
            name=f"{name}-{identity}",
            resume="allow",
            config=dict(config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, curves: dict[str, float], step: int) -> None:
        self._run.log(curves, step=step)

    def close(self) -> None:
        self._run.finish()


def _identity(output: Path) -> tuple[str, str]:
    """The name of a run, and what tells it from others of that name: drawn once and kept in its folder."""
    path = output / "tracker-id"
    if not path.exists():
        write_whole(path, uuid4().hex[:8])
    return output.resolve().name, path.read_text().strip()
