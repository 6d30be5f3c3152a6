"""A run's record, read back: while the run goes on, and after it broke off. Needs no torch."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearshift.spec.placement import Placement

TREND = 0.1
"""The weight of the newest loss in the running mean that a step's loss is compared with: a memory of about 10 steps."""


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records in a `metrics.jsonl`, in order. A line that an interruption cut short is left out."""
    with Path(path).open(encoding="utf-8", errors="replace") as lines:
        return [record for record in map(parse_record, lines) if record is not None]


def parse_record(line: str) -> dict[str, Any] | None:
    """The record in a line; None if the line is not whole."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if line.endswith("\n") and isinstance(record, dict) else None


@dataclass
class Cell:
    """One mixer in one layer, over the steps of a stage that sampled it."""

    times: int = 0
    """Steps that sampled it."""
    judged: int = 0
    """Those of them that had a loss."""
    loss: float = 0.0
    """Sum of their losses."""
    excess: float = 0.0
    """Sum of their losses less the running mean of the steps before them, which leaves out what time has changed."""


class Tally:
    """How often the steps of a stage sampled each mixer in each layer, and what they lost when they did.

    A step's loss counts for every (layer, mixer) of its placement. It is a function of the placements and losses in
    order, and so of the record: a resumed run's is that of an unbroken one.
    """

    def __init__(self, records: Iterable[dict[str, Any]] = ()):
        """Count in the steps among the records of one stage."""
        self.cells: dict[str, list[Cell]] = {}
        """Mixer -> its cell in each layer, in order of first use."""
        self._all = Cell()
        self._trend: float | None = None
        for record in records:
            if record["event"] == "step" and record.get("placement"):
                self.add(Placement.parse(record["placement"]), record["loss"])

    def add(self, placement: Placement, loss: float | None) -> None:
        """Count in a step. `loss` is None where nothing that ran could learn.

        ValueError if the placement is not of as many layers as those before it.
        """
        layers = len(next(iter(self.cells.values()), placement))
        if len(placement) != layers:
            raise ValueError(f"a placement of {len(placement)} layers comes after placements of {layers}")
        before = loss if self._trend is None else self._trend
        if loss is not None and before is not None:
            self._trend = before + TREND * (loss - before)
        cells = [self.cells.setdefault(mixer, [Cell() for _ in placement])[at] for at, mixer in enumerate(placement)]
        for cell in (self._all, *cells):
            cell.times += 1
            if loss is not None and before is not None:
                cell.judged += 1
                cell.loss += loss
                cell.excess += loss - before

    def times(self) -> dict[str, list[int]]:
        """Mixer -> in each layer, how many steps sampled it."""
        return {mixer: [cell.times for cell in cells] for mixer, cells in self.cells.items()}

    def mean_loss(self) -> dict[str, list[float | None]]:
        """Mixer -> in each layer, the mean loss of the steps that sampled it; None if none did."""
        return self._mean("loss", 0.0)

    def mean_excess(self) -> dict[str, list[float | None]]:
        """Mixer -> in each layer, how far those losses are beyond the running mean, more than an average step's is."""
        return self._mean("excess", self._all.excess / self._all.judged if self._all.judged else 0.0)

    def _mean(self, what: str, less: float) -> dict[str, list[float | None]]:
        return {
            mixer: [getattr(cell, what) / cell.judged - less if cell.judged else None for cell in cells]
            for mixer, cells in self.cells.items()
        }
