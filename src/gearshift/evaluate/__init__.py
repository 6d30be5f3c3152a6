"""(model, placement) -> numbers: divergence from the teacher, perplexity, agreement, lm-eval."""

from gearshift.evaluate.errors import layer_errors
from gearshift.evaluate.harness import run_harness
from gearshift.evaluate.judge import Judge, JudgeSettings, Score
from gearshift.evaluate.metrics import (
    HeldOut,
    HeldOutMetric,
    Metric,
    MetricKind,
    evaluate_many,
    find_metric,
    metric_names,
)
from gearshift.evaluate.walk import Stop, route, walk

__all__ = [
    "HeldOut",
    "HeldOutMetric",
    "Judge",
    "JudgeSettings",
    "Metric",
    "MetricKind",
    "Score",
    "Stop",
    "evaluate_many",
    "find_metric",
    "layer_errors",
    "metric_names",
    "route",
    "run_harness",
    "walk",
]
