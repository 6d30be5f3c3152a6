"""The families whose modelling code is Fast-LLM's: checkpoints that it wrote, and the logits that it computed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gearshift import GearshiftForCausalLM
from gearshift.formats import FORMATS, open_checkpoint
from tests.formats.folders import convert, export

DATA = Path(__file__).parent / "data"
FAMILIES = ("apriel", "diffusion_llama", "dream", "mtp_llama")
IDENTITY = "apriel-identity"
FOLDERS = [path.name for name in FAMILIES for path in sorted(DATA.glob(f"{name}-*")) if path.name != IDENTITY]


def config_of(folder: str) -> dict[str, Any]:
    return json.loads((DATA / folder / "config.json").read_text())


@pytest.mark.parametrize("folder", FOLDERS)
def test_there_and_back(tmp_path: Path, folder: str) -> None:
    convert(open_checkpoint(DATA / folder), tmp_path / "native")
    model = GearshiftForCausalLM.from_pretrained(tmp_path / "native").eval()
    expected = load_file(DATA / folder / "expected.safetensors")
    with torch.no_grad():
        output = model(expected["input_ids"], prediction_heads=any("head" in name for name in expected))
    assert_close(output.logits, expected["logits"])
    for number, logits in enumerate(output.prediction_logits or (), start=1):
        assert_close(logits, expected[f"logits.head_{number}"])

    export(open_checkpoint(tmp_path / "native"), tmp_path / "back", folder.partition("-")[0])
    before, after = (load_file(path / "model.safetensors") for path in (DATA / folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    for tensor in before:
        assert before[tensor].equal(after[tensor]), tensor
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert back == {key: value for key, value in config_of(folder).items() if key != "transformers_version"}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
