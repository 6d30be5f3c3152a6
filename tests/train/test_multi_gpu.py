"""Many GPUs do what one does, over NCCL."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.models import supernet
from tests.train.test_parallel import RECOMPUTED, furthest
from tests.train.test_run import recipe, timeless
from tests.train.test_torchrun import check_restart, torchrun, write

pytestmark = pytest.mark.multi_gpu

COMPILING = 400
"""Seconds for a run, most of which compiles kernels."""
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 32}
ATTENTIONS = {"attention": {"type": "attention", **HEADS}, "window": {"type": "attention", **HEADS, "window": 6}}
RECURRENT = {
    "gdn": {"type": "gated_delta_net", "key_heads": 2, "value_heads": 4, "key_dim": 32, "value_dim": 32},
    "kda": {"type": "kimi_delta_attention", "heads": 4, "head_dim": 32},
}
ARRANGEMENTS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "2 shards": (2, None),
    "2 copies": (2, {"data": "ddp"}),
    "2 slices": (2, {"tensor": 2}),
    "4 shards": (4, None),
    "2 shards of 2 slices": (4, {"tensor": 2}),
    "2 copies in 2 shards": (4, {"replicas": 2}),
}


def prepared(source: Path, folder: Path, **model: Any) -> str:
    """The folder of a model that CUDA's kernels can run, its weights small: see `tests/model/test_cuda.py`."""
    shutil.copytree(source / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    made = supernet(layers=2, hidden_size=128, **model)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 2:
                parameter.div_(4)
    made.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def case(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """How far off a run may be, its settings, its record on one GPU: attentions alone, or all mixers by autocast."""
    folder = tmp_path_factory.mktemp(request.param)
    exact = request.param == "float32"
    model = prepared(source, folder / "model", mixers=ATTENTIONS if exact else ATTENTIONS | RECURRENT)
    settings = {"model": model, "device": "cuda", "autocast": "none" if exact else "bfloat16", "sequence_length": 64}
    settings |= {"batch_size": 8, "held_out": 3, "stages": RECOMPUTED, "compile": False, "cuda_graphs": False}
    run = recipe(source, folder / "alone", **settings)
    ended = torchrun("-m", "gearshift", "train", write(run, folder), processes=1, timeout=COMPILING)
    assert ended.returncode == 0, ended.stderr
    return 1e-5 if exact else 3e-2, settings, timeless(folder / "alone")


@pytest.mark.parametrize("name", ARRANGEMENTS)
def test_many_gpus_learn_what_one_does(source, case, tmp_path, name) -> None:
    gpus, parallel = ARRANGEMENTS[name]
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    largest, settings, alone = case
    path = write(recipe(source, tmp_path / "run", parallel=parallel, **settings), tmp_path)
    ended = torchrun("-m", "gearshift", "train", path, processes=gpus, timeout=COMPILING)
    assert ended.returncode == 0, ended.stderr
    assert furthest(timeless(tmp_path / "run"), alone) < largest


@pytest.mark.parametrize("name", ["2 shards", "2 copies", "4 shards"])
def test_compiled_gpus_learn_what_a_plain_one_does(source, case, tmp_path, name) -> None:
    gpus, parallel = ARRANGEMENTS[name]
    if torch.cuda.device_count() < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    largest, settings, alone = case
    faster = {"compile": True, "cuda_graphs": None if "copies" in name else False}
    path = write(recipe(source, tmp_path / "run", parallel=parallel, **{**settings, **faster}), tmp_path)
    ended = torchrun("-m", "gearshift", "train", path, processes=gpus, timeout=COMPILING)
    assert ended.returncode == 0, ended.stderr
    assert furthest(timeless(tmp_path / "run"), alone) < max(largest, 1e-3)  # fused sums have another order


def test_a_killed_gpu_process_ends_the_job_and_a_restart_goes_on(source, tmp_path) -> None:
    model = prepared(source, tmp_path / "model", mixers=ATTENTIONS)
    exact = {"autocast": "none", "compile": False, "cuda_graphs": False, "sequence_length": 64}
    check_restart(source, tmp_path, model=model, device="cuda", timeout=COMPILING, **exact)
