"""What the tensors of adapters are called. PEFT's layers are in `lora.py`; this needs no PEFT."""

from torch import nn

from gearshift.model.block import Block

BASE = "base_layer."
"""In PEFT's layers, where the weights lie beside which an adapter stands. Not so in a checkpoint: see `plain`."""
_PARTS = (".lora_A.", ".lora_B.")


def is_adapter(name: str) -> bool:
    """Whether a tensor of that name belongs to an adapter."""
    return any(part in name for part in _PARTS)


def plain(name: str) -> str:
    """The name in a checkpoint of what `named_parameters` calls `name`."""
    return name.replace(f".{BASE}", ".")


def beside_adapters(model: nn.Module) -> set[str]:
    """The names of the parameters that never learn, because their block has adapters that do."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Block) and module.spec.lora is not None
        for name, _ in module.named_parameters()
        if not is_adapter(name)
    }
