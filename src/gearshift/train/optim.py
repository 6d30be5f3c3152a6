"""Which parameters learn, how fast, and the optimiser that moves them."""

import math
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gearshift.model import GearshiftForCausalLM
from gearshift.model.adapter_names import beside_adapters, plain
from gearshift.model.block import StochasticMixer
from gearshift.train.parallel import ALONE, Gradients, Parallel, local
from gearshift.train.recipe import DistillationSettings, OptimiserSettings, ScheduleSettings


def main_parameters(model: GearshiftForCausalLM) -> set[str]:
    """The names of the parameters that the all-main placement uses: all but those of the other mixers."""
    others: list[str] = []
    for path, module in model.named_modules():
        if isinstance(module, StochasticMixer):
            others += [f"{path}.mixers.{name}." for name in module.mixers if name != module.main]
    return {name for name, _ in model.named_parameters() if not name.startswith(tuple(others))}


def learning_rate_scales(
    model: GearshiftForCausalLM, scales: Mapping[str, float], freeze: Iterable[str], own_teacher: bool
) -> dict[str, float]:
    """Name -> factor on the learning rate, for every parameter that learns.

    In a block with adapters nothing but these learns, whatever the globs say. Globs know parameters by their names in a
    checkpoint.

    Args:
        model: the supernet.
        scales: glob -> factor; the last that matches counts. Without a match: 0 if the main placement uses the
            parameter, else 1.
        freeze: globs that never learn.
        own_teacher: whether the model under its main placement teaches any stage.

    Raises ValueError if a glob matches nothing, if nothing learns, if a parameter that learns is not float32, or if
    a parameter of the main placement would learn although that placement is the teacher.
    """
    names = [plain(name) for name, _ in model.named_parameters()]
    freeze = list(freeze)
    for glob in (*scales, *freeze):
        if not any(fnmatchcase(name, glob) for name in names):
            like = next((name for name in names if ".mixers." in name), names[-1])
            raise ValueError(f"the glob {glob!r} matches no parameter: names look like {like!r}")
    main, frozen = main_parameters(model), beside_adapters(model)
    learning: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        scale = 0.0 if name in main else 1.0
        for glob, given in scales.items():
            if fnmatchcase(plain(name), glob):
                scale = given
        if scale == 0 or name in frozen or any(fnmatchcase(plain(name), glob) for glob in freeze):
            continue
        if own_teacher and name in main:
            raise ValueError(
                f"{name!r} would learn, but the main placement uses it, and that is the teacher: freeze it (a narrower"
                " glob in learning_rate_scales), name a separate reference model as teacher, or learn in sft stages by"
                " cross_entropy alone"
            )
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name!r} is {parameter.dtype}, too coarse to learn in: load the model in float32")
        learning[name] = scale
    if not learning:
        raise ValueError("nothing can learn: every parameter is frozen, or the model has no mixers but the main ones")
    return learning


def learning(model: GearshiftForCausalLM, settings: DistillationSettings, other_teacher: bool) -> dict[str, float]:
    """As `learning_rate_scales`, by a run's settings, with or without a reference model that teaches."""
    own = not other_teacher and any(stage.needs_teacher for stage in settings.stages)
    return learning_rate_scales(model, settings.learning_rate_scales, settings.freeze, own)


class LocalAdamW(torch.optim.AdamW):
    """AdamW on what this process has of each parameter. Its state lies on the processes as the parameters do."""

    def _init_group(self, group: dict[str, Any], *found: list[Tensor]) -> bool:
        """AdamW's own step fills the lists `found` here, and works on what stands in them."""
        has_complex: bool = super()._init_group(group, *found)
        for tensors in found:
            tensors[:] = map(local, tensors)
        return has_complex


def make_optimiser(model: nn.Module, scales: Mapping[str, float], settings: OptimiserSettings) -> torch.optim.AdamW:
    """AdamW over the parameters in `scales`, grouped by their factor and by whether they decay.

    A parameter without a gradient is left alone by a step: no decay, no moments. State is made on first use.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name in scales:
            groups.setdefault((scales[name], parameter.ndim >= 2), []).append(parameter)
    return LocalAdamW(
        [
            {"params": members, "scale": scale, "weight_decay": settings.weight_decay if decays else 0.0}
            for (scale, decays), members in groups.items()
        ],
        betas=settings.betas,
        eps=settings.epsilon,
        fused=True,
    )


def set_learning_rate(optimiser: torch.optim.Optimizer, learning_rate: float) -> None:
    """Give each group `learning_rate` times its factor."""
    for group in optimiser.param_groups:
        group["lr"] = learning_rate * group["scale"]


def schedule(step: int, steps: int, settings: ScheduleSettings) -> float:
    """The factor on the learning rate at step `step` of `steps`: a linear rise, then half a cosine down."""
    warmup = round(settings.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup + 1) / max(1, steps - warmup)
    return settings.final + (1 - settings.final) * (1 + math.cos(math.pi * progress)) / 2


@torch.no_grad()
def clip(groups: Iterable[Gradients], largest: float | None, parallel: Parallel = ALONE) -> torch.Tensor:
    """Scale the gradients of each group down to norm `largest`. Returns the norm of all of them before."""
    groups = [group for group in groups if group]
    if not groups:
        return torch.zeros(())
    norms = parallel.norms(groups)
    if largest is not None:
        factors = (largest / (norms + 1e-6)).clamp(max=1.0)
        for group, factor in zip(groups, factors.unbind(), strict=True):
            _scale([local(gradient) for gradient in group], factor)
    return norms.square().sum().sqrt()


def _scale(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply by a scalar in place. What changes many tensors at once runs on a small part of a GPU for one."""
    if len(tensors) == 1:
        tensors[0].mul_(factor)
    else:
        torch._foreach_mul_(tensors, factor)
