"""A fuzzer for the readers: damaged checkpoints must be opened, or refused in one clear sentence.

    python -m tests.formats.fuzz --minutes 10 [--first 0] [--keep DIR]

Case n is a function of n alone, as long as the sources and mutations stay as they are. Each case is opened with
`open_checkpoint` and, where that succeeds, read whole. Anything but a ValueError or an OSError of one line that names a
file counts as a failure, and so do hanging, more memory than 3 GB beyond what was in use, and any change to the folder.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from gearshift.conversion import convert
from gearshift.formats import FORMATS, open_checkpoint
from gearshift.formats.checkpoint import CONFIG
from gearshift.formats.gguf.header import read_header
from gearshift.plan.execute import materialise
from gearshift.surgery import load_surgery
from tests.formats.families import families
from tests.formats.folders import save
from tests.formats.gguf_files import write as write_gguf
from tests.formats.mutations import FRACTIONS, NUMBERS, TEXTS, damage_bytes, damage_json, damage_safetensors

SECONDS, EXTRA_BYTES, LONGEST_SENTENCE = 8, 3 * 10**9, 1200
DATA = Path(__file__).parent / "data"
SURGERY = Path(__file__).parents[2] / "recipes" / "quickstart" / "surgery.yaml"
SMALL: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    """One damaged checkpoint: the folder or file it was made from, and the file that is replaced."""

    source: str
    file: str
    content: bytes


class HungError(BaseException):
    """A case took too long. No Exception, so that no reader can take it for one of its own."""


def make_sources(folder: Path) -> None:
    """Small valid checkpoints of every format, in folders that begin with its name.

    Of a family there are two: one that has every tensor, and one with the longest setting of its sweep.
    """
    for name, family in families().items():
        family.save(folder / name, **family.full)
        family.save(folder / f"{name}-long", **max(family.sweep, key=lambda settings: len(str(settings))))
    _copy_stored(folder)
    _make_images(folder / "gemma3_images")
    save(folder / "llama-sharded", **SMALL).save_pretrained(folder / "llama-sharded", max_shard_size="5KB")
    (folder / "llama-sharded" / "model.safetensors").unlink()
    convert(folder / "llama", [load_surgery(SURGERY)]).write(folder / "gearshift")
    _make_gguf(folder / "gguf")
    made = {path.name.partition("-")[0] for path in folder.iterdir()}
    assert made == set(FORMATS), f"no source for {sorted(set(FORMATS) - made)}"


def _copy_stored(folder: Path) -> None:
    """The checkpoints among the tests' data: formats whose code is not in transformers."""
    for stored in sorted(path for path in DATA.iterdir() if path.is_dir()):
        name = stored.name.replace("apriel2-with-images", "apriel2_images")
        (folder / name).mkdir()
        for file in (CONFIG, "model.safetensors"):
            shutil.copyfile(stored / file, folder / name / file)


def _make_images(folder: Path) -> None:
    """A Gemma 3 that reads images too, without the weights of what reads them."""
    text = families()["gemma3"]
    text.save(folder, **text.full)
    config = json.loads((folder / CONFIG).read_text())
    del config["architectures"]
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config}
    (folder / CONFIG).write_text(json.dumps(outer))
    tensors = load_file(folder / "model.safetensors")
    save_file({f"language_model.{name}": tensor for name, tensor in tensors.items()}, folder / "model.safetensors")


def _make_gguf(folder: Path) -> None:
    model = save(folder, **SMALL)
    assert isinstance(model, LlamaForCausalLM)
    shutil.rmtree(folder)
    folder.mkdir()
    factors = np.ones(SMALL["head_dim"] // 2, np.float32)
    write_gguf(folder / "model.gguf", model, more=lambda w: w.add_tensor("rope_freqs.weight", factors))


def case(number: int, sources: Path) -> Case:
    """The damaged checkpoint of a number."""
    rng = random.Random(number)
    source = rng.choice(sorted(path.name for path in sources.iterdir()))
    files = {path.name: path.read_bytes() for path in sorted((sources / source).iterdir())}
    names = [name for name in files if name.endswith(("config.json", ".safetensors", ".index.json", ".gguf"))]
    name = rng.choice([name for name in names if name != "generation_config.json"])
    if name.endswith(".gguf"):
        return Case(source, name, damage_gguf(sources / source / name, files[name], rng))
    if name.endswith(".safetensors"):
        return Case(source, name, damage_safetensors(files[name], rng))
    damage = damage_json if rng.random() < 0.9 else damage_bytes
    return Case(source, name, damage(files[name], rng))


def damage_gguf(path: Path, data: bytes, rng: random.Random) -> bytes:
    """A GGUF file with damaged bytes in its header, or with a value of its metadata replaced by another type's."""
    header = read_header(path)
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 1, 2, 5))):
            data = damage_bytes(data, rng, header.bytes)
        return data
    key = rng.choice([key for key in header.metadata if not key.startswith("tokenizer")])
    number, text = rng.choice(NUMBERS), rng.choice([text for text in TEXTS if text != "\ud800"])
    kinds = gguf.GGUFValueType
    replacements = {
        kinds.UINT32: number % 2**32,
        kinds.UINT64: number % 2**64,
        kinds.FLOAT64: rng.choice(FRACTIONS),
        kinds.BOOL: rng.random() < 0.5,
        kinds.STRING: text,
    }
    return _with_value(data, key, *rng.choice(list(replacements.items())))


def _with_value(data: bytes, key: str, kind: gguf.GGUFValueType, value: Any) -> bytes:
    """GGUF bytes with one more value of metadata, in front, in place of the one of that name."""
    writer = gguf.GGUFWriter(None, "llama")
    packed = writer._pack_val(value, kind, add_vtype=True)
    name = len(key.encode()).to_bytes(8, "little") + key.encode()
    # The old one keeps its bytes, under a name of the same length that nobody asks for.
    renamed = data.replace(name, name[:8] + b"general.x"[: len(key)].ljust(len(key), b"x"), 1)
    count = int.from_bytes(data[16:24], "little") + 1
    return renamed[:16] + count.to_bytes(8, "little") + name + packed + renamed[24:]


def check(case: Case, sources: Path, work: Path) -> str:
    """Open a case in the folder `work`; what is wrong with how that went, or nothing."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(sources / case.source, work)
    (work / case.file).write_bytes(case.content)
    before = _contents(work)
    try:
        with limits():
            checkpoint = open_checkpoint(work / case.file if case.file.endswith(".gguf") else work)
            materialise(checkpoint.plan, checkpoint.source)
    except (ValueError, OSError) as error:
        problem = _unclear(error)
    except (Exception, HungError) as error:
        problem = f"{type(error).__name__}: {str(error)[:200]} at {_place(error)}"
    else:
        problem = ""
    return problem or ("" if _contents(work) == before else "the folder changed")


def _unclear(error: Exception) -> str:
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return f"{type(error).__name__}: {text[:200]} at {_place(error)}"
    if "\n" in text or not text.strip() or len(text) > LONGEST_SENTENCE or not text.isprintable():
        return f"unclear, {len(text)} characters: {text[:200]!r} at {_place(error)}"
    named = ("config.json", "safetensors", "model.gguf", "source tensor", "case")
    return "" if any(name in text for name in named) else f"names no file: {text[:200]!r} at {_place(error)}"


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "gearshift" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@contextmanager
def limits() -> Iterator[None]:
    """No more than some seconds and some memory beyond what the process has."""

    def hung(*_: object) -> None:
        raise HungError(f"no answer after {SECONDS} s of computing")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGPROF, hung)
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_BYTES, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of computing: the machine may be busy with something else
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, previous)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run(sources: Path, work: Path, numbers: Iterator[int], failed: Callable[[int, Case, str], None]) -> int:
    """Try one case after another; how many there were."""
    tried = 0
    for number in numbers:
        damaged = case(number, sources)
        if problem := check(damaged, sources, work):
            failed(number, damaged, problem)
        tried += 1
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that failed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    until = time.monotonic() + 60 * options.minutes
    seen: dict[str, int] = {}

    def numbers() -> Iterator[int]:
        number = options.first
        while time.monotonic() < until:
            yield number
            number += 1

    def failed(number: int, damaged: Case, problem: str) -> None:
        kind = problem.partition(":")[0] + problem.rpartition(" at ")[2]
        seen[kind] = seen.get(kind, 0) + 1
        if seen[kind] > 3:
            return
        print(json.dumps({"case": number, "source": damaged.source, "file": damaged.file, "problem": problem}))
        sys.stdout.flush()
        if options.keep:
            options.keep.mkdir(parents=True, exist_ok=True)
            (options.keep / f"{number}-{damaged.source}-{damaged.file}").write_bytes(damaged.content)

    with tempfile.TemporaryDirectory() as scratch:
        sources = Path(scratch) / "sources"
        sources.mkdir()
        make_sources(sources)
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        tried = run(sources, Path(scratch) / "case", numbers(), failed)
    print(f"{tried} cases, {sum(seen.values())} failures of {len(seen)} kinds")


if __name__ == "__main__":
    main()
