"""Metrics by name, alone and many at once."""

from types import SimpleNamespace

import pytest
from tests.models import supernet, tokens

from gearshift.data import TokenSequences
from gearshift.evaluate import HeldOut, HeldOutMetric, MetricKind, evaluate_many, find_metric, metric_names, metrics
from gearshift.spec import Placement

SEQUENCES = TokenSequences(tokens(2, 12))


class CountOf:
    """A metric of another package: how many layers run one mixer."""

    higher_is_better = True

    def __call__(self, model, placement) -> float:
        return float(placement.counts().get("gdn", 0))


def test_built_in_metrics_know_their_direction() -> None:
    made = {name: find_metric(name).make(HeldOut(SEQUENCES)) for name in metric_names()}
    assert {name: metric.higher_is_better for name, metric in made.items()} == {
        "divergence": False,
        "perplexity": False,
        "agreement": True,
    }


def test_one_at_a_time_equals_many() -> None:
    model = supernet(layers=2)
    placements = [Placement(["gdn", "window"]), model.spec.main, Placement(["gdn", "kda"])]
    for name in metric_names():
        metric = find_metric(name).make(HeldOut(SEQUENCES))
        shares: list[float] = []
        assert evaluate_many(metric, model, placements, shares.append) == [metric(model, p) for p in placements]
        assert sum(shares) == pytest.approx(1)


def test_a_metric_follows_the_model_it_is_given() -> None:
    metric = HeldOutMetric("perplexity", HeldOut(SEQUENCES))
    one, other = supernet(layers=2), supernet(seed=1, layers=2)
    first = metric(one, one.spec.main)
    assert metric(other, one.spec.main) != first
    assert metric(one, one.spec.main) == first


def test_another_packages_metric_is_found_by_entry_point(monkeypatch) -> None:
    entry = SimpleNamespace(
        name="gdn_layers", value="elsewhere:KIND", load=lambda: MetricKind(lambda _: CountOf(), "layers")
    )
    monkeypatch.setattr(
        metrics, "entry_points", lambda group, name=None: [e for e in [entry] if name in (None, e.name)]
    )
    assert metric_names()[-1] == "gdn_layers"
    metric = find_metric("gdn_layers").make(HeldOut(SEQUENCES))
    model = supernet(layers=2)
    assert evaluate_many(metric, model, [Placement(["gdn", "gdn"]), model.spec.main]) == [2.0, 0.0]
    entry.load = lambda: CountOf
    with pytest.raises(ValueError, match="is no MetricKind"):
        find_metric("gdn_layers")


def test_an_unknown_metric_is_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown metric 'divergance': did you mean divergence"):
        find_metric("divergance")
    with pytest.raises(ValueError, match="there are divergence, perplexity, agreement"):
        find_metric("zzz")
