"""Runs a function as several ranks of one gloo world on this machine."""

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from edge_glass.local_ranks import RENDEZVOUS

# Imports only: nothing that starts threads, which a fork would lose.
PRELOAD = ["torch", "torch._dynamo", "edge_glass.training.fit"]


def end_ranks(function: Callable[..., Any], *arguments: Any, world_size: int = 1, timeout: float = 120) -> list[int]:
    """Run `function(rank, *arguments)` on each rank, with the environment of a launcher; the exit codes, in rank order.

    A rank that was killed has minus the signal's number. `function` connects the ranks itself.
    """
    multiprocessing.set_forkserver_preload(PRELOAD)
    context = multiprocessing.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_as_launched, args=(rank, world_size, folder, function, arguments))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
            timeout = timeout if process.exitcode == 0 else 5  # the others have had their time to notice
    return [process.exitcode for process in ranks]


def _as_launched(rank: int, world_size: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    if world_size > 1:
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in facts.items()})
        os.environ[RENDEZVOUS] = f"file://{folder}/rendezvous"
    function(rank, *arguments)


def run_ranks(function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """What `function(*arguments)` returns on each rank; the exception of a rank is raised here.

    `function` must be importable, so defined at the top level of a test module.
    """
    # Ranks are forked from a server that has imported torch and nothing more (DistributedDataParallel imports
    # dynamo): the first world takes seconds, every further one a fraction of a second. Forking pytest itself
    # could deadlock.
    multiprocessing.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        ranks = (world_size, folder, function, arguments)
        mp.start_processes(_as_rank, ranks, nprocs=world_size, start_method="forkserver")
        return [torch.load(Path(folder, f"{rank}.pt"), weights_only=False) for rank in range(world_size)]


def _as_rank(rank: int, world_size: int, folder: str, function: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=world_size)
    try:
        torch.save(function(*arguments), Path(folder, f"{rank}.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()
