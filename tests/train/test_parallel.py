"""Many processes do what one does: forked ones on the CPU, over gloo."""

import os
import shutil
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec
from gearshift.conversion import export
from gearshift.data import TokenSequences
from gearshift.train import (
    Callback,
    DistillationSettings,
    Distiller,
    ParallelSettings,
    Record,
    StepRecord,
    TrainResult,
    train,
)
from gearshift.train.checkpoint import Checkpoints
from gearshift.train.losses import activation_error
from gearshift.train.parallel import ALONE, launch, parallelise, process_group
from gearshift.train.parallel.processes import mesh_sizes
from gearshift.train.parallel.split import check_splits
from tests.models import ATTENTION, supernet, supernet_spec, tokens
from tests.train.processes import run_processes
from tests.train.test_run import STAGES, recipe, timeless

CPU = torch.device("cpu")
ARRANGEMENTS: dict[str, tuple[int, dict[str, Any] | None]] = {
    "shards by themselves": (2, None),
    "a copy each": (2, {"data": "ddp"}),
    "slices of tensors": (2, {"tensor": 2}),
    "shards and slices": (4, {"data": "fsdp", "tensor": 2}),
    "copies in shards": (4, {"replicas": 2}),
}
RECOMPUTED = ({"type": "layerwise", "steps": 2}, {**STAGES[1], "steps": 3, "recompute": True})


@pytest.fixture(scope="module")
def run(source: Path) -> Any:
    """The recipe of a run of five steps in two stages, by its output folder."""
    return partial(recipe, source, batch_size=8, held_out=3, stages=RECOMPUTED)


@pytest.fixture(scope="module")
def alone(run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "run"
    train(run(output))
    return output


def furthest(ours: Any, theirs: Any) -> float:
    """The largest difference of two records' numbers, relative above one. All else must be equal."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        return max((furthest(ours[key], theirs[key]) for key in ours), default=0.0)
    if isinstance(ours, list):
        return max((furthest(one, other) for one, other in zip(ours, theirs, strict=True)), default=0.0)
    if isinstance(ours, float):
        return abs(ours - theirs) / max(1.0, abs(ours))
    assert ours == theirs
    return 0.0


def check_same(ours: Path, theirs: Path) -> None:
    """The same record, and the same model up to what Adam makes of the last digits of gradients near zero."""
    assert furthest(timeless(ours), timeless(theirs)) < 1e-5
    one, other = (load_file(path / "model" / "model.safetensors") for path in (ours, theirs))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, other[name], atol=1e-3), name


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "copies" in name else ()) for name in ARRANGEMENTS]
)
def test_many_processes_learn_what_one_does(run, alone, tmp_path, name) -> None:
    world, parallel = ARRANGEMENTS[name]
    run_processes(world, train, run(tmp_path / "run", parallel=parallel))
    check_same(tmp_path / "run", alone)


def test_a_separate_teacher_and_shared_blocks(source, tmp_path) -> None:
    """All outside the main mixers learns: norms and embeddings, which no unit shards, too."""
    shutil.copytree(source / "model", tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    sharing().save_pretrained(tmp_path / "model")
    taught = {"model": str(tmp_path / "model"), "teacher": str(tmp_path / "model"), "stages": RECOMPUTED}
    # What the main mixers learn from themselves is rounding.
    taught |= {"learning_rate_scales": {"*": 0.5}, "freeze": ("*.mixers.attention.*",)}
    train(recipe(source, tmp_path / "alone", **taught))
    run_processes(2, train, recipe(source, tmp_path / "run", **taught))
    check_same(tmp_path / "run", tmp_path / "alone")


@pytest.mark.parametrize("world", [1, 2])
def test_checkpoints_in_the_background(run, alone, tmp_path, world) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    work = (run(whole), None, [Copy(whole, killed)])
    train_in_background(*work) if world == 1 else run_processes(world, train_in_background, *work)
    check_same(whole, alone)
    # The one of step 2, and the one of its stage's end right behind it, take their places when they are written.
    assert train_in_background(run(killed)).resumed_at == 2
    check_same(killed, alone)


def train_in_background(*work: Any) -> TrainResult:
    """`train(*work)`, with checkpoints written as they are on CUDA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gearshift.train.run.Checkpoints", lambda folder, background: Checkpoints(folder, True))
        return train(*work)


class Copy(Callback):
    """Copies a run's folder when step 3 has been recorded: what a kill would leave.

    Once a checkpoint that is written in the background is in its place: a kill leaves no folder torn by its renaming.
    """

    def __init__(self, output: Path, target: Path):
        self.output = output
        self.target = target

    def on_record(self, record: Record) -> None:
        if isinstance(record, StepRecord) and record.global_step == 3:
            while len(list((self.output / "checkpoints").iterdir())) > 1:
                time.sleep(0.01)
            shutil.copytree(self.output, self.target)


def test_a_checkpoint_loads_and_exports_on_another_number_of_processes(source, run, alone, tmp_path) -> None:
    whole, output = tmp_path / "whole", tmp_path / "killed"
    run_processes(4, train, run(whole, parallel={"tensor": 2}), None, [Copy(whole, output)])
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-00000002-stage-01"]
    export(output, "kda").write(tmp_path / "exported")
    run_processes(2, train, run(output))
    check_same(output, alone)
    # What was exported is what step 2 left: the stage before has moved it, and the steps behind moved it on.
    export(output, "kda").write(tmp_path / "finished")
    then, now = (_queries(tmp_path / name, "") for name in ("exported", "finished"))
    start, end = (_queries(folder, ".mixers.kda") for folder in (source / "model", output / "model"))
    assert not torch.equal(then, start)
    assert not torch.equal(then, end)
    assert torch.equal(now, end)


def test_copies_and_shards_go_on_from_each_other(tmp_path) -> None:
    """With blocks that share weights, all outside the main mixers learning from a separate teacher, and averages."""
    run_processes(2, _check_handing_on, tmp_path, _handed_on())


def _check_handing_on(folder: Path, expected: tuple[list[float], dict[str, torch.Tensor]]) -> None:
    with process_group():
        for first, then in (("ddp", "fsdp"), ("fsdp", "ddp")):
            losses, weights = _handed_on(Checkpoints(folder / first), first, then)
            assert losses == pytest.approx(expected[0], rel=1e-3)
            for name, weight in weights.items():
                assert torch.allclose(weight, expected[1][name], atol=1e-4), name


def _handed_on(
    checkpoints: Checkpoints | None = None, *arrangements: str
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses and the weights of a run that `arrangements` share, the next one going on after two steps."""
    settings = DistillationSettings(
        stages=[{"type": "layerwise", "steps": 1}, {"type": "stochastic", "steps": 3}],
        batch_size=4,
        ema=0.9,
        learning_rate_scales={"*": 0.5},
        freeze=("*.mixers.attention.*",),
    )
    losses: list[float] = []
    for data in arrangements or (None,):
        model, teacher = sharing(), sharing().requires_grad_(False)
        parallel = ALONE if data is None else placed(model, data=data)
        if data is not None:
            parallel.place(teacher, CPU, half=False)
        distiller = Distiller(model, TokenSequences(tokens(8, 12)), settings, teacher, parallel=parallel)
        if losses:
            assert checkpoints is not None
            assert checkpoints.restore(distiller)
        for record in distiller.run():
            if isinstance(record, StepRecord):
                losses.append(record.loss)
                if checkpoints is not None and len(losses) == 2:
                    checkpoints.save(distiller)
                    break
    return losses, {name: parallel.whole(weight) for name, weight in model.state_dict().items()}


def sharing() -> GearshiftForCausalLM:
    """A supernet of three layers with the same weights in all of them."""
    spec = supernet_spec(layers=3).model_dump()
    spec["decoder"]["blocks"]["block"]["shared_weights"] = True
    torch.manual_seed(0)
    return GearshiftForCausalLM(GearshiftConfig(ModelSpec.model_validate(spec)))


def _queries(folder: Path, mixer: str) -> torch.Tensor:
    """The weights of the query projections of both layers."""
    weights = load_file(folder / "model.safetensors")
    return torch.stack([weights[f"model.layers.{layer}.mixer{mixer}.q_proj.weight"] for layer in range(2)])


def placed(model: GearshiftForCausalLM, **parallel: Any) -> Any:
    """The arrangement of this test's processes, with `model` on it."""
    arrangement = parallelise(ParallelSettings(**parallel), CPU)
    arrangement.place(model, CPU, half=False)
    return arrangement


KINDS: dict[str, dict[str, Any]] = {
    "attention": {**ATTENTION, "qkv_bias": True, "output_bias": True, "qk_norm": {}},
    "gdn": {"type": "gated_delta_net", "key_heads": 2, "value_heads": 4, "key_dim": 8, "value_dim": 8},
    "kda": {"type": "kimi_delta_attention", "heads": 4, "head_dim": 8},
    "classic": {"type": "mamba", "inner_size": 32, "projection_bias": True, "norm": {}},
    "grouped": {"type": "mamba", "projection": "grouped", "state_size": 8, "inner_size": 32, "xb_size": 16},
    "after": {
        "type": "mamba", "projection": "grouped", "state_size": 8, "inner_size": 32, "xb_size": 16,
        "repeat_kv_before_conv": False,
    },
    "mamba2": {"type": "mamba2", "heads": 4, "head_dim": 8, "groups": 2, "norm_groups": 2, "projection_bias": True},
    "discrete": {"type": "discrete_mamba2", "key_heads": 2, "value_heads": 4, "head_dim": 8, "state_size": 8},
    "latent": {
        "type": "multi_head_latent_attention", "heads": 4, "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8, "bias": True,
    },
}  # fmt: skip


def every_kind() -> GearshiftForCausalLM:
    """A block with every kind of mixer, another one with the other kind of MLP."""
    spec = supernet_spec(layers=2, mixers=KINDS).model_dump()
    plain = {"type": "plain", "intermediate_size": 40, "up_bias": True, "down_bias": True}
    block = spec["decoder"]["blocks"].pop("block")
    spec["decoder"] |= {"pattern": ["one", "other"], "blocks": {"one": block, "other": {**block, "mlp": plain}}}
    torch.manual_seed(0)
    model = GearshiftForCausalLM(GearshiftConfig(ModelSpec.model_validate(spec)))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def learn(model: GearshiftForCausalLM, name: str, batch: torch.Tensor) -> torch.Tensor:
    """The loss of a model with the mixer `name` everywhere, after its backward pass."""
    hidden = model.model.embed(batch)
    context = model.model.context(hidden)
    for block in model.model.blocks:
        hidden = block(hidden, context, name)
    loss = activation_error(hidden, torch.ones_like(hidden))
    loss.backward()
    return loss.detach()


def test_every_kind_computes_with_slices_what_it_computes_whole() -> None:
    run_processes(2, _compare_kinds)


def _compare_kinds() -> None:
    batch = tokens(2, 9)
    with process_group():
        ours, theirs = every_kind(), every_kind()
        arrangement = placed(ours, tensor=2)
        for name in KINDS:
            losses = learn(ours, name, batch), learn(theirs, name, batch)
            assert torch.allclose(*losses, rtol=1e-5), (name, losses)
            for (path, parameter), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
                assert (parameter.grad is None) == (expected.grad is None), (name, path)
                if expected.grad is not None:
                    gradient = arrangement.whole(parameter.grad)
                    error = (gradient - expected.grad).norm() / expected.grad.norm().clamp_min(1e-6)
                    assert error < 1e-4, (name, path, error)
            ours.zero_grad(set_to_none=True)
            theirs.zero_grad(set_to_none=True)


@pytest.mark.parametrize(
    ("settings", "world", "sentence"),
    [
        ({"tensor": 3}, 4, "parallel: tensor 3 does not divide 4 processes"),
        ({"replicas": 3}, 4, "parallel: replicas 3 does not divide 4 processes"),
        ({"tensor": 2, "replicas": 4}, 4, "parallel: replicas 4 does not divide 4 processes over tensor 2"),
        ({"tensor": 2}, 1, "does not divide 1 process: start it with torchrun --nproc-per-node N -m gearshift"),
    ],
)
def test_processes_that_do_not_divide_are_refused(settings, world, sentence) -> None:
    with pytest.raises(ValueError, match=sentence):
        mesh_sizes(ParallelSettings(**settings), world)


def test_copies_of_copies_are_refused() -> None:
    with pytest.raises(ValueError, match="with data: ddp every process keeps a copy: leave replicas out"):
        ParallelSettings(data="ddp", replicas=2)


@pytest.mark.parametrize(
    ("mixers", "mlp", "sentence"),
    [
        ({"kda": {"type": "kimi_delta_attention", "heads": 3, "head_dim": 8}}, {}, "'kda' has heads 3, which does not"),
        ({"one": {**ATTENTION, "kv_heads": 1}}, {}, "'one' has kv_heads 1, which does not divide by tensor 2"),
        (
            {"normed": {**ATTENTION, "qk_norm": {}, "qk_norm_across_heads": True}},
            {},
            "'normed' .attention. cannot be split: qk_norm_across_heads needs all heads in one place; set tensor to 1",
        ),
        ({"m": {"type": "mamba2", "heads": 4, "head_dim": 8}}, {}, "'m' has groups 1, which does not divide"),
        ({}, {"intermediate_size": 41}, "the MLP has intermediate_size 41, which does not divide by tensor 2"),
        (
            {},
            {"type": "mixture_of_experts", "experts": 4, "experts_per_token": 2},
            "the MLP .mixture_of_experts. cannot be split: its experts are not split; set tensor to 1",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(mixers, mlp, sentence) -> None:
    spec = supernet_spec(layers=2, mixers={"attention": ATTENTION, **mixers}).model_dump()
    spec["decoder"]["blocks"]["block"]["mlp"] = {"type": "gated", "intermediate_size": 40, **mlp}
    model = GearshiftForCausalLM(GearshiftConfig(ModelSpec.model_validate(spec)))
    with pytest.raises(ValueError, match=sentence):
        check_splits(model, 2)


def test_adapters_are_not_split() -> None:
    pytest.importorskip("peft")
    spec = supernet_spec(layers=2).model_dump()
    spec["decoder"]["blocks"]["block"]["lora"] = {"rank": 2, "alpha": 4}
    model = GearshiftForCausalLM(GearshiftConfig(ModelSpec.model_validate(spec)))
    with pytest.raises(ValueError, match="has LoRA adapters, which tensor parallelism does not split"):
        check_splits(model, 2)


def test_batches_that_do_not_divide_are_refused_by_one_process_alone(source, tmp_path) -> None:
    folder = tmp_path / "said"
    folder.mkdir()
    # The text, which may take long to read, is not even looked for.
    settings = recipe(source, tmp_path / "run", batch_size=6, gradient_accumulation=2, text="/nowhere.txt")
    run_processes(2, _refused, settings, folder, check=False)
    (said,) = folder.iterdir()
    assert said.read_text() == "stage 0: 6 sequences a step in 2 parts cannot be shared by 2 data-parallel ranks"
    assert not (tmp_path / "run").exists()


def _refused(settings: Any, folder: Path) -> None:
    """Write the error that gets out of a run down in `folder`; only the first to fail gets there."""
    launch.GRACE = 3.0  # no torchrun is here to end the other one
    try:
        train(settings)
    except ValueError as error:
        (folder / os.environ["RANK"]).write_text(str(error))


@pytest.mark.parametrize(("error", "waits"), [(ValueError, True), (KeyboardInterrupt, False)])
def test_who_waits_for_torchrun(tmp_path: Path, error: type[BaseException], waits: bool) -> None:
    """Where one process has failed, the other waits for its end; not after Ctrl-C, though it may have lost its own."""
    run_processes(2, _left_alone, tmp_path, error, check=False)
    assert (tmp_path / "waited").exists() == waits


def _left_alone(folder: Path, error: type[BaseException]) -> None:
    """The first process fails with `error`, the other one because the first is gone."""
    launch.time.sleep = lambda seconds: (folder / "waited").touch()
    with process_group() as first:
        if first:
            raise error
        dist.barrier()


def test_every_counted_token_weighs_the_same_on_several_processes() -> None:
    """Although the processes' rows, and the parts of a step, hold different numbers of them."""
    run_processes(2, _check_sft, _sft_curve())


def _check_sft(expected: list[float]) -> None:
    with process_group():
        assert _sft_curve(shared=True) == pytest.approx(expected, rel=1e-5)


def _sft_curve(shared: bool = False) -> list[float]:
    model = supernet(layers=2)
    arrangement = placed(model) if shared else ALONE
    counted = torch.arange(12)[None] >= torch.tensor([11, 2, 9, 1, 10, 4, 11, 3])[:, None]
    settings = DistillationSettings(
        stages=[{"type": "sft", "steps": 3, "learning_rate": 1e-2}], batch_size=4, gradient_accumulation=2
    )
    chats = TokenSequences(tokens(8, 12), counted=counted)
    distiller = Distiller(model, None, settings, chats=chats, parallel=arrangement)
    return [record.loss for record in distiller.run() if isinstance(record, StepRecord)]
