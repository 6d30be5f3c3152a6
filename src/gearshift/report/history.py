"""A run so far, read from its folder: while it goes on, after it broke off, and when it is done."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gearshift.locks import LOCK, is_abandoned
from gearshift.records import Tally, parse_record
from gearshift.report.data import Count, PlacementText, Stage, TrainingRecord

RECENT = 20
"""Steps over which a stage's present loss and speed are taken."""
HELD_OUT = {
    "mixers": "error",
    "forward_kl": "forward KL, nats a token",
    "cross_entropy": "cross-entropy, nats a token",
}
"""What a stage's end says of held-out text -> what that is, in words."""
Rows = dict[str, list[float | None]]
"""Mixer -> a number for each layer."""
Read = TypeVar("Read")
Finite = Annotated[float, Field(allow_inf_nan=False)]
FiniteRows = dict[str, list[Finite | None]]


class _Asked(BaseModel):
    """What is asked of a record, or of a part of one. It may say more."""

    model_config = ConfigDict(strict=True)


class _Record(_Asked):
    """Its place in the run, whatever its kind."""

    stage: Count
    type: str
    step: Count


class _StepRecord(_Record):
    global_step: Count
    loss: Finite | None
    terms: dict[str, Finite | None]
    learning_rate: Finite | None
    gradient_norm: Finite | None
    tokens: Count
    seconds: Finite
    placement: PlacementText | None = None
    mixers: dict[str, Finite | None] | None = None
    layers: FiniteRows | None = None


class _CalibrationRecord(_Record):
    before: FiniteRows
    after: FiniteRows
    seconds: Finite


class _HeldOut(_Asked):
    mixers: dict[str, Finite | None] = {}
    forward_kl: dict[str, Finite | None] = {}
    cross_entropy: dict[str, Finite | None] = {}


class _StageEndRecord(_Record):
    held_out: _HeldOut | None = None


class _StoppedRecord(_Record):
    reason: str


KNOWN: dict[str, type[_Record]] = {
    "step": _StepRecord,
    "calibration": _CalibrationRecord,
    "stage_end": _StageEndRecord,
    "stopped": _StoppedRecord,
}
"""Kind of record -> what is asked of it."""


@dataclass(frozen=True)
class StageHistory:
    """A stage of a run so far."""

    index: int
    """Its number, from 0."""
    name: str
    """Its type, with its number where several stages have that type."""
    planned: int
    """Steps that it is to have."""
    steps: Sequence[dict[str, Any]]
    """The records of those that are done."""
    calibration: dict[str, Any] | None = None
    """The record of its calibration, None if there was none."""
    end: dict[str, Any] | None = None
    """The record of its end, None before it."""

    @property
    def loss(self) -> float | None:
        """Mean of the last steps' losses; None if there is none."""
        losses = [step["loss"] for step in self.steps[-RECENT:] if step["loss"] is not None]
        return fmean(losses) if losses else None

    @property
    def tokens_per_second(self) -> float | None:
        """Over the last steps."""
        seconds = sum(step["seconds"] for step in self.steps[-RECENT:])
        return sum(step["tokens"] for step in self.steps[-RECENT:]) / seconds if seconds else None

    @property
    def seconds_left(self) -> float | None:
        """The steps to come at the median time of the last ones; None if nothing says how long a step takes."""
        if self.end is not None:
            return 0.0
        recent = [step["seconds"] for step in self.steps[-RECENT:]]
        return median(recent) * max(0, self.planned - len(self.steps)) if recent else None

    @property
    def held_out(self) -> tuple[str, dict[str, float | None]] | None:
        """What the numbers of its end on held-out text are, and the numbers by mixer; None without any."""
        said = self.end and self.end.get("held_out")
        if not said:
            return None
        for key, words in HELD_OUT.items():
            if key in said:
                return words, said[key]
        return "loss", {name: value for name, value in said.items() if isinstance(value, int | float)}

    def as_stage(self) -> Stage:
        """The stage as pictures of losses take it."""
        return stage_of(self.name, self.steps)

    def layer_errors(self) -> dict[str, Rows]:
        """`first step` and `last step` -> the error of each mixer in each layer; empty in stages without."""
        judged = [step["layers"] for step in self.steps if step.get("layers")]
        return {"first step": judged[0], "last step": judged[-1]} if judged else {}

    @cached_property
    def tally(self) -> Tally:
        """What its steps sampled."""
        return Tally(self.steps)


@dataclass(frozen=True)
class RunHistory:
    """A run so far."""

    folder: Path
    """Where it is."""
    recipe: Mapping[str, Any]
    """Its recipe as it stands in `recipe.json`; empty if there is none."""
    stages: Sequence[StageHistory]
    """All stages of the recipe, those to come included."""
    unknown: Mapping[str, int]
    """Kind of record that this version does not know -> how many there are."""
    damaged: Sequence[int]
    """Numbers, from 1, of the lines of its record that cannot be read. Not of a last one that may still be written."""
    finished: bool
    """Whether its model is written."""
    written: datetime
    """When its record last grew, local time."""
    at_work: bool
    """Whether a process is at it now, as far as can be known here."""
    stopped: str | None = None
    """Why it stopped by itself, None if it did not."""

    @property
    def done(self) -> int:
        """Steps done."""
        return sum(len(stage.steps) for stage in self.stages)

    @property
    def planned(self) -> int:
        """Steps of all stages."""
        return sum(stage.planned for stage in self.stages)

    @property
    def seconds_left(self) -> float | None:
        """Until the end; None as soon as one stage to come has not shown how long its steps take."""
        left = [stage.seconds_left for stage in self.stages if stage.planned]
        return None if None in left else sum(seconds for seconds in left if seconds is not None)

    @cached_property
    def mixers(self) -> list[str]:
        """All mixers that the record names, the main one first if it is known."""
        learning, sampled = self._named()
        return list(dict.fromkeys([*([self.main] if self.main else []), *learning, *sampled]))

    @cached_property
    def main(self) -> str | None:
        """The mixer that is the teacher's equal on held-out text, or is sampled and never learns layer by layer."""
        learning, sampled = self._named()
        others = [mixer for mixer in sampled if mixer not in learning] if learning else []
        exact = [
            mixer
            for stage in self.stages
            if stage.held_out and stage.held_out[0].startswith("forward KL")
            for mixer, value in stage.held_out[1].items()
            if value == 0
        ]
        return next(iter([*exact, *others]), None)

    def _named(self) -> tuple[list[str], list[str]]:
        """The mixers that learn layer by layer, and those that placements name."""
        judged = [rows for stage in self.stages for rows in stage.layer_errors().values()]
        judged += [stage.calibration["after"] for stage in self.stages if stage.calibration]
        sampled = [stage.tally.cells for stage in self.stages]
        return list(dict.fromkeys(chain(*judged))), list(dict.fromkeys(chain(*sampled)))


def read_history(folder: Path | str) -> RunHistory:
    """The run in a folder. ValueError, in a sentence, if it holds none or if its record cannot be understood."""
    folder = Path(folder)
    path = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise ValueError(f"there is no run at {folder}: the folder does not exist")
    if not path.is_file() and (folder / "training" / "metrics.jsonl").is_file():
        raise ValueError(f"{folder} is a quickstart's folder: its training run is in {folder / 'training'}")
    if not path.is_file() and not (folder / "recipe.json").is_file():
        raise ValueError(f"{folder} holds no training run: it has neither metrics.jsonl nor recipe.json")
    records, unknown, damaged = _records(path)
    if not records and damaged:
        raise ValueError(f"{path} cannot be read, from line {damaged[0]} on: it holds no record of a run")
    if not records:
        newer = f", but for {_counted(unknown)} that this version of Gearshift does not know" if unknown else ""
        raise ValueError(f"the run in {folder} has no record yet{newer}: try again after its first step")
    recipe = _understood(folder / "recipe.json", _recipe)
    stages = _understood(path, lambda path: _stages(records, recipe))
    finished = (folder / "model").exists()
    written = datetime.fromtimestamp(path.stat().st_mtime)
    stopped = records[-1]["reason"] if records[-1]["event"] == "stopped" else None
    at_work = not is_abandoned(folder / LOCK)
    return RunHistory(folder, recipe, stages, unknown, damaged, finished, written, at_work, stopped)


def stage_of(name: str, steps: Sequence[Mapping[str, Any]]) -> Stage:
    """A stage of the report's data from the records of its steps."""
    return Stage(
        name=name,
        records=tuple(
            TrainingRecord(
                step=step["step"],
                loss=step["loss"],
                mixer_losses=step.get("mixers") or {},
                loss_terms={} if step.get("mixers") else step["terms"],
                learning_rate=step["learning_rate"],
                tokens=step["tokens"],
                seconds=step["seconds"],
            )
            for step in steps
        ),
    )


def _counted(unknown: Mapping[str, int]) -> str:
    return ", ".join(f"{number} of kind {kind!r}" for kind, number in unknown.items())


def _records(path: Path) -> tuple[list[dict[str, Any]], dict[str, int], list[int]]:
    """The records of kinds that are known here, in order; how many of each other kind; which lines are damaged."""
    known: list[dict[str, Any]] = []
    unknown: Counter[str] = Counter()
    damaged: list[int] = []
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                record = parse_record(line)
                if record is None:
                    damaged += [number] if line.endswith("\n") else []
                elif (event := str(record.get("event", "none"))) in KNOWN:
                    known.append(record)
                else:
                    unknown[event] += 1
    return known, dict(unknown), damaged


def _understood(path: Path, read: Callable[[Path], Read]) -> Read:
    """What `read` makes of a file. ValueError if the file is not laid out as this version lays it out."""
    try:
        return read(path)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        what = str(error).splitlines()[0]
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise ValueError(
            f"{path} cannot be understood ({what}): if a newer version of Gearshift wrote it, read it with that one"
        ) from None


def _recipe(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8"))["recipe"]) if path.exists() else {}


def _stages(records: Sequence[dict[str, Any]], recipe: Mapping[str, Any]) -> list[StageHistory]:
    """The recipe's stages with their records; without a recipe, the stages that the record names."""
    plans = [(str(stage["type"]), int(stage["steps"])) for stage in recipe.get("stages", ())]
    by_stage: dict[int, list[dict[str, Any]]] = {}
    for record in records:
        _check(record)
        by_stage.setdefault(record["stage"], []).append(record)
    for index in range(len(plans), max(by_stage) + 1):
        own = by_stage.get(index, [])
        plans.append((own[0]["type"] if own else "unknown", sum(record["event"] == "step" for record in own)))
    types = Counter(kind for kind, _ in plans)
    stages = []
    for index, (kind, planned) in enumerate(plans):
        own = by_stage.get(index, [])
        steps = [record for record in own if record["event"] == "step"]
        calibration, end = (
            next((r for r in own if r["event"] == event), None) for event in ("calibration", "stage_end")
        )
        name = kind if types[kind] == 1 else f"{kind} ({index})"
        stages.append(StageHistory(index, name, planned, steps, calibration, end))
        _ = stages[-1].tally  # whether the placements fit each other shows here
    return stages


def _check(record: Mapping[str, Any]) -> None:
    """ValueError if a record lacks something, or has something of another type."""
    try:
        KNOWN[record["event"]].model_validate(record)
    except ValidationError as error:
        if lacking := sorted(str(fault["loc"][0]) for fault in error.errors() if fault["type"] == "missing"):
            raise ValueError(f"a {record['event']} record lacks {', '.join(lacking)}") from None
        raise
