"""What follows from a spec without weights: tensor names and shapes, starting distributions, sizes, costs."""

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.initialization import no_init_weights

from gearshift.model.block import Block, norm_names
from gearshift.model.config import GearshiftConfig
from gearshift.model.start import declared
from gearshift.plan import Initialiser, Schema, TensorInfo
from gearshift.spec import CostTable, ModelSpec, decode_cost
from gearshift.spec.parts import DTYPE_BYTES

if TYPE_CHECKING:
    from gearshift.model.modeling import GearshiftForCausalLM


@lru_cache(maxsize=8)
def _skeleton(dump: str) -> "GearshiftForCausalLM":
    from gearshift.model.modeling import GearshiftForCausalLM

    spec = ModelSpec.model_validate_json(dump)
    # Drawing nothing halves the time that it takes.
    with torch.device("meta"), no_init_weights():
        model = GearshiftForCausalLM(GearshiftConfig(spec))
    model.tie_weights()  # or a tied head would be a parameter of its own
    return model


def skeleton(spec: ModelSpec) -> "GearshiftForCausalLM":
    """The model on the meta device: all of its structure, none of its weights. Cached; do not change it."""
    return _skeleton(spec.model_dump_json())


def schema(spec: ModelSpec, dtype: str) -> Schema:
    """Name -> shape and dtype of every tensor of the model's checkpoint. A tied head is not among them."""
    tensors = skeleton(spec).state_dict()
    if spec.tie_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    return {name: TensorInfo(tuple(tensor.shape), dtype) for name, tensor in tensors.items()}


def initial(spec: ModelSpec) -> dict[str, Initialiser]:
    """Name -> starting distribution of every tensor of the model's checkpoint."""
    model = skeleton(spec)
    started = {
        (f"{path}.{name}" if path else name): initialiser
        for path, module in model.named_modules()
        for name, initialiser in declared(module)
    }
    if spec.tie_embeddings:
        del started["lm_head.weight"]
    return started


def parameter_counts(spec: ModelSpec, batch: int = 1) -> tuple[dict[tuple[str, str], int], int]:
    """Parameters of each mixer by (block, name), and of everything else that decoding `batch` sequences reads."""
    model = skeleton(spec)
    counts: dict[tuple[str, str], int] = {}
    for name, key in zip(spec.decoder.layout, spec.decoder.weight_keys, strict=True):
        block = model.get_submodule(f"model.layers.{key}")
        assert isinstance(block, Block)
        for mixer in block.spec.mixers:
            counts[name, mixer] = _elements(block.mixer_named(mixer))
    layers = sum(
        _elements(model.get_submodule(f"model.layers.{key}.{part}"))
        for key, block in zip(spec.decoder.weight_keys, spec.decoder.layers, strict=True)
        for part in (*norm_names(block), "mlp")
    )
    layers -= sum(block.mlp.idle_parameters(spec.hidden_size, batch) for block in spec.decoder.layers)
    # A step reads one row of the embedding table, the final norm, and the whole head, tied or not.
    return counts, layers + (spec.vocab_size + 2) * spec.hidden_size


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def cost_table(spec: ModelSpec, dtype: str, context: int = 8192, batch: int = 1) -> CostTable:
    """The default cost model: bytes moved to decode one token (see `decode_cost`), weights and caches in `dtype`."""
    counts, shared = parameter_counts(spec, batch)
    size = DTYPE_BYTES[dtype]
    weights = {key: count * size for key, count in counts.items()}
    return decode_cost(spec, weights, shared * size, dtype, context, batch)
