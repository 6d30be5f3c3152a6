"""How the stages compute: in what precision, compiled or not, recorded or not."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gearshift.mixers.attention_function import FLEX
from gearshift.mixers.base import Mixer
from gearshift.model import GearshiftForCausalLM
from gearshift.train.parallel import Parallel
from gearshift.train.recipe import DistillationSettings
from gearshift.train.steps import BlockSteps, CompiledSteps

WIDE = 2048
"""Channels from which on a student's kernels are long enough to be launched one by one: graphs mostly take memory."""


class Precision:
    """The precision of matrix products on a device. Each call opens a new context."""

    def __init__(
        self,
        autocast: Literal["auto", "none", "bfloat16"],
        device: torch.device,
        residual: Literal["auto", "float32"] = "auto",
    ):
        self.device = device
        self.enabled = autocast == "bfloat16" or (autocast == "auto" and device.type == "cuda")
        self.residual = torch.bfloat16 if self.enabled and residual == "auto" else None
        """Of the hidden states between mixers and MLPs; None: the weights' own."""
        if self.enabled and device.type == "cuda" and not torch.cuda.is_bf16_supported():
            raise ValueError(f"{torch.cuda.get_device_name(device)} cannot compute in bfloat16: set autocast to none")

    def __call__(self, cached: bool = True) -> AbstractContextManager[Any]:
        """`cached`: whether a weight that is converted twice in a row is converted once."""
        if not self.enabled:
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=cached)

    def embed(self, model: GearshiftForCausalLM, tokens: Tensor) -> Tensor:
        """tokens [batch, tokens] -> [batch, tokens, hidden], what the first block reads."""
        hidden = model.model.embed(tokens)
        return hidden if self.residual is None else hidden.to(self.residual)


class FrozenWeights:
    """The weights of the blocks' linear layers that do not learn, in the precision of their products.

    What is recorded with them has not to convert them again at every step.
    """

    def __init__(self, models: Iterable[GearshiftForCausalLM], precision: Precision):
        self.models = tuple(models)
        self.precision = precision

    def close(self) -> None:
        """Give back their memory, which whatever was recorded reads."""
        self.__dict__.pop("_lowered", None)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Within, the models have them."""
        if not self.precision.enabled:
            yield
            return
        originals = {weight: weight.data for weight in self._lowered}
        try:
            for weight, lowered in self._lowered.items():
                weight.data = lowered
            yield
        finally:
            for weight, original in originals.items():
                weight.data = original

    @cached_property
    def _lowered(self) -> dict[nn.Parameter, Tensor]:
        blocks = {block for model in self.models for block in model.model.blocks}
        linears = (module for block in blocks for module in block.modules() if isinstance(module, nn.Linear))
        weights: set[nn.Parameter] = {linear.weight for linear in linears}  # type: ignore[misc]
        return {weight: weight.data.to(torch.bfloat16) for weight in weights if not weight.requires_grad}


@dataclass(frozen=True)
class Engine:
    """How the stages compute. Whatever it says, the result is the same but for rounding."""

    precision: Precision
    steps: BlockSteps
    graphs: bool = False
    """Whether work that is the same at every step is recorded as a CUDA graph."""
    layer_graphs: bool = False
    """Whether the layers of a student are recorded too, each mixer of each layer by itself."""
    attn_implementation: str | None = None
    """The attention function to train on; None: each model's own."""

    @property
    def plain(self) -> "Engine":
        """The same with nothing compiled and nothing recorded."""
        return replace(self, steps=BlockSteps(), graphs=False, layer_graphs=False)


def make_engine(
    settings: DistillationSettings, models: set[GearshiftForCausalLM], device: torch.device, parallel: Parallel
) -> Engine:
    """What `settings` ask for, or else the fastest that `models` allow on `device`, in the arrangement `parallel`.

    ValueError for what was asked for and cannot be.
    """
    obstacle = _obstacle(models)
    able = device.type == "cuda" and obstacle is None
    compiled = (able and parallel.compilable) if settings.compile is None else settings.compile
    narrow = all(model.spec.hidden_size < WIDE for model in models)
    graphs = (able and parallel.recordable) if settings.cuda_graphs is None else settings.cuda_graphs
    layer_graphs = graphs and (narrow or settings.cuda_graphs is not None)
    if compiled and not parallel.compilable:
        raise ValueError("compile: true cannot compile slices of tensors (parallel: tensor above 1): leave it out")
    if graphs and not parallel.recordable:
        raise ValueError("cuda_graphs: true cannot record shards or slices of a model (parallel): leave it out")
    if graphs and device.type != "cuda":
        raise ValueError(f"cuda_graphs: true needs a CUDA device, not {device}: leave it out")
    if graphs and obstacle is not None:
        raise ValueError(f"cuda_graphs: true, but {obstacle}: leave it out")
    steps = CompiledSteps(parallel.within) if compiled else BlockSteps()
    attn_implementation = _attn_implementation(settings, models, device)
    return Engine(
        Precision(settings.autocast, device, settings.residual), steps, graphs, layer_graphs, attn_implementation
    )


def _attn_implementation(
    settings: DistillationSettings, models: set[GearshiftForCausalLM], device: torch.device
) -> str | None:
    unable = [mixer for model in models for mixer in _mixers(model) if not mixer.supports_attention(FLEX)]
    if settings.attn_implementation == FLEX and unable:
        raise ValueError(
            f"attn_implementation: {FLEX} cannot run {unable[0].spec.type} with these settings (dropout, or heads"
            " narrower than 16 channels): leave it out"
        )
    if settings.attn_implementation is None and device.type == "cuda" and not unable:
        return FLEX
    return settings.attn_implementation


def _obstacle(models: set[GearshiftForCausalLM]) -> str | None:
    """What keeps a step from being recorded, None if nothing does."""
    for model in models:
        for name, module in model.named_modules():
            if isinstance(module, nn.Dropout) and module.p > 0:
                return f"{name} drops inputs at random"
            if not getattr(module, "recordable", True):
                return f"what {name} runs depends on its input"
    return None


def _mixers(model: nn.Module) -> Iterator[Mixer]:
    return (module for module in model.modules() if isinstance(module, Mixer))
