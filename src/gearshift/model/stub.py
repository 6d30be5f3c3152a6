"""What a saved folder carries for `trust_remote_code`: a file that imports the package, not a second implementation."""

import os
from pathlib import Path

STUB = "modeling_gearshift.py"
"""The file's name."""
AUTO_MAP = {
    "AutoConfig": "modeling_gearshift.GearshiftConfig",
    "AutoModelForCausalLM": "modeling_gearshift.GearshiftForCausalLM",
}
"""Where transformers finds the classes: a key of `config.json`."""
STUB_CODE = '''"""Loads this checkpoint with `trust_remote_code=True`. Its code is in the package `gearshift`."""

try:
    from gearshift.model import GearshiftConfig, GearshiftForCausalLM
except ModuleNotFoundError as error:
    if error.name not in ("gearshift", "gearshift.model"):
        raise
    raise ImportError("this checkpoint needs the package gearshift: pip install gearshift") from None

__all__ = ["GearshiftConfig", "GearshiftForCausalLM"]
'''


def write_stub(folder: str | os.PathLike[str]) -> None:
    """Write the stub into a saved folder."""
    (Path(folder) / STUB).write_text(STUB_CODE, encoding="utf-8")
