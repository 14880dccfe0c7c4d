"""Who this process is among the ranks, and the few collectives that training and evaluation need.

Everything here is a no-op in a single process, so that no caller has to ask whether there are ranks.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from edge_glass.errors import LostRank, UserError
from edge_glass.local_ranks import RENDEZVOUS

Number = TypeVar("Number", float, Tensor)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """The place of this process in its world.

    Attributes:
        rank: number of this process, 0 to world_size - 1.
        local_rank: its number on this machine, which is also the number of its GPU.
        world_size: how many processes train together.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1


def current_ranks() -> Ranks:
    """The ranks as torch.distributed knows them, else as the environment says, else a single process."""
    local_rank = os.environ.get("LOCAL_RANK")
    if dist.is_available() and dist.is_initialized():
        rank, world_size = dist.get_rank(), dist.get_world_size()
    else:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    return Ranks(rank, rank if local_rank is None else int(local_rank), world_size)


@contextlib.contextmanager
def connected_ranks(timeout_minutes: float = 30.0) -> Iterator[None]:
    """This rank's place in its world, given up at the end; nothing in a process that is alone.

    Args:
        timeout_minutes: how long a rank waits for the others in a collective before it gives up.

    Raises:
        LostRank: instead of what a collective raises when a rank has died or hangs.
    """
    ranks = current_ranks()
    if ranks.world_size == 1 and "RANK" not in os.environ:
        yield
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(ranks.local_rank % torch.cuda.device_count())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",  # numbers that a host needs at once never wait for the GPU
        # Ranks of an outer launcher meet at MASTER_ADDR and MASTER_PORT.
        init_method=os.environ.get(RENDEZVOUS, "env://"),
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=timedelta(minutes=timeout_minutes),
    )
    roll_call = dist.new_group(backend="gloo")  # never used while all is well, so that it works when nothing else does
    try:
        yield
    except RuntimeError as error:
        if not _of_a_lost_rank(error):
            raise
        raise _lost(roll_call, error) from error
    finally:
        dist.destroy_process_group()


def is_main() -> bool:
    """True in the one process that writes reports and checkpoints."""
    return current_ranks().rank == 0


def gather(tensor: Tensor) -> Tensor:
    """The rows of every rank, in rank order, with gradient back to the rank that each row came from.

    The gradient of a row is the sum over ranks of the gradients of all its copies. A loss that every rank
    computes in full from gathered rows therefore has `world_size` times its gradient on each rank, and the
    mean over ranks that DistributedDataParallel takes makes it the gradient of one process with all rows.

    Args:
        tensor: `[local rows, ...]`; the number of rows may differ between ranks, the rest of the shape may
            not.

    Returns:
        `[rows of all ranks, ...]`.

    Raises:
        ValueError: the rows of two ranks differ in shape.
    """
    return _Gather.apply(tensor) if _in_a_world() else tensor


def all_mean(value: Number) -> Number:
    """The mean over ranks of a number or tensor, without gradient; the same type comes back."""
    if not _in_a_world():
        return value.detach() if isinstance(value, Tensor) else value
    total = value.detach().clone() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    mean = total / dist.get_world_size()
    return mean if isinstance(value, Tensor) else mean.item()


def all_sum(values: list[float]) -> list[float]:
    """The sum over ranks of each number."""
    if not _in_a_world():
        return values
    total = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def all_objects(value: Item) -> list[Item]:
    """The value of every rank, in rank order; any that pickle can carry."""
    if not _in_a_world():
        return [value]
    gathered: list[Item] = [value] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def decided_by_main(decide: Callable[[], Item]) -> Item:
    """What `decide` gives on the first rank, on every rank; its error for the user, too.

    For what is read from a disk that other ranks may see at another moment: ranks that decide for themselves may
    decide differently.
    """
    if not _in_a_world():
        return decide()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = decide()
        except UserError as error:
            outcome[1] = str(error)
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise UserError(outcome[1])
    return outcome[0]


def barrier() -> None:
    """Waits until every rank is here."""
    if _in_a_world():
        dist.barrier()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:
        counts = _row_counts(tensor)
        ctx.start = sum(counts[: dist.get_rank()])
        ctx.stop = ctx.start + tensor.shape[0]
        # Every rank must send equally much: short ones are filled up, and the filling is cut off on arrival.
        padded = tensor.new_zeros(max(counts), *tensor.shape[1:])
        padded[: tensor.shape[0]] = tensor
        received = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(received, padded)
        return torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # to be summed in place
        dist.all_reduce(gradient)
        return gradient[ctx.start : ctx.stop]


def _row_counts(tensor: Tensor) -> list[int]:
    """How many rows each rank holds; all ranks learn of a misfit together, so that none is left waiting."""
    row_size = tensor[:1].numel() if tensor.shape[0] else -1  # -1: no row to compare
    mine = torch.tensor([tensor.shape[0], row_size], device=tensor.device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    facts = torch.stack(everyone).tolist()
    if len({size for _, size in facts if size >= 0}) > 1:
        raise ValueError(
            "gather: the ranks hold rows of different size, numbers per row by rank: "
            f"{[size for _, size in facts]}; build the same model and read the same modalities on every rank"
        )
    return [count for count, _ in facts]


def _in_a_world() -> bool:
    """True when there are other ranks to talk to."""
    several = current_ranks().world_size > 1
    if several and not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"the environment says WORLD_SIZE={os.environ['WORLD_SIZE']}, but the ranks are not connected: "
            "each would train alone; call torch.distributed.init_process_group() first, or unset WORLD_SIZE"
        )
    return several


def _of_a_lost_rank(error: RuntimeError) -> bool:
    """True for what gloo and NCCL raise when another rank has gone or does not answer."""
    words = ("gloo", "Timed out", "timeout", "Connection", "NCCL")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _lost(roll_call: Any, error: RuntimeError) -> LostRank:
    """The error for the user, with the ranks that do not answer any more."""
    missing = _missing(roll_call)
    who = f"rank{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}" if missing else "a rank"
    return LostRank(
        f"{who} of {dist.get_world_size()} died, hangs, or evaluates for longer than launch.timeout_minutes: rank "
        f"{dist.get_rank()} waited in vain ({str(error).splitlines()[0]}). It can go on from its newest checkpoint "
        "with training.resume=<its folder>"
    )


def _missing(roll_call: Any) -> list[int]:
    """Ranks that do not answer within seconds: rank 0 asks all the others, and they only whether it is there."""
    patience = timedelta(seconds=5)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    missing = []
    for other in range(1, world_size) if rank == 0 else [0]:
        try:
            dist.isend(torch.zeros(1), other, group=roll_call)
            request = dist.irecv(torch.zeros(1), other, group=roll_call)
            assert request is not None
            request.wait(patience if rank == 0 else patience * world_size)
        except RuntimeError:
            missing.append(other)
    return missing
