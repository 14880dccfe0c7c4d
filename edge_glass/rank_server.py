"""Imported by the server that ranks are forked from, and by nothing else: it outlives signals that are for its ranks.

A cluster, or `kill` with a process group, tells every process to stop. A server that did would take with it how its
ranks ended.
"""

import signal

from edge_glass.local_ranks import STOP_SIGNALS

for number in STOP_SIGNALS:
    signal.signal(number, signal.SIG_IGN)
