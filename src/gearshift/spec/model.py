"""ModelSpec > DecoderSpec > BlockSpec > a mixer and an MLP: named blocks, laid out by a pattern."""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import Annotated, Any, Literal, Self

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, field_validator, model_validator
from pydantic_core import CoreSchema, core_schema

from gearshift.spec.base import Spec
from gearshift.spec.parts import MixerSpec, MLPSpec, NormSpec, StateTensor
from gearshift.spec.placement import MOST_LAYERS, NAME, Placement
from gearshift.spec.registry import MIXERS, MLPS, Registry


class _Registered:
    """Pydantic's view of a field that holds any kind of a registry, told apart by `type`."""

    def __init__(self, registry: Registry, *more: type[Spec]):
        self.registry = registry
        self.more = {spec.model_fields["type"].default: spec for spec in more}

    def _parse(self, value: Any) -> Any:
        if isinstance(value, dict) and str(value.get("type")) in self.more:
            return self.more[value["type"]].model_validate(value)
        return self.registry.parse(value)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        dump = core_schema.plain_serializer_function_ser_schema(lambda spec: spec.model_dump(mode="json"))
        return core_schema.no_info_plain_validator_function(self._parse, serialization=dump)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        specs = [self.registry[name].spec for name in self.registry.names()] + list(self.more.values())
        return {"oneOf": [handler(spec.__pydantic_core_schema__) for spec in specs]}


class StochasticMixerSpec(MixerSpec):
    """Several named mixers of which one runs."""

    type: Literal["stochastic"] = "stochastic"
    """Always `stochastic`."""
    main: str
    """The mixer that the pretrained weights went to: the teacher."""
    mixers: dict[str, Annotated[MixerSpec, _Registered(MIXERS)]] = Field(min_length=1)
    """The mixers by name. Names are what placements speak of."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.mixers:
            if not NAME.fullmatch(name):
                raise ValueError(f"a mixer cannot be called {name!r}: use letters, digits, '_' and '-', a letter first")
        if self.main not in self.mixers:
            raise ValueError(f"the main mixer {self.main!r} is not among the mixers {', '.join(self.mixers)}")
        return self

    def resolved(self, hidden_size: int) -> Self:
        mixers = {name: mixer.resolved(hidden_size) for name, mixer in self.mixers.items()}
        return self.model_copy(update={"mixers": mixers})


class LoraSpec(Spec):
    """Low-rank adapters of linear layers (LoRA, arXiv 2106.09685): W x becomes W x + alpha / rank B A x."""

    rank: int = Field(ge=1)
    """The number of rows of A and of columns of B."""
    alpha: float = Field(gt=0)
    """alpha / rank multiplies what an adapter adds."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """The share of an adapter's inputs that are zeroed in training."""
    targets: tuple[str, ...] = Field(default=("*",), min_length=1)
    """Globs of the linear layers that have an adapter, such as `mixer.q_proj` or `mlp.*`: by their paths in the block,
    where `mixer` is each of its mixers."""


class BlockSpec(Spec):
    """One decoder block: norm, mixer, residual; norm, MLP, residual."""

    mixer: Annotated[MixerSpec, _Registered(MIXERS, StochasticMixerSpec)]
    """The token mixer, or a stochastic mixer that holds several."""
    mlp: Annotated[MLPSpec, _Registered(MLPS)]
    """The channel mixer."""
    norm: NormSpec = NormSpec()
    """The norms of the mixer and of the MLP."""
    norm_placement: Literal["before", "after", "around"] = "before"
    """Where they are: on what a half reads, on what it adds to the residual stream, or on both."""
    shared_weights: bool = False
    """Whether all layers of this block use one set of weights. Each layer keeps a state of its own all the same."""
    lora: LoraSpec | None = None
    """The adapters beside its linear layers; null for none. Where there are some, nothing else in the block learns."""

    @property
    def mixers(self) -> dict[str, MixerSpec]:
        """The mixers that a placement can choose from: a plain mixer is its only choice, under the name of its type."""
        return self.mixer.mixers if isinstance(self.mixer, StochasticMixerSpec) else {self.mixer.type: self.mixer}

    @property
    def main(self) -> str:
        """The choice that holds the pretrained weights."""
        return self.mixer.main if isinstance(self.mixer, StochasticMixerSpec) else self.mixer.type


class PredictionHeadSpec(Spec):
    """A head for a token further ahead (arXiv 2404.19737): a block of its own, then a norm, then the model's head.

    It reads what the last layer reads. Its block has a plain mixer, so no placement concerns it.
    """

    block: BlockSpec
    """The block."""
    norm: NormSpec = NormSpec()
    """The norm before the model's head."""

    @field_validator("block")
    @classmethod
    def _check(cls, block: BlockSpec) -> BlockSpec:
        if isinstance(block.mixer, StochasticMixerSpec):
            raise ValueError("the block of a prediction head has one mixer, not a stochastic one")
        return block


class DecoderSpec(Spec):
    """A stack of blocks: a pattern of block names, repeated to the number of layers, the last repeat cut short."""

    num_layers: int = Field(ge=1, le=MOST_LAYERS)
    """How many layers there are."""
    pattern: tuple[str, ...] = Field(min_length=1)
    """Names of blocks, repeated until `num_layers` is reached."""
    blocks: dict[str, BlockSpec] = Field(min_length=1)
    """The blocks by name."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in self.blocks:
            if not NAME.fullmatch(name):
                raise ValueError(f"a block cannot be called {name!r}: use letters, digits, '_' and '-', a letter first")
        for name in self.pattern:
            if name not in self.blocks:
                raise ValueError(f"the pattern names a block {name!r}, but the blocks are {', '.join(self.blocks)}")
        idle = [name for name in self.blocks if name not in self.layout]
        if idle:
            raise ValueError(f"no layer uses the block {idle[0]!r}: put it into the pattern or drop it")
        return self

    @property
    def layout(self) -> tuple[str, ...]:
        """The name of each layer's block."""
        return tuple(islice(cycle(self.pattern), self.num_layers))

    @property
    def layers(self) -> tuple[BlockSpec, ...]:
        """Each layer's block."""
        return tuple(self.blocks[name] for name in self.layout)

    @property
    def weight_keys(self) -> tuple[str, ...]:
        """For each layer, the key its weights are stored under: its number, or its block's name if that shares them."""
        return tuple(n if self.blocks[n].shared_weights else str(i) for i, n in enumerate(self.layout))


def shortest_pattern(layout: Sequence[str]) -> list[str]:
    """The shortest beginning of a layout that repeats to the whole of it, the last repeat cut short if need be."""
    for length in range(1, len(layout) + 1):
        if all(name == layout[index % length] for index, name in enumerate(layout)):
            return list(layout[:length])
    return list(layout)


class ModelSpec(Spec):
    """A causal language model: embeddings, a decoder, a final norm, a head. Always resolved: every size is explicit."""

    vocab_size: int = Field(ge=1)
    """The number of rows of the embedding table and of the head."""
    hidden_size: int = Field(ge=1)
    """The width of the residual stream."""
    max_positions: int = Field(ge=1)
    """The context length that the model was made for, in tokens."""
    tie_embeddings: bool = False
    """Whether the head is the transposed embedding table."""
    scale_embeddings: bool = False
    """Whether embeddings are multiplied by the square root of the hidden size."""
    logit_softcap: float | None = Field(default=None, gt=0)
    """If set, c: logits x become c tanh(x / c)."""
    final_norm: NormSpec = NormSpec()
    """The norm before the head."""
    decoder: DecoderSpec
    """The stack of blocks."""
    prediction_heads: tuple[PredictionHeadSpec, ...] = ()
    """Heads beside the usual one: the first predicts the token after the next one, and so on."""

    @field_validator("decoder")
    @classmethod
    def _resolve(cls, decoder: DecoderSpec, info: Any) -> DecoderSpec:
        if "hidden_size" not in info.data:
            return decoder
        blocks = {}
        for name, block in decoder.blocks.items():
            try:
                blocks[name] = block.model_copy(update={"mixer": block.mixer.resolved(info.data["hidden_size"])})
            except ValueError as error:
                raise ValueError(f"block {name!r}: {error}") from None
        return decoder.model_copy(update={"blocks": blocks})

    @field_validator("prediction_heads")
    @classmethod
    def _resolve_heads(cls, heads: tuple[PredictionHeadSpec, ...], info: Any) -> tuple[PredictionHeadSpec, ...]:
        if "hidden_size" not in info.data:
            return heads
        mixers = [head.block.mixer.resolved(info.data["hidden_size"]) for head in heads]
        blocks = [head.block.model_copy(update={"mixer": mixer}) for head, mixer in zip(heads, mixers, strict=True)]
        return tuple(head.model_copy(update={"block": block}) for head, block in zip(heads, blocks, strict=True))

    @property
    def choices(self) -> tuple[tuple[str, ...], ...]:
        """For every layer, the names a placement can put there."""
        return tuple(tuple(block.mixers) for block in self.decoder.layers)

    @property
    def main(self) -> Placement:
        """The placement of main mixers: the pretrained model."""
        return Placement(block.main for block in self.decoder.layers)

    @property
    def is_supernet(self) -> bool:
        """Whether some layer offers a choice."""
        return any(len(offered) > 1 for offered in self.choices)

    @property
    def has_lora(self) -> bool:
        """Whether some block has adapters."""
        blocks = (*self.decoder.blocks.values(), *(head.block for head in self.prediction_heads))
        return any(block.lora is not None for block in blocks)

    def mixers(self, placement: Placement) -> tuple[MixerSpec, ...]:
        """The mixer that runs in each layer under a (valid) placement."""
        placement.validate(self.choices)
        return tuple(block.mixers[name] for block, name in zip(self.decoder.layers, placement, strict=True))

    def state(self, placement: Placement) -> tuple[tuple[StateTensor, ...], ...]:
        """What each layer keeps of a sequence under a placement."""
        return tuple(mixer.state() for mixer in self.mixers(placement))

    def state_bytes(self, placement: Placement, tokens: int, dtype: str) -> int:
        """The size of one sequence's state after `tokens` tokens, in bytes."""
        return sum(tensor.bytes(tokens, dtype) for layer in self.state(placement) for tensor in layer)
