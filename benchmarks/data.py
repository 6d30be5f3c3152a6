"""How fast text becomes tokens, and tokens batches, against what one GPU eats. Prints one table.

    python benchmarks/data.py TOKENIZER [--tokens 200000000] [--gpu 300000]

TOKENIZER is a model's folder. Text: the English that Python carries, repeated. Batches: of a file of random tokens.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer

from gearshift.data import Batch, Corpus, DataSource, open_corpus
from gearshift.data.corpus import Cut
from gearshift.data.order import shares
from gearshift.data.python_text import python_documents
from gearshift.data.tokens import TokenFile
from gearshift.plan.ahead import made_ahead

ROWS, LENGTH, STEPS = 16, 1024, 300
DOCUMENT = 700
"""Mean tokens of a document in the random file."""


def token_file(folder: Path, tokens: int) -> TokenFile:
    """A file of random tokens below 49,152."""
    generator = np.random.default_rng(0)
    with (folder / "tokens.bin").open("wb") as file:
        for begin in range(0, tokens, 2**24):
            file.write(generator.integers(0, 49_152, min(2**24, tokens - begin), np.uint16).tobytes())
    starts = generator.choice(tokens, tokens // DOCUMENT)
    np.unique(np.append(starts, 0)).astype(np.int64).tofile(folder / "documents.bin")
    (folder / "facts.json").write_text(json.dumps({"dtype": "uint16", "tokens": tokens, "digest": "random"}))
    return TokenFile(folder, "random tokens")


def step(corpus: Corpus, number: int) -> Batch:
    """The batch of step `number`, as a training run makes it."""
    batch = corpus.draw(range(number * ROWS, (number + 1) * ROWS), 0)
    _ = batch.cu_seqlens
    return batch.pin_memory() if torch.cuda.is_available() else batch


def ahead(corpus: Corpus) -> Iterator[Batch]:
    """Batches as training takes them: made in a thread, three held at most."""
    with closing(made_ahead(range(STEPS), partial(step, corpus), lambda number: 1, 3)) as batches:
        yield from batches


class Steps(Dataset):
    """The same for torch's DataLoader, for comparison."""

    def __init__(self, corpus: Corpus):
        self.corpus = corpus

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, number: int) -> torch.Tensor:
        return step(self.corpus, number).tokens


def forget(path: Path) -> None:
    """Drop a file from the system's page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds(do: Callable[[], object]) -> float:
    """How long a call takes."""
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def rate(batches: Callable[[], Iterator[object]]) -> float:
    """Tokens a second over STEPS batches."""
    return STEPS * ROWS * LENGTH / seconds(lambda: deque(batches(), maxlen=0))


def tokenising(folder: Path, tokenizer: object) -> tuple[float, float]:
    """(tokens a second of tokenising a jsonl file to disk, seconds until an open corpus the second time)."""
    path = folder / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in python_documents() * 16))
    opened = partial(open_corpus, [DataSource(path=str(path))], tokenizer, LENGTH, cache=folder / "cache")
    first, second = seconds(opened), seconds(opened)
    return len(opened().cuts[0].file.tokens) / first, second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer")
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--gpu", type=float, default=300_000, help="tokens that one GPU eats a second")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = token_file(folder, arguments.tokens)
        cut = Cut(file, LENGTH)
        joined, packed = (Corpus([cut], shares([1]), kind) for kind in ("joined", "packed"))
        mixed = Corpus([cut] * 3, shares([5, 3, 2]), "packed")
        tokenised, opened = tokenising(folder, AutoTokenizer.from_pretrained(arguments.tokenizer))
        forget(folder / "tokens.bin")
        loader = DataLoader(Steps(joined), batch_size=None, num_workers=2)
        rows = [
            ("batches, file not in memory", rate(lambda: map(partial(step, joined), range(STEPS)))),
            ("batches, joined", rate(lambda: map(partial(step, joined), range(STEPS)))),
            ("batches, packed", rate(lambda: map(partial(step, packed), range(STEPS)))),
            ("batches, packed, three sources", rate(lambda: map(partial(step, mixed), range(STEPS)))),
            ("the same, made ahead in a thread", rate(lambda: ahead(mixed))),
            ("torch's DataLoader, two workers, joined", rate(lambda: iter(loader))),
        ]
        late = statistics.median(seconds(partial(step, mixed, 10**9 + number)) for number in range(20))
    print("| what | tokens/s | times what one GPU eats |\n| --- | --- | --- |")
    print(f"| tokenising, once | {tokenised:,.0f} | {tokenised / arguments.gpu:.1f} |")
    for what, speed in rows:
        print(f"| {what} | {speed:,.0f} | {speed / arguments.gpu:.0f} |")
    print(f"\nOpening a tokenised source: {opened * 1e3:.0f} ms. A batch after 10^9 steps: {late * 1e3:.1f} ms.")


if __name__ == "__main__":
    main()
