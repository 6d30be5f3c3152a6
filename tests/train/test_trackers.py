"""What trackers are told. Packages that are not installed are played by stand-ins that keep the calls."""

import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from gearshift import Placement
from gearshift.train.metrics import JsonLines, Record, StageEndRecord, StepRecord
from gearshift.train.trackers import Tracker, check_trackers, make_trackers


def step(stage: int, number: int, **more: Any) -> StepRecord:
    given = {
        "stage": stage, "type": ("layerwise", "stochastic")[stage], "step": number, "global_step": 4 * stage + number,
        "total_steps": 8, "loss": 2.0, "terms": {"forward_kl": 2.0}, "learning_rate": 0.1, "gradient_norm": 3.0,
        "tokens": 10, "seconds": 0.5,
    }  # fmt: skip
    return StepRecord(**given | more)


LAYERS = {"kda": [0.25, None], "gdn": [0.5, 0.75]}
END = {"step": 4, "global_step": 4}
RECORDS: list[Record] = [
    *(step(0, number, mixers={"kda": 0.25, "gdn": 0.625}, layers=LAYERS) for number in range(4)),
    StageEndRecord(stage=0, type="layerwise", **END, held_out={"loss": 0.4, "mixers": {"kda": 0.2, "gdn": 0.6}}),
    step(1, 0, placement=Placement(["attention", "kda"])),
    step(1, 1, placement=Placement(["attention", "attention"]), loss=None, terms={}),
    step(1, 2, placement=Placement(["kda", "kda"]), loss=4.0),
]


class Kept(Tracker):
    """A tracker that keeps what it is told."""

    def open(self, output: Path, config: Any, next_step: int) -> None:
        self.next_step = next_step
        self.points: list[tuple[int, dict[str, float]]] = []

    def log(self, curves: dict[str, float], step: int) -> None:
        self.points.append((step, curves))


def tell(tracker: Tracker, records: list[Record]) -> None:
    for record in records:
        tracker.on_record(record)
    tracker.close()


def test_every_mixer_of_every_layer_has_its_curves(tmp_path: Path) -> None:
    tracker = Kept(tmp_path, 2, {}, [])
    tell(tracker, RECORDS)
    assert [place for place, _ in tracker.points] == [0, 2, 3, 4, 6]
    layerwise, _, held_out, first, last = (curves for _, curves in tracker.points)
    rates = {"learning rate": 0.1, "gradient norm": 3.0, "tokens a second": 20.0}
    layers = {"layers/kda/00": 0.25, "layers/gdn/00": 0.5, "layers/gdn/01": 0.75}
    means = {"mixers/kda": 0.25, "mixers/gdn": 0.625}
    assert layerwise == {"terms/forward_kl": 2.0, "loss": 2.0, **means, **layers, **rates}
    assert held_out == {"held out/loss": 0.4, "held out/mixers/kda": 0.2, "held out/mixers/gdn": 0.6}
    assert first["share of layers/kda"] == 0.5
    assert last["times sampled/attention/00"] == 2
    assert last["times sampled/kda/01"] == 2
    assert last["loss when sampled/kda/01"] == 3.0
    assert last["loss when sampled/attention/00"] == 2.0
    assert "loss when sampled/attention/01" not in last


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    unbroken = Kept(tmp_path, 1, {}, [])
    tell(unbroken, RECORDS)
    for cut in range(len(RECORDS)):
        history = [json.loads(record.to_json()) for record in RECORDS[:cut]]
        resumed = Kept(tmp_path, 1, {}, history)
        assert resumed.next_step == [0, 1, 2, 3, 4, 4, 5, 6][cut]
        tell(resumed, RECORDS[cut:])
        assert resumed.points == unbroken.points[len(unbroken.points) - len(resumed.points) :]


def in_folder(tmp_path: Path, *names: str) -> list[Tracker]:
    """Trackers of a run that has done its first step."""
    record = JsonLines(tmp_path / "metrics.jsonl")
    tell(record, RECORDS[:1])  # type: ignore[arg-type]
    return make_trackers(names, tmp_path, 2, {"seed": 3})


def test_a_missing_package_is_named_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "wandb", "trackio"):
        monkeypatch.setattr("gearshift.train.trackers.find_spec", lambda name: None)
        with pytest.raises(ValueError, match=rf'name {name}, which is not .*: pip install "gearshift\[{name}\]"'):
            check_trackers([name])
    check_trackers([])


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tell(in_folder(tmp_path, "tensorboard")[0], RECORDS[1:])
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 2.0), (4, 2.0), (6, 4.0)]
    assert {"mixers/gdn", "layers/kda/00", "times sampled/kda/01", "held out/loss"} <= set(events.Tags()["scalars"])


def test_tensorboard_keeps_what_a_stage_ended_on(tmp_path: Path) -> None:
    """When a run goes on right behind it."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    record = JsonLines(tmp_path / "metrics.jsonl")
    for part in (RECORDS[:5], RECORDS[5:]):
        tracker = make_trackers(["tensorboard"], tmp_path, 1, {})[0]
        tell(tracker, part)
        for each in part:
            record.on_record(each)
    events = accumulators.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("held out/loss")] == pytest.approx([0.4])
    assert [event.step for event in events.Scalars("gradient norm")] == list(range(7))


class StandIn(ModuleType):
    """A module like wandb or trackio, as far as a run uses it: keeps what it is told. No test of the real ones."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.errors = SimpleNamespace(Error=RuntimeError)
        self.began: list[dict[str, Any]] = []
        self.told: list[tuple[Any, ...]] = []

    def init(self, **given: Any) -> Any:
        self.began.append(given)
        return SimpleNamespace(
            log=lambda curves, step=None: self.told.append((step if step is not None else curves["step"], curves)),
            define_metric=lambda *names, step_metric: self.told.append((names, step_metric)),
            finish=lambda: self.told.append(("finished",)),
        )


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_with_runs_is_told_of_one_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = StandIn(name)
    monkeypatch.setitem(sys.modules, name, module)
    check_trackers([name])
    for _ in range(2):
        tell(in_folder(tmp_path, name)[0], RECORDS[1:])
    first, second = module.began
    assert first == second
    assert (first["project"], first["config"], first["resume"]) == ("gearshift", {"seed": 3}, "allow")
    assert first["name"].startswith(tmp_path.name)
    told = [call for call in module.told if call != (("*",), "step")]
    assert [call[0] for call in told] == [2, 3, 4, 6, "finished"] * 2
    assert told[0][1]["layers/kda/00"] == 0.25


def test_trackers_are_closed_if_a_later_one_cannot_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = StandIn("wandb"), StandIn("trackio")
    monkeypatch.setitem(sys.modules, "wandb", first)
    monkeypatch.setitem(sys.modules, "trackio", second)
    monkeypatch.setattr(second, "init", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        in_folder(tmp_path, "wandb", "trackio")
    assert first.told[-1] == ("finished",)


def test_a_run_killed_as_it_draws_its_name_draws_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = StandIn("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)

    def killed(path: Path, text: str, **how: str) -> None:
        path.touch()
        raise KeyboardInterrupt

    in_folder(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            make_trackers(["wandb"], tmp_path, 2, {})
    make_trackers(["wandb"], tmp_path, 2, {})
    assert len(module.began[0]["id"]) == 8


def test_wandb_that_wants_an_account_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = StandIn("wandb")

    def refuse(**given: Any) -> None:
        raise RuntimeError("no API key\nmore")

    monkeypatch.setattr(module, "init", refuse)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ValueError, match=r"cannot begin \(no API key\): log in, or set WANDB_MODE=offline"):
        in_folder(tmp_path, "wandb")


def test_the_real_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is an extra")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    tell(in_folder(tmp_path, "wandb")[0], RECORDS[1:])
    (written,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert (tmp_path / "tracker-id").read_text() in written.name
    assert b"layers/kda/00" in written.read_bytes()


def test_the_real_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="trackio is an extra")
    tell(in_folder(tmp_path, "trackio")[0], RECORDS[1:])
    run = trackio.Api().runs("gearshift")[0]
    assert run.name.startswith(tmp_path.name)
