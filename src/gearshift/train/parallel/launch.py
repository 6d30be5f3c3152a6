"""The group of the processes that torchrun started, from its beginning to its end."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

GRACE = 30.0
"""Seconds that a process waits for torchrun to end it, before it does so itself.

The first to fail takes seconds to leave Python on a busy machine; were another one faster, its status would be told."""


@contextmanager
def process_group() -> Iterator[bool]:
    """The life of the group of processes that torchrun started. Yields whether this is the first of them.

    Nothing for one alone, or within another such block. Where several fail, only the first to do so gets its error out:
    the others fail because of it, or of the same.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_initialized() or world == 1:
        yield rank == 0
        return
    store, rank, world = next(iter(rendezvous("env://")))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps the store over restarts, and with it the addresses of processes that are gone. On several
        # machines the counts differ.
        store = dist.PrefixStore(f"restart {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    try:
        dist.init_process_group(_backend(), store=store, rank=rank, world_size=world)
        yield rank == 0
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if interrupted:
            store.add("interrupted", 1)
        if store.add("failed", 1) > 1 and not interrupted:
            # Once one has ended, torchrun ends the others: let it be the one that says why. After Ctrl-C torchrun waits
            # for all of them instead, this one too, whose own interrupt torch's checkpoints have caught on the way.
            try:
                if not store.add("interrupted", 0):
                    time.sleep(GRACE)
            finally:
                os._exit(1)
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise ConnectionError("another process of this job has ended: torchrun says which, and how") from None
        raise
    dist.destroy_process_group()


def _backend() -> str:
    """gloo, and NCCL on the GPU that is this process's. ValueError if there is none for it."""
    if not torch.cuda.is_available():
        return "gloo"
    here, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if here >= there:
        raise ValueError(f"process {here + 1} on this machine has no GPU, there are {there}: start fewer processes")
    torch.cuda.set_device(here)
    return "cpu:gloo,cuda:nccl"
