"""Several processes on this machine, forked from a server that has imported what they need.

Not from the tests' own process: once it has computed gradients, a CUDA build of torch refuses to do so in its forks.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["pytest", "gearshift.train.estimate", "gearshift.mixers.attention.module", "tests.models"]
)


PATIENCE = 120.0
"""Seconds that a process may take."""


def run_processes(world: int, work: Callable[..., Any], *given: Any, check: bool = True) -> None:
    """Call `work(*given)`, which is pickled, in `world` processes that find each other as torchrun's do.

    They have the environment of this one, and nothing else that was patched in it. With `check`, AssertionError if one
    fails, or has to be killed because it does not end.
    """
    # Theirs is a store of this process, as torchrun's is: a port that is only known to be free can be taken since.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    failures = _CONTEXT.SimpleQueue()
    group = {
        **os.environ,
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "MASTER_ADDR": store.host,
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world),
    }
    ranks = ({**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world))
    processes = [_CONTEXT.Process(target=_call, args=(rank, failures, work, given)) for rank in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
        process.kill()
        process.join()  # by itself, a kill leaves no exit code yet
    said = "" if failures.empty() else failures.get()
    codes = [process.exitcode for process in processes]
    assert not check or not any(codes), said or codes


def _call(environment: Mapping[str, str], failures: Any, work: Callable[..., Any], given: tuple[Any, ...]) -> None:
    os.environ |= environment
    torch.set_num_threads(1)
    try:
        work(*given)
    except BaseException:
        failures.put(traceback.format_exc())
        os._exit(1)
    os._exit(0)
