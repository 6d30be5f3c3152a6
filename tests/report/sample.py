"""A report as a real run gives it, at any size, drawn from a seed: for tests, and for looking at the page."""

import math
import random
import sys
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

from gearshift.report import (
    Candidate,
    CostSpan,
    DominatedMixer,
    Environment,
    ExportCheck,
    Generation,
    LayerErrors,
    MixerInfo,
    ModelInfo,
    Preset,
    PureQuality,
    Quality,
    Report,
    Search,
    Stage,
    Step,
    TrainingRecord,
    write,
)
from gearshift.spec.placement import Placement

MIXERS = {
    "attention": "softmax attention over the whole context, as pretrained",
    "window": "softmax attention over the last 128 tokens",
    "gdn": "Gated DeltaNet: a recurrent state under the gated delta rule",
    "kda": "Kimi Delta Attention: the delta rule with a gate for each channel",
}
BYTES = {"attention": 8.05e6, "window": 1.92e6, "gdn": 2.75e6, "kda": 2.93e6}
STATE = {"attention": 6_291_456, "window": 98_304, "gdn": 165_888, "kda": 171_000}
HARM = {"attention": 0.0, "window": 1.25, "gdn": 0.8, "kda": 0.95}
SHARED = 212e6
DOMINATED = "In every layer gdn costs less and diverges less than kda."
PROMPT = "Explain in two sentences why a <b>bicycle</b> stays upright & what a gear does."
TEXTS = {
    "quality": "A bicycle stays upright because the rider steers into each small fall, which brings the wheels back "
    "under the weight. A gear changes how far the wheel turns for one turn of the pedals.",
    "balanced": "A bicycle stays upright because of the balance of the rider and the wheels turning. A gear is a wheel "
    "with teeth that turns another wheel, and it makes the pedals easier to turn.",
    "fast": "The bicycle is a bicycle that is a bicycle with a <script>alert('&')</script> wheel.\n\n"
    "    def gear(x):\n        return x < 2 and x > 1\n\nThe gear is the gear of the gear.",
}


def sample(layers: int = 30, layerwise_steps: int = 30, stochastic_steps: int = 20, seed: int = 0) -> Report:
    """A whole report."""
    search = sample_search(layers, seed)
    balanced = next(preset for preset in search.presets if preset.name == "balanced")
    return Report(
        title="SmolLM2-135M-Instruct in four gears",
        model=ModelInfo(
            name="SmolLM2-135M-Instruct",
            format="llama",
            parameters_total=227_431_296,
            parameters_active=134_515_008,
            layers=layers,
            dtype="bfloat16",
        ),
        mixers=tuple(MixerInfo(name=name, description=text) for name, text in MIXERS.items()),
        main="attention",
        environment=Environment(
            versions={"gearshift": "0.1.0", "python": "3.11.2", "torch": "2.11.0", "transformers": "5.17.0"},
            device="cpu (2 cores)",
            threads=2,
        ),
        steps=_steps(),
        quality=_quality(),
        training=(_layerwise(layerwise_steps, seed), _stochastic(stochastic_steps, seed)),
        layer_errors=_errors(layers, seed),
        search=search,
        export=ExportCheck(
            placement=balanced.placement, path="runs/quickstart/balanced", max_abs_difference=0.0, exact=True
        ),
        generations=tuple(_generation(preset) for preset in search.presets),
        settings=_settings(),
    )


def minimal(layers: int = 2) -> Report:
    """The least that a report may say."""
    model = ModelInfo(
        name="tiny", format="llama", parameters_total=10, parameters_active=5, layers=layers, dtype="float32"
    )
    return Report(
        title="Tiny", model=model, mixers=(MixerInfo(name="attention", description="all of it"),), main="attention"
    )


def sample_search(layers: int, seed: int) -> Search:
    """Candidates of a made-up, nearly additive landscape, with their true front."""
    draw = random.Random(seed)
    weight = [0.004 + 0.03 * draw.random() ** 3 + 0.02 * math.exp(-layer) for layer in range(layers)]
    order = sorted(range(layers), key=lambda layer: weight[layer])
    main = Placement(["attention"] * layers)

    def judge(placement: Placement, kind: str) -> Candidate:
        predicted = sum(weight[layer] * HARM[mixer] for layer, mixer in enumerate(placement))
        changed = layers - placement.counts().get("attention", 0)
        divergence = predicted * (1 + 1.8 * (changed / layers) ** 2) * (1 + 0.05 * draw.random())
        told = predicted if kind in ("verified", "preset") else None
        return Candidate(placement=placement, kind=kind, cost=_cost(placement), divergence=divergence, predicted=told)

    found = [judge(Placement([mixer] * layers), "pure") for mixer in MIXERS]
    others = [mixer for mixer in MIXERS if mixer != "attention"]
    found += [judge(main.replace(layer, mixer), "single change") for layer in range(layers) for mixer in others]
    for kept in range(0, layers, max(1, layers // 9)):
        for cheap in ("gdn", "window"):
            found.append(judge(_changed(main, order[: layers - kept], (cheap, "gdn", cheap)), "verified"))
    span = CostSpan(cheapest=_cost(Placement(["window"] * layers)), main=_cost(main))
    presets = []
    for name, share in (("quality", 0.75), ("balanced", 0.5), ("fast", 0.25)):
        budget = span.cheapest + share * (span.main - span.cheapest)
        keep = int((budget - SHARED - BYTES["gdn"] * layers) / (BYTES["attention"] - BYTES["gdn"]))
        placement = _changed(main, order[: layers - max(0, keep)], ("window", *["gdn"] * (layers // 4)))
        found.append(judge(placement, "preset"))
        presets.append(_preset(name, share, budget, placement, found[-1]))
    return Search(
        cost_unit="bytes a token at 8192 tokens of context",
        context=8192,
        span=span,
        candidates=tuple(found),
        front=tuple(one for one in found if not any(_beats(other, one) for other in found)),
        presets=tuple(presets),
        dominated=(DominatedMixer(mixer="kda", in_no_preset=True, reason=DOMINATED),),
        main_state_bytes=STATE["attention"] * layers,
        layer_evaluations=1984,
        layer_evaluations_saved=1436,
    )


def _cost(placement: Placement) -> float:
    return SHARED + sum(BYTES[mixer] for mixer in placement)


def _changed(placement: Placement, order: Sequence[int], mixers: Sequence[str]) -> Placement:
    """The placement with the given mixers, in turn, in some layers."""
    for layer, mixer in zip(order, cycle(mixers), strict=False):
        placement = placement.replace(layer, mixer)
    return placement


def _preset(name: str, share: float, budget: float, placement: Placement, judged: Candidate) -> Preset:
    return Preset(
        name=name,
        placement=placement,
        counts=placement.counts(),
        budget_share=share,
        budget_cost=budget,
        cost=judged.cost,
        divergence=judged.divergence,
        state_bytes=sum(STATE[mixer] for mixer in placement),
    )


def _beats(one: Candidate, other: Candidate) -> bool:
    mine, theirs = (one.cost, one.divergence), (other.cost, other.divergence)
    return mine != theirs and mine[0] <= theirs[0] and mine[1] <= theirs[1]


def _quality() -> Quality:
    before = {"attention": (0.0, 14.62), "window": (0.412, 21.3), "gdn": (6.871, 14_203.0), "kda": (6.534, 10_934.0)}
    after = {"attention": (0.0, 14.62), "window": (0.287, 19.1), "gdn": (2.318, 147.2), "kda": (2.461, 169.8)}
    tables = [
        tuple(PureQuality(mixer=name, divergence=kl, perplexity=ppl) for name, (kl, ppl) in table.items())
        for table in (before, after)
    ]
    return Quality(tokens=16_384, sequence_length=1024, teacher_perplexity=14.62, before=tables[0], after=tables[1])


def _layerwise(steps: int, seed: int) -> Stage:
    draw = random.Random(seed + 1)
    records = []
    for step in range(steps):
        fall = math.exp(-step / 9)
        losses = {
            "window": 0.08 + 0.05 * fall + 0.004 * draw.random(),
            "gdn": 0.31 + 0.62 * fall + 0.02 * draw.random(),
            "kda": 0.33 + 0.58 * fall + 0.02 * draw.random(),
        }
        records.append(
            TrainingRecord(
                step=step + 1,
                loss=sum(losses.values()),
                mixer_losses=losses,
                learning_rate=3e-3 * min(1, (step + 1) / 5),
                tokens=2048,
                seconds=3.4 + draw.random(),
            )
        )
    return Stage(name="layerwise", records=tuple(records))


def _stochastic(steps: int, seed: int) -> Stage:
    draw = random.Random(seed + 2)
    records = []
    for step in range(steps):
        kl = 0.9 * math.exp(-step / 14) * (0.6 + 0.8 * draw.random())
        terms = {"forward_kl": kl, "cross_entropy": 2.7 + kl * 0.8}
        records.append(
            TrainingRecord(
                step=step + 1,
                loss=kl + 0.1 * terms["cross_entropy"],
                loss_terms=terms,
                learning_rate=5e-4,
                tokens=2048,
                seconds=6.2 + draw.random(),
            )
        )
    return Stage(name="stochastic", records=tuple(records))


def _errors(layers: int, seed: int) -> LayerErrors:
    draw = random.Random(seed + 3)
    before, after = {}, {}
    for mixer, start, end in (("window", 0.12, 0.07), ("gdn", 0.95, 0.32), ("kda", 0.93, 0.36)):
        before[mixer] = tuple(start * (0.7 + 0.5 * draw.random()) for _ in range(layers))
        after[mixer] = tuple(end * (0.3 + 1.5 * draw.random() ** 2) for _ in range(layers))
    return LayerErrors(before=before, after=after)


def _generation(preset: Preset) -> Generation:
    speed = {"quality": 11.3, "balanced": 13.9, "fast": 16.2}[preset.name]
    return Generation(
        preset=preset.name,
        placement=preset.placement,
        prompt=PROMPT,
        text=TEXTS[preset.name],
        tokens=48,
        tokens_per_second=speed,
        state_bytes=(preset.state_bytes or 0) // 40,
    )


def _steps() -> tuple[Step, ...]:
    told = {
        "convert": (8.31, "227 M parameters, 4 mixers in each of 30 layers"),
        "measure": (41.2, "gdn 6.87, kda 6.53, window 0.412 nats from the teacher"),
        "distil layerwise": (131.7, "mean error gdn 0.95 → 0.32, kda 0.93 → 0.36, window 0.12 → 0.07"),
        "distil stochastic": (139.4, "forward KL 0.91 → 0.24"),
        "measure again": (40.8, "gdn 2.32, kda 2.46, window 0.287 nats from the teacher"),
        "search": (204.5, "117 placements, three presets"),
        "export": (14.02, "balanced: logits equal, bit for bit"),
        "generate": (11.9, "16.2 tokens/s with fast, 11.3 with quality"),
    }
    return tuple(Step(name=name, seconds=seconds, result=result) for name, (seconds, result) in told.items())


def _settings() -> dict[str, object]:
    return {
        "arguments": {"model": "SmolLM2-135M-Instruct", "out": Path("runs/quickstart"), "text": None, "threads": 2},
        "surgery": {
            "steps": [
                {"wrap": {"block": "*", "main": "attention"}},
                {"add": {"mixer": "window", "type": "attention", "window": 128, "init": "transfer"}},
                {"add": {"mixer": "gdn", "type": "gated_delta_net", "init": "transfer"}},
            ]
        },
        "training": {
            "layerwise": {"steps": 30, "optimizer": {"name": "adamw", "lr": 0.003, "betas": [0.9, 0.95]}},
            "stochastic": {"steps": 20, "sampling": {"strategy": "allocation"}, "losses": {"forward_kl": 1.0}},
        },
        "search": {"budgets": [0.75, 0.5, 0.25], "context": 8192, "sequence_length": 1024},
        "seeds": {"data": 0, "training": 0, "initialisers": 0},
    }


if __name__ == "__main__":
    print(write(sample(), Path(sys.argv[1])))
