"""Sequences cut from tokenised sources on disk, mixed by weights, read as they are drawn."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from gearshift.data.batch import Batch
from gearshift.data.order import interleaved, shares, shuffled
from gearshift.data.python_text import python_documents
from gearshift.data.readers import Dataset, Documents, Files, Reader
from gearshift.data.sequences import TokenSequences, spread, too_few
from gearshift.data.tokens import TokenFile, tokenised
from gearshift.spec import Spec

Boundaries = Literal["joined", "packed"]
"""`joined`: a sequence is one text, whatever documents it holds. `packed`: documents in it do not see each other."""


class DataSource(Spec):
    """One source of text."""

    path: str | None = None
    """A file, or a folder that is searched: `.jsonl`, `.ndjson`, `.parquet`, or plain UTF-8 text, a document a file."""
    dataset: str | None = None
    """The name of a dataset on the Hugging Face hub, in place of a path."""
    config: str | None = None
    """The dataset's configuration, if it has several."""
    split: str | None = None
    """The dataset's split; `train` if left out."""
    field: str = "text"
    """The key or column that holds the text of a row."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The source's share of the tokens, beside the other sources' weights."""

    @model_validator(mode="after")
    def _check(self) -> "DataSource":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give each source either a path or a dataset")
        if self.path is not None and (self.config or self.split):
            raise ValueError("config and split belong to a dataset, not to a path")
        return self

    def reader(self) -> Reader:
        """Opens the source. ValueError if it is not there."""
        if self.dataset is not None:
            return Dataset(self.dataset, self.config, self.split or "train", self.field)
        assert self.path is not None
        return Files(self.path, self.field)


@dataclass(frozen=True)
class Cut:
    """The tokens of a source as sequences of one length. What is left over at the end is dropped."""

    file: TokenFile
    length: int
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Sequences that do not count, [held out], int64, rising."""

    def __len__(self) -> int:
        return len(self.file.tokens) // self.length - len(self.held_out)

    @cached_property
    def _gaps(self) -> np.ndarray:
        """For each held-out sequence, how many sequences that count lie before it."""
        return self.held_out - np.arange(len(self.held_out))

    def place(self, number: int) -> int:
        """Which sequence of the source is number `number` of those that count."""
        return number + int(np.searchsorted(self._gaps, number, side="right"))

    def without(self, places: Sequence[int]) -> "Cut":
        """The same with these sequences of the source held out too."""
        return replace(self, held_out=np.union1d(self.held_out, np.array(places, np.int64)))

    def read(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """A sequence of the source: its tokens [length], and where documents begin in it [length], bool."""
        first = place * self.length
        starts = np.zeros(self.length, bool)
        low, high = np.searchsorted(self.file.starts, (first, first + self.length))
        starts[self.file.starts[low:high] - first] = True
        return self.file.tokens[first : first + self.length], starts


class Corpus:
    """An endless row of sequences from several sources, each a function of its number and a seed."""

    def __init__(self, cuts: Sequence[Cut], shares: Sequence[Fraction], boundaries: Boundaries):
        self.cuts = cuts
        self.shares = shares
        self.boundaries: Boundaries = boundaries

    @property
    def length(self) -> int:
        """Tokens a sequence."""
        return self.cuts[0].length

    def __len__(self) -> int:
        """How many sequences there are, in all sources."""
        return sum(map(len, self.cuts))

    def draw(self, numbers: Iterable[int], seed: int = 0) -> Batch:
        """See `Sequences`. Sources take turns by their shares; each begins its own epochs."""
        chosen = []
        for number in numbers:
            source, index = interleaved(number, self.shares)
            cut = self.cuts[source]
            epoch, position = divmod(index, len(cut))
            chosen.append((source, cut.place(shuffled(position, len(cut), seed, source, epoch))))
        return self._read(chosen)

    def split(self, held_out: int) -> tuple["Corpus", TokenSequences]:
        """(the rest, `held_out` sequences: each source's share, spread evenly over it). ValueError if none is left."""
        if held_out < 1:
            raise ValueError(f"at least one sequence can be held out, not {held_out}")
        wanted = np.bincount(
            [interleaved(number, self.shares)[0] for number in range(held_out)], minlength=len(self.cuts)
        )
        for cut, count in zip(self.cuts, wanted, strict=True):
            if not count < len(cut):
                raise ValueError(too_few(len(cut), self.length, count, _where(cut, self.cuts)))
        places = [
            [cut.place(int(number)) for number in spread(count, len(cut))]
            for cut, count in zip(self.cuts, wanted, strict=True)
        ]
        rest = [cut.without(chosen) for cut, chosen in zip(self.cuts, places, strict=True)]
        batch = self._read([(source, place) for source, chosen in enumerate(places) for place in chosen])
        return Corpus(rest, self.shares, self.boundaries), TokenSequences(batch.tokens, batch.starts)

    def digest(self) -> str:
        """Changes if any token does, or what is drawn from where."""
        sources = [[cut.file.facts["digest"], str(share)] for cut, share in zip(self.cuts, self.shares, strict=True)]
        return hashlib.blake2b(json.dumps([self.length, sources]).encode(), digest_size=16).hexdigest()

    def _read(self, chosen: Sequence[tuple[int, int]]) -> Batch:
        """The sequences (source, place), in this order."""
        tokens, starts = zip(*(self.cuts[source].read(place) for source, place in chosen), strict=True)
        packed = torch.from_numpy(np.stack(starts)) if self.boundaries == "packed" else None
        return Batch(torch.from_numpy(np.stack(tokens).astype(np.int64)), packed)


def open_corpus(
    sources: Sequence[DataSource],
    tokenizer: Any,
    length: int,
    boundaries: Boundaries = "joined",
    cache: str | Path | None = None,
) -> Corpus:
    """The text of `sources`, tokenised (once: see `tokenised`) and cut into sequences of `length` tokens.

    Without a source, the English text that every Python carries. ValueError if a source cannot be read, or is too short
    for one sequence.
    """
    readers = [source.reader() for source in sources] or [Documents("the text that Python carries", python_documents())]
    cuts = [Cut(tokenised(reader, tokenizer, cache), length) for reader in readers]
    for cut in cuts:
        if not len(cut):
            text, tokens = f"the text{_where(cut, cuts)}", len(cut.file.tokens)
            raise ValueError(f"{text} is too short: {tokens} tokens do not make one sequence of {length}")
    return Corpus(cuts, shares([source.weight for source in sources] or [1.0]), boundaries)


def _where(cut: Cut, cuts: Sequence[Cut]) -> str:
    """Which source is meant, where there are several."""
    return f" in {cut.file.name}" if len(cuts) > 1 else ""
