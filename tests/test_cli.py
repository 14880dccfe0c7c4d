"""What all commands begin with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMAND = "import os; from edge_glass.cli import run_command; run_command(lambda: print(os.environ['OMP_WAIT_POLICY']))"


@pytest.mark.parametrize(("given", "found"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_waiting_threads_leave_the_cores_to_others_unless_the_user_says_otherwise(given, found):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    printed = subprocess.check_output([sys.executable, "-c", COMMAND], env=environment, cwd=ROOT, text=True)
    assert printed.strip() == found
