"""A run on a GPU that is broken off goes on as on the CPU."""

from pathlib import Path

import pytest

from gearshift.train import train
from tests.train.test_multi_gpu import ATTENTIONS, prepared
from tests.train.test_parallel import furthest
from tests.train.test_run import Interrupt, recipe, timeless

DEVICE = "cuda"
STAGES = ({"type": "layerwise", "steps": 3}, {"type": "stochastic", "steps": 5})


@pytest.mark.gpu
@pytest.mark.parametrize(("fast", "largest"), [(False, 1e-5), (None, 1e-4)])
def test_an_interrupted_run_goes_on(source: Path, tmp_path: Path, fast: bool | None, largest: float) -> None:
    """Plain, and compiled and recorded. Sums that kernels make in no fixed order differ in their last bits."""
    settings = {"model": prepared(source, tmp_path / "model", mixers=ATTENTIONS), "device": DEVICE, "stages": STAGES}
    settings |= {"autocast": "none", "compile": fast, "cuda_graphs": fast, "sequence_length": 64, "ema": 0.9}
    train(recipe(source, tmp_path / "unbroken", held_out=2, **settings))
    broken = recipe(source, tmp_path / "broken", held_out=2, **settings)
    for at in (1, 4):  # in each stage one step or more behind its last checkpoint, if that is written by then
        with pytest.raises(KeyboardInterrupt):
            train(broken, callbacks=[Interrupt(at)])
    assert train(broken).resumed_at is not None
    assert furthest(timeless(tmp_path / "broken"), timeless(tmp_path / "unbroken")) < largest
