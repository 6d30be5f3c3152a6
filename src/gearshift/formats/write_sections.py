"""A spec as a config made of sections."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gearshift.formats.base import InexpressibleError
from gearshift.formats.fates import CARRIED, Carried, Constant, Fixed, Mapped, WeightDtype
from gearshift.formats.leaves import as_written, flatten, set_at, value_at
from gearshift.formats.sections import Inner, Named, Repeated, Section, SectionFate, Stated, Values
from gearshift.spec import Spec

_BLOCKS = "decoder.blocks."


@dataclass(frozen=True)
class SectionWriter:
    """Writes one config. InexpressibleError with the first leaf that it cannot say."""

    format: str
    dtype: str
    extras: Mapping[str, Any]
    kept: Mapping[str, Any]
    """What the config that the model came from said beside the spec, by path."""

    def write(self, section: Section, spec: Spec, path: str = "", outer: Values | None = None) -> dict[str, Any]:
        """The section of `spec`, which lies at `path` in the model's."""
        config: dict[str, Any] = {}
        for fate in section.fates:
            self._put(fate, section, spec, path, config, (outer or Values()).new_child(flatten(config, section.nested)))
        return config

    def _put(
        self, fate: SectionFate, section: Section, spec: Spec, path: str, config: dict[str, Any], values: Values
    ) -> None:
        """Write the keys that a fate is of."""
        match fate:
            case Fixed():
                self._leaf(spec, fate.path, path, fate.value, why=fate.why)
            case Inner():
                value = self._leaf(spec, fate.path, path)
                inside = _below(path, fate.path)
                if isinstance(fate, Named):
                    each = {name: self._inner(fate, item, f"{inside}.{name}", values) for name, item in value.items()}
                    set_at(config, fate.key, each)
                else:
                    set_at(config, fate.key, self._inner(fate, value, inside, values))
            case Constant():
                if fate.write:
                    set_at(config, fate.key, fate.value)
            case WeightDtype():
                set_at(config, fate.key, self.dtype)
            case Carried():
                value = (self.extras if not path and fate.extra in CARRIED else self.kept).get(_below(path, fate.extra))
                if value is not None or (fate.null and not path):
                    set_at(config, fate.key, value)
            case Stated():
                if fate.write is not None:
                    set_at(config, fate.key, fate.write(spec))
            case Repeated():
                if fate.path is not None:
                    self._leaf(spec, fate.path, path, values[fate.of])
                set_at(config, fate.key, values[fate.of])
            case Mapped():
                value = self._leaf(spec, fate.paths[0], path)
                for other in fate.paths[1:]:
                    self._leaf(spec, other, path, value)
                if value is not None or not fate.omit_none:
                    set_at(config, fate.key, fate.theirs(value))

    def _inner(self, fate: Inner, spec: Any, path: str, values: Values) -> dict[str, Any]:
        """The section of what a key holds, and the word for it: the first that can say it."""
        assert not callable(fate.by), "sections that share their keys are only read"
        refusal: InexpressibleError | None = None
        for word, section in fate.choices.items():
            head = {} if fate.by is None else {fate.by: word}
            if section is None or spec is None:
                if section is spec:
                    return head
            elif isinstance(spec, section.spec) and section.type in (None, getattr(spec, "type", None)):
                try:
                    return head | self.write(section, spec, path, values)
                except InexpressibleError as error:
                    refusal = error
        kind = getattr(spec, "type", None)
        raise refusal or (self._leaf_refusal(path, spec) if kind is None else self._leaf_refusal(f"{path}.type", kind))

    def _leaf(self, spec: Spec, leaf: str, path: str, *only: Any, why: str = "") -> Any:
        """What a leaf, or an item of one, is; it must be `only`, if that is given."""
        head, _, item = leaf.partition(".")
        try:
            held = getattr(spec, head)
            value = held[item] if item and isinstance(held, Mapping) else value_at(spec, leaf)
        except LookupError as error:
            raise self._leaf_refusal(_below(path, error.args[0]), None) from None
        if only and value != only[0]:
            raise self._leaf_refusal(_below(path, leaf), value, why)
        return value

    def _leaf_refusal(self, path: str, value: Any, why: str = "") -> InexpressibleError:
        setting = f"{path} {as_written(value)}"
        if path.startswith(_BLOCKS):
            block, _, leaf = path.removeprefix(_BLOCKS).partition(".")
            setting = f"block {block!r} has {leaf} {as_written(value)}"
        return self.refusal(f"{setting} ({why})" if why else setting)

    def refusal(self, what: str) -> InexpressibleError:
        """What is raised where the family cannot say `what`."""
        return InexpressibleError(f"the format {self.format!r} cannot express this model: {what}")


def _below(above: str, name: str) -> str:
    return ".".join(filter(None, (above, name)))
