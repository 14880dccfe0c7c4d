"""What the commands share: messages instead of tracebacks for everything that the user can mend."""

import os
import sys
from collections.abc import Callable


def run_command(main: Callable[[], None]) -> None:
    """Run a Hydra main function; on an error of the user's print one message and exit with code 2.

    Anything else keeps its traceback and exits with code 1.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from edge_glass.config import explain, explain_override
    from edge_glass.errors import UserError

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra would print and exit by itself, without saying what would be valid
    try:
        main()
    except UserError as error:
        message = str(error)
    except HydraException as error:
        message = explain_override(error)
    except OmegaConfBaseException as error:
        message = explain(error)
    else:
        return
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
