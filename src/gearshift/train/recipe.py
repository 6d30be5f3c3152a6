"""What a person says about a distillation: settings for a model in memory, and the recipe of a whole run."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from gearshift.data import Boundaries, ChatSource, DataSource
from gearshift.settings import load_settings
from gearshift.spec import Spec
from gearshift.train.sampling import AllocationSampling, PresetSampling, Sampling, normalised

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class OptimiserSettings(Spec):
    """AdamW (arXiv 1711.05101), made anew for every stage."""

    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.95)
    """Decay of the first and of the second moment a step."""
    epsilon: Rate = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Weight = 0.0
    """Decoupled decay, times the learning rate; on matrices only."""
    clip_norm: Rate | None = 1.0
    """Largest norm of a gradient: each mixer's by itself in a layerwise stage, else the model's. Null: none."""


class ScheduleSettings(Spec):
    """The learning rate over a stage: a linear rise, then half a cosine down."""

    warmup: float = Field(default=0.05, ge=0, le=1)
    """The share of the stage's steps in which the rate rises."""
    final: float = Field(default=0.1, ge=0, le=1)
    """The rate at the stage's last step, as a share of the highest."""


class Weights(Spec):
    """Weights of losses. Those at 0 are not computed, and one at least is not."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        normalised(self.model_dump(), "the losses' weights")
        return self


class LossWeights(Weights):
    """The weights of the stochastic stage's losses. Those at 0 are not computed."""

    forward_kl: Weight = 1.0
    """KL(teacher | student) of the next token, nats: covers all that the teacher finds likely."""
    reverse_kl: Weight = 0.0
    """KL(student | teacher) of the next token, nats: avoids what the teacher finds unlikely."""
    cross_entropy: Weight = 0.0
    """Cross-entropy of the text's next token, nats: learns from the text, not from the teacher."""
    activation: Weight = 0.0
    """Normalised error of the mixers' outputs, mean over layers, each side on its own stream of hidden states."""


class ChatLossWeights(Weights):
    """The weights of the sft stage's losses, all on the assistant's tokens only. Those at 0 are not computed."""

    cross_entropy: Weight = 1.0
    """Cross-entropy of the assistant's next token, nats: learns from the chats."""
    forward_kl: Weight = 0.0
    """KL(teacher | student), nats: stays near all that the teacher finds likely."""
    reverse_kl: Weight = 0.0
    """KL(student | teacher), nats: stays off what the teacher finds unlikely."""


class StageSettings(Spec):
    """What every stage has."""

    reads_chats: ClassVar[bool] = False
    """Whether the stage learns from chats, not from text."""

    type: str
    """The kind of stage."""
    steps: int = Field(ge=0)
    """Optimiser steps."""
    learning_rate: Rate
    """The highest learning rate of the stage."""
    batch_size: int | None = Field(default=None, ge=1)
    """Sequences a step; the recipe's if left out."""
    gradient_accumulation: int | None = Field(default=None, ge=1)
    """Parts that a step's sequences are processed in, one after another; the recipe's if left out."""
    schedule: ScheduleSettings | None = None
    """The course of the learning rate; the recipe's if left out."""

    @property
    def needs_teacher(self) -> bool:
        """Whether the stage learns from a teacher."""
        return True

    @property
    def compares_layers(self) -> bool:
        """Whether the student's layers are held against the teacher's, one by one."""
        return True


class LayerwiseStage(StageSettings):
    """Every mixer of every layer learns to repeat the output of the teacher's main mixer."""

    type: Literal["layerwise"] = "layerwise"
    """Always `layerwise`."""
    learning_rate: Rate = 2e-3
    """The highest learning rate of the stage."""
    calibration: Literal["none", "scale", "ridge"] = "ridge"
    """How the new mixers' output projections are fitted before the first step: not at all, by one factor, or whole."""
    calibration_sequences: int | None = Field(default=None, ge=1)
    """Sequences to calibrate on; one step's if left out."""
    ridge: Rate = 1.0
    """`ridge`: how strongly the fit is held to the scaled projection, as a share of the features' mean square."""
    stream: Literal["teacher", "student"] = "teacher"
    """Whose hidden states the mixers read: the `teacher`'s own, or those of a `student`, a placement that is sampled at
    each step, so that they learn to correct what the layers before them lost. The targets are the teacher's."""
    sampling: Sampling = AllocationSampling()
    """`student`: how its placement is drawn."""

    @model_validator(mode="after")
    def _sampled_for_a_student(self) -> Self:
        if self.stream == "teacher" and self.sampling != AllocationSampling():
            raise ValueError(f"sampling {self.sampling.type} draws students: set stream to student, or leave it out")
        return self

    @model_validator(mode="after")
    def _held_where_fitted(self) -> Self:
        if self.calibration != "ridge" and self.ridge != 1.0:
            raise ValueError(f"ridge {self.ridge:g} holds calibration: ridge, not {self.calibration}: leave it out")
        return self


class SampledStage(StageSettings):
    """What the stages have in which sampled placements learn end to end."""

    sampling: Sampling = AllocationSampling()
    """How the placement of a step is drawn."""
    losses: LossWeights | ChatLossWeights
    """What the placement is judged by."""
    temperature: Rate = 1.0
    """Divides the logits of both divergences. Held-out sequences are judged without it."""
    recompute: bool = False
    """Whether the backward pass computes each layer again instead of keeping its activations: slower by about a third,
    and memory for one layer's activations instead of all. The result is the same."""

    @model_validator(mode="after")
    def _divergence_for_a_temperature(self) -> Self:
        if self.temperature != 1.0 and not (self.losses.forward_kl or self.losses.reverse_kl):
            raise ValueError(
                f"temperature {self.temperature:g} is that of forward_kl and reverse_kl, which have no weight: leave it"
                " out"
            )
        return self

    @property
    def held_out_loss(self) -> str:
        """The loss that held-out sequences are judged by."""
        return "cross_entropy"

    @property
    def held_out_placements(self) -> tuple[str, ...]:
        """Placements that held-out sequences are judged under, beside those of one mixer everywhere."""
        return ()

    @property
    def needs_teacher(self) -> bool:
        return any(weight > 0 for name, weight in self.losses if name != "cross_entropy")

    @property
    def compares_layers(self) -> bool:
        return isinstance(self.losses, LossWeights) and self.losses.activation > 0


class StochasticStage(SampledStage):
    """Sampled placements learn end to end to repeat the teacher's next-token distribution."""

    type: Literal["stochastic"] = "stochastic"
    """Always `stochastic`."""
    learning_rate: Rate = 5e-4
    """The highest learning rate of the stage."""
    losses: LossWeights = LossWeights()
    """What the placement is judged by."""

    @property
    def held_out_loss(self) -> str:
        return "forward_kl" if self.needs_teacher else "cross_entropy"  # else what would teach may have moved


class SftStage(SampledStage):
    """Supervised fine-tuning: sampled placements learn to say what the assistant says in chats."""

    reads_chats: ClassVar[bool] = True

    type: Literal["sft"] = "sft"
    """Always `sft`."""
    learning_rate: Rate = 1e-4
    """The highest learning rate of the stage."""
    losses: ChatLossWeights = ChatLossWeights()
    """What the placement is judged by, on the assistant's tokens only."""

    @property
    def held_out_placements(self) -> tuple[str, ...]:
        return self.sampling.named if isinstance(self.sampling, PresetSampling) else ()


Stage = Annotated[LayerwiseStage | StochasticStage | SftStage, Field(discriminator="type")]
"""Any stage, told apart by `type`."""


class ParallelSettings(Spec):
    """How the processes that torchrun starts share the work. None of it changes what is learnt."""

    data: Literal["fsdp", "ddp"] = "fsdp"
    """What processes with different sequences do with the model: shard it (PyTorch's FSDP2), or keep a copy each."""
    replicas: int = Field(default=1, ge=1)
    """`fsdp`: how many times the model is there, each time in shards: hybrid sharding, where 2 on two machines keeps
    the gathering of parameters within each."""
    tensor: int = Field(default=1, ge=1)
    """How many neighbouring processes split each mixer's heads and each MLP's channels, over the same sequences."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.data == "ddp" and self.replicas > 1:
            raise ValueError("with data: ddp every process keeps a copy: leave replicas out")
        return self


class DistillationSettings(Spec):
    """How a model in memory is distilled."""

    stages: tuple[Stage, ...] = Field(min_length=1)
    """What is done, in order."""
    seed: int = Field(default=0, ge=0, lt=2**64)
    """Decides the order of the data and the sampled placements."""
    batch_size: int = Field(default=8, ge=1)
    """Sequences an optimiser step."""
    gradient_accumulation: int = Field(default=1, ge=1)
    """Parts that a step's sequences are processed in, one after another: more of them need less memory."""
    optimiser: OptimiserSettings = OptimiserSettings()
    """AdamW's settings."""
    schedule: ScheduleSettings = ScheduleSettings()
    """The course of the learning rate in each stage."""
    learning_rate_scales: dict[str, Weight] = Field(default={})
    """Glob of parameter names -> factor on their learning rate, 0 freezes. The last glob that matches counts.

    Without a match, the factor is 0 for all that the main placement uses, and 1 for everything else."""
    freeze: tuple[str, ...] = ()
    """Globs of parameter names that never learn, whatever their factor."""
    ema: float | None = Field(default=None, gt=0, lt=1)
    """Decay of an exponential moving average of what learns, over the steps that move it. Each stage ends on it: it is
    what is judged, handed to the next stage and written. Null: none, a stage ends on its last step's values."""
    autocast: Literal["auto", "none", "bfloat16"] = "auto"
    """Precision of the matrix products: `auto` is bfloat16 on CUDA and the weights' own elsewhere."""
    residual: Literal["auto", "float32"] = "auto"
    """Precision of the hidden states between mixers and MLPs: `auto` is that of the matrix products."""
    attn_implementation: str | None = None
    """The attention function of transformers that training runs on. Null: on CUDA `flex_attention`, whose cost follows
    windows and documents where others pay for the whole square of a sequence; elsewhere the model's own."""
    compile: bool | None = None
    """Whether to compile what stands between the mixers' cores (torch.compile): a slow start, then faster steps.
    Null: on CUDA, unless `parallel` splits tensors."""
    cuda_graphs: bool | None = None
    """Whether to record what is the same at every step as CUDA graphs: a layerwise step, the teacher's forward, and
    each mixer of each layer of a student, which takes memory. Null: on CUDA, for a model that allows it and is not in
    shards; a student's layers only below 2,048 channels."""
    loss_chunk: int | None = Field(default=None, ge=1)
    """Positions whose logits are in memory at once; 256 on a CPU and 2048 elsewhere if left out."""

    @field_validator("attn_implementation")
    @classmethod
    def _known_function(cls, value: str | None) -> str | None:
        known = ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
        if value is None or value in known or "/" in value:
            return value
        raise ValueError(
            f"there is no attention function {value!r}: choose {', '.join(known)}, or a kernel of the hub by its name"
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for index in range(len(self.stages)):
            size, parts = self.batch_size_of(index), self.parts_of(index)
            if size % parts:
                raise ValueError(f"stage {index}: {size} sequences a step cannot be processed in {parts} equal parts")
        return self

    def batch_size_of(self, stage: int) -> int:
        """Sequences a step of stage `stage`."""
        return self.stages[stage].batch_size or self.batch_size

    def parts_of(self, stage: int) -> int:
        """Parts that a step of stage `stage` is processed in."""
        return self.stages[stage].gradient_accumulation or self.gradient_accumulation

    def part_size_of(self, stage: int) -> int:
        """Sequences in each of those parts."""
        return self.batch_size_of(stage) // self.parts_of(stage)

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)


class Recipe(DistillationSettings):
    """All of a training run: what `gearshift train` reads."""

    model: str
    """The folder of the supernet, or its name on the hub."""
    output: str
    """The folder for the run: its record, its checkpoints and, at the end, the model."""
    teacher: str = "self"
    """`self`: the model under its main placement. Or a reference model of the same shape and of any format: a folder, a
    .gguf file or a name on the hub."""
    text: str | None = None
    """A file, or a folder: short for one source of `data`. With neither, the English text that every Python carries."""
    data: tuple[DataSource, ...] | None = Field(default=None, min_length=1)
    """The sources of text, mixed by their weights."""
    chats: tuple[ChatSource, ...] | None = Field(default=None, min_length=1)
    """The sources of chats, mixed by their weights: what sft stages learn from. The other stages learn from text."""
    chat_template: str | None = None
    """A file with the Jinja template that renders chats; it is written with the model. Null: the tokenizer's own."""
    documents: Boundaries = "joined"
    """`joined`: a sequence is one text, whatever documents or chats it holds. `packed`: they do not see each other."""
    data_cache: str | None = None
    """The folder for tokenised text; null: `tokens` in $GEARSHIFT_CACHE, by itself in the user's cache folder."""
    sequence_length: int = Field(default=1024, ge=2)
    """Tokens a sequence."""
    held_out: int = Field(default=0, ge=0)
    """Sequences kept out of training, spread evenly over the text, that each stage is judged on at its end."""
    device: str = "auto"
    """A device by torch's name; `auto` is CUDA where there is one."""
    parallel: ParallelSettings | None = None
    """How several processes share the work; shards over all of them if left out."""
    checkpoint_every: int = Field(default=50, ge=1)
    """Steps between checkpoints. There is one at the end of each stage too."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """What shows the run's curves as well: `tensorboard` (in the output folder), `wandb`, `trackio`."""
    log_every: int = Field(default=10, ge=1)
    """Steps between the points in trackers. The record always has every step."""

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if self.text is not None and self.data:
            raise ValueError("give either text or data: text is short for data with one path")
        return self

    @model_validator(mode="after")
    def _chats_for_sft(self) -> Self:
        if any(stage.reads_chats for stage in self.stages) and not self.chats:
            raise ValueError("an sft stage learns from chats: name their sources in chats")
        if self.chats and not any(stage.reads_chats for stage in self.stages):
            raise ValueError("only an sft stage learns from chats, and there is none: leave chats out")
        return self

    @model_validator(mode="after")
    def _output_beside_what_is_read(self) -> Self:
        for source in (*self.sources, *(self.chats or ())):
            if source.path is not None and Path(self.output).resolve().is_relative_to(Path(source.path).resolve()):
                raise ValueError(
                    f"the output folder {self.output} lies in {source.path}, so a resumed run would read its own record"
                    " as text: choose another one"
                )
        return self

    @model_validator(mode="after")
    def _teacher_for_a_stage(self) -> Self:
        if self.teacher != "self" and not any(stage.needs_teacher for stage in self.stages):
            raise ValueError("no stage learns from a teacher: leave teacher out, or weigh a loss that compares with it")
        return self

    @field_validator("trackers")
    @classmethod
    def _each_once(cls, trackers: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [name for name in trackers if trackers.count(name) > 1]:
            raise ValueError(f"{twice[0]} comes twice: name each once")
        return trackers

    @property
    def reads_text(self) -> bool:
        """Whether any stage learns from text, not from chats."""
        return not all(stage.reads_chats for stage in self.stages)

    @property
    def sources(self) -> tuple[DataSource, ...]:
        """The sources of text; none for the text that Python carries."""
        return (DataSource(path=self.text),) if self.text is not None else self.data or ()

    @field_validator("model", "output", "teacher", "text")
    @classmethod
    def _not_empty(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("give a path, not an empty text")
        return value


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a YAML file, changed by `key=value` overrides (see `gearshift.settings`)."""
    return load_settings(Recipe, path, overrides)
