"""What a search found."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gearshift.files import write_whole
from gearshift.search.budget import Budget
from gearshift.spec import Placement

Kind = Literal["single change", "pure", "verified", "preset"]


@dataclass(frozen=True)
class Candidate:
    """A placement that was evaluated."""

    placement: Placement
    kind: Kind
    """Why: one layer changed from all-main, one mixer everywhere, proposed by the search, or chosen for a budget."""
    cost: float
    """In the result's cost unit."""
    score: float
    """The metric that was optimised."""
    predicted: float | None
    """That metric as the sum of single-layer changes; None where it is not finite."""
    numbers: Mapping[str, float]
    """All that was measured of it, by metric."""


@dataclass(frozen=True)
class Chosen:
    """The placement chosen for a budget: what a preset will be."""

    name: str
    budget: Budget
    """What it had to keep to."""
    limit: float | None
    """The budget in the result's cost unit; None for a budget of counts."""
    candidate: Candidate
    predicted_best: Placement
    """What the solver proposed first; evaluation may have preferred another."""


@dataclass(frozen=True)
class Dominated:
    """A mixer that no preset uses, or that other mixers beat in every layer."""

    mixer: str
    in_no_preset: bool
    everywhere: bool
    """Whether in every layer that offers it another mixer is no dearer and scores no worse."""
    reason: str
    """Why, in one sentence."""


@dataclass(frozen=True)
class SearchResult:
    """All that a search evaluated, and what it chose."""

    method: str
    metric: str
    higher_is_better: bool
    cost_unit: str
    """What costs count, in words."""
    span: tuple[float, float]
    """The cost of the cheapest placement and of the all-main one."""
    main: Placement
    main_score: float
    layer_scores: tuple[Mapping[str, float], ...]
    """For each layer: mixer -> the score with this one layer changed."""
    candidates: tuple[Candidate, ...]
    """Everything that was evaluated, in order."""
    front: tuple[Candidate, ...]
    """Those that no other beats in both cost and score, cheapest first."""
    predicted_front: tuple[tuple[float, float], ...]
    """(cost, predicted score) of the best placements by single-layer scores, cheapest first."""
    chosen: tuple[Chosen, ...]
    """One for each budget."""
    dominated: tuple[Dominated, ...]
    layer_evaluations: int
    """Layers run, each over all judged text."""
    layer_evaluations_saved: int
    """How many more a plain forward of each placement would have run."""

    @property
    def placements(self) -> dict[str, Placement]:
        """The chosen placements by name: presets for a checkpoint."""
        return {chosen.name: chosen.candidate.placement for chosen in self.chosen}

    def to_json_dict(self) -> dict[str, Any]:
        """Everything as JSON values: placements in run-length form, null for a number that is not finite."""
        return {
            "method": self.method,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "cost": {"unit": self.cost_unit, "cheapest": self.span[0], "main": self.span[1]},
            "main": {"placement": str(self.main), "score": _number(self.main_score)},
            "chosen": {chosen.name: _chosen(chosen) for chosen in self.chosen},
            "dominated": [vars(dominated) for dominated in self.dominated],
            "layer_scores": [{name: _number(score) for name, score in layer.items()} for layer in self.layer_scores],
            "front": [_candidate(candidate) for candidate in self.front],
            "predicted_front": [[cost, _number(score)] for cost, score in self.predicted_front],
            "candidates": [_candidate(candidate) for candidate in self.candidates],
            "placements_evaluated": len(self.candidates),
            "layer_evaluations": self.layer_evaluations,
            "layer_evaluations_saved": self.layer_evaluations_saved,
        }


def write_result(result: SearchResult, folder: str | Path, overwrite: bool = False) -> list[Path]:
    """Write `search.json`, and for each budget `NAME.json`, a placement file; returns their paths.

    ValueError if the folder exists and holds anything, unless `overwrite`; files of other names are then left alone.
    """
    folder = Path(folder)
    check_folder(folder, overwrite)
    folder.mkdir(parents=True, exist_ok=True)
    files = {chosen.name: {**_chosen(chosen), "cost_unit": result.cost_unit} for chosen in result.chosen}
    files["search"] = result.to_json_dict()
    paths = []
    for name, content in files.items():
        paths.append(folder / f"{name}.json")
        write_whole(paths[-1], json.dumps(content, indent=2, allow_nan=False) + "\n")
    return paths


def check_folder(folder: str | Path, overwrite: bool = False) -> None:
    """ValueError if results cannot go to `folder`: to be asked before a long search."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"the folder {folder} exists: choose another, or pass --overwrite")


def _chosen(chosen: Chosen) -> dict[str, Any]:
    candidate = _candidate(chosen.candidate)
    del candidate["kind"]
    return {
        **candidate,
        "counts": chosen.candidate.placement.counts(),
        "budget": str(chosen.budget),
        "limit": chosen.limit,
        "predicted_best": str(chosen.predicted_best),
    }


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "placement": str(candidate.placement),
        "kind": candidate.kind,
        "cost": candidate.cost,
        "score": _number(candidate.score),
        "predicted": candidate.predicted,
        "numbers": {name: _number(value) for name, value in candidate.numbers.items()},
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
