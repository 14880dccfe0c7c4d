import os
import signal
import subprocess
import sys

import pytest

from edge_glass.distributed import current_ranks
from edge_glass.errors import RESUMABLE, Stopped
from edge_glass.training.signals import STOP_SIGNALS, StopSignals
from tests.ranks import run_ranks

ALONE = """
import os, signal
from edge_glass.training.signals import StopSignals
with StopSignals() as signals:
    os.kill(os.getpid(), signal.{first})
    assert signals.received == [signal.{first}]
    print("went on", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("too late", flush=True)
"""


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = [signal.getsignal(other) for other in STOP_SIGNALS]
    with StopSignals() as signals:
        assert signals.received == []
        os.kill(os.getpid(), number)
        assert signals.received == [number]
    assert [signal.getsignal(other) for other in STOP_SIGNALS] == before


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_another_ctrl_c_ends_the_process_at_once(first):
    ended = subprocess.run([sys.executable, "-c", ALONE.format(first=first)], capture_output=True, text=True)
    assert ended.stdout == "went on\n" and ended.returncode == -signal.SIGINT
    assert ended.stderr.count("Ctrl-C again ends the run at once") == (first == "SIGINT")


def test_once_everything_is_saved_a_signal_stops_where_it_comes():
    with pytest.raises(Stopped) as stopped, StopSignals() as signals:
        signals.at_once = True
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == RESUMABLE


def test_the_handler_that_was_there_before_gets_the_signal_in_the_end(monkeypatch):
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: heard.append(number))
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGTERM)  # a cluster may send more than one
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGUSR2)
            assert heard == []
        signals.hand_on()
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_default_handler_is_no_one_to_hand_a_signal_to():
    with StopSignals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
    signals.hand_on()
    StopSignals().hand_on()


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in ranks, whose parent decides about Ctrl-C
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == []
    finally:
        signal.signal(signal.SIGINT, before)


def hears_what_only_the_second_rank_was_told() -> list[int]:
    heard: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    with StopSignals() as signals:
        if current_ranks().rank == 1:
            os.kill(os.getpid(), signal.SIGUSR2)
        signals.share()
    signals.hand_on()
    return heard


def test_the_rank_that_acts_on_a_signal_need_not_be_the_one_that_was_told():
    assert run_ranks(hears_what_only_the_second_rank_was_told) == [[signal.SIGUSR2]] * 2
