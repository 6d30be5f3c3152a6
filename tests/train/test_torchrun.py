"""What the launcher sees: a killed process, a restart, a bad recipe."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from gearshift.train import Recipe, train
from tests.train.test_parallel import furthest
from tests.train.test_run import recipe, timeless

STAGES = ({"type": "layerwise", "steps": 2}, {"type": "stochastic", "steps": 2})


def launched(*arguments: object, processes: int = 2) -> dict[str, Any]:
    """`torchrun --nproc-per-node PROCESSES ARGUMENTS`, its output as text: what to give to subprocess."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return {"args": [*command, *map(str, arguments)], "env": environment, "text": True}


def torchrun(*arguments: object, processes: int = 2, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """`torchrun --nproc-per-node PROCESSES ARGUMENTS`, its output as text."""
    job = launched(*arguments, processes=processes)
    return subprocess.run(**job, capture_output=True, timeout=timeout, check=False)


def write(settings: Recipe, folder: Path) -> Path:
    """The file of a recipe."""
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")))
    return path


def test_a_killed_process_ends_the_job_and_a_restart_goes_on_from_the_checkpoint(source, tmp_path) -> None:
    check_restart(source, tmp_path)


def check_restart(source: Path, tmp_path: Path, timeout: float = 120, **more: Any) -> None:
    """A run whose second process is killed once, against one that nothing happens to."""
    path = write(recipe(source, tmp_path / "run", stages=STAGES, **more), tmp_path)
    script = Path(__file__).with_name("killed_once.py")
    ended = torchrun("--max-restarts", "1", script, tmp_path / "killed", "train", path, timeout=timeout)
    assert (tmp_path / "killed").exists()
    assert ended.returncode == 0, ended.stderr
    # torchrun says which and how; the other one says that one has ended, unless torchrun was faster to end it.
    assert "failed (exitcode: -9) local_rank: 1" in ended.stderr
    assert ended.stderr.count("gearshift: another process of this job has ended") <= 1
    assert "Traceback" not in ended.stderr
    assert ended.stdout.split() == f"{tmp_path}/run/model: 2 steps, resumed at step 2".split()
    train(recipe(source, tmp_path / "alone", stages=STAGES, **more))
    assert furthest(timeless(tmp_path / "run"), timeless(tmp_path / "alone")) < 1e-5


def test_a_bad_recipe_is_refused_in_one_sentence_said_once(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("{model: nowhere, output: out, stages: [{type: layerwise}]}")
    ended = torchrun("-m", "gearshift", "train", tmp_path / "recipe.yaml")
    assert ended.returncode != 0
    assert ended.stderr.count("gearshift: ") == 1
    reason = f"{tmp_path}/recipe.yaml: the key 'stages.0.steps' is missing"
    assert f"gearshift: {reason}" in ended.stderr
    assert f"  traceback : {reason}\n" in ended.stderr  # torchrun's summary, whose word for it that is
    assert "exitcode  : 2" in ended.stderr


def test_ctrl_c_ends_all_processes_without_waiting_for_each_other(source: Path, tmp_path: Path) -> None:
    path = write(recipe(source, tmp_path / "run", stages=[{"type": "layerwise", "steps": 10**6}]), tmp_path)
    job = subprocess.Popen(**launched("-m", "gearshift", "train", path), stderr=subprocess.PIPE)
    hung = threading.Timer(120, job.terminate)
    hung.start()
    try:
        assert any("stage 1/1 layerwise" in line for line in job.stderr), "it ended before its first step"
        job.send_signal(signal.SIGINT)  # its processes are in groups of their own: a terminal's reaches it alone too
        _, said = job.communicate()
    finally:
        hung.cancel()
        job.terminate()
        job.wait()
    assert "gearshift: stopped" in said
    assert "forcefully exiting" not in said  # what torchrun does to those that it has waited for too long
