"""What the commands share: messages instead of tracebacks for everything that the user can mend."""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from edge_glass.errors import Stopped, UserError

SECONDS_FOR_THE_FIRST_RANK = 10


def run_command(main: Callable[[], None], at_the_end: Callable[[], None] = lambda: None) -> None:
    """Run a Hydra main function; on an error of the user's print one message and exit with code 2.

    A defect keeps its traceback and exits with code 1. A signal exits with code 75, Ctrl-C with 130; a run that is
    training by then saves itself first (`training/signals.py`).

    Args:
        main: the function.
        at_the_end: called however `main` ends, before the message.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from edge_glass.config import explain, explain_override

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, _stop)
    # Threads that wait for each other by spinning take the cores from whatever else runs; torch reads this on import.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit by itself, without saying what would be valid
    try:
        try:
            main()
        finally:
            at_the_end()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        refuse(error)
    except HydraException as error:
        refuse(explain_override(error))
    except OmegaConfBaseException as error:
        refuse(explain(error))


def refuse(message: object) -> NoReturn:
    """Print one message and exit with code 2; of the ranks of an outer torchrun the first speaks for all."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # torchrun ends all ranks as soon as one has ended, so the first must come first; a rank that fails alone is
        # still here after that and speaks for itself.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(SECONDS_FOR_THE_FIRST_RANK)
        message = f"rank {rank}: {message}"
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def _stop(number: int, _: FrameType | None) -> NoReturn:
    os.write(2, f"{signal.Signals(number).name}: stopped\n".encode())
    raise Stopped
