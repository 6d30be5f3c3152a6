"""Training on many processes: how a model lies on them, and what they have to tell each other.

Copies of a model compute as one alone does, and average their gradients (`copies`). For shards and slices (`processes`)
the engine is PyTorch's. Every mixer and every MLP is a unit of FSDP2 of its own, so that a step gathers the mixers that
it runs and no others. Within a unit, DTensor splits the parameters as its module's `sharding` table says. Embeddings,
norms outside the mixers and the head lie on every process whole.

This package alone reads those tables, and beside `train.checkpoint` it alone names torch.distributed.
"""

from gearshift.train.parallel.base import ALONE, Gradients, Parallel, local
from gearshift.train.parallel.launch import process_group
from gearshift.train.parallel.processes import parallelise

__all__ = ["ALONE", "Gradients", "Parallel", "local", "parallelise", "process_group"]
