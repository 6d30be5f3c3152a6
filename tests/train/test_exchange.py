"""What several processes exchange in a step, and what each does by itself: forked ones on the CPU, over gloo."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from gearshift.data import TokenSequences
from gearshift.model import GearshiftForCausalLM
from gearshift.train import DistillationSettings, Distiller, StepRecord
from gearshift.train.layerwise import LayerwiseRun
from gearshift.train.parallel import ALONE, Parallel, process_group
from tests.models import supernet, tokens
from tests.train.processes import run_processes
from tests.train.test_parallel import placed

ENDING = "single" if hasattr(dist, "all_gather_single") else "into_tensor"  # torch < 2.13
GATHER, REDUCE = f"all_gather_{ENDING}", "reduce_scatter_single" if ENDING == "single" else "reduce_scatter_tensor"


def counted(name: str) -> list[int]:
    """The numbers of elements that `torch.distributed`'s function `name` gives from now on, in this process."""
    call, counts = getattr(dist, name), []

    def counting(output: torch.Tensor, *given: Any, **more: Any) -> Any:
        counts.append(output.numel())
        return call(output, *given, **more)

    setattr(dist, name, counting)
    return counts


def size(unit: torch.nn.Module) -> int:
    """Elements of a unit as FSDP gathers it from two processes: rows padded to an even number."""
    return sum((p.shape[0] + p.shape[0] % 2) * p[0].numel() for p in unit.parameters())


def sizes_of(model: GearshiftForCausalLM) -> dict[str, int]:
    """The sizes of a block's units, by the mixers' names and `mlp`."""
    block = model.model.blocks[0]
    return {name: size(block.mixer_named(name)) for name in block.spec.mixers} | {"mlp": size(block.mlp)}


def distilled(model: GearshiftForCausalLM, stage: dict[str, Any], **parallel: Any) -> Distiller:
    """A distillation, in steps of two parts, on all processes."""
    return in_two_parts(model, stage, placed(model, **parallel))


def in_two_parts(model: GearshiftForCausalLM, stage: dict[str, Any], parallel: Parallel = ALONE) -> Distiller:
    settings = DistillationSettings(stages=[stage], batch_size=4, gradient_accumulation=2)
    return Distiller(model, TokenSequences(tokens(8, 12)), settings, parallel=parallel)


def test_only_the_mixers_of_a_placement_are_gathered_and_reduced_once() -> None:
    run_processes(2, _count_of_a_placement)


def _count_of_a_placement() -> None:
    model = supernet(layers=3)
    sizes = sizes_of(model)
    model.config.presets = {"only": "attention,gdn,kda"}
    only = {"type": "presets", "probabilities": {"only": 1.0}}
    with process_group():
        distiller = distilled(model, {"type": "stochastic", "steps": 3, "sampling": only})
        steps = distiller.run()
        next(steps)
        gathered, reduced = counted(GATHER), counted(REDUCE)
        next(steps)
        # Each of the two parts: the teacher's three layers, the student's first, and its last two, forwards and back.
        student = sizes["gdn"] + sizes["kda"] + 2 * sizes["mlp"]
        once = 4 * (sizes["attention"] + sizes["mlp"]) + 2 * student
        # And perhaps the MLP before, fetched ahead.
        assert sum(gathered) in range(2 * once, 2 * (once + sizes["mlp"]) + 1)
        # After the second part alone, what the two sampled mixers have learnt.
        assert sorted(reduced) == sorted([sizes["gdn"] // 2, sizes["kda"] // 2])
        assert distiller.optimiser is not None
        moved = {name for name, parameter in model.named_parameters() if parameter in distiller.optimiser.state}
        assert moved == {
            name
            for name, _ in model.named_parameters()
            if "layers.1.mixer.mixers.gdn" in name or "layers.2.mixer.mixers.kda" in name
        }


def test_layer_by_layer_every_unit_is_gathered_once_and_after_it_none_is_old() -> None:
    run_processes(2, _count_layer_by_layer)


def _count_layer_by_layer() -> None:
    model = supernet(layers=3)
    sizes = sizes_of(model)
    with process_group():
        steps = distilled(model, {"type": "layerwise", "steps": 3, "calibration": "none"}).run()
        next(steps)
        gathered, reduced = counted(GATHER), counted(REDUCE)
        next(steps)
        assert sum(gathered) == 2 * 3 * sum(sizes.values())  # in each of the two parts
        students = [sizes[name] // 2 for name in ("window", "gdn", "kda")]
        assert sorted(reduced) == sorted(3 * students)
        units = [unit for block in model.model.blocks for unit in (block.mixer, block.mlp)]
        assert all(isinstance(parameter, DTensor) for unit in units for parameter in unit.parameters())


def test_copies_exchange_what_was_sampled_once_a_step() -> None:
    run_processes(2, _count_of_copies)


def _count_of_copies() -> None:
    model = supernet(layers=3)
    model.config.presets = {"only": "attention,gdn,kda"}
    stage = {"type": "stochastic", "steps": 3, "sampling": {"type": "presets", "probabilities": {"only": 1.0}}}
    with process_group(), pytest.MonkeyPatch.context() as patch:
        steps = distilled(model, stage, data="ddp").run()
        next(steps)
        exchanged = counted("all_reduce")
        next(steps)
        sampled = [model.model.blocks[layer].mixer_named(name) for layer, name in ((1, "gdn"), (2, "kda"))]
        learnt = sum(parameter.numel() for mixer in sampled for parameter in mixer.parameters())
        assert sorted(exchanged) == [2, learnt]  # and the loss with its one term
        largest = max(parameter.numel() for mixer in sampled for parameter in mixer.parameters())
        patch.setattr("gearshift.train.parallel.copies.BUCKET", largest)
        exchanged.clear()
        next(steps)
        assert sum(exchanged) == 2 + learnt
        assert max(exchanged) == largest
        assert len(exchanged) > 3


def test_copies_exchange_the_joined_gradients_of_each_mixer_at_once() -> None:
    run_processes(2, _count_of_joined, _joined_curve())


def _count_of_joined(expected: list[tuple[float, float]]) -> None:
    with process_group():
        exchanged = counted("all_reduce")
        curve = _joined_curve({"data": "ddp"})
    block = supernet(layers=2).model.blocks[0]
    sizes = 2 * [sum(p.numel() for p in block.mixer_named(name).parameters()) for name in ("window", "gdn", "kda")]
    assert exchanged == 3 * [len(sizes), *sizes]  # the errors, then the gradients
    assert torch.allclose(torch.tensor(curve), torch.tensor(expected), rtol=1e-5)


def _joined_curve(parallel: dict[str, Any] | None = None) -> list[tuple[float, float]]:
    """The loss and the norm of the gradients of each step, gradients joined as CUDA graphs need them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerwiseRun, "joins_gradients", True)
        model = supernet(layers=2)
        stage = {"type": "layerwise", "steps": 3, "calibration": "none"}
        steps = (distilled(model, stage, **parallel) if parallel else in_two_parts(model, stage)).run()
        return [(step.loss, step.gradient_norm) for step in steps if isinstance(step, StepRecord)]


@pytest.mark.parametrize("stage", ["layerwise", "stochastic"])
def test_steps_of_the_optimiser_go_past_dtensor(stage: str) -> None:
    """Which works out where the tensors lie anew for every other set of them, and takes longer than the step."""
    run_processes(2, _check_local, stage)


def _check_local(stage: str) -> None:
    seen: list[Any] = []
    for name in ("_fused_adamw_", "_foreach_mul_", "_foreach_lerp_"):
        setattr(torch, name, _watched(getattr(torch, name), seen))
    model = supernet(layers=2)
    settings = DistillationSettings(stages=[{"type": stage, "steps": 2}], batch_size=4, ema=0.9)
    with process_group():
        distiller = Distiller(model, TokenSequences(tokens(8, 12)), settings, parallel=placed(model))
        steps = distiller.run()
        while distiller.global_step < 2:
            next(steps)
        assert {type(tensor) for tensor in seen} == {torch.Tensor}
        assert distiller.optimiser is not None
        moments = [state["exp_avg"] for state in distiller.optimiser.state.values()]
        assert moments
        assert all(isinstance(moment, DTensor) for moment in moments)


def _watched(call: Any, seen: list[Any]) -> Any:
    def watching(tensors: Any, *given: Any, **more: Any) -> Any:
        seen.extend(tensors)
        return call(tensors, *given, **more)

    return watching
