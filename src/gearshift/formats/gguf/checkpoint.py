"""A GGUF file as a checkpoint: what its metadata says in other words than a config, and its tokenizer."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gearshift.formats.checkpoint import Checkpoint, build_plan
from gearshift.formats.documents import GENERATION, write_json
from gearshift.formats.gguf import architecture
from gearshift.formats.gguf.common import MLP_BIAS, OUTPUT_BIAS, QKV_BIAS, TIED
from gearshift.formats.gguf.source import GGUFSource

_EMBEDDINGS = "token_embd.weight"


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF file. ValueError, naming it, if it is damaged or not a model that we can read."""
    source = GGUFSource(path)
    try:
        found = architecture(source.header.metadata)
        config = _as_config(source.header.metadata, source)
        native = found.table.to_native({**config, **found.implied(config, source)})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    notes = [f"de-quantised from {', '.join(source.quantisations)}"] if source.quantisations else []
    native = replace(native, source={**native.source, "name": path.name, "notes": notes})
    plan = build_plan(found.table, native, source, path)

    def write_extras(out: Path) -> None:
        _write_tokenizer(path, out)
        write_json(out / GENERATION, {key: native.extras[key] for key in sorted(native.extras)})

    return Checkpoint(path, found.table, native, source, plan, source.fingerprint, write_extras)


def _as_config(metadata: Mapping[str, Any], source: GGUFSource) -> dict[str, Any]:
    """The metadata, and under keys of our own what a GGUF file says by having a tensor or not."""
    config, tensors = dict(metadata), source.schema
    config[TIED] = "output.weight" not in tensors
    config[QKV_BIAS] = "blk.0.attn_q.bias" in tensors
    config[OUTPUT_BIAS] = "blk.0.attn_output.bias" in tensors
    config[MLP_BIAS] = "blk.0.ffn_gate.bias" in tensors
    prefix = metadata["general.architecture"]
    config.setdefault(f"{prefix}.vocab_size", tensors[_EMBEDDINGS].shape[0] if _EMBEDDINGS in tensors else None)
    scaling = f"{prefix}.rope.scaling"
    if config.get(f"{scaling}.type") == "none":
        config[f"{scaling}.type"] = "default"
    elif f"{scaling}.factor" in config:
        config.setdefault(f"{scaling}.type", "linear")
    return config


def _write_tokenizer(path: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the tokenizers library panics over a bad vocabulary, which is no Exception
        raise ValueError(f"the tokenizer in {path} cannot be converted: {' '.join(str(error).split())}") from error
    tokenizer.save_pretrained(out)
