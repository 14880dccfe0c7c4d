"""Signals that ask a run to stop: noted when they come, obeyed between two steps."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from edge_glass.distributed import all_objects
from edge_glass.errors import Stopped
from edge_glass.local_ranks import STOP_SIGNALS


class StopSignals:
    """While it is open, SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C are noted instead of ending the process.

    Ctrl-C after any of them ends the process at once. Handlers that were there before, such as the one with which
    submitit has SLURM queue a job again, come back at the end, and can be called with `hand_on`.

    Attributes:
        received: the signals that came, each once.
        at_once: set when there is nothing left to save: the next signal raises `Stopped` where it finds the process.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self.at_once = False
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
            self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
            for number, before in self._before.items():
                if before is not signal.SIG_IGN:  # the process that started this rank decides about Ctrl-C
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def hand_on(self) -> None:
        """Give the signals to the handlers that a program set before; one of them may end the process."""
        for number in self.received:
            before = self._before.get(number)
            if callable(before) and before is not signal.default_int_handler:
                before(number, None)

    def share(self) -> None:
        """Let every rank know the signals of all: the one that acts on them may not be the one that was told."""
        for of_rank in all_objects(self.received):
            self._add(*of_rank)

    def _add(self, *numbers: signal.Signals) -> None:
        self.received += [number for number in numbers if number not in self.received]

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a process that loads data; the one it belongs to ends it
        if number == signal.SIGINT and self.received:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._add(signal.Signals(number))
        if self.at_once:
            raise Stopped
        if number == signal.SIGINT:  # written past Python's buffers, which this may have interrupted
            os.write(2, b"\nCtrl-C: finishing this step and saving; Ctrl-C again ends the run at once\n")
