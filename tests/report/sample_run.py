"""A training run's folder as a run leaves it, drawn from a seed: for tests, and for looking at the page."""

import json
import math
import random
import sys
from pathlib import Path
from typing import Any

MIXERS = {"attention": 0.0, "window": 0.12, "gdn": 0.35, "kda": 0.3}
"""Mixer -> how hard it is to make like the main one."""


def sample_run(
    folder: Path, layers: int = 30, layerwise: int = 200, stochastic: int = 200, done: int | None = None
) -> Path:
    """Write the first `done` steps of a run of two stages (all of them, and the model, if None); returns the folder."""
    draw = random.Random(0)
    steps = layerwise + stochastic
    records = [_calibration(layers, draw)]
    records += [_layerwise(number, layerwise, steps, layers, draw) for number in range(layerwise)]
    records.append(
        _end(0, "layerwise", layerwise, layerwise, {"loss": 0.19, "mixers": {"window": 0.03, "gdn": 0.21, "kda": 0.18}})
    )
    records += [_stochastic(number, layerwise, steps, layers, draw) for number in range(stochastic)]
    pure = {"attention": 0.0, "window": 0.08, "gdn": 0.42, "kda": 0.37}
    records.append(_end(1, "stochastic", stochastic, steps, {"forward_kl": pure}))
    if done is not None:
        records = [record for record in records if record["global_step"] < done]
    folder.mkdir(parents=True, exist_ok=True)
    stages = [{"type": "layerwise", "steps": layerwise}, {"type": "stochastic", "steps": stochastic}]
    recipe = {"model": "runs/135m/supernet", "seed": 3, "stages": stages, "optimiser": {"betas": [0.9, 0.95]}}
    (folder / "recipe.json").write_text(json.dumps({"recipe": recipe, "text": "0"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if done is None:
        (folder / "model").mkdir(exist_ok=True)
    return folder


def _record(event: str, stage: int, kind: str, step: int, global_step: int, **more: Any) -> dict[str, Any]:
    return {"event": event, "stage": stage, "type": kind, "step": step, "global_step": global_step, **more}


def _errors(layers: int, hardness: float, draw: random.Random) -> list[float]:
    return [hardness * (0.4 + 1.2 * layer / layers) * math.exp(draw.gauss(0, 0.15)) for layer in range(layers)]


def _calibration(layers: int, draw: random.Random) -> dict[str, Any]:
    moments = {
        moment: {name: _errors(layers, factor * hard, draw) for name, hard in MIXERS.items() if hard}
        for moment, factor in {"before": 40.0, "scaled": 3.0, "after": 1.8}.items()
    }
    return _record("calibration", 0, "layerwise", 0, 0, seconds=4.2, **moments)


def _rates(number: int, of: int, peak: float) -> float:
    return peak * min((number + 1) / (0.05 * of + 1), 0.55 + 0.45 * math.cos(math.pi * number / of))


def _layerwise(number: int, of: int, steps: int, layers: int, draw: random.Random) -> dict[str, Any]:
    ease = 1.6 * math.exp(-6 * number / of) + 0.5
    errors = {name: _errors(layers, ease * hard, draw) for name, hard in MIXERS.items() if hard}
    means = {name: sum(found) / layers for name, found in errors.items()}
    loss = sum(means.values()) / len(means)
    return _record(
        "step", 0, "layerwise", number, number, total_steps=steps, loss=loss, terms={"activation": loss},
        learning_rate=_rates(number, of, 1e-3), gradient_norm=0.8 * ease * math.exp(draw.gauss(0, 0.2)), tokens=16384,
        seconds=0.126 * math.exp(draw.gauss(0, 0.04)), placement=None, mixers=means, layers=errors,
    )  # fmt: skip


def _stochastic(number: int, before: int, steps: int, layers: int, draw: random.Random) -> dict[str, Any]:
    placement = [draw.choice(list(MIXERS)) for _ in range(layers)]
    hard = sum(MIXERS[name] for name in placement) / layers
    loss = (3 * math.exp(-5 * number / (steps - before)) + 0.8) * hard * math.exp(draw.gauss(0, 0.1))
    return _record(
        "step", 1, "stochastic", number, before + number, total_steps=steps, loss=loss, terms={"forward_kl": loss},
        learning_rate=_rates(number, steps - before, 5e-4), gradient_norm=0.5 * math.exp(draw.gauss(0, 0.3)),
        tokens=16384, seconds=0.075 * math.exp(draw.gauss(0, 0.04)), placement=",".join(placement), mixers=None,
        layers=None,
    )  # fmt: skip


def _end(stage: int, kind: str, step: int, global_step: int, held_out: dict[str, Any]) -> dict[str, Any]:
    return _record("stage_end", stage, kind, step, global_step, held_out=held_out)


if __name__ == "__main__":
    sample_run(Path(sys.argv[1]), done=int(sys.argv[2]) if len(sys.argv) > 2 else None)
