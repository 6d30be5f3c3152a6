"""Merging adapters into the weights beside which they stand: W + alpha / rank B A.

That is arithmetic, which no plan holds. A checkpoint is merged by a source that does it where a tensor is read, so that
whatever can be done to a checkpoint can be done to a merged one, a shard at a time.
"""

from dataclasses import replace

import torch

from gearshift.formats import FORMATS, Checkpoint
from gearshift.model import schema
from gearshift.model.adapters import adapter_scales
from gearshift.plan import Plan, Schema
from gearshift.plan.execute import Source, evaluate
from gearshift.plan.regions import Box
from gearshift.spec import BlockSpec, ModelSpec


class MergedSource:
    """The tensors of a checkpoint under our names, its adapters merged in float32 and rounded to the weights' dtype."""

    def __init__(self, source: Source, plan: Plan, scales: dict[str, float]):
        """`scales`: path of a layer that has an adapter -> alpha / rank."""
        self._source, self._plan = source, plan
        self._scales = {f"{path}.weight": scale for path, scale in scales.items()}
        adapters = {self._adapter(name, part) for name in self._scales for part in "AB"}
        self.schema: Schema = {name: info for name, info in plan.target.items() if name not in adapters}

    def read(self, name: str, box: Box | None = None) -> torch.Tensor:
        """As `Source.read`."""
        tensor = self._merged(name) if name in self._scales else self._read(name)
        return tensor if box is None else tensor[tuple(slice(*interval) for interval in box)]

    def _merged(self, name: str) -> torch.Tensor:
        weight, a, b = (self._read(part) for part in (name, self._adapter(name, "A"), self._adapter(name, "B")))
        precise = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(precise) + self._scales[name] * (b.to(precise) @ a.to(precise))).to(weight.dtype)

    def _read(self, name: str) -> torch.Tensor:
        return evaluate(self._plan.expressions[name], self._source, 0, name)

    @staticmethod
    def _adapter(name: str, part: str) -> str:
        return f"{name.removesuffix('weight')}lora_{part}.default.weight"


def merged(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with its adapters merged into its weights, which are read when they are asked for.

    Computed otherwise than with the adapters beside the weights, its logits differ by rounding. ValueError if it has no
    adapters.
    """
    spec = checkpoint.native.spec
    if not spec.has_lora:
        raise ValueError(f"{checkpoint.path} has no LoRA adapters to merge: leave out --merge-lora")
    source = MergedSource(checkpoint.source, checkpoint.plan, adapter_scales(spec))
    native = replace(checkpoint.native, spec=without_lora(spec))
    own = FORMATS["gearshift"]
    return replace(
        checkpoint,
        format=own,
        native=native,
        source=source,
        plan=own.import_plan(native.spec, schema(native.spec, native.dtype), source.schema),
        fingerprint=f"{checkpoint.fingerprint} merged",
    )


def without_lora(spec: ModelSpec) -> ModelSpec:
    """The same model without adapters."""

    def bare(block: BlockSpec) -> BlockSpec:
        return block.model_copy(update={"lora": None})

    blocks = {name: bare(block) for name, block in spec.decoder.blocks.items()}
    heads = tuple(head.model_copy(update={"block": bare(head.block)}) for head in spec.prediction_heads)
    decoder = spec.decoder.model_copy(update={"blocks": blocks})
    return spec.model_copy(update={"decoder": decoder, "prediction_heads": heads})
