"""Foreign checkpoints in and out. A family is data in a folder of its own; everything else here serves all families."""

from gearshift.formats.base import Format, InexpressibleError
from gearshift.formats.checkpoint import HUB_NAME, Checkpoint, choose_format, hub_folder, open_checkpoint
from gearshift.formats.native import NativeConfig
from gearshift.formats.registry import FORMATS
from gearshift.formats.spec_file import read_spec
from gearshift.formats.writer import write_checkpoint

__all__ = [
    "FORMATS",
    "HUB_NAME",
    "Checkpoint",
    "Format",
    "InexpressibleError",
    "NativeConfig",
    "choose_format",
    "hub_folder",
    "open_checkpoint",
    "read_spec",
    "write_checkpoint",
]
