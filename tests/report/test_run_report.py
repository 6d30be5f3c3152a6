"""The report of a run: finished, running, broken off, and of what is no run."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from sample_run import sample_run
from test_report_page import Reader
from typer.testing import CliRunner

from gearshift.cli import app
from gearshift.locks import LOCK
from gearshift.records import Tally, read_records
from gearshift.report.history import RECENT, read_history
from gearshift.report.numbers import MISSING
from gearshift.report.run_page import render_run, stage_rows, status

LAYERS = 4


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_run(tmp_path_factory.mktemp("runs") / "finished", LAYERS, 70, 12)


def running(folder: Path, done: int, process: int | None = None, host: str | None = None) -> Path:
    """A run after `done` steps that a process is at: this one if None is given."""
    sample_run(folder, LAYERS, 70, 12, done)
    (folder / LOCK).write_text(f"process {process or os.getpid()} on {host or socket.gethostname()}")
    return folder


def anchors(page: str) -> list[str]:
    return [name for name in Reader(page).ids if "-m" not in name and "DejaVu" not in name]


def test_a_finished_run_has_every_section(finished: Path) -> None:
    history = read_history(finished)
    page = render_run(history)
    reader = Reader(page)
    wanted = ["top", "training", "errors", "sampled-1", "held-out", "watched", "calibration", "settings"]
    assert [name for name in reader.ids if name in wanted] == wanted
    assert reader.tags.count("svg") == 5
    assert len(set(reader.ids)) == len(reader.ids)
    assert not {"link", "script", "img", "iframe"} & set(reader.tags)
    assert "https:" not in page
    assert "Finished: 82 steps." in reader.text
    assert (history.main, history.mixers) == ("attention", ["attention", "window", "gdn", "kda"])
    assert page == render_run(read_history(finished))


def test_the_heat_maps_say_what_was_sampled(finished: Path) -> None:
    records = [record for record in read_records(finished / "metrics.jsonl") if record["stage"] == 1]
    tally = Tally(records)
    page = render_run(read_history(finished))
    for mixer, times in tally.times().items():
        for layer, count in enumerate(times):
            assert f'title="{mixer}, layer {layer}: {count}"' in page
    steps = [record["layers"] for record in read_records(finished / "metrics.jsonl") if record.get("layers")]
    assert read_history(finished).stages[0].layer_errors() == {"first step": steps[0], "last step": steps[-1]}


def test_a_layerwise_stage_that_follows_students_says_whose_loss_it_is(tmp_path: Path) -> None:
    folder = running(tmp_path / "run", 70)
    path = folder / "metrics.jsonl"
    student = {"placement": "gdn,kda,attention,gdn"}
    records = [record | student if record["event"] == "step" else record for record in read_records(path)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    reader = Reader(render_run(read_history(folder)))
    assert {"errors", "sampled-0"} <= set(reader.ids)
    assert "all mixers learn on the hidden states of one placement" in reader.text
    assert "Each step runs one placement" not in reader.text


def test_a_run_on_its_way(tmp_path: Path) -> None:
    """With a line that is only half written, as one finds it while the run writes it or after it broke off."""
    folder = running(tmp_path / "run", 75)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + path.read_text().splitlines()[-1][:50])
    history = read_history(folder)
    layerwise, stochastic = history.stages
    assert [len(stage.steps) for stage in history.stages] == [70, 5]
    assert (layerwise.seconds_left, layerwise.end is None) == (0.0, False)
    seconds = sorted(step["seconds"] for step in stochastic.steps)
    assert stochastic.seconds_left == history.seconds_left == pytest.approx(7 * seconds[2])
    assert stochastic.loss == pytest.approx(sum(step["loss"] for step in stochastic.steps) / 5)
    assert layerwise.loss == pytest.approx(sum(step["loss"] for step in layerwise.steps[-RECENT:]) / RECENT)
    assert stage_rows(history)[1][:2] == ("stochastic", "5 of 12")
    assert status(history).startswith("75 of 82 steps done (91%), 0.5")
    assert "left at the present pace. The record last grew at " in status(history)
    assert stage_rows(history)[1][4].startswith("0.5")
    assert "91%" in Reader(render_run(history)).text


@pytest.mark.parametrize("killed", [True, False], ids=["killed", "no lock"])
def test_a_run_that_no_process_is_at_has_no_time_left(tmp_path: Path, killed: bool) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    folder = running(tmp_path / "run", 75, gone.pid)
    if not killed:
        (folder / LOCK).unlink()
    history = read_history(folder)
    said = "75 of 82 steps done (91%). No process is at the run now: the same command goes on with it. The record last"
    assert status(history).startswith(said)
    assert said in Reader(render_run(history)).text
    assert [row[4] for row in stage_rows(history)] == ["done", MISSING]
    shown = CliRunner().invoke(app, ["report", str(folder)])
    assert "No process is at the run now" in shown.output
    assert " left at" not in shown.output


def test_a_run_on_another_machine_may_go_on(tmp_path: Path) -> None:
    folder = running(tmp_path / "run", 75, 2**31 - 1, "elsewhere")
    assert "left at the present pace" in status(read_history(folder))
    (folder / LOCK).write_text("")  # just taken
    assert "left at the present pace" in status(read_history(folder))


def test_what_is_to_come_has_no_time_yet(tmp_path: Path) -> None:
    history = read_history(running(tmp_path / "run", 10))
    assert stage_rows(history)[1][4] == "not begun"
    assert history.seconds_left is None
    assert history.done == 10
    ids = Reader(render_run(history)).ids
    assert "sampled-1" not in ids
    assert "held-out" not in ids


def test_only_a_calibration_so_far(tmp_path: Path) -> None:
    folder = running(tmp_path / "run", 1)
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    ids = Reader(render_run(read_history(folder))).ids
    assert "calibration" in ids
    assert "training" not in ids


def test_steps_without_a_loss_and_numbers_that_were_lost(tmp_path: Path) -> None:
    folder = running(tmp_path / "run", 75)
    path = folder / "metrics.jsonl"
    records = read_records(path)
    records[-1] |= {"loss": None, "terms": {}, "gradient_norm": 0.0}
    records[-2] |= {"gradient_norm": None}
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert "training" in Reader(render_run(read_history(folder))).ids


def test_stages_of_one_type_are_told_apart(tmp_path: Path) -> None:
    folder = running(tmp_path / "run", 75)
    recipe = {"stages": [{"type": kind, "steps": 70} for kind in ("layerwise", "stochastic", "stochastic")]}
    (folder / "recipe.json").write_text(json.dumps({"recipe": recipe}))
    assert [stage.name for stage in read_history(folder).stages] == ["layerwise", "stochastic (1)", "stochastic (2)"]
    (folder / "recipe.json").unlink()
    assert [stage.planned for stage in read_history(folder).stages] == [70, 5]


def test_kinds_of_records_to_come_are_left_out_and_named(tmp_path: Path) -> None:
    folder = running(tmp_path / "run", 10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"event": "merger", "stage": 0}\n' * 2)
    sentence = "Left out: records of kinds that this version of Gearshift does not know, merger (2)."
    assert sentence in Reader(render_run(read_history(folder))).text
    shown = CliRunner().invoke(app, ["report", str(folder)])
    assert sentence in shown.output


def test_damaged_lines_are_counted_and_the_rest_is_shown(tmp_path: Path) -> None:
    """A last line that does not end is no damage: a run may be writing it."""
    folder = running(tmp_path / "run", 10)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[3], lines[5], lines[6] = lines[3][:40] + b"\n", b"\0" * 30 + b"\n", b"[1, 2]\n"
    (folder / "metrics.jsonl").write_bytes(b"".join(lines) + b'{"event": "st')
    history = read_history(folder)
    assert history.damaged == [4, 6, 7]
    assert history.done == 7
    sentence = "Left out: 3 lines of metrics.jsonl that cannot be read (the first: line 4)."
    assert Reader(render_run(history)).text.count(sentence) == 1
    shown = CliRunner().invoke(app, ["report", str(folder)])
    assert (shown.exit_code, shown.output.count(sentence)) == (0, 1)


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / {"metrics": "metrics.jsonl", "recipe": "recipe.json", "inner": "training/metrics.jsonl"}[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({}, r"there is no run at .*: the folder does not exist"),
        ({"inner": "{}\n"}, r"is a quickstart's folder: its training run is in .*training"),
        ({"recipe": '{"recipe": {}}'}, r"the run in .* has no record yet: try again"),
        ({"metrics": ""}, r"the run in .* has no record yet: try again"),
        ({"metrics": "\n{]\n"}, r"metrics.jsonl cannot be read, from line 1 on: it holds no record of a run"),
        ({"metrics": '{"event": "merger"}\n'}, r"no record yet, but for 1 of kind 'merger' that this version"),
        ({"metrics": '{"event": "stage_end", "stage": 0}\n'}, r"understood \(a stage_end record lacks step, type\)"),
        ({"metrics": '{"event": "calibration", "stage": 0, "type": "x", "step": 0, "after": {}, "seconds": 1}\n'},
         r"understood \(a calibration record lacks before\)"),
        ({"metrics": '{"event": "step", "stage": 0, "type": "x", "step": -1, "global_step": 0, "loss": 1, "terms": {},'
                     ' "seconds": 1, "learning_rate": 1, "tokens": 1, "gradient_norm": 1}\n'},
         r"metrics.jsonl cannot be understood \(step: Input should be greater than or equal to 0\)"),
        ({"metrics": '{"event": "step"}\n', "recipe": "{"}, r"recipe.json cannot be understood"),
        ({"metrics": '{"event": "step"}\n', "recipe": "[]"}, r"recipe.json cannot be understood"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_said_in_a_sentence(tmp_path: Path, files: dict[str, str], sentence: str) -> None:
    folder = write(tmp_path / "run", **files)
    with pytest.raises(ValueError, match=sentence) as caught:
        read_history(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("event", "change", "sentence"),
    [
        ("step", {"seconds": "1"}, "seconds: Input should be a valid number"),
        ("step", {"seconds": None}, "seconds: Input should be a valid number"),
        ("step", {"loss": float("nan")}, "loss: Input should be a finite number"),
        ("step", {"tokens": [1]}, "tokens: Input should be a valid integer"),
        ("step", {"global_step": "0"}, "global_step: Input should be a valid integer"),
        ("step", {"layers": {"gdn": 1}}, "layers.gdn: Input should be a valid list"),
        ("step", {"placement": ["gdn"]}, "placement: .* a placement is text"),
        ("step", {"placement": "gdn"}, "a placement of 1 layers comes after placements of 4"),
        ("calibration", {"after": {"gdn": ["x"]}}, "after.gdn.0: Input should be a valid number"),
        ("stage_end", {"held_out": {"forward_kl": None}}, "held_out.forward_kl: Input should be a valid dictionary"),
        ("stage_end", {"stage": "1"}, "stage: Input should be a valid integer"),
        ("stopped", {"reason": 3}, "reason: Input should be a valid string"),
    ],
)
def test_records_edited_into_other_types_are_refused_in_a_sentence(
    tmp_path: Path, event: str, change: dict, sentence: str
) -> None:
    path = sample_run(tmp_path / "run", LAYERS, 4, 3) / "metrics.jsonl"
    records = read_records(path)
    records.append(records[-1] | {"event": "stopped", "reason": "the loss became nan"})
    edited = next(place for place in (-3, -2, -1, 0) if records[place]["event"] == event)
    records[edited] = records[edited] | change
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    shown = CliRunner().invoke(app, ["report", str(path.parent)])
    said = " ".join(shown.output.split())
    assert shown.exit_code == 2, said
    assert re.search(rf"metrics.jsonl cannot be understood \({sentence}", said), said


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no training run: it has neither metrics.jsonl nor recipe.json"):
        read_history(tmp_path)
    shown = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert shown.exit_code == 2
    assert "Traceback" not in shown.output


def test_the_command(finished: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["report", str(finished)])
    assert shown.exit_code == 0, shown.output
    lines = shown.output.splitlines()
    assert lines[0].split() == ["stage", "steps", "loss", "tokens/s", "time", "left", "held-out"]
    assert lines[1].split()[:4] == ["layerwise", "70", "of", "70"]
    assert "kda 0.370" in lines[2]
    assert lines[-1] == f"report: {finished / 'report.html'}"
    elsewhere = tmp_path / "new" / "page.html"
    assert CliRunner().invoke(app, ["report", str(finished), "--out", str(elsewhere)]).exit_code == 0
    assert elsewhere.read_text() == (finished / "report.html").read_text()
