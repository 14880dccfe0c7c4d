"""A world of ranks on this machine, forked from a server that has imported what they need.

A fresh process spends seconds on imports. The server spends them once for all ranks of all jobs of a sweep, and while
this process still composes and checks its config. This process itself never imports torch.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from types import FrameType
from typing import Any

from edge_glass.errors import LostRank, Stopped, UserError

# Imports alone: threads, or a GPU, would not survive the fork. DistributedDataParallel imports torch._dynamo.
PRELOAD = ["__main__", "torch._dynamo", "edge_glass.training.fit"]
RENDEZVOUS = "EDGE_GLASS_RENDEZVOUS"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
# How long ranks may take to end when another has failed, or when the process that started them is gone.
GRACE_SECONDS = 15.0


class RankError(Exception):
    """A defect in a rank; the message is its traceback."""


@dataclass
class Outcome:
    """How a rank ended.

    Attributes:
        kind: `value`, `stopped`, or, a failure, `user`, `defect`, `lost` (it missed other ranks), `killed`.
        value: what it returned, or the message of the failure.
    """

    kind: str
    value: Any = None


# Of several failures the one that brought the others about: a rank that misses another one is never the first to fail.
CAUSES = ("killed", "defect", "user", "lost")


def warm_up() -> None:
    """Start the server, which imports while this process goes on."""
    multiprocessing.set_forkserver_preload(["edge_glass.rank_server", *PRELOAD])
    from multiprocessing.forkserver import ensure_running

    ensure_running()


def run_local_ranks(function: str, config: Any, run_dir: str, count: int, threads: int) -> Any:
    """Call `function(config, run_dir)` on `count` new ranks and return what rank 0 returns.

    SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C are passed on to the ranks as SIGTERM; a second Ctrl-C ends all at once.

    Args:
        function: `module:name`.
        config: plain containers.
        run_dir: the run's folder.
        count: number of ranks.
        threads: of each rank.

    Raises:
        UserError: from any rank, as that rank wrote it; or a rank was killed.
        RankError: a defect in a rank.
        Stopped: a signal came, and the ranks have saved the run.
    """
    warm_up()
    context = multiprocessing.get_context("forkserver")
    # Its other end is held by this process alone: it reads as closed when this process ends, however it ends.
    lifeline, held = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="edge-glass-") as folder:
        ranks: list[tuple[ForkServerProcess, Connection]] = []
        for rank in range(count):
            facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
            environment = {
                **os.environ,  # the server has those of the moment it was started
                **{name: str(value) for name, value in facts.items()},
                "OMP_NUM_THREADS": str(threads),
                RENDEZVOUS: f"file://{folder}/rendezvous",  # a file: no port that another world could take
            }
            receiver, sender = context.Pipe(duplex=False)
            arguments = (function, config, run_dir, environment, sender, lifeline)
            process = context.Process(target=_live, args=arguments, name=f"rank {rank}", daemon=False)
            process.start()
            sender.close()
            ranks.append((process, receiver))
        try:
            with _signals_passed_on([process for process, _ in ranks]) as told_to_stop:
                outcomes = _outcomes(ranks)
        finally:
            for process, _ in ranks:
                process.kill()
            held.close()
            lifeline.close()
    return _verdict(outcomes, bool(told_to_stop))


def _outcomes(ranks: list[tuple[ForkServerProcess, Connection]]) -> list[Outcome]:
    """How each rank ended; once one has failed, those that do not end by themselves are killed."""
    found: dict[int, Outcome] = {}
    deadline: float | None = None
    while len(found) < len(ranks):
        waiting = [rank for rank in range(len(ranks)) if rank not in found]
        ends = [end for rank in waiting for end in (ranks[rank][0].sentinel, ranks[rank][1])]
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not wait(ends, left):
            for rank in waiting:
                ranks[rank][0].kill()
                found[rank] = Outcome("lost", "did not end by itself")
            break
        for rank in waiting:
            process, receiver = ranks[rank]
            if receiver.poll():
                try:
                    found[rank] = receiver.recv()
                except EOFError:
                    process.join()
                    found[rank] = Outcome("killed", _end_of(process))
            elif process.exitcode is not None:
                found[rank] = Outcome("killed", _end_of(process))
            if rank in found and found[rank].kind in CAUSES and deadline is None:
                deadline = time.monotonic() + GRACE_SECONDS
    for process, _ in ranks:
        process.join()
    return [found[rank] for rank in range(len(ranks))]


def _verdict(outcomes: list[Outcome], told_to_stop: bool) -> Any:
    """What the ranks' ends mean for the job."""
    terminated = f"by {signal.SIGTERM.name}"
    for kind in CAUSES:
        for rank, outcome in enumerate(outcomes):
            if outcome.kind != kind:
                continue
            if told_to_stop and (kind == "lost" or (kind == "killed" and terminated in outcome.value)):
                continue  # before its first step, or in an evaluation: nothing of it is lost
            if kind == "defect":
                raise RankError(f"in rank {rank}:\n{outcome.value}")
            raise UserError(f"rank {rank} {outcome.value}" if kind == "killed" else outcome.value)
    if told_to_stop or any(outcome.kind == "stopped" for outcome in outcomes):
        raise Stopped
    return outcomes[0].value


def _end_of(process: ForkServerProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"ended without a word, with exit code {code}"
    name = signal.Signals(-code).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


@contextmanager
def _signals_passed_on(ranks: list[ForkServerProcess]) -> Iterator[list[int]]:
    """Tells the ranks of signals that this process gets; gives the list of those it got."""
    received: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            for process in ranks:
                process.kill()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        received.append(number)  # before the message: whoever answers it with a second Ctrl-C is to be heard
        if number == signal.SIGINT:
            os.write(2, b"\nCtrl-C: finishing this step and saving; Ctrl-C again ends the run at once\n")
        for process in ranks:
            process.terminate()

    if threading.current_thread() is not threading.main_thread():  # no other thread may set handlers
        yield received
        return
    before: Mapping[int, Any] = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _live(
    function: str, config: Any, run_dir: str, environment: dict[str, str], sender: Connection, lifeline: Connection
) -> None:
    """The life of a rank."""
    for number in STOP_SIGNALS:  # which the server ignores
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all its processes; the first one decides
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    try:
        sender.send(Outcome("value", call(function, config, run_dir)))
    except Stopped:
        sender.send(Outcome("stopped"))
    except LostRank as error:
        sender.send(Outcome("lost", str(error)))
    except UserError as error:
        sender.send(Outcome("user", str(error)))
    except Exception:
        sender.send(Outcome("defect", traceback.format_exc()))
    else:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)  # other ranks may be gone: no clean-up that waits for them


def _end_with_parent(lifeline: Connection) -> None:
    """Stop this rank, as with SIGTERM, when the process that started it is gone."""
    try:
        lifeline.recv()
    except EOFError:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


def call(function: str, config: Any, run_dir: str) -> Any:
    """Import `module:name` and call it."""
    module, _, name = function.partition(":")
    found: Callable[[Any, str], Any] = getattr(importlib.import_module(module), name)
    return found(config, run_dir)
