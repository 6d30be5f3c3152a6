"""The moving average of docs/adding-a-mixer.md, as a package of its own that is installed: every verb takes it."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gearshift.tiny import write_tiny_model

GUIDE = Path(__file__).parents[1] / "docs" / "adding-a-mixer.md"
TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all. " * 200
SURGERY = """
edits:
  - wrap: {main: attention}
  - add: {name: average, mixer: {type: ema}}
"""
RECIPE = """
model: {work}/supernet
text: {work}/text.txt
output: {work}/run
sequence_length: 64
held_out: 1
batch_size: 1
stages:
  - {{type: layerwise, steps: 2, calibration_sequences: 1}}
  - {{type: stochastic, steps: 2}}
"""


def sources() -> dict[str, str]:
    """The package's files, from the guide: `name`: and then its code."""
    block = re.compile(r"`(gearshift_ema/\w+\.py)`:\n\n```python\n(.*?)```", re.DOTALL)
    found = block.findall(GUIDE.read_text(encoding="utf-8"))
    assert len(found) == 3
    return dict(found)


def wheel(folder: Path) -> Path:
    """The package as a wheel, with its entry point."""
    info = "gearshift_ema-0.1.dist-info"
    files = sources() | {
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: gearshift-ema\nVersion: 0.1\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: a test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[gearshift.mixers]\nema = gearshift_ema:KIND\n",
    }
    digests = {
        name: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for name, text in files.items()
    }
    record = [f"{name},sha256={digests[name]},{len(text.encode())}" for name, text in files.items()]
    files[f"{info}/RECORD"] = "\n".join([*record, f"{info}/RECORD,,"])
    path = folder / "gearshift_ema-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip put the package."""
    folder = tmp_path_factory.mktemp("third-party")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", folder / "site"]
    subprocess.run([*pip, wheel(folder)], check=True)
    return folder / "site"


def test_it_works_in_every_verb(installed: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}

    def gearshift(*args: object) -> str:
        command = [sys.executable, "-m", "gearshift", *map(str, args)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "surgery.yaml").write_text(SURGERY)
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(work=tmp_path))
    write_tiny_model(tmp_path / "source", TEXT)
    supernet, trained = tmp_path / "supernet", tmp_path / "run" / "model"

    gearshift("convert", tmp_path / "source", supernet, "--surgery", tmp_path / "surgery.yaml")
    assert "ema" in gearshift("info", supernet)
    gearshift("train", tmp_path / "recipe.yaml")
    assert trained.is_dir(), list((tmp_path / "run").iterdir())
    shown = gearshift("eval", trained, "--placement", "average", "--text", tmp_path / "text.txt", "--json")
    assert "average" in shown
    small = ("length=64", "sequences=1", "top=1", "--text", tmp_path / "text.txt")
    gearshift("search", trained, *small, "--budget", "half:0.5", "--out", tmp_path / "found")
    placement = f"@{tmp_path / 'found' / 'half.json'}"
    assert "average" in str(json.loads((tmp_path / "found" / "half.json").read_text()))
    gearshift("export", trained, tmp_path / "exported", "--placement", placement)
    made = [
        gearshift("generate", *model, "--prompt", "The quick", "--max-new-tokens", 8)
        for model in ((trained, "--placement", placement), (tmp_path / "exported",))
    ]
    assert all(text.strip().startswith("The quick") for text in made)
