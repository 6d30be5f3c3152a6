"""For every layer, the name of the mixer that runs: one value type for sampling, search, eval, export and serving."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
"""What a mixer or a preset may be called: what fits a module's path and a placement's text."""

MOST_LAYERS = 4096
"""No model has more; a slip of the pen that asks for a billion must not be carried out."""


@dataclass(frozen=True)
class Placement:
    """The name of one mixer for every layer, first layer first. Hashable, ordered, immutable."""

    mixers: tuple[str, ...]

    def __init__(self, mixers: Iterable[str]):
        object.__setattr__(self, "mixers", tuple(mixers))

    @classmethod
    def parse(cls, text: str) -> "Placement":
        """Read the run-length form, `attention*3,gdn*5,attention`. ValueError if an item is malformed."""
        mixers: list[str] = []
        for item in text.split(","):
            match = re.fullmatch(rf"\s*({NAME.pattern})\s*(?:\*\s*(\d+))?\s*", item)
            if not match or match[2] == "0":
                raise ValueError(f"{item.strip()!r} in the placement {text!r} is neither 'mixer' nor 'mixer*count'")
            count = int(match[2] or 1)
            if len(mixers) + count > MOST_LAYERS:
                raise ValueError(f"the placement {text!r} names more than {MOST_LAYERS:,} layers")
            mixers += [match[1]] * count
        return cls(mixers)

    @classmethod
    def from_json(cls, text: str) -> "Placement":
        """Read a JSON list of names, a string in run-length form, or an object with the key `placement`."""
        value = json.loads(text)
        if isinstance(value, dict) and "placement" in value:
            value = value["placement"]
        if isinstance(value, str):
            return cls.parse(value)
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise ValueError(
                "a placement in JSON is a list of mixer names, a text such as 'attention*3,gdn',"
                " or an object with one of them under 'placement'"
            )
        return cls(value)

    def to_json(self) -> str:
        """A JSON list with one name a layer."""
        return json.dumps(list(self.mixers))

    def __str__(self) -> str:
        runs = ((name, len(list(run))) for name, run in groupby(self.mixers))
        return ",".join(name if count == 1 else f"{name}*{count}" for name, count in runs)

    def __len__(self) -> int:
        return len(self.mixers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.mixers)

    def __getitem__(self, layer: int) -> str:
        return self.mixers[layer]

    def counts(self) -> dict[str, int]:
        """How many layers each mixer has, in order of first use."""
        return dict(Counter(self.mixers))

    def replace(self, layer: int, mixer: str) -> "Placement":
        """The same placement with another mixer in one layer."""
        return Placement((*self.mixers[:layer], mixer, *self.mixers[layer + 1 :]))

    def validate(self, choices: Sequence[Sequence[str]]) -> "Placement":
        """Check against each layer's mixers; returns itself. ValueError with the first layer that does not fit."""
        if len(self) != len(choices):
            raise ValueError(f"the placement {self} names {len(self)} layers, but the model has {len(choices)}")
        for layer, (name, offered) in enumerate(zip(self.mixers, choices, strict=True)):
            if name not in offered:
                raise ValueError(f"layer {layer} has no mixer {name!r}: it offers {', '.join(offered)}")
        return self


def resolve_placement(
    value: "str | Placement | Iterable[str]", presets: Mapping[str, Placement], choices: Sequence[Sequence[str]]
) -> Placement:
    """The placement that a person means: a preset's name, a run-length list, `@file.json`, a Placement or names.

    A single name that is no preset but a mixer of every layer that has a choice means that mixer everywhere.
    """
    if isinstance(value, Placement):
        return value.validate(choices)
    if not isinstance(value, str):
        if isinstance(value, Mapping) or not isinstance(value, Iterable):
            raise ValueError(f"a placement is a preset's name, a Placement or a list of mixer names, not {value!r}")
        return Placement(value).validate(choices)
    if value in presets:
        return presets[value].validate(choices)
    if value.startswith("@"):
        return _from_file(Path(value[1:])).validate(choices)
    if NAME.fullmatch(value):
        return _everywhere(value, presets, choices)
    return Placement.parse(value).validate(choices)


def _from_file(path: Path) -> Placement:
    try:
        return Placement.from_json(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a folder, not a file with a placement") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _everywhere(name: str, presets: Mapping[str, Placement], choices: Sequence[Sequence[str]]) -> Placement:
    """`name` in each layer that offers it, the only mixer in layers without a choice."""
    filled = [name if name in offered else offered[0] for offered in choices if name in offered or len(offered) == 1]
    if len(filled) == len(choices) and name in filled:
        return Placement(filled)
    known = [*presets, *dict.fromkeys(mixer for offered in choices for mixer in offered)]
    near = get_close_matches(name, known)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known are {', '.join(known)}"
    raise ValueError(f"{name!r} is no preset and no mixer that every layer offers: {hint}")
