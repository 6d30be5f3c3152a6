"""What a family's code makes of its config beyond what fates can say."""

from collections.abc import Mapping
from typing import Any

from gearshift.spec import ModelSpec


class Dialect:
    """Translates between a family's config and the keys that its fates speak of. This one has nothing to translate."""

    beside_class: frozenset[str] = frozenset()
    """Keys of the family that mean something else to its config class, which does not get them."""

    def for_class(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """What the config class gets of a config."""
        return {key: value for key, value in raw.items() if key not in self.beside_class}

    def read(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The values of the keys that fates speak of, from those of a config: flat, defaults filled in.

        ValueError, with the key, for a value that makes no sense.
        """
        return dict(values)

    def write(self, config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
        """The config that the family's code reads, from what the fates wrote of `spec`.

        ValueError, with what is wrong, if there is none.
        """
        return config


class OldRotary(Dialect):
    """Of code for transformers 4: `rope_theta` and `rope_scaling` in place of `rope_parameters`.

    Only writing needs it: today's config classes read both.
    """

    def write(self, config: dict[str, Any], spec: ModelSpec) -> dict[str, Any]:
        if "rope_parameters" not in config:  # no layer has any
            return config
        scaling = dict(config["rope_parameters"])
        theta = scaling.pop("rope_theta")
        plain = scaling == {"rope_type": "default"}
        rest = {key: value for key, value in config.items() if key != "rope_parameters"}
        return rest | {"rope_theta": theta, "rope_scaling": None if plain else scaling}
