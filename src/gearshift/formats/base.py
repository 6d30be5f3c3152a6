"""What a format is: a family of checkpoints that Gearshift reads, and writes where it can."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from gearshift.formats.native import NativeConfig
from gearshift.plan import Plan, Schema
from gearshift.spec import ModelSpec


class InexpressibleError(ValueError):
    """A model has something that a format cannot say."""

    reached = 0
    """How far a family came: 0 if it has no such block, 1 if it has no key for a setting, 2 if no one value for it."""


class Format(ABC):
    """A family of checkpoints: its config as our native one, and its tensors as ours."""

    name: str
    model_type: str | None
    """The `model_type` of its `config.json`; None if it has none."""
    writable: bool = True
    """Whether Gearshift exports to it."""
    kinds: int = 1
    """How many kinds of block a model of it can have."""
    companions: ClassVar[Mapping[str, str]] = {}
    """Files that a folder of this format needs to be loaded, by name. Most need none."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Every `model_type` that it reads."""
        return () if self.model_type is None else (self.model_type,)

    @property
    def in_transformers(self) -> bool:
        """Whether transformers has the family's classes, so that no code of a checkpoint's is needed to run it."""
        return False

    @abstractmethod
    def to_native(self, raw: Mapping[str, Any]) -> NativeConfig:
        """Read a config. ValueError that names the key if there is anything in it that we cannot say."""

    @abstractmethod
    def express(self, native: NativeConfig) -> dict[str, Any]:
        """Write a config. InexpressibleError with the first block and field that the family cannot say."""

    def to_config(self, native: NativeConfig) -> dict[str, Any]:
        """As `express`; the error names the formats that could."""
        try:
            return self.express(native)
        except InexpressibleError as error:
            from gearshift.formats.registry import FORMATS

            able = ", ".join(name for name, other in FORMATS.items() if other.can_express(native))
            raise InexpressibleError(f"{error}; these formats can: {able}") from None

    def can_express(self, native: NativeConfig) -> bool:
        """Whether Gearshift can export the model to this format."""
        try:
            self.express(native)
        except InexpressibleError:
            return False
        return True

    @abstractmethod
    def plan(self, spec: ModelSpec, target: Schema) -> Plan:
        """The bijection from the family's tensors to `target`, the native schema of `spec`. Its inverse exports."""

    @abstractmethod
    def import_plan(self, spec: ModelSpec, target: Schema, source: Schema) -> Plan:
        """The plan from a checkpoint with the tensors `source`; dtypes are kept, what is not needed is discarded.

        Raises ValueError for a missing, a misshapen or an extra tensor.
        """

    def tied_copy(self, spec: ModelSpec, source: Schema) -> tuple[str, str] | None:
        """The names, in a checkpoint, of the embeddings and of a head that must be their copy; None without one."""
        return None

    def write_companions(self, folder: Path) -> None:
        """Write what else a folder of this format needs to be loaded."""
        for name, text in self.companions.items():
            (folder / name).write_text(text, encoding="utf-8")
