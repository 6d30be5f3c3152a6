import json
import math

import numpy as np
import pytest
from pydantic import BaseModel, ValidationError
from sample import minimal, sample

from gearshift.report import Candidate, Generation, LayerErrors, Preset, PureQuality, Report, Step, data
from gearshift.spec.placement import Placement


@pytest.fixture(scope="module")
def report() -> Report:
    return sample(layers=6)


def test_round_trip(report: Report) -> None:
    assert Report.model_validate_json(report.model_dump_json()) == report
    assert Report.model_validate_json(minimal().model_dump_json()) == minimal()


def test_an_unknown_key_is_refused(report: Report) -> None:
    values = json.loads(report.model_dump_json())
    values["search"]["presets"][0]["colour"] = "red"
    with pytest.raises(ValueError, match=r"search\.presets\.0\.colour"):
        Report.model_validate(values)


def test_every_field_says_what_it_means() -> None:
    models = [kind for kind in vars(data).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]
    for model in models:
        assert model.__doc__
        for name, field in model.model_fields.items():
            assert field.description, f"{model.__name__}.{name}"


def test_a_report_is_frozen(report: Report) -> None:
    with pytest.raises(ValidationError):
        report.title = "another"  # type: ignore[misc]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), None])
def test_what_is_not_finite_becomes_null(value: float) -> None:
    step = Step(name="measure", seconds=value, result="")
    assert step.seconds is None
    assert json.loads(step.model_dump_json())["seconds"] is None


def test_numpy_numbers_are_taken() -> None:
    assert PureQuality(mixer="a", divergence=np.float32(0.5), perplexity=np.float64(3)).divergence == 0.5


def test_a_placement_is_taken_as_value_or_text() -> None:
    from_value = Candidate(placement=Placement(["a", "a", "b"]), kind="pure", cost=1, divergence=0)
    from_text = Candidate(placement="a, a*1, b", kind="pure", cost=1, divergence=0)
    assert from_value.placement == from_text.placement == "a*2,b"
    with pytest.raises(ValueError, match="neither 'mixer' nor 'mixer\\*count'"):
        Candidate(placement="a**2", kind="pure", cost=1, divergence=0)
    with pytest.raises(ValueError, match="a placement is text"):
        Candidate(placement=3, kind="pure", cost=1, divergence=0)


def test_counts_agree_with_the_placement() -> None:
    with pytest.raises(ValueError, match="the preset 'fast' counts"):
        Preset(name="fast", placement="a*2,b", counts={"a": 1, "b": 2}, cost=1, divergence=1)
    assert Preset(name="fast", placement="a*2", counts={"a": 2, "b": 0}, cost=1, divergence=1).budget_share is None


def test_settings_become_plain() -> None:
    settings = sample(layers=4).settings
    assert settings["arguments"]["out"] == "runs/quickstart"
    nested = {"a": (1, math.nan, {"b": {3}}), 7: Step(name="x", seconds=1, result="y"), "n": np.int64(4)}
    report = minimal().model_copy(update={})
    report = Report.model_validate({**dict(report), "settings": nested})
    assert json.loads(report.model_dump_json())["settings"]["a"] == [1, None, {"b": [3]}]
    assert report.settings["7"] == {"name": "x", "seconds": 1.0, "result": "y"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"main": "mamba"}, "main names the mixer 'mamba'"),
        ({"mixers": minimal().mixers * 2}, "listed twice"),
        ({"layer_errors": LayerErrors(before={"attention": (0.1,)})}, "1 layer errors, but the model 2 layers"),
        ({"layer_errors": LayerErrors(before={"gdn": (0.1, 0.2)})}, "layer_errors names the mixer 'gdn'"),
        (
            {
                "generations": [
                    Generation(
                        preset="p",
                        placement="attention*3",
                        prompt="",
                        text="",
                        tokens=1,
                        tokens_per_second=1,
                        state_bytes=1,
                    )
                ]
            },
            "names 3 layers, but the model has 2",
        ),
    ],
)
def test_parts_agree_with_each_other(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Report.model_validate({**dict(minimal()), **change})
