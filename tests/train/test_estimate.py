"""The memory that an estimate gives, against what training then takes."""

import gc
import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from torch.profiler import ProfilerActivity, profile
from typer.testing import CliRunner

from gearshift import GearshiftConfig, GearshiftForCausalLM, ModelSpec, train
from gearshift.cli import app
from gearshift.data import TokenSequences
from gearshift.formats.spec_file import read_spec
from gearshift.mixers.footprint import Footprint, run_stand_in, stand_in, standing_in
from gearshift.train import (
    ChatLossWeights,
    Distiller,
    LayerwiseStage,
    LossWeights,
    PresetSampling,
    Recipe,
    SandwichSampling,
    SftStage,
    StochasticStage,
    UniformSampling,
    load_recipe,
)
from gearshift.train.estimate import Ranks, Units, advice, estimate, remarks, shared_out
from gearshift.train.estimate import stages as estimates
from gearshift.train.estimate.table import _smaller, gigabytes
from gearshift.train.estimate.tracker import Tracker
from tests.models import supernet_spec

RECIPES = Path(__file__).parents[2] / "recipes"
HEADS = {"heads": 4, "kv_heads": 2, "head_dim": 16, "rotary": {"theta": 1e4}}
MIXERS: dict[str, dict[str, Any]] = {
    "attention": {"type": "attention", **HEADS},
    "window": {"type": "attention", **HEADS, "window": 16},
    "gdn": {"type": "gated_delta_net", "key_heads": 4, "key_dim": 16},
    "kda": {"type": "kimi_delta_attention", "heads": 4, "head_dim": 16},
}
TOKENS = 128


def named(probabilities: dict[str, float]) -> PresetSampling:
    return PresetSampling(probabilities=probabilities)


def spec_of(layers: int = 3, **model: Any) -> ModelSpec:
    return supernet_spec(layers, MIXERS, **{"vocab_size": 1000, "hidden_size": 64, **model})


def recipe_of(spec: ModelSpec, folder: Path, *stages: Any, **more: Any) -> Recipe:
    """A recipe for a spec file, so that nothing but sizes is known."""
    path = folder / "model.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    settings = {"sequence_length": TOKENS, "batch_size": 2, "device": "cpu", "loss_chunk": 64, **more}
    if any(stage.reads_chats for stage in stages):
        (folder / "chats.jsonl").touch()
        settings["chats"] = [{"path": str(folder / "chats.jsonl")}]
    return Recipe(model=str(path), output=str(folder / "run"), stages=stages, **settings)


def measured(spec: ModelSpec, recipe: Recipe) -> int:
    """The most bytes in use by tensors while `recipe` runs, by torch's own account of every allocation."""
    model = GearshiftForCausalLM(GearshiftConfig(spec))
    sequences = TokenSequences(torch.randint(spec.vocab_size, (8, TOKENS)))
    chats = TokenSequences(sequences.tokens, None, sequences.tokens % 2 == 0)
    now = most = sum(parameter.nbytes for parameter in model.parameters())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for _ in Distiller(model, sequences, recipe, chats=chats).run():
            pass
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def large_recipe(stage: str, length: int, folder: Path, **more: Any) -> Recipe:
    """A recipe for a GPU: 8,192 tokens a step or one sequence."""
    heads = {"heads": 8, "kv_heads": 4, "head_dim": 64, "rotary": {"theta": 1e4}}
    mixers = {
        "attention": {"type": "attention", **heads},
        "window": {"type": "attention", **heads, "window": 128},
        "gdn": {"type": "gated_delta_net", "key_heads": 8, "key_dim": 64},
        "kda": {"type": "kimi_delta_attention", "heads": 8, "head_dim": 64},
    }
    spec = supernet_spec(6, mixers, vocab_size=32000, hidden_size=512)
    more |= {"batch_size": max(1, 8192 // length), "device": "cuda", "cuda_graphs": False, "loss_chunk": 2048}
    return recipe_of(spec, folder, STAGES[stage], sequence_length=length, **more)


STAGES = {
    "layerwise": LayerwiseStage(steps=2, calibration="none"),
    "students": LayerwiseStage(steps=2, calibration="none", stream="student"),
    "calibration": LayerwiseStage(steps=2, calibration_sequences=8),
    "stochastic": StochasticStage(steps=3, sampling=UniformSampling()),
    "recompute": StochasticStage(steps=3, sampling=UniformSampling(), recompute=True),
    "activation": StochasticStage(steps=2, losses=LossWeights(activation=0.5)),
    "sft": SftStage(steps=3, sampling=UniformSampling(), losses=ChatLossWeights(forward_kl=0.5)),
}


@pytest.mark.parametrize("name", STAGES)
def test_an_estimate_is_near_what_training_takes(name: str, tmp_path: Path) -> None:
    spec = spec_of(layers=4)
    recipe = recipe_of(spec, tmp_path, STAGES[name], ema=0.9)
    found = estimate(recipe)[0]
    assert found.total == pytest.approx(measured(spec, recipe), rel=0.15)
    assert found.tokens == 2 * TOKENS
    assert found.operations > 6 * 4 * 64 * 64 * found.tokens


def test_bfloat16_in_parts_and_tied_embeddings(tmp_path: Path) -> None:
    spec = spec_of(tie_embeddings=True)
    stage = StochasticStage(steps=2, batch_size=4, gradient_accumulation=2)
    recipe = recipe_of(spec, tmp_path, stage, autocast="bfloat16")
    assert estimate(recipe)[0].total == pytest.approx(measured(spec, recipe), rel=0.15)


@pytest.mark.parametrize(("name", "compiled"), [("layerwise", False), ("stochastic", True), ("recompute", False)])
def test_a_few_layers_tell_of_all(name: str, compiled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(spec_of(layers=5), tmp_path, STAGES[name], compile=compiled)
    few = estimate(recipe, gpus=1)[0]
    monkeypatch.setattr(estimates, "_rehearsed", lambda spec, recipe, index: list(range(spec.decoder.num_layers)))
    every = estimate(recipe, gpus=1)[0]
    assert few.total == pytest.approx(every.total, rel=0.05)
    assert few.operations == pytest.approx(every.operations, rel=0.25)


def test_placements_of_all_layers_are_named_where_few_are_rehearsed(tmp_path: Path) -> None:
    named = "gdn*3,kda*2"
    student = LayerwiseStage(steps=2, stream="student", sampling=SandwichSampling(cheapest=named))
    stages = student, StochasticStage(steps=2, sampling=SandwichSampling(cheapest=named))
    assert [stage.tokens for stage in estimate(recipe_of(spec_of(layers=5), tmp_path, *stages))] == [2 * TOKENS] * 2


def test_steps_that_learn_nothing_are_not_what_is_rehearsed(tmp_path: Path) -> None:
    """The main mixer is the heaviest here, but a step of it alone is skipped."""
    mixers = {name: MIXERS[name] for name in ("attention", "gdn")}
    spec = supernet_spec(4, mixers, vocab_size=1000, hidden_size=64)
    more = {"attn_implementation": "eager", "sequence_length": 1024}
    always, often = (
        estimate(recipe_of(spec, tmp_path, StochasticStage(steps=30, sampling=named(probabilities)), **more))
        for probabilities in ({"attention*3,gdn": 1.0}, {"attention*3,gdn": 0.5, "attention": 0.5})
    )
    assert always == often
    with pytest.raises(ValueError, match="the stochastic stage has nothing to do"):
        estimate(recipe_of(spec, tmp_path, StochasticStage(steps=1, sampling=named({"attention": 1})), **more))


def test_a_preset_that_a_model_does_not_have_yet_may_be_any_placement(tmp_path: Path) -> None:
    sampling = SandwichSampling(cheapest="fast", between=named({"slow": 0.5, "fast": 0.25}))
    recipe = recipe_of(spec_of(layers=2), tmp_path, SftStage(steps=30, sampling=sampling))
    (unknown,) = estimate(recipe)
    assert unknown.unknown == ("fast", "slow")
    path = tmp_path / "named.yaml"
    presets = {"fast": "kda*2", "slow": "attention,kda"}
    path.write_text(yaml.safe_dump({"spec": spec_of(layers=2).model_dump(mode="json"), "presets": presets}))
    (known,) = estimate(recipe.model_copy(update={"model": str(path)}))
    assert known.unknown == ()
    assert known.total <= unknown.total < 1.15 * known.total
    (said,) = remarks(recipe, [unknown])
    assert said.startswith("stage 0 (sft): the model has no preset fast or slow; any placement stands in for one here")
    with pytest.raises(ValueError, match="the placement fast,kda,fast names 3 layers, but the model has 2"):
        estimate(recipe_of(spec_of(layers=2), tmp_path, StochasticStage(steps=1, sampling=named({"fast,kda,fast": 1}))))


def test_an_estimate_warns_of_what_its_run_will(tmp_path: Path) -> None:
    sampling = SandwichSampling(cheapest="yet-to-come", largest="attention")
    more = {"sequence_length": 129, "teacher": str(tmp_path / "model.yaml"), "text": "/nowhere.txt"}
    recipe = recipe_of(spec_of(layers=2), tmp_path, StochasticStage(steps=3, sampling=sampling), **more)
    nowhere, positions, of_teacher, idle = remarks(recipe, [])
    assert nowhere == "no text at /nowhere.txt: there is no such file or folder; a run needs it"
    assert positions.startswith("sequence_length is 129, but the model was made for 128 positions")
    assert of_teacher.startswith("sequence_length is 129, but the teacher was made for 128 positions")
    assert idle.startswith("stage 0 (stochastic): largest is 'attention', the main placement, of which nothing learns")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    shown = CliRunner().invoke(app, ["train", str(path), "--estimate", "--memory", "10"])
    assert shown.exit_code == 0, shown.output
    assert positions in shown.stdout


@pytest.mark.parametrize("tied", [False, True])
def test_everything_may_learn_where_no_teacher_is_needed(tmp_path: Path, tied: bool) -> None:
    spec = spec_of(2, tie_embeddings=tied)
    recipe = recipe_of(spec, tmp_path, SftStage(steps=2), learning_rate_scales={"*": 1.0})
    assert estimate(recipe)[0].total == pytest.approx(measured(spec, recipe), rel=0.15)
    mixed = recipe.model_copy(update={"stages": (*recipe.stages, StochasticStage(steps=1))})
    with pytest.raises(ValueError, match="the main placement uses it, and that is the teacher"):
        estimate(mixed)


def test_an_estimate_does_not_depend_on_when_garbage_is_collected(tmp_path: Path) -> None:
    mixers = {name: MIXERS[name] for name in ("attention", "window")}
    spec = supernet_spec(2, mixers, vocab_size=1000, hidden_size=64)
    recipe = recipe_of(spec, tmp_path, STAGES["stochastic"], compile=True)
    before = gc.get_threshold()
    gc.set_threshold(1000, 5, 5)
    try:
        collected = estimate(recipe, gpus=1)
        gc.disable()
        kept = estimate(recipe, gpus=1)
    finally:
        gc.set_threshold(*before)
        gc.enable()
    assert kept == collected


@pytest.mark.slow
@pytest.mark.parametrize(("compiled", "layerwise", "stochastic"), [(True, 3.5, 13.0), (False, 3.9, 20.0)])
def test_what_an_h200_took(compiled: bool, layerwise: float, stochastic: float) -> None:
    """GB, measured by torch.cuda.max_memory_allocated with flash-linear-attention 0.6.0 and without CUDA graphs.

    Hidden states were in float32 then.
    """
    folder = RECIPES / "smollm2-135m"
    stages = LayerwiseStage(steps=20, calibration="none"), StochasticStage(steps=20, sampling=UniformSampling())
    recipe = load_recipe(folder / "train.yaml", [f"model={folder / 'model.yaml'}"])
    found = estimate(recipe.model_copy(update={"stages": stages, "compile": compiled, "residual": "float32"}), gpus=1)
    assert [stage.total / 1e9 for stage in found] == pytest.approx([layerwise, stochastic], rel=0.15)


def test_compiled_steps_keep_less(tmp_path: Path) -> None:
    """Of several products made at once, each piece is a view of the whole."""
    more = {"sequence_length": 1024, "loss_chunk": 64}
    recipe = recipe_of(spec_of(layers=8), tmp_path, STAGES["stochastic"], **more)
    plain, compiled = (
        estimate(recipe.model_copy(update={"compile": how}), gpus=1)[0].parts["activations"] for how in (False, True)
    )
    assert 0.5 * plain < compiled < 0.95 * plain


@pytest.mark.slow
@pytest.mark.parametrize(
    ("length", "name", "took"),
    [(32768, "layerwise", 4.21), (32768, "stochastic", 19.78), (32768, "recompute", 3.94), (131072, "layerwise", 9.10)],
)
def test_long_sequences_on_an_h200(length: int, name: str, took: float) -> None:
    """GB, by `benchmarks/memory.py` with torch 2.11."""
    more = {"sequence_length": length, "batch_size": 1, "device": "cuda", "compile": True, "cuda_graphs": False}
    model = str(RECIPES / "smollm2-135m" / "model.yaml")
    recipe = Recipe(model=model, output="-", stages=(STAGES[name],), **more)
    assert estimate(recipe)[0].total / 1e9 == pytest.approx(took, rel=0.15)


@pytest.mark.parametrize(
    ("length", "name", "took"),
    [
        (1024, "stochastic", 1.374),
        (32768, "layerwise", 1.974),
        (32768, "stochastic", 3.031),
        (32768, "recompute", 1.835),
    ],
)
@pytest.mark.slow
def test_what_an_h200_took_compiled(length: int, name: str, took: float, tmp_path: Path) -> None:
    """GB, as in `test_an_estimate_is_near_what_a_gpu_takes`, with torch 2.11."""
    recipe = large_recipe(name, length, tmp_path, compile=True)
    assert estimate(recipe, gpus=1)[0].total / 1e9 == pytest.approx(took, rel=0.15)


def test_recomputing_and_smaller_parts_take_less(tmp_path: Path) -> None:
    more = {"sequence_length": 1024, "batch_size": 2, "loss_chunk": 128, "compile": False}
    recipe = recipe_of(spec_of(layers=8), tmp_path, STAGES["stochastic"], **more)
    whole = estimate(recipe, 1)
    again = estimate(recipe.model_copy(update={"stages": (STAGES["recompute"],)}), 1)[0]
    assert again.total < 0.6 * whole[0].total
    (said,) = advice(recipe, whole, again.total, 1)
    assert "stages.0.recompute=true" in said
    (said,) = advice(recipe, whole, again.total - 1, 1)
    assert "stages.0.recompute=true stages.0.gradient_accumulation=2" in said
    (said,) = advice(recipe, whole, 1000, 1)
    assert "shorter sequences" in said
    assert not advice(recipe, whole, whole[0].total, 1)
    assert next(_smaller(recipe_of(spec_of(2), tmp_path, STAGES["sft"]), 0, 1))[1] == "stages.0.recompute=true"


def test_what_is_shared_between_gpus() -> None:
    parts = {"parameters": 800, "gradients": 80, "optimiser": 1600, "activations": 100, "logits": 7}
    units = Units(root=40, largest=20)
    assert shared_out(parts, units, 60, Ranks(shards=8)) == {
        "parameters": 100 + 80, "gradients": 10 + 20, "optimiser": 200, "activations": 100, "logits": 7,
    }  # fmt: skip
    assert shared_out(parts, units, 60, Ranks(shards=2, tensor=4)) == {
        "parameters": 100 + 20, "gradients": 10 + 5, "optimiser": 200, "activations": 60 + 10, "logits": 7,
    }  # fmt: skip
    assert shared_out(parts, units, 60, Ranks(tensor=4))["parameters"] == 200


def test_sequences_must_divide_among_gpus(tmp_path: Path) -> None:
    recipe = recipe_of(spec_of(2), tmp_path, STAGES["recompute"])
    with pytest.raises(ValueError, match="2 sequences a step cannot be split"):
        estimate(recipe, gpus=3)
    with pytest.raises(ValueError, match=r"model: there is no config of '/nowhere': make the model first"):
        estimate(recipe.model_copy(update={"model": "/nowhere"}))


def test_a_teacher_of_another_depth(tmp_path: Path) -> None:
    """Whole: only layer by layer has it to be as deep as the model."""
    recipe = recipe_of(spec_of(2), tmp_path, STAGES["stochastic"])
    totals = {}
    for depth in (1, 2, 5):
        path = tmp_path / f"{depth}.yaml"
        path.write_text(yaml.safe_dump(spec_of(depth).model_dump(mode="json")))
        found = estimate(recipe.model_copy(update={"teacher": str(path)}))
        totals[depth] = found[0].parts["parameters"]
        if depth != 2:
            layerwise = recipe.model_copy(update={"teacher": str(path), "stages": (STAGES["layerwise"],)})
            with pytest.raises(ValueError, match=f"layer by layer, a teacher of {depth} layers"):
                estimate(layerwise)
    assert totals[1] < totals[2] < totals[5]
    with pytest.raises(ValueError, match=r"teacher: there is no config of '/nowhere': name a model's folder"):
        estimate(recipe.model_copy(update={"teacher": "/nowhere"}))


@pytest.mark.parametrize(
    ("name", "gpus", "gigabytes", "memory"),
    [
        pytest.param("laptop", None, 6, "smollm2-135m", marks=pytest.mark.slow),
        pytest.param("smollm2-135m", 1, 24, None, marks=pytest.mark.slow),
        ("1.5b", 1, 80, None),
        ("8b", 8, 80, None),
    ],
)
def test_shipped_recipes_fit(name: str, gpus: int | None, gigabytes: int, memory: str | None) -> None:
    model = RECIPES / (memory or name) / "model.yaml"
    recipe = load_recipe(RECIPES / name / "train.yaml", [f"model={model}", "compile=false"])
    for stage in estimate(recipe, gpus):
        assert 0.02 * gigabytes < stage.total / 1e9 < gigabytes


def test_long_sequences_on_one_gpu(tmp_path: Path) -> None:
    """A window's tokens and the chunks of recurrences: nothing grows with the square of a sequence."""
    more = {"batch_size": 1, "compile": False, "loss_chunk": 2**15}
    short, long = (
        estimate(recipe_of(spec_of(2), tmp_path, STAGES["recompute"], sequence_length=length, **more), gpus=1)
        for length in (2**15, 2**17)
    )
    assert long[0].total < 4.1 * short[0].total


def test_the_command_prints_a_table_and_starts_nothing(tmp_path: Path) -> None:
    stage = LayerwiseStage(steps=2, calibration="none", stream="student", sampling=named({"fast": 1}))
    recipe = recipe_of(spec_of(2), tmp_path, stage, batch_size=1)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    shown = CliRunner().invoke(app, ["train", str(path), "--estimate", "--memory", "0.0001"])
    assert shown.exit_code == 1, shown.output
    assert shown.stderr == ""
    assert "layerwise" in shown.output
    assert "optimiser" in shown.output
    assert "the model has no preset fast" in shown.output
    assert "the device has" in shown.output
    assert not (tmp_path / "run").exists()
    shown = CliRunner().invoke(app, ["train", str(path), "--estimate", "--memory", "10"])
    assert shown.exit_code == 0, shown.output
    assert "the device has" not in shown.output
    assert CliRunner().invoke(app, ["train", str(path), "--estimate", "--memory", "0"]).exit_code == 2
    others = CliRunner().invoke(app, ["train", str(path), "--estimate"], env={"RANK": "1"})
    assert (others.exit_code, others.output) == (0, "")
    narrow = CliRunner().invoke(app, ["train", str(path), "--estimate"], env={"COLUMNS": "40"})
    assert "0 layerwise" in narrow.stdout
    assert "activations" in narrow.stdout


def test_on_a_terminal_the_command_shows_that_it_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.StringIO()
    monkeypatch.setattr("gearshift.cli.err", Console(file=shown, force_terminal=True))
    monkeypatch.setattr(train.estimate, "estimate", lambda recipe, gpus: [])
    monkeypatch.setattr(train.estimate, "remarks", lambda recipe, stages: [])
    path = tmp_path / "recipe.yaml"
    path.write_text("{model: nowhere, output: run, stages: [{type: stochastic, steps: 1}]}")
    assert CliRunner().invoke(app, ["train", str(path), "--estimate"]).exit_code == 0
    assert "estimating" in shown.getvalue()


def test_only_an_estimate_takes_gpus(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{model: nowhere, output: run, stages: [{type: stochastic, steps: 1}]}")
    shown = CliRunner().invoke(app, ["train", str(path), "--gpus", "2"])
    assert shown.exit_code == 2


def test_a_kernel_without_a_footprint_is_refused() -> None:
    assert stand_in("some.package:kernel") is None
    with standing_in(lambda operations: None), pytest.raises(ValueError, match="nothing declares its footprint"):
        stand_in("some.package:kernel")


def test_a_stand_in_takes_what_it_declares() -> None:
    tracker = Tracker()
    with tracker, standing_in(tracker.count):
        x = torch.empty(100, dtype=torch.uint8).float().requires_grad_()
        output = run_stand_in(
            lambda x: Footprint((torch.empty_like(x),), (x,), kept=1000, forward=5000, backward=9000, flops=3), x
        )
        assert tracker.total == 800 + 1000
        assert tracker.peak == 800 + 1000 + 5000
        output.sum().backward()
    assert tracker.peak >= 800 + 1000 + 9000
    assert tracker.operations == 9


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["layerwise", "stochastic", "recompute"])
@pytest.mark.parametrize("length", [1024, 32768])
def test_an_estimate_is_near_what_a_gpu_takes(name: str, compiled: bool, length: int, tmp_path: Path) -> None:
    recipe = large_recipe(name, length, tmp_path, compile=compiled)
    spec = read_spec(recipe.model)
    model = GearshiftForCausalLM(GearshiftConfig(spec)).cuda()
    sequences = TokenSequences(torch.randint(spec.vocab_size, (4, length)))
    runner = Distiller(model, sequences, recipe)
    first = next(records := runner.run())  # compiles and tunes kernels, which takes memory of its own
    torch.cuda.reset_peak_memory_stats()
    assert [first, *records]
    assert estimate(recipe)[0].total == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


@pytest.mark.parametrize(("size", "said"), [(0, "0.00"), (8_700_000, "0.009"), (4_630_000_000, "4.63")])
def test_small_sizes_are_not_rounded_to_nothing(size: int, said: str) -> None:
    assert gigabytes(size) == said
