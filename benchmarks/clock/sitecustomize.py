"""Lets the wall clock of a Python process jump: first on PYTHONPATH, it is imported before anything else.

The hours by which `time.time` is wrong stand in the file that TORTURE_CLOCK names; no file, no jump.
"""

import os
import time

_path = os.environ["TORTURE_CLOCK"]
_true_time, _true_time_ns = time.time, time.time_ns


def _seconds() -> int:
    try:
        with open(_path) as file:
            return int(file.read()) * 3600
    except OSError:
        return 0


time.time = lambda: _true_time() + _seconds()
time.time_ns = lambda: _true_time_ns() + _seconds() * 10**9
