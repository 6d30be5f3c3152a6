"""The fate of every field: what a format's config mapping is written in.

A field of the family's config is `Mapped`, `Constant`, `Derived`, `Carried` or a run-time-only key; a leaf of our spec
is `Mapped` or `Fixed` (unrepresentable but for one value). `Format`s check that each has exactly one.

A leaf is named by its path in `ModelSpec`. `layer.` stands for every kind of block that has the rest
(`layer.mixer.heads`), the name of a kind for that one alone (`sliding_attention.mixer.window`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gearshift.spec import ModelSpec

REQUIRED: Any = type("Required", (), {"__repr__": lambda self: "REQUIRED"})()
"""The default of a key that must be there."""


@dataclass(frozen=True)
class Mapped:
    """A key that says the same as one leaf of the spec, or as several that the family cannot tell apart."""

    key: str
    paths: tuple[str, ...]
    default: Any = REQUIRED
    """Where the key is absent and the family has no config class that knows better."""
    omit_none: bool = False
    """Whether the key is left out, instead of written as null, where the leaf is None."""
    omit_implied: bool = False
    """Whether the key is left out where the others say as much without it."""
    whole: bool = False
    """Whether the family has a whole number where the leaf is a float; one with a fraction is written as it is."""
    words: Mapping[Any, Any] | None = None
    """The family's words for values of ours: theirs -> ours, the first being written. There are no others."""
    null: Any = None
    """What null means."""
    spelled: bool = False
    """Whether a value that says the same as ours (`auto`, null) is written as it came, where it still does."""

    def theirs(self, value: Any) -> Any:
        """The family's value for ours. LookupError, with what is wrong, if it has no word for it."""
        if isinstance(value, tuple):
            return list(value)
        if self.whole and isinstance(value, float) and value.is_integer():
            return int(value)
        for word, meaning in (self.words or {}).items():
            if meaning == value:
                return word
        if self.words is not None:
            raise LookupError(f"{self.key!r} cannot be {value!r}: it knows {', '.join(map(repr, self.words))}")
        return value

    def ours(self, value: Any) -> Any:
        """Our value for the family's. ValueError if it has no such word."""
        if value is None:
            value = self.null
        for word, meaning in (self.words or {}).items():
            if word == value:
                return meaning
        if self.words is not None:
            raise ValueError(f"{self.key!r} is {value!r}: known are {', '.join(map(repr, self.words))}")
        return value


def mapped(key: str, *paths: str, default: Any = REQUIRED) -> Mapped:
    """A key that is always written."""
    return Mapped(key, paths, default)


def implied(key: str, *paths: str) -> Mapped:
    """A key that is left out where the family computes the same without it."""
    return Mapped(key, paths, default=None, omit_implied=True)


def optional(key: str, *paths: str) -> Mapped:
    """A key that is left out where the leaf is None."""
    return Mapped(key, paths, default=None, omit_none=True)


def computed(path: str) -> "Fixed":
    """A leaf that the family computes as our spec does where it is left out."""
    return Fixed(path, None, computed=True)


@dataclass(frozen=True)
class Nullable:
    """A key that holds other keys, and is null where the part of the spec at `path` is."""

    key: str
    path: str


@dataclass(frozen=True)
class Constant:
    """A key with one value that we can read, and that we write."""

    key: str
    value: Any
    same: tuple[Any, ...] = ()
    """Other values that mean the same when read."""
    write: bool = True
    """Whether it is written; False for keys that mean something only by being there."""
    why: str = ""
    """What a person should know who has another value."""


@dataclass(frozen=True)
class Derived:
    """A key that repeats what a leaf of the spec says: compared when it is there, written from the leaf."""

    key: str
    path: str


@dataclass(frozen=True)
class Translated:
    """A key that says in its own way what the leaf at `path`, outside the blocks, holds."""

    key: str
    path: str
    read: Callable[[Any, ModelSpec], Any]
    """(value, the rest of the spec) -> the leaf. ValueError if the value makes no sense."""
    write: Callable[[ModelSpec], Any]
    """The spec -> the value. LookupError, with what is wrong, if the family cannot say it."""
    default: Any = None
    """What an absent key means."""


@dataclass(frozen=True)
class Carried:
    """A key that nothing the model computes depends on: kept beside the spec, under `name` where that differs."""

    key: str
    name: str = ""
    null: bool = False
    """Whether null says something other than the family's default, so that it is written where nothing is kept."""
    known: tuple[Any, ...] = ()
    """The values that are accepted; any, if there are none here."""
    why: str = ""
    """What a person should know who has another value."""

    @property
    def extra(self) -> str:
        """The key's name among the native config's extras."""
        return self.name or self.key


@dataclass(frozen=True)
class WeightDtype:
    """The key that names the dtype of the weights. Where it is absent, the weights say it themselves."""

    key: str


@dataclass(frozen=True)
class Fixed:
    """A leaf of the spec that the family has no key for: export fails unless it has this value.

    A path above leaves can be fixed to null: the family has nothing of what they describe.
    """

    path: str
    value: Any
    computed: bool = False
    """Whether it stands for what our spec makes of it: export fails unless that is what the model has."""
    why: str = ""
    """What a person should know whose model has another value."""


Fate = Mapped | Translated | Nullable | Constant | Derived | Carried | WeightDtype | Fixed


def takes_any(fate: object) -> bool:
    """Whether a key with this fate may have other values than those that are listed with it."""
    return not (isinstance(fate, Constant) or (isinstance(fate, Carried) and fate.known))


RUNTIME_ONLY = frozenset(
    {
        # Where, by what and how a config was made or loaded.
        "_attn_implementation_autoset",
        "_commit_hash",
        "_name_or_path",
        "name_or_path",
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        # What a forward returns.
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        # Settings of generation, which transformers moved to generation_config.json and ignores here.
        "do_sample",
        "max_length",
        "temperature",
        "top_k",
        "top_p",
    }
)
"""Keys of a transformers config that say nothing of the model. Read past, never written."""

CARRIED = frozenset(
    {
        "bos_token_id",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "use_cache",
    }
)
"""The names that `Carried` keys may have: what a native config holds beside the spec."""
