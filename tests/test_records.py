"""A run's record read back, and what it says of the sampled mixers."""

import json
from pathlib import Path

import pytest

from gearshift.records import Tally, read_records


def step(number: int, placement: str | None, loss: float | None) -> dict:
    return {"event": "step", "step": number, "placement": placement, "loss": loss}


STEPS = [
    {"event": "calibration"},
    step(0, "a*3", None),
    step(1, "a,b*2", 4.0),
    step(2, "b*3", 2.0),
    step(3, "b,a,b", 3.0),
]


def test_a_step_counts_for_every_mixer_that_it_sampled() -> None:
    tally = Tally(STEPS)
    assert tally.times() == {"a": [2, 2, 1], "b": [2, 2, 3]}
    assert tally.mean_loss() == {"a": [4.0, 3.0, None], "b": [2.5, 3.0, 3.0]}
    # Beyond the running mean (4 before the loss of 2, 3.8 before that of 3): 0, -2 and -0.8, on average -2.8 / 3.
    assert tally.mean_excess()["b"] == pytest.approx([-1.4 + 2.8 / 3, -1.0 + 2.8 / 3, 0.0])
    assert tally.mean_excess()["a"] == [pytest.approx(2.8 / 3), pytest.approx(-0.8 + 2.8 / 3), None]
    assert Tally().times() == Tally().mean_loss() == {}


def test_a_line_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps(record) for record in STEPS]
    path.write_text("\n".join(whole) + "\n" + whole[-1])
    assert read_records(path) == STEPS
    path.write_bytes(path.read_bytes()[:-20] + b"\xc3")
    assert read_records(path) == STEPS
    path.write_text("17\n[]\n" + whole[0] + "\n")
    assert read_records(path) == STEPS[:1]
