"""The command line from outside: every verb, every kind of bad input, Ctrl-C."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner, Result

from gearshift.cli import app
from gearshift.locks import LOCK
from gearshift.quickstart import quickstart
from gearshift.quickstart_job import Job
from gearshift.report import Report
from gearshift.tiny import TINY, write_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 200
SURGERY = Path(__file__).parents[1] / "recipes" / "quickstart" / "surgery.yaml"


def gearshift(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def succeed(*args: object) -> Result:
    result = gearshift(*args)
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny source, its supernet, and text."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "text.txt").write_text(TEXT)
    write_tiny_model(folder / "source", TEXT)
    succeed("convert", folder / "source", folder / "supernet", "--surgery", SURGERY)
    return folder


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_help_of_every_verb() -> None:
    verbs = ("convert", "info", "diff", "train", "eval", "search", "export", "generate", "quickstart", "report")
    shown = succeed("--help").output
    for verb in verbs:
        assert verb in shown
        assert "Usage" in succeed(verb, "--help").output


def test_convert_dry_run_writes_nothing(work: Path) -> None:
    before = listing(work)
    shown = succeed("convert", work / "source", work / "new", "--surgery", SURGERY, "--dry-run").output
    assert "layers.0-3" in shown
    assert "kda" in shown
    assert listing(work) == before


def test_info(work: Path) -> None:
    shown = succeed("info", work / "supernet").output
    assert "attention (main)" in shown
    assert "x 4" in shown
    resolved = yaml.safe_load(succeed("info", work / "supernet", "--resolved").output)
    assert resolved["spec"]["decoder"]["blocks"]["layer"]["mixer"]["mixers"]["window"]["window"] == 128


def test_eval_takes_several_placements_in_any_order(work: Path) -> None:
    settings = ("--text", work / "text.txt", "--json", "--sequence-length", 64, "--sequences", 2)
    (work / "p.json").write_text('["gdn", "gdn", "attention", "kda"]')
    placements = ("attention", "gdn*4", f"@{work / 'p.json'}")
    repeated = [part for placement in placements for part in ("--placement", placement)]
    shown = [
        json.loads(succeed("eval", work / "supernet", "--placement", *placements, *settings).output),
        json.loads(succeed("eval", "--placement", *placements, work / "supernet", *settings).output),
        json.loads(succeed("eval", work / "supernet", *settings, *repeated).output),
    ]
    assert shown[0] == shown[1] == shown[2]
    main, gdn, mixed = shown[0]["scores"]
    assert main["divergence"] == 0 < gdn["divergence"]
    assert mixed["placement"] == "gdn*2,attention,kda"
    table = succeed("eval", work / "supernet", "--placement", "attention", *settings[:2], "--sequence-length", 64)
    assert "divergence" in table.output


def recipe(work: Path, folder: Path, *stages: dict[str, object]) -> Path:
    """A recipe for a run in `folder`."""
    settings = {
        "model": str(work / "supernet"),
        "output": str(folder / "run"),
        "text": str(work / "text.txt"),
        "sequence_length": 32,
        "batch_size": 2,
        "device": "cpu",
        "stages": list(stages),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_train_resumes_and_finishes(work: Path, tmp_path: Path) -> None:
    stages = {"type": "layerwise", "steps": 9}, {"type": "stochastic", "steps": 2}
    shown = succeed("train", recipe(work, tmp_path, *stages), "stages.0.steps=2", "seed=3")
    assert shown.stdout.endswith("model: 4 steps\n")
    begun, first, second = shown.stderr.splitlines()
    assert begun.startswith(f"training {work}/supernet: ")
    assert begun.endswith(
        " parameters learn, of window, gdn, kda, in 4 of 4 layers; 4 steps (layerwise, stochastic);"
        f" record: {tmp_path}/run/metrics.jsonl"
    )
    assert first == "stage 1/2 layerwise"
    assert second.startswith("step 3/4, stage 2/2 stochastic, loss ")
    assert "finished before" in succeed("train", tmp_path / "recipe.yaml", "stages.0.steps=2", "seed=3").output
    run = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["output"]
    assert "Finished: 4 steps." in succeed("report", run).output
    shown = gearshift("train", tmp_path / "recipe.yaml", "stages.0.stepps=2")
    assert shown.exit_code == 2
    assert "stepps" in shown.output
    assert "did you mean steps" in shown.output


def test_a_run_that_diverges_says_where_in_one_line(work: Path, tmp_path: Path) -> None:
    shown = gearshift("train", recipe(work, tmp_path, {"type": "layerwise", "steps": 9, "learning_rate": 1e30}))
    assert shown.exit_code == 1
    assert "The first bad tensor: the output of model.layers." in shown.output
    assert shown.stderr.splitlines()[2:] == [shown.stderr.splitlines()[-1]]  # behind those for run and stage
    assert not (tmp_path / "run" / "model").exists()
    said = " ".join(succeed("report", tmp_path / "run").output.split())
    assert "of 9 steps (" in said
    assert "Stopped after " in said
    assert "The first bad tensor: the output of model.layers." in said


def test_search_names_presets_and_export_and_generate_use_them(work: Path, tmp_path: Path) -> None:
    small = ("length=64", "sequences=1", "top=1")
    budgets = ("half:0.5", "attention=1,gdn=2")
    before = json.loads((work / "supernet" / "config.json").read_text())
    shown = succeed(
        "search", work / "supernet", *small, "--text", work / "text.txt", "--budget", *budgets, "--out", tmp_path / "s"
    )
    assert "half" in shown.output
    assert json.loads((work / "supernet" / "config.json").read_text()) == before
    counts = json.loads((tmp_path / "s" / "budget-2.json").read_text())["counts"]
    assert (counts["attention"], counts["gdn"]) == (1, 2)
    half = json.loads((tmp_path / "s" / "half.json").read_text())
    span = json.loads((tmp_path / "s" / "search.json").read_text())["cost"]
    assert half["cost"] <= (span["cheapest"] + span["main"]) / 2
    placement = f"@{tmp_path / 's' / 'half.json'}"
    assert "format" in succeed("export", work / "supernet", tmp_path / "e", "--placement", placement).output
    again = gearshift("export", work / "supernet", tmp_path / "e", "--placement", placement)
    assert again.exit_code == 2
    assert "--overwrite" in again.output
    succeed("export", work / "supernet", tmp_path / "e", "--placement", placement, "--overwrite")
    prompt = ("--prompt", "The quick", "--max-new-tokens", 5)
    alone = succeed("generate", tmp_path / "e", *prompt).stdout
    assert alone == succeed("generate", work / "supernet", *prompt, "--placement", placement).stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["convert", "{work}/nowhere", "{new}"], "there is no"),
        (["convert", "{work}/text.txt", "{new}"], "neither a model folder"),
        (["convert", "{work}/source", "{work}/supernet"], "--overwrite"),
        (["convert", "{work}/source", "{new}", "--surgery", "{work}/none.yaml"], "cannot be read"),
        (["convert", "{work}/source", "{new}", "--dtype", "int3"], "unknown dtype"),
        (["convert", "{work}/source"], "OUT"),
        (["info", "{work}"], "config.json"),
        (["diff", "{work}/source", "{work}/nowhere"], "there is no"),
        (["train", "{work}/none.yaml"], "cannot be read"),
        (["eval", "{work}/supernet", "--placement", "gdn*3", "--text", "{work}/text.txt"], "names 3 layers"),
        (["eval", "{work}/supernet", "--placement", "mamba*4", "--text", "{work}/text.txt"], "no mixer 'mamba'"),
        (["eval", "{work}/supernet", "--placement", "fast", "--text", "{work}/text.txt"], "no preset"),
        (["eval", "{work}/supernet", "--placement", "gdn", "--text", "{work}/none"], "no text"),
        (["eval", "{work}/supernet", "--placement", "gdn", "--text", "{work}/short"], "too short"),
        (["search", "{work}/supernet", "--text", "{work}/text.txt", "--budget", "1.5", "--out", "{new}"], "span"),
        (["search", "{work}/supernet", "--text", "{work}/text.txt", "--budget", "gdn=5", "--out", "{new}"], "span"),
        (["search", "{work}/supernet", "--text", "{work}/text.txt", "--budget", "x", "--out", "{new}"], "budget"),
        (["search", "{work}/supernet", "--text", "{work}/text.txt", "--budget", "0.5", "--out", "{work}"], "overwrite"),
        (
            [
                "search",
                "{work}/supernet",
                "length=999999",
                "--text",
                "{work}/text.txt",
                "--budget",
                "0.5",
                "--out",
                "{new}",
            ],
            "length is 999999",
        ),
        (["search", "{work}/source", "--text", "{work}/text.txt", "--budget", "0.5", "--out", "{new}"], "nothing to"),
        (["export", "{work}/supernet", "{new}"], "--placement"),
        (["export", "{work}/supernet", "{new}", "--placement", "gdn", "--format", "x"], "unknown format"),
        (["export", "{work}/supernet", "{new}", "--placement", "gdn", "--format", "llama"], "llama"),
        (["generate", "{work}/supernet", "--prompt", "", "--placement", "gdn"], "prompt is empty"),
        (["quickstart", "--out", "{work}", "--model", "tiny"], "something else"),
        (["quickstart", "--out", "{new}", "--model", "{work}/nowhere"], "there is no"),
        (["quickstart", "--out", "{new}", "--model", "tiny", "held_outt=1"], "held_outt"),
        (["quickstart", "--out", "{new}", "--model", "tiny", "--text", "{work}/short"], "too short"),
        (["frobnicate"], "No such command"),
    ],
)
def test_bad_input_is_one_sentence_and_changes_nothing(
    work: Path, tmp_path: Path, args: list[str], message: str
) -> None:
    (work / "short").write_text("ab")
    before = listing(work)
    filled = [arg.format(work=work, new=tmp_path / "new") for arg in args]
    result = gearshift(*filled)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert listing(work) == before
    if "quickstart" not in args:
        assert listing(tmp_path) == set()


def test_a_full_disk_is_a_sentence(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("gearshift.train.metrics.StepRecord.to_json", full)
    shown = gearshift("train", recipe(work, tmp_path, {"type": "stochastic", "steps": 1}))
    assert shown.exit_code == 2
    record = tmp_path / "run" / "metrics.jsonl"
    assert f"gearshift: no space is left for {record}: free some and run the same again" in shown.output
    monkeypatch.setattr("gearshift.progress.say_if_piped", full)
    shown = gearshift("train", tmp_path / "recipe.yaml")
    assert "no space is left on a disk that is written to: free some and run the same again" in shown.output


def test_ctrl_c_at_any_time_exits_130(work: Path, tmp_path: Path) -> None:
    # Until the launcher answers Ctrl-C, the script does: Python's own first moments are not what is tried.
    script = "import os, signal; signal.signal(signal.SIGINT, lambda *_: os._exit(130)); print('up', flush=True)\n"
    command = [sys.executable, "-c", script + "from gearshift_launcher import main; main()"]
    command += ["quickstart", "--out", str(tmp_path / "out"), "--model", "tiny"]
    before = listing(work)
    for delay in (0.5, 1.5, 3.0, 4.5, 6.0):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "up\n"
            time.sleep(delay)
            if (tmp_path / "out" / "report.html").exists():
                process.communicate(timeout=60)
                break  # a fast machine, and each run goes on where the one before was stopped
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=60)
        assert process.returncode == 130, said
        assert not (tmp_path / "out" / LOCK).exists()
        assert "Traceback" not in said
    assert listing(work) == before
    assert subprocess.run(command, check=False).returncode == 0


def test_ctrl_c_that_falls_into_a_finaliser_is_not_lost() -> None:
    script = """
import signal, time, gearshift.cli
class Unlucky:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def app():
    Unlucky()
    time.sleep(50)
gearshift.cli.app = app
import gearshift_launcher
gearshift_launcher.main()
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False, stderr=subprocess.PIPE, timeout=45)
    assert (ended.returncode, ended.stderr) == (130, b"")


def test_two_quickstarts_do_not_write_to_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the report is written; after Ctrl-C nobody has the folder."""

    def another(job: Job) -> None:
        said = (
            rf"another quickstart writes to .*out now \(process {os.getpid()} on .*\): wait for it, or choose another -"
        )
        with pytest.raises(ValueError, match=said):
            quickstart(tmp_path / "out", TINY)
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "run", lambda job: None)
    monkeypatch.setattr("gearshift.quickstart.write_report", another)
    with pytest.raises(KeyboardInterrupt):
        quickstart(tmp_path / "out", TINY)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["quickstart.json"]


def test_the_quickstart_on_a_tiny_model(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text("process 1 on elsewhere")  # a kill left it behind
    shown = succeed("quickstart", "--out", tmp_path, "--model", "tiny").output
    assert "report.html" in shown
    assert not (tmp_path / LOCK).exists()
    report = Report.model_validate_json((tmp_path / "report.json").read_text())
    assert report.export is not None
    assert report.export.exact
    assert report.quality is not None
    before, after = (
        {item.mixer: item.divergence for item in side} for side in (report.quality.before, report.quality.after)
    )
    assert all(after[name] < before[name] for name in ("gdn", "kda"))
    assert [preset.name for preset in report.search.presets] == ["quality", "balanced", "fast"]
    assert [item.preset for item in report.generations] == ["main", "quality", "balanced", "fast"]
    page = (tmp_path / "report.html").read_text()
    assert "<svg" in page
    job = json.loads((tmp_path / "quickstart.json").read_text())
    del job["settings"]["distillation"]["stages"][0]["stream"]  # as an earlier version wrote it
    (tmp_path / "quickstart.json").write_text(json.dumps(job))
    again = succeed("quickstart", "--out", tmp_path, "--model", "tiny").output
    assert "done before" in again
    other = gearshift("quickstart", "--out", tmp_path, "--model", "tiny", "distillation.seed=1")
    assert other.exit_code == 2
    assert "holds a quickstart with other settings" in other.output
