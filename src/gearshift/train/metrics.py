"""What a run says about itself: records, the callbacks that take them, the JSONL file."""

import json
import math
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from gearshift.files import write_whole, writing
from gearshift.progress import Bar
from gearshift.records import parse_record
from gearshift.spec import Placement


@dataclass(frozen=True, kw_only=True)
class Record:
    """Something that happened in a run."""

    stage: int
    """Number of the stage, from 0."""
    type: str
    """Kind of the stage: `layerwise`, `stochastic` or `sft`."""
    step: int
    """Number of the step within its stage, from 0; the stage's number of steps for its end."""
    global_step: int
    """Number of the step over all stages, from 0."""

    @property
    def event(self) -> str:
        """What happened."""
        raise NotImplementedError

    def to_json(self) -> str:
        """One line of JSON. What is not finite becomes null: JSON has no word for it."""
        values = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return json.dumps({"event": self.event, **values})


@dataclass(frozen=True, kw_only=True)
class StepRecord(Record):
    """One optimiser step."""

    total_steps: int
    """Steps of the whole run."""
    loss: float | None
    """What was minimised. None if the step was skipped: nothing that ran could learn, as under all-main."""
    terms: dict[str, float]
    """The parts of the loss, unweighted."""
    learning_rate: float
    """Before the factors of `learning_rate_scales`."""
    gradient_norm: float
    """Norm of all gradients before clipping."""
    tokens: int
    """Tokens of the step."""
    seconds: float
    """Wall-clock time of the step, the wait for its batch included."""
    placement: Placement | None = None
    """The sampled placement. None in a layerwise stage on the teacher's stream, which samples none."""
    mixers: dict[str, float] | None = None
    """Layerwise: mixer -> its mean error over layers."""
    layers: dict[str, list[float | None]] | None = None
    """Layerwise: mixer -> its error in each layer, None where it does not learn."""

    @property
    def event(self) -> str:
        return "step"


@dataclass(frozen=True, kw_only=True)
class CalibrationRecord(Record):
    """The layerwise stage's first action. All three: mixer -> normalised activation error in each layer."""

    before: dict[str, list[float | None]]
    """As the mixers were."""
    scaled: dict[str, list[float | None]]
    """With the best factor on each output projection."""
    after: dict[str, list[float | None]]
    """As they are now."""
    seconds: float
    """Wall-clock time."""

    @property
    def event(self) -> str:
        return "calibration"


@dataclass(frozen=True, kw_only=True)
class StageEndRecord(Record):
    """The end of a stage."""

    held_out: dict[str, Any] | None = None
    """On held-out text. Layerwise: as in a step's record. Stochastic: mixer -> forward KL with it everywhere. Sft: the
    same of the cross-entropy on held-out chats, and of every preset that is sampled by name."""

    @property
    def event(self) -> str:
        return "stage_end"


@dataclass(frozen=True, kw_only=True)
class StoppedRecord(Record):
    """The run has stopped by itself in this step, of which nothing is kept."""

    reason: str
    """What went wrong, in a sentence."""

    @property
    def event(self) -> str:
        return "stopped"


def step_progress(advance: Bar, stages: int) -> Callable[[Record], None]:
    """For `on_record`: shows the steps done, the stage (of `stages`) and the latest loss on a bar.

    The bar moves by the steps since the last record; at first, by those done before too.
    """
    done, stage, loss = 0, 0, ""

    def watch(record: Record) -> None:
        nonlocal done, stage, loss
        steps = 0
        if record.stage != stage:
            stage, loss = record.stage, ""
        if isinstance(record, StepRecord):
            steps, done = record.global_step + 1 - done, record.global_step + 1
            loss = _loss(record) or loss
        advance(steps, f"{_stage(record, stages)}{loss}")

    return watch


PAUSE = 30.0
"""Seconds between the lines of `step_lines`."""


def step_lines(console: Console, stages: int) -> Callable[[Record], None]:
    """For `on_record` where no bar can be seen: a line for the first record of each stage, and now and then for a step.

    It has the step, the stage (of `stages`), the loss, and the speed since the line before.
    """
    stage, said, tokens, seconds = -1, 0.0, 0, 0.0

    def watch(record: Record) -> None:
        nonlocal stage, said, tokens, seconds
        line = _stage(record, stages)
        if isinstance(record, StepRecord):
            tokens, seconds = tokens + record.tokens, seconds + record.seconds
            step = f"step {record.global_step + 1:,}/{record.total_steps:,}"
            line = f"{step}, {line}{_loss(record)}, {tokens / seconds:,.0f} tokens/s"
        due = isinstance(record, StepRecord) and time.monotonic() - said >= PAUSE
        if due or record.stage != stage:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
            stage, said, tokens, seconds = record.stage, time.monotonic(), 0, 0.0

    return watch


def _stage(record: Record, stages: int) -> str:
    return f"stage {record.stage + 1}/{stages} {record.type}"


def _loss(record: StepRecord) -> str:
    return "" if record.loss is None else f", loss {record.loss:.4g}"


def show_steps(console: Console, advance: Bar, stages: int) -> Callable[[Record], None]:
    """For `on_record`: what moves the bar of `advance` on a terminal, and writes lines where no bar can be seen."""
    return step_progress(advance, stages) if console.is_terminal else step_lines(console, stages)


class Callback:
    """Takes a run's records as they are made. Override what is of interest."""

    def on_record(self, record: Record) -> None:
        """Any record, in order."""

    def close(self) -> None:
        """The run is over, or was interrupted."""


def close(callbacks: Iterable[Callback]) -> None:
    """Close them all, even if one of them cannot be."""
    with ExitStack() as stack:
        for callback in callbacks:
            stack.callback(callback.close)


class JsonLines(Callback):
    """The record of a run: one line of JSON for every step and event. A resumed run goes on from its checkpoint."""

    def __init__(self, path: Path, stage: int = 0, step: int = 0):
        """Keep the records from before (stage, step) and drop the rest, so that no step appears twice."""
        self.path = path
        kept = _lines_before(path, stage, step) if path.exists() else []
        write_whole(path, "".join(kept))
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def on_record(self, record: Record) -> None:
        with writing(self.path):
            self._file.write(record.to_json() + "\n")
            self._file.flush()

    def close(self) -> None:
        with writing(self.path):
            self._file.close()


def _lines_before(path: Path, stage: int, step: int) -> list[str]:
    """The lines of the records from before (stage, step)."""
    kept = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            record = parse_record(line)
            if record is None:
                continue
            try:
                earlier = (record["stage"], record["step"]) < (stage, step)
            except (KeyError, TypeError):
                raise ValueError(
                    f"{path} holds a line that does not say its stage and step ({line.strip()[:100]}): take it out"
                ) from None
            if earlier:
                kept.append(line)
    return kept


def _plain(value: Any) -> Any:
    if isinstance(value, Placement):
        return str(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
