"""Runs a function as several ranks of one gloo world on this machine."""

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """What `function(*arguments)` returns on each rank; the exception of a rank is raised here.

    `function` must be importable, so defined at the top level of a test module.
    """
    # Ranks are forked from a server that has imported torch and nothing more (DistributedDataParallel imports
    # dynamo): the first world takes seconds, every further one a fraction of a second. Forking pytest itself
    # could deadlock.
    multiprocessing.set_forkserver_preload(["torch", "torch._dynamo"])
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
