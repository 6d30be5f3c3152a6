"""A model under the knife: its spec so far, and for every tensor of it an expression over the original's tensors."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch

from gearshift.mixers.base import Mixer, Start
from gearshift.model.adapter_names import is_adapter
from gearshift.plan import Expression, Initialise, Initialiser, Reference, references
from gearshift.plan.rewrite import substitute
from gearshift.spec import MIXERS, MLPS, BlockSpec, MixerSpec, ModelSpec, StochasticMixerSpec

LAYERS = "model.layers."


@dataclass(frozen=True)
class Draft:
    """What the edits so far have made of the model."""

    spec: ModelSpec
    tensors: Mapping[str, Expression]
    """For every tensor of `spec`, an expression over the original's tensors."""
    reasons: Mapping[str, str] = field(default_factory=dict)
    """For original tensors that an edit dropped, why. Only those that nothing else uses end up discarded."""
    dtype: str = "float32"
    """The dtype of tensors that start afresh."""

    def with_decoder(self, **changes: Any) -> "Draft":
        """The same weights under a changed decoder. ValueError if the changes do not make a valid spec."""
        decoder = {**self.spec.decoder.model_dump(mode="json"), **changes}
        return replace(self, spec=ModelSpec.model_validate({**self.spec.model_dump(mode="json"), "decoder": decoder}))

    def with_blocks(self, blocks: Mapping[str, BlockSpec]) -> "Draft":
        """The same weights with some blocks' specs replaced."""
        merged = {**self.spec.decoder.blocks, **blocks}
        return self.with_decoder(blocks={name: block.model_dump(mode="json") for name, block in merged.items()})

    def selected(self, names: Iterable[str] | None) -> dict[str, BlockSpec]:
        """The blocks called `names`, all if None. ValueError for a name that is no block."""
        blocks = self.spec.decoder.blocks
        if names is None:
            return dict(blocks)
        for name in names:
            if name not in blocks:
                raise ValueError(f"there is no block {name!r}: the blocks are {', '.join(blocks)}")
        return {name: blocks[name] for name in names}

    def mixer_prefixes(self, block: str, mixer: str | None) -> list[str]:
        """Where the tensors of a block's mixer lie, one prefix for each set of weights. None: a plain mixer."""
        decoder = self.spec.decoder
        keys = dict.fromkeys(
            key for name, key in zip(decoder.layout, decoder.weight_keys, strict=True) if name == block
        )
        inside = "mixer." if mixer is None else f"mixer.mixers.{mixer}."
        return [f"{LAYERS}{key}.{inside}" for key in keys]

    def under(self, prefix: str) -> dict[str, Expression]:
        """The tensors below a prefix, by the rest of their names."""
        return {name.removeprefix(prefix): made for name, made in self.tensors.items() if name.startswith(prefix)}

    def renamed(self, rename: Callable[[str], str]) -> "Draft":
        """The same tensors under other names."""
        return replace(self, tensors={rename(name): made for name, made in self.tensors.items()})

    def without(self, prefixes: Iterable[str], reason: str) -> "Draft":
        """Without the tensors below the prefixes."""
        dropped = tuple(prefixes)
        gone = {name: made for name, made in self.tensors.items() if name.startswith(dropped)} if dropped else {}
        kept = {name: made for name, made in self.tensors.items() if name not in gone}
        reasons = {source: reason for made in gone.values() for source in references(made)}
        return replace(self, tensors=kept, reasons={**reasons, **self.reasons})

    def with_adapters(self) -> "Draft":
        """With the adapters that the spec asks for, and no others: those that are not there yet start afresh.

        ValueError if a block's `lora` has no layer to adapt.
        """
        from gearshift.model import initial, schema

        if not (self.spec.has_lora or any(is_adapter(name) for name in self.tensors)):
            return self
        shapes, starts = schema(self.spec, self.dtype), initial(self.spec)
        gone = [name for name in self.tensors if is_adapter(name) and name not in shapes]
        draft = self.without(gone, "its layer has no adapter any more")
        fresh = {
            name: Initialise(starts[name], info.shape, self.dtype)
            for name, info in shapes.items()
            if is_adapter(name) and name not in draft.tensors
        }
        return replace(draft, tensors={**draft.tensors, **fresh})

    def started(
        self, prefix: str, spec: MixerSpec, given: Mapping[str, Start], origin: Mapping[str, Expression]
    ) -> "Draft":
        """With a new mixer's tensors below `prefix`: `given` over `origin`'s names, the rest from its initialisers."""
        made: dict[str, Expression] = {}
        for name, (shape, initialiser) in mixer_tensors(spec, self.spec.hidden_size).items():
            start = given.get(name, initialiser)
            if isinstance(start, Initialiser):
                made[prefix + name] = Initialise(start, shape, self.dtype)
            else:
                made[prefix + name] = substitute(start, origin)
        return replace(self, tensors={**self.tensors, **made})


def mixer_tensors(spec: MixerSpec, hidden_size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name -> (shape, starting distribution) of every tensor of a mixer."""
    return _mixer_tensors(spec.model_dump_json(), spec.type, hidden_size)


@lru_cache(maxsize=64)
def _mixer_tensors(dump: str, kind: str, hidden_size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    spec = MIXERS.parse(json.loads(dump)).resolved(hidden_size)
    module_class: type[Mixer] = MIXERS[kind].load()
    with torch.device("meta"):
        module = module_class(spec, hidden_size)
    initialisers = module_class.initialisers(spec, hidden_size)
    return {name: (tuple(tensor.shape), initialisers[name]) for name, tensor in module.state_dict().items()}


def mlp_shapes(block: BlockSpec, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor of a block's MLP."""
    with torch.device("meta"):
        module = MLPS[block.mlp.type].load()(block.mlp, hidden_size)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def stochastic(block: str, spec: BlockSpec) -> StochasticMixerSpec:
    """The block's stochastic mixer. ValueError if it has a plain one."""
    if not isinstance(spec.mixer, StochasticMixerSpec):
        raise ValueError(f"block {block!r} has a plain {spec.mixer.type} mixer: wrap it first")
    return spec.mixer


def original(spec: ModelSpec, names: Iterable[str], dtype: str) -> Draft:
    """A draft in which nothing has been edited yet."""
    return Draft(spec, {name: Reference(name) for name in names}, {}, dtype)
