"""How far each mixer's output is from the main mixer's, layer by layer."""

import torch

from gearshift.data import TokenSequences
from gearshift.model import GearshiftForCausalLM
from gearshift.progress import Advance, silent
from gearshift.train.losses import activation_error


@torch.inference_mode()
def layer_errors(
    model: GearshiftForCausalLM, sequences: TokenSequences, advance: Advance = silent
) -> dict[str, list[float | None]]:
    """Mixer -> normalised activation error in each layer, None where the layer does not offer it or it is the main one.

    Each mixer reads the hidden states of the all-main model and is compared with the main mixer on them, so a layer's
    error says nothing of how errors add up over depth. `advance` is told of sequences done.
    """
    spec, body = model.spec, model.model
    names = dict.fromkeys(
        name for layer, offered in enumerate(spec.choices) for name in offered if name != spec.main[layer]
    )
    totals: dict[str, list[float | None]] = {
        name: [
            0.0 if name in offered and name != spec.main[layer] else None for layer, offered in enumerate(spec.choices)
        ]
        for name in names
    }
    for tokens in sequences.tokens.split(1):
        hidden = body.embed(tokens.to(model.device))
        context = body.context(hidden)
        for layer, block in enumerate(body.blocks):
            normed = block.mixer_norm(hidden)
            target = block.mixer_named(spec.main[layer])(normed, context)
            for name, row in totals.items():
                so_far = row[layer]
                if so_far is not None:
                    error = float(activation_error(block.mixer_named(name)(normed, context), target))
                    row[layer] = so_far + error / len(sequences)
            hidden = block.feed(block.add_mixed(hidden, target))
        advance(1)
    return totals
