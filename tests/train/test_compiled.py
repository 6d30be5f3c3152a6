"""Compiled steps and CUDA graphs teach what plain ones teach."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from gearshift.data import TokenSequences
from gearshift.train import (
    DistillationSettings,
    Distiller,
    LayerwiseStage,
    ParallelSettings,
    SftStage,
    StepRecord,
    StochasticStage,
    distil,
    losses,
)
from gearshift.train.engine import WIDE, make_engine
from gearshift.train.parallel import ALONE, Parallel, parallelise, process_group
from tests.models import MIXERS, supernet, tokens
from tests.train.processes import run_processes

STAGES = {
    "layerwise": LayerwiseStage(steps=6, calibration="none"),
    "layerwise, students": LayerwiseStage(steps=6, calibration="none", stream="student"),
    "stochastic": StochasticStage(steps=6),
    "stochastic, all losses": StochasticStage(
        steps=3, losses={"forward_kl": 1.0, "reverse_kl": 0.2, "cross_entropy": 0.5, "activation": 0.1}
    ),
    "sft": SftStage(steps=4),
}
LATENT = {
    "type": "multi_head_latent_attention",
    "heads": 4,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
STATE_SPACES = {
    "mamba": {"type": "mamba", "projection": "grouped", "inner_size": 32, "xb_size": 16},
    "mamba2": {"type": "mamba2", "state_size": 8, "heads": 4, "head_dim": 8},
    "discrete": {"type": "discrete_mamba2", "value_heads": 4, "key_heads": 2},
}


def learnt(stage: str, device: str = "cpu", **settings: Any) -> tuple[dict[str, torch.Tensor], list[float]]:
    """What the mixers' parameters moved by, and the losses on the way."""
    model = supernet(layers=2, mixers={**MIXERS, "latent": LATENT, **(STATE_SPACES if device == "cpu" else {})})
    model.to(device)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    losses: list[float] = []
    counted = torch.rand(8, 20, generator=torch.Generator().manual_seed(0)) < 0.6
    distil(
        model,
        TokenSequences(tokens(8, 20)),
        DistillationSettings(stages=(STAGES[stage],), batch_size=4, gradient_accumulation=2, loss_chunk=8, **settings),
        lambda record: losses.append(record.loss) if record.event == "step" and record.loss is not None else None,
        chats=TokenSequences(tokens(8, 20), None, counted),
    )
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}, losses


@pytest.mark.parametrize("stage", list(STAGES))
def test_every_mixer_compiles_as_a_whole(monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    compiled: Callable[..., Any] = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compiled)
    torch.compiler.reset()
    moved, losses = learnt(stage, compile=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    expected, plain = learnt(stage, compile=False)
    assert losses == pytest.approx(plain, rel=1e-5)
    assert graphs >= 4
    for name, change in expected.items():
        assert torch.allclose(moved[name], change, atol=1e-5), name


def test_compiled_processes_learn_what_a_plain_one_does() -> None:
    run_processes(2, _check_compiled, curve(compile=False))


def _check_compiled(expected: list[float]) -> None:
    torch.compile = partial(torch.compile, backend="aot_eager", fullgraph=True)
    graphs = []
    with process_group():
        for settings in (ParallelSettings(data="fsdp"), ParallelSettings(data="ddp")):
            assert curve(parallelise(settings, torch.device("cpu")), compile=True) == pytest.approx(expected, rel=1e-5)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        # Compiled once: all layers of a kind share it. FSDP makes other classes of the units, which are compiled anew.
        assert 4 <= graphs[1] - graphs[0] <= graphs[0]


def curve(parallel: Parallel = ALONE, **settings: Any) -> list[float]:
    """The losses of a few steps of both stages, the second one with recomputation."""
    model = supernet(layers=2, mixers={name: MIXERS[name] for name in ("attention", "window", "gdn")})
    parallel.place(model, torch.device("cpu"), half=False)
    stages = LayerwiseStage(steps=2), StochasticStage(steps=2, recompute=True)
    made = DistillationSettings(stages=stages, batch_size=4, seed=1, **settings)
    distiller = Distiller(model, TokenSequences(tokens(8, 12)), made, parallel=parallel)
    return [record.loss for record in distiller.run() if isinstance(record, StepRecord)]


def test_slices_of_tensors_are_not_compiled() -> None:
    run_processes(2, _check_slices)


def _check_slices() -> None:
    with process_group():
        sliced = parallelise(ParallelSettings(tensor=2), torch.device("cpu"))
        with pytest.raises(ValueError, match="compile: true cannot compile slices of tensors"):
            curve(sliced, compile=True)
        with pytest.raises(ValueError, match="cuda_graphs: true cannot record shards or slices of a model"):
            curve(sliced, cuda_graphs=True)


def test_graphs_need_cuda() -> None:
    with pytest.raises(ValueError, match="cuda_graphs: true needs a CUDA device, not cpu"):
        learnt("layerwise", cuda_graphs=True)


@pytest.mark.parametrize(("hidden_size", "graphs"), [(64, True), (WIDE, False)])
def test_graphs_of_a_student_are_for_narrow_models(hidden_size: int, graphs: bool) -> None:
    model = supernet(layers=1, hidden_size=hidden_size)
    settings = DistillationSettings(stages=(STAGES["layerwise"],), autocast="none", attn_implementation="sdpa")
    engine = make_engine(settings, {model}, torch.device("cuda"), ALONE)
    assert engine.steps.compiled
    assert engine.graphs
    assert engine.layer_graphs == graphs
    asked = settings.model_copy(update={"cuda_graphs": True})
    assert make_engine(asked, {model}, torch.device("cuda"), ALONE).layer_graphs


@pytest.mark.gpu
@pytest.mark.parametrize("stage", list(STAGES))
@pytest.mark.parametrize(("compiled", "graphs"), [(True, False), (False, True), (True, True)])
def test_on_cuda(stage: str, compiled: bool, graphs: bool) -> None:
    """In float32: equal but for the order of sums. The heads are too narrow for flex attention."""
    settings = {"autocast": "none", "attn_implementation": "sdpa"}
    _, losses = learnt(stage, "cuda", compile=compiled, cuda_graphs=graphs, **settings)
    _, plain = learnt(stage, "cuda", compile=False, cuda_graphs=False, **settings)
    assert losses == pytest.approx(plain, rel=1e-3)


def test_the_attention_function_is_put_back() -> None:
    model = supernet(layers=1)
    seen: list[str] = []
    settings = DistillationSettings(stages=(STAGES["layerwise"],), batch_size=4, attn_implementation="eager")
    data = TokenSequences(tokens(8, 20))
    distil(model, data, settings, lambda record: seen.append(model.config._attn_implementation))
    assert set(seen) == {"eager"}
    assert model.config._attn_implementation == "sdpa"


def test_another_number_of_counted_tokens_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    losses._compiled_chunk_terms.cache_clear()
    torch.compiler.reset()
    weights = {"forward_kl": 0.5, "reverse_kl": 0.2, "cross_entropy": 1.0}
    graphs = []
    for positions in (17, 19, 31, 5, 0):
        hidden = torch.randn(2, 1, positions, 6)
        given = hidden[0].requires_grad_(), hidden[1], torch.ones(1, positions).long(), *torch.randn(2, 11, 6)
        loss, _ = losses.head_losses(*given, weights, chunk=8, compiled=True, ragged=True)
        plain, _ = losses.head_losses(*given, weights, chunk=8, ragged=not positions)
        loss.backward()
        assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    losses._compiled_chunk_terms.cache_clear()
    assert len(set(graphs)) == 1
