"""Sequences cut from tokenised sources on disk, mixed by weights, read as they are drawn."""

import hashlib
import json
import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from gearshift.data.batch import Batch
from gearshift.data.chats import ChatTemplate
from gearshift.data.order import interleaved, shares, shuffled
from gearshift.data.python_text import python_documents
from gearshift.data.readers import ChatRenderer, Dataset, Documents, Files, Reader, find_files
from gearshift.data.sequences import TokenSequences, spread, too_few
from gearshift.data.tokens import TokenFile, tokenised
from gearshift.spec import Spec

_log = logging.getLogger(__name__)

Boundaries = Literal["joined", "packed"]
"""`joined`: a sequence is one text, whatever documents it holds. `packed`: documents in it do not see each other."""


class DataSource(Spec):
    """One source of text."""

    path: str | None = Field(default=None, min_length=1)
    """A file, or a folder that is searched: `.jsonl`, `.ndjson`, `.parquet`, or plain UTF-8 text, a document a file."""
    dataset: str | None = Field(default=None, min_length=1)
    """The name of a dataset on the Hugging Face hub, in place of a path."""
    config: str | None = None
    """The dataset's configuration, if it has several."""
    split: str | None = None
    """The dataset's split; `train` if left out."""
    field: str = "text"
    """The key or column that holds the text of a row."""
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """The source's share of the tokens, beside the other sources' weights."""

    of_chats: ClassVar[bool] = False

    @model_validator(mode="after")
    def _path_or_dataset(self) -> "DataSource":
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give each source either a path or a dataset")
        if self.path is not None and (self.config or self.split):
            raise ValueError("config and split belong to a dataset, not to a path")
        return self

    def check(self) -> None:
        """ValueError if there is no file at its path. Reads nothing; what a dataset holds only its reader knows."""
        if self.path is not None:
            find_files(Path(self.path), self.of_chats)

    def reader(self, chats: ChatRenderer | None = None) -> Reader:
        """Opens the source, of text or of `chats`. ValueError if it is not there."""
        if self.dataset is not None:
            return Dataset(self.dataset, self.config, self.split or "train", self.field, chats)
        assert self.path is not None
        return Files(self.path, self.field, chats)


class ChatSource(DataSource):
    """One source of chats."""

    of_chats: ClassVar[bool] = True
    field: str = "messages"
    """The key or column that holds a row's chat: a list of {role, content}, or ShareGPT's {from, value}."""


@dataclass(frozen=True)
class Cut:
    """The tokens of a source as sequences of one length. What is left over at the end is dropped."""

    file: TokenFile
    length: int
    held_out: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Sequences that do not count, [held out], int64, rising."""

    def __len__(self) -> int:
        return self._total - len(self.held_out)

    @property
    def _total(self) -> int:
        return len(self.file.tokens) // self.length

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

    def read(self, place: int) -> tuple[np.ndarray, ...]:
        """A sequence of the source: its tokens [length], and where documents begin in it [length], bool."""
        first = place * self.length
        return self.file.tokens[first : first + self.length], self._starts(first, first + self.length)

    def _starts(self, first: int, end: int) -> np.ndarray:
        """Which of the tokens from `first` to `end` begin documents, [end - first], bool."""
        starts = np.zeros(end - first, bool)
        low, high = np.searchsorted(self.file.starts, (first, end))
        starts[self.file.starts[low:high] - first] = True
        return starts


@dataclass(frozen=True, kw_only=True)
class ChatCut(Cut):
    """The chats of a source as sequences of one length: as many whole ones as fit, then padding.

    A chat that is longer than a sequence is cut at its end and has one to itself. Padding is token 0, which every model
    has, other than a tokenizer's own: nothing comes after it, and it is never learnt.
    """

    rows: np.ndarray
    """Of each sequence, the first of its tokens and the one after the last, [sequences, 2], int64."""

    @property
    def _total(self) -> int:
        return len(self.rows)

    def read(self, place: int) -> tuple[np.ndarray, ...]:
        """A sequence: tokens, where chats (and the padding) begin, and which tokens are to be learnt. All [length]."""
        first, end = self.rows[place]
        used = end - first
        tokens = np.zeros(self.length, self.file.tokens.dtype)
        starts, counted = np.zeros((2, self.length), bool)
        tokens[:used], starts[:used] = self.file.tokens[first:end], self._starts(first, end)
        counted[:used] = self.file.counted[first:end]
        starts[used : used + 1] = True
        return tokens, starts, counted


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
        return Corpus(rest, self.shares, self.boundaries), TokenSequences.of(batch)

    def check(self, tokenizer: Any, vocabulary: int) -> None:
        """ValueError if the text holds a token that a model with a `vocabulary` of this size does not know."""
        if max(tokenizer.get_vocab().values()) < vocabulary:
            return
        for cut in self.cuts:
            largest = int(cut.file.tokens.max())
            if largest >= vocabulary:
                raise ValueError(
                    f"{cut.file.name} holds the token {tokenizer.convert_ids_to_tokens(largest)!r}, number {largest:,}"
                    f" of the tokenizer, but the model's vocabulary has {vocabulary:,}: take the model's own tokenizer,"
                    " or a model whose embeddings were resized to this one"
                )

    def digest(self) -> str:
        """Changes if any token does, or what is drawn from where."""
        sources = [[cut.file.facts["digest"], str(share)] for cut, share in zip(self.cuts, self.shares, strict=True)]
        return hashlib.blake2b(json.dumps([self.length, sources]).encode(), digest_size=16).hexdigest()

    def _read(self, chosen: Sequence[tuple[int, int]]) -> Batch:
        """The sequences (source, place), in this order."""
        parts = zip(*(self.cuts[source].read(place) for source, place in chosen), strict=True)
        tokens, starts, *counted = (np.stack(part) for part in parts)
        packed = torch.from_numpy(starts) if self.boundaries == "packed" else None
        return Batch(torch.from_numpy(tokens.astype(np.int64)), packed, *map(torch.from_numpy, counted))


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


def open_chats(
    sources: Sequence[ChatSource],
    tokenizer: Any,
    length: int,
    boundaries: Boundaries = "joined",
    cache: str | Path | None = None,
    quiet: bool = False,
) -> Corpus:
    """The chats of `sources`, rendered by the tokenizer's chat template, in sequences of `length` tokens.

    What the assistant says is marked as what is to be learnt. Unless it is to be `quiet`, says on stderr how many chats
    are too long. ValueError if a source cannot be read, or if the tokenizer has no chat template.
    """
    template = ChatTemplate(tokenizer)
    cuts = []
    for source in sources:
        file = tokenised(source.reader(template), tokenizer, cache)
        cuts.append(ChatCut(file, length, rows=chat_rows(file, length, quiet)))
    return Corpus(cuts, shares([source.weight for source in sources]), boundaries)


def chat_rows(file: TokenFile, length: int, quiet: bool = False) -> np.ndarray:
    """Which tokens of a file of chats each sequence of `length` takes, as in `ChatCut`.

    Chats of which nothing is left to learn are left out. ValueError if that is all of them.
    """
    ends = np.append(file.starts[1:], len(file.tokens))
    fitting = np.searchsorted(ends, file.starts + length, side="right")
    # For each chat, the one after a sequence that begins with it: a chat that does not fit is in none with others.
    following = np.maximum(fitting, np.arange(1, len(ends) + 1))
    heads = _heads(following)
    first, end = file.starts[heads], ends[following[heads] - 1]
    beyond = end > first + length
    ranges = np.stack([first[beyond] + 1, first[beyond] + length], axis=1)
    left_out = beyond.copy()
    left_out[beyond] = ~np.logical_or.reduceat(file.counted, ranges.flatten())[::2]
    rows = np.stack([first, np.minimum(end, first + length)], axis=1)[~left_out]
    lost = int(left_out.sum())
    cut = int(beyond.sum()) - lost
    if (cut or lost) and not quiet:
        _log.warning(
            "%s: of %d chats, %d are cut after %d tokens, and %d are left out because the assistant speaks only after"
            " that", file.name, len(ends), cut, length, lost,
        )  # fmt: skip
    if not len(rows):
        raise ValueError(
            f"in every chat in {file.name}, the assistant speaks only after {length} tokens: take longer sequences"
        )
    return rows


def _heads(following: np.ndarray) -> np.ndarray:
    """The chats that begin sequences, [sequences], int64: the first one, and always the one `following` [chats]."""
    heads, chat, after = array("q"), 0, following.data
    while chat < len(after):
        heads.append(chat)
        chat = after[chat]
    return np.array(heads, np.int64)


def _where(cut: Cut, cuts: Sequence[Cut]) -> str:
    """Which source is meant, where there are several."""
    return f" in {cut.file.name}" if len(cuts) > 1 else ""
