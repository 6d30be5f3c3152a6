"""Metrics: callables (model, placement) -> float, found by name."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from importlib.metadata import entry_points
from typing import Protocol, runtime_checkable

from gearshift.data import TokenSequences
from gearshift.evaluate.judge import Judge, JudgeSettings, Score
from gearshift.model import GearshiftForCausalLM
from gearshift.progress import Advance, silent
from gearshift.spec import Placement

GROUP = "gearshift.metrics"
"""The entry-point group under which other packages offer metrics."""


class Metric(Protocol):
    """How good a model is under a placement: one number, and the direction that is better."""

    @property
    def higher_is_better(self) -> bool:
        """Whether larger numbers are better."""

    def __call__(self, model: GearshiftForCausalLM, placement: Placement) -> float:
        """Measure one placement."""


@runtime_checkable
class BatchMetric(Protocol):
    """A metric that measures many placements for less than the sum of their prices."""

    def many(
        self, model: GearshiftForCausalLM, placements: Sequence[Placement], advance: Advance = silent
    ) -> list[float]:
        """Measure placements, in their order. `advance` is told of shares of the whole that add up to 1."""


@dataclass(frozen=True)
class HeldOut:
    """What a metric may measure on, and how."""

    sequences: TokenSequences
    """Held-out text."""
    settings: JudgeSettings = field(default_factory=JudgeSettings)
    """How to judge on it."""
    teacher: GearshiftForCausalLM | None = None
    """A separate reference model. None: the measured model itself under its main placement."""


@dataclass(frozen=True)
class MetricKind:
    """A metric by name, before it has text to measure on. An entry point of `gearshift.metrics` names one."""

    make: Callable[[HeldOut], Metric]
    """Held-out text -> the metric. A metric that brings its own data ignores it."""
    description: str
    """What it measures and in which unit, in one line."""


@dataclass
class HeldOutMetric:
    """One of the judge's numbers as a metric. Placements measured together share the layers that they agree on."""

    name: str
    """`divergence`, `perplexity` or `agreement`."""
    held_out: HeldOut
    """What to measure on."""
    measured: dict[Placement, Score] = field(default_factory=dict, repr=False)
    """All numbers of every placement that was measured, as of the last time."""
    _judge: Judge | None = field(default=None, repr=False)

    @property
    def higher_is_better(self) -> bool:
        """Whether larger numbers are better."""
        return self.name == "agreement"

    def judge(self, model: GearshiftForCausalLM) -> Judge:
        """The judge of `model`, made on first use."""
        if self._judge is None or self._judge.model is not model:
            self._judge = Judge(model, self.held_out.sequences, self.held_out.settings, self.held_out.teacher)
            self.measured.clear()
        return self._judge

    def many(
        self, model: GearshiftForCausalLM, placements: Sequence[Placement], advance: Advance = silent
    ) -> list[float]:
        """Measure placements in one pass, in their order. `advance` gets shares that add up to 1."""
        judge = self.judge(model)
        planned = judge.planned(placements)
        scores = judge.score(placements, lambda layers: advance(layers / planned))
        self.measured.update((score.placement, score) for score in scores)
        return [getattr(score, self.name) for score in scores]

    def __call__(self, model: GearshiftForCausalLM, placement: Placement) -> float:
        return self.many(model, [placement])[0]


def evaluate_many(
    metric: Metric, model: GearshiftForCausalLM, placements: Sequence[Placement], advance: Advance = silent
) -> list[float]:
    """Measure placements, together if the metric can. `advance` is told of shares that add up to 1."""
    if isinstance(metric, BatchMetric):
        return metric.many(model, placements, advance)
    values = []
    for placement in placements:
        values.append(metric(model, placement))
        advance(1 / len(placements))
    return values


BUILT_IN = {
    "divergence": MetricKind(
        partial(HeldOutMetric, "divergence"),
        "forward KL divergence from the teacher on held-out text, nats a token; lower is better",
    ),
    "perplexity": MetricKind(partial(HeldOutMetric, "perplexity"), "perplexity of held-out text; lower is better"),
    "agreement": MetricKind(
        partial(HeldOutMetric, "agreement"),
        "share of positions whose likeliest next token is the teacher's; higher is better",
    ),
}


def metric_names() -> tuple[str, ...]:
    """The built-in metrics, then those of other packages."""
    return (*BUILT_IN, *sorted({entry.name for entry in entry_points(group=GROUP)} - BUILT_IN.keys()))


def find_metric(name: str) -> MetricKind:
    """The metric called `name`. ValueError with the nearest names if there is none."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    for entry in entry_points(group=GROUP, name=name):
        kind = entry.load()
        if not isinstance(kind, MetricKind):
            raise ValueError(f"the metric {name!r} ({entry.value}) is no MetricKind but a {type(kind).__name__}")
        return kind
    near = get_close_matches(name, metric_names())
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(metric_names())}"
    raise ValueError(f"unknown metric {name!r}: {hint}")
