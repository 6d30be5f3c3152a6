"""What a run has to say, as data: the layout of `report.json`, and how the numbers are handed to the page."""

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, model_validator
from pydantic_core import to_jsonable_python

from gearshift.spec.base import Spec
from gearshift.spec.placement import Placement


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _placement_text(value: Any) -> str:
    """The run-length form of a Placement, or of a text that can be read as one."""
    if not isinstance(value, str | Placement):
        raise ValueError(f"a placement is text such as 'a*3,b', not {value!r}")
    return str(Placement.parse(str(value)))


def _plain(value: Any) -> Any:
    """Settings as JSON has them: paths as text, tuples as lists, models as objects, NaN and infinities as null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return _finite(value)
    plain = to_jsonable_python(value, fallback=str)
    return _plain(plain) if isinstance(plain, dict | list) else plain


Number = Annotated[float | None, AfterValidator(_finite)]
"""A measured number. NaN and infinities become null: JSON has neither, and a page has no use for them."""
Count = Annotated[int, Field(ge=0)]
"""How many of something."""
PlacementText = Annotated[str, BeforeValidator(_placement_text)]
"""A placement in run-length form, `a*3,b`. A Placement is taken too."""


class ModelInfo(Spec):
    """The pretrained model that became the supernet."""

    name: str
    """What it is called: a hub name, a file or a folder."""
    format: str
    """The family its checkpoint was read as."""
    parameters_total: Count
    """All parameters of the supernet."""
    parameters_active: Count
    """Parameters that one token uses under the all-main placement."""
    layers: Annotated[int, Field(gt=0)]
    """Number of decoder layers."""
    dtype: str
    """dtype of the weights."""


class MixerInfo(Spec):
    """One of the mixers that every layer can run."""

    name: str
    """Its name in a placement."""
    description: str
    """What it is, in one line."""


class Environment(Spec):
    """Where the numbers were measured."""

    versions: dict[str, str]
    """Package (or `python`) -> version."""
    device: str
    """The processor that ran the model."""
    threads: Count
    """CPU threads that the run could use."""


class Step(Spec):
    """One step of the run."""

    name: str
    """What it did."""
    seconds: Number
    """Wall-clock time."""
    result: str
    """What came of it, in one line."""


class PureQuality(Spec):
    """How good the model is with one mixer in every layer."""

    mixer: str
    """The mixer."""
    divergence: Number
    """Forward KL divergence from the teacher on held-out text, nats a token."""
    perplexity: Number
    """Perplexity on the same text."""


class Quality(Spec):
    """The pure placements before and after training, judged on the same held-out text."""

    tokens: Count
    """Tokens judged."""
    sequence_length: Count
    """Tokens a sequence."""
    teacher_perplexity: Number
    """The teacher's own perplexity on that text."""
    before: tuple[PureQuality, ...]
    """Every pure placement before training."""
    after: tuple[PureQuality, ...] = ()
    """Every pure placement after training; empty if there was none."""


class TrainingRecord(Spec):
    """One optimiser step."""

    step: Count
    """Number of the step within its stage."""
    loss: Number
    """What was minimised."""
    mixer_losses: dict[str, Number] = Field(default_factory=dict)
    """Mixer -> its own loss, in a stage that trains each mixer by itself."""
    loss_terms: dict[str, Number] = Field(default_factory=dict)
    """Term -> its value, in a stage whose loss is a weighted sum."""
    learning_rate: Number
    """Learning rate of this step."""
    tokens: Count
    """Tokens of this step."""
    seconds: Number
    """Wall-clock time of this step."""


class Stage(Spec):
    """One stage of the distillation."""

    name: str
    """`layerwise`, `stochastic`, ..."""
    records: tuple[TrainingRecord, ...]
    """Its steps, first step first."""


class LayerErrors(Spec):
    """How far each mixer's output is from the main mixer's, layer by layer: normalised activation error, 0 is exact."""

    before: dict[str, tuple[Number, ...]]
    """Mixer -> error of each layer, before training."""
    after: dict[str, tuple[Number, ...]] = Field(default_factory=dict)
    """Mixer -> error of each layer, after training."""


class Candidate(Spec):
    """A placement that the search evaluated."""

    placement: PlacementText
    """The placement."""
    kind: Literal["single change", "verified", "preset", "pure"]
    """Why it was evaluated: one layer changed from all-main, a proposed winner, a preset, one mixer everywhere."""
    cost: Number
    """Its cost, in the search's unit."""
    divergence: Number
    """Its measured divergence from the teacher, nats a token."""
    predicted: Number = None
    """The divergence that was predicted from single-layer changes; null if none was."""


class Preset(Spec):
    """A named placement that the search chose: a gear."""

    name: str
    """Its name in the checkpoint's config."""
    placement: PlacementText
    """The placement."""
    counts: dict[str, Count]
    """Mixer -> number of layers."""
    budget_share: Number = None
    """The budget as a share of the span from the cheapest placement to all-main; null for another kind of budget."""
    budget_cost: Number = None
    """The budget in the search's unit."""
    cost: Number
    """What the placement costs."""
    divergence: Number
    """Its measured divergence from the teacher, nats a token."""
    state_bytes: Count | None = None
    """State of one sequence at the search's context."""

    @model_validator(mode="after")
    def _counts_agree(self) -> "Preset":
        counts = Placement.parse(self.placement).counts()
        if counts != {name: count for name, count in self.counts.items() if count}:
            raise ValueError(f"the preset {self.name!r} counts {self.counts}, but its placement has {counts}")
        return self


class CostSpan(Spec):
    """What budgets are a share of."""

    cheapest: Number
    """Cost of the cheapest placement."""
    main: Number
    """Cost of the all-main placement."""


class DominatedMixer(Spec):
    """A mixer that another one beats."""

    mixer: str
    """The mixer."""
    in_no_preset: bool
    """Whether no preset uses it."""
    reason: str
    """What beats it, in one sentence."""


class Search(Spec):
    """What the search tried, and what it found."""

    cost_unit: str
    """What the cost counts, in words: `bytes a token at 8192 tokens of context`."""
    context: Count
    """Tokens before the decoded one that the cost assumes."""
    span: CostSpan
    """The cheapest and the all-main cost."""
    candidates: tuple[Candidate, ...]
    """Every placement that was evaluated."""
    front: tuple[Candidate, ...]
    """Those of them that nothing beats in both cost and divergence."""
    presets: tuple[Preset, ...]
    """The chosen placements."""
    dominated: tuple[DominatedMixer, ...] = ()
    """The mixers that another one beats."""
    main_state_bytes: Count | None = None
    """State of one sequence at that context under the all-main placement."""
    layer_evaluations: Count
    """How many times a layer was run on the judged text."""
    layer_evaluations_saved: Count
    """How many more there would have been without reuse of shared hidden states."""


class ExportCheck(Spec):
    """The exported checkpoint, reloaded by itself, against the supernet under the same placement."""

    placement: PlacementText
    """The placement that was exported."""
    path: str
    """Where the checkpoint is."""
    max_abs_difference: Number
    """Largest difference of any logit."""
    exact: bool
    """Whether every logit is the same, bit for bit."""


class Generation(Spec):
    """What the model wrote under one placement."""

    preset: str
    """The placement's name."""
    placement: PlacementText
    """The placement."""
    prompt: str
    """What it was given."""
    text: str
    """What it wrote."""
    tokens: Count
    """Tokens written."""
    tokens_per_second: Number
    """Tokens written a second."""
    state_bytes: Count
    """State of the sequence at its end."""


class Report(Spec):
    """All that a run has to say. What it did not do is absent: every part with a default may be left out."""

    title: str
    """Headline of the page."""
    model: ModelInfo
    """The model."""
    mixers: tuple[MixerInfo, ...]
    """The mixers, in the order that every table and picture keeps."""
    main: str
    """The main mixer: the teacher's own."""
    environment: Environment | None = None
    """Where it ran."""
    steps: tuple[Step, ...] = ()
    """The steps of the run."""
    quality: Quality | None = None
    """The pure placements before and after training."""
    training: tuple[Stage, ...] = ()
    """The stages of the distillation."""
    layer_errors: LayerErrors | None = None
    """The error of each mixer in each layer."""
    search: Search | None = None
    """The search and its presets."""
    export: ExportCheck | None = None
    """The exported checkpoint's check."""
    generations: tuple[Generation, ...] = ()
    """What each placement wrote."""
    settings: Annotated[dict[str, JsonValue], BeforeValidator(_plain)] = Field(default_factory=dict)
    """Every setting: the recipe, the seeds, the arguments."""

    @model_validator(mode="after")
    def _agrees(self) -> "Report":
        names = [mixer.name for mixer in self.mixers]
        if len(set(names)) != len(names):
            raise ValueError(f"a mixer is listed twice in {', '.join(names)}")
        for where, mixer in self._named_mixers():
            if mixer not in names:
                raise ValueError(f"{where} names the mixer {mixer!r}, but the report lists {', '.join(names)}")
        choices = [names] * self.model.layers
        for placement in self._placements():
            Placement.parse(placement).validate(choices)
        for mixer, errors in _error_rows(self.layer_errors):
            if len(errors) != self.model.layers:
                raise ValueError(f"{mixer!r} has {len(errors)} layer errors, but the model {self.model.layers} layers")
        return self

    def _named_mixers(self) -> Iterator[tuple[str, str]]:
        yield "main", self.main
        for quality in (*self.quality.before, *self.quality.after) if self.quality else ():
            yield "quality", quality.mixer
        for stage in self.training:
            yield from (("training", mixer) for record in stage.records for mixer in record.mixer_losses)
        yield from (("layer_errors", mixer) for mixer, _ in _error_rows(self.layer_errors))
        for dominated in self.search.dominated if self.search else ():
            yield "search.dominated", dominated.mixer

    def _placements(self) -> Iterator[str]:
        if self.search:
            yield from (found.placement for found in (*self.search.candidates, *self.search.front))
            yield from (preset.placement for preset in self.search.presets)
        if self.export:
            yield self.export.placement
        yield from (generation.placement for generation in self.generations)


def _error_rows(errors: LayerErrors | None) -> list[tuple[str, tuple[float | None, ...]]]:
    return [*errors.before.items(), *errors.after.items()] if errors else []
