"""Signals that ask a run to stop: noted when they come, obeyed between two steps."""

import os
import signal
import threading
from types import FrameType
from typing import Any

from edge_glass.errors import Stopped
from edge_glass.local_ranks import STOP_SIGNALS


class StopSignals:
    """While it is open, SIGTERM, SIGUSR1, SIGUSR2 and Ctrl-C are noted instead of ending the process.

    Ctrl-C after any of them ends the process at once. Handlers that were there before, such as the one with which
    submitit has SLURM queue a job again, come back at the end, and can be called with `hand_on`.

    Attributes:
        received: the first signal that came.
        at_once: set when there is nothing left to save: the next signal raises `Stopped` where it finds the process.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
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
        """Give the signal to the handler that was there before, if a program set one; it may end the process."""
        before = self._before.get(self.received) if self.received is not None else None
        if callable(before) and before is not signal.default_int_handler:
            before(self.received, None)

    def _note(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a process that loads data; the one it belongs to ends it
        if number == signal.SIGINT and self.received is not None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.received = self.received or signal.Signals(number)
        if self.at_once:
            raise Stopped
        if number == signal.SIGINT:  # written past Python's buffers, which this may have interrupted
            os.write(2, b"\nCtrl-C: finishing this step and saving; Ctrl-C again ends the run at once\n")
