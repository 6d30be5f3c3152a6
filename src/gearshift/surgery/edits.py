"""The edits that a surgery is made of. Each takes a draft to a draft, or says why it cannot be carried out."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gearshift.mixers.base import Start
from gearshift.plan import Expression, references
from gearshift.spec import MIXERS, BlockSpec, MixerSpec, Spec, StochasticMixerSpec
from gearshift.surgery.draft import LAYERS, Draft, mixer_tensors, mlp_shapes, stochastic

Init = Literal["transfer", "random"]
Names = Annotated[tuple[str, ...], Field(min_length=1)]


class Edit(Spec):
    """One edit."""

    def apply(self, draft: Draft) -> Draft:
        """The edited draft. ValueError if the edit does not fit the model."""
        raise NotImplementedError


class Wrap(Edit):
    """Put each plain mixer into a stochastic mixer, as its main one."""

    main: str
    """The name that the plain mixer gets."""
    blocks: Names | None = None
    """Which blocks; all if left out."""

    def apply(self, draft: Draft) -> Draft:
        changed = {}
        moves: dict[str, str] = {}
        for name, block in draft.selected(self.blocks).items():
            if isinstance(block.mixer, StochasticMixerSpec):
                raise ValueError(f"block {name!r} has a stochastic mixer already: add to it instead")
            moves |= dict(zip(draft.mixer_prefixes(name, None), draft.mixer_prefixes(name, self.main), strict=True))
            wrapped = StochasticMixerSpec(main=self.main, mixers={self.main: block.mixer})
            changed[name] = block.model_copy(update={"mixer": wrapped})
        return draft.renamed(lambda tensor: _moved(tensor, moves)).with_blocks(changed)


class Add(Edit):
    """Add a mixer to stochastic mixers."""

    name: str
    """The name of the new mixer."""
    mixer: dict[str, Any]
    """Its settings, `type` included. Sizes left out follow from the mixer it starts from."""
    init: Init = "transfer"
    """`transfer`: from another mixer's weights; `random`: from the mixer's own distributions."""
    source: str | None = None
    """The mixer to transfer from; the main one if left out."""
    blocks: Names | None = None
    """Which blocks; all that have a stochastic mixer if left out."""

    def apply(self, draft: Draft) -> Draft:
        names = self.blocks or _stochastic_blocks(draft)
        for name, block in draft.selected(names).items():
            mixer = stochastic(name, block)
            if self.name in mixer.mixers:
                raise ValueError(f"block {name!r} has a mixer {self.name!r} already: replace or drop it")
            origin = self.source or mixer.main
            if origin not in mixer.mixers:
                raise ValueError(
                    f"block {name!r} has no mixer {origin!r} to start from: it has {', '.join(mixer.mixers)}"
                )
            spec, given = _begin(self.mixer, mixer.mixers[origin], self.init, block, draft.spec.hidden_size)
            sources = draft.mixer_prefixes(name, origin)
            for prefix, source in zip(draft.mixer_prefixes(name, self.name), sources, strict=True):
                draft = draft.started(prefix, spec, given, draft.under(source))
            grown = mixer.model_copy(update={"mixers": {**mixer.mixers, self.name: spec}})
            draft = draft.with_blocks({name: block.model_copy(update={"mixer": grown})})
        return draft


class Drop(Edit):
    """Take a mixer out of stochastic mixers."""

    name: str
    """The mixer to drop. The main mixer stays."""
    blocks: Names | None = None
    """Which blocks; all that have a stochastic mixer if left out."""

    def apply(self, draft: Draft) -> Draft:
        names = self.blocks or _stochastic_blocks(draft)
        for name, block in draft.selected(names).items():
            mixer = stochastic(name, block)
            _present(name, mixer, self.name)
            if self.name == mixer.main:
                raise ValueError(
                    f"{self.name!r} is the main mixer of block {name!r}: it cannot be dropped, only pruned to"
                )
            rest = {key: spec for key, spec in mixer.mixers.items() if key != self.name}
            draft = draft.without(draft.mixer_prefixes(name, self.name), f"the mixer {self.name!r} was dropped")
            draft = draft.with_blocks(
                {name: block.model_copy(update={"mixer": mixer.model_copy(update={"mixers": rest})})}
            )
        return draft


class Replace(Edit):
    """Put another mixer in the place of one, under the same name."""

    mixer: dict[str, Any]
    """The new mixer's settings, `type` included."""
    name: str | None = None
    """In a stochastic mixer, which one to replace. Left out for plain mixers."""
    init: Init = "transfer"
    """`transfer`: from the replaced mixer's weights; `random`: from the new mixer's own distributions."""
    blocks: Names | None = None
    """Which blocks; all if left out."""

    def apply(self, draft: Draft) -> Draft:
        for name, block in draft.selected(self.blocks).items():
            old = _one(name, block, self.name)
            spec, given = _begin(self.mixer, old, self.init, block, draft.spec.hidden_size)
            for prefix in draft.mixer_prefixes(name, self.name):
                origin = draft.under(prefix)
                draft = draft.without([prefix], f"its mixer was replaced by {spec.type}")
                draft = draft.started(prefix, spec, given, origin)
            draft = draft.with_blocks({name: _with_mixer(block, self.name, spec)})
        return draft


class Change(Edit):
    """Change settings that leave every tensor's shape alone: a window, rotary positions, an epsilon."""

    blocks: Names | None = None
    """Which blocks; all if left out."""
    name: str | None = None
    """In a stochastic mixer, whose settings `mixer` changes."""
    mixer: dict[str, Any] = Field(default_factory=dict)
    """New values of the mixer's settings."""
    mlp: dict[str, Any] = Field(default_factory=dict)
    """New values of the MLP's settings."""
    norm: dict[str, Any] = Field(default_factory=dict)
    """New values of the norms' settings."""
    lora: dict[str, Any] | None = Field(default_factory=dict)
    """New values of the adapters' settings, which gives adapters to a block without them; null takes them away."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.mixer or self.mlp or self.norm or self.lora or self.lora is None):
            raise ValueError("a change names at least one setting of mixer, mlp, norm or lora")
        return self

    def apply(self, draft: Draft) -> Draft:
        changed = {}
        for name, block in draft.selected(self.blocks).items():
            new = block
            if self.mixer:
                new = _with_mixer(new, self.name, self._changed_mixer(name, block, draft.spec.hidden_size))
            dump = new.model_dump(mode="json")
            dump["mlp"] |= self.mlp
            dump["norm"] |= self.norm
            if self.lora is None or self.lora:
                dump["lora"] = None if self.lora is None else {**(dump["lora"] or {}), **self.lora}
            changed[name] = BlockSpec.model_validate(dump)
            _check_rank(name, block, changed[name])
            if mlp_shapes(block, draft.spec.hidden_size) != mlp_shapes(changed[name], draft.spec.hidden_size):
                raise ValueError(f"block {name!r}: {self.mlp} would change the shapes of the MLP's weights")
        return draft.with_blocks(changed)

    def _changed_mixer(self, name: str, block: BlockSpec, hidden_size: int) -> MixerSpec:
        old = _one(name, block, self.name)
        if self.mixer.get("type", old.type) != old.type:
            raise ValueError(f"block {name!r}: a change cannot turn {old.type} into {self.mixer['type']}: use replace")
        new = MIXERS.parse({**old.model_dump(mode="json"), **self.mixer}).resolved(hidden_size)
        before, after = (
            {key: shape for key, (shape, _) in mixer_tensors(spec, hidden_size).items()} for spec in (old, new)
        )
        if before != after:
            raise ValueError(
                f"block {name!r}: {self.mixer} would change the shapes of the mixer's weights: use replace"
            )
        return new


def _check_rank(name: str, old: BlockSpec, new: BlockSpec) -> None:
    if old.lora is not None and new.lora is not None and old.lora.rank != new.lora.rank:
        raise ValueError(
            f"block {name!r} has adapters of rank {old.lora.rank}, which cannot become {new.lora.rank}: merge them"
            " (gearshift export --merge-lora) or take them away (lora: null) first"
        )


class Lay(Edit):
    """Lay the layers out anew: another pattern, copies of blocks under new names, fewer layers."""

    pattern: tuple[str, ...] = Field(min_length=1)
    """Names of blocks, repeated to the number of layers. Each layer keeps its own weights."""
    copies: dict[str, str] = Field(default_factory=dict)
    """New blocks: new name -> the block it starts as a copy of."""
    num_layers: int | None = Field(default=None, ge=1)
    """How many layers to keep, from the first; all if left out."""

    def apply(self, draft: Draft) -> Draft:
        old = draft.spec.decoder
        blocks = dict(old.blocks)
        for new, origin in self.copies.items():
            if new in blocks:
                raise ValueError(f"there is a block {new!r} already: choose another name for the copy")
            blocks[new] = draft.selected([origin])[origin]
        if idle := [new for new in self.copies if new not in self.pattern]:
            raise ValueError(f"the pattern does not use the copy {idle[0]!r}: put it in, or leave it out")
        count = self.num_layers or old.num_layers
        if count > old.num_layers:
            raise ValueError(f"the model has {old.num_layers} layers: {count} would need weights that nothing gives")
        used = {name: blocks[name] for name in self.pattern if name in blocks}
        new_draft = draft.with_decoder(
            num_layers=count,
            pattern=list(self.pattern),
            blocks={name: block.model_dump(mode="json") for name, block in used.items()} or blocks,
        )
        laid = new_draft.spec.decoder
        for layer, (before, after) in enumerate(zip(old.layers, laid.layers, strict=False)):
            if before != after:
                raise ValueError(
                    f"layer {layer} has the weights of block {old.layout[layer]!r}, and block {laid.layout[layer]!r} is"
                    " not like it: copy the block, lay it out, and then edit the copy"
                )
        return carried(draft, new_draft, lambda layer, rest: rest, "its layer was cut off")


def carried(draft: Draft, target: Draft, rename: Any, reason: str) -> Draft:
    """`target` with each of its layers' tensors taken from the same layer of `draft`.

    `rename(layer, rest)` maps the part of a name after the layer's key, or gives None to leave the tensor behind.
    """
    old, new = draft.spec.decoder, target.spec.decoder
    by_key: dict[str, dict[str, Expression]] = {}
    tensors = {name: made for name, made in draft.tensors.items() if not name.startswith(LAYERS)}
    for name, made in draft.tensors.items():
        if name.startswith(LAYERS):
            key, _, rest = name.removeprefix(LAYERS).partition(".")
            by_key.setdefault(key, {})[rest] = made
    for layer, key in enumerate(new.weight_keys):
        for rest, made in by_key[old.weight_keys[layer]].items():
            if (moved := rename(layer, rest)) is not None:
                tensors.setdefault(f"{LAYERS}{key}.{moved}", made)
    kept = {source for made in tensors.values() for source in references(made)}
    gone = {source for made in draft.tensors.values() for source in references(made)} - kept
    return Draft(target.spec, tensors, {**dict.fromkeys(gone, reason), **draft.reasons}, draft.dtype)


def _stochastic_blocks(draft: Draft) -> tuple[str, ...]:
    blocks = draft.spec.decoder.blocks
    found = tuple(name for name, block in blocks.items() if isinstance(block.mixer, StochasticMixerSpec))
    if not found:
        raise ValueError("no block has a stochastic mixer: wrap first")
    return found


def _moved(tensor: str, moves: Mapping[str, str]) -> str:
    for old, new in moves.items():
        if tensor.startswith(old):
            return new + tensor.removeprefix(old)
    return tensor


def _present(block: str, mixer: StochasticMixerSpec, name: str) -> None:
    if name not in mixer.mixers:
        raise ValueError(f"block {block!r} has no mixer {name!r}: it has {', '.join(mixer.mixers)}")


def _one(name: str, block: BlockSpec, mixer: str | None) -> MixerSpec:
    """The mixer that an edit means: a plain one, or one of a stochastic one by name."""
    if not isinstance(block.mixer, StochasticMixerSpec):
        if mixer is not None:
            raise ValueError(f"block {name!r} has a plain mixer: leave out the mixer's name {mixer!r}")
        return block.mixer
    if mixer is None:
        raise ValueError(f"block {name!r} has a stochastic mixer: name one of {', '.join(block.mixer.mixers)}")
    _present(name, block.mixer, mixer)
    return block.mixer.mixers[mixer]


def _with_mixer(block: BlockSpec, name: str | None, spec: MixerSpec) -> BlockSpec:
    if name is None:
        return block.model_copy(update={"mixer": spec})
    assert isinstance(block.mixer, StochasticMixerSpec)
    mixers = {**block.mixer.mixers, name: spec}
    return block.model_copy(update={"mixer": block.mixer.model_copy(update={"mixers": mixers})})


def _begin(
    settings: Mapping[str, Any], origin: MixerSpec, init: Init, block: BlockSpec, hidden_size: int
) -> tuple[MixerSpec, Mapping[str, Start]]:
    """The complete spec of a new mixer in `block`, and those of its tensors that come from the one it starts from."""
    if "type" not in settings:
        raise ValueError(f"the new mixer {dict(settings)} has no 'type': one of {', '.join(MIXERS.names())}")
    kind = MIXERS[settings["type"]]
    settings = {**dict.fromkeys(kind.norm_epsilons, block.norm.epsilon), **settings}
    transfer = kind.transfer_from(origin.type)
    if transfer is None:
        if init == "transfer":
            raise ValueError(f"{kind.name} cannot start from the weights of {origin.type}: use init: random")
        return MIXERS.parse(settings).resolved(hidden_size), {}
    given = {key: value for key, value in settings.items() if key != "type"}
    spec = transfer.infer(origin, hidden_size, given)
    return spec, transfer.plan(origin, spec, hidden_size) if init == "transfer" else {}
