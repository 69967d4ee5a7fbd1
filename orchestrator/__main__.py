"""The command line as a process: `python -m orchestrator`, and `dino` where it is installed."""

import os
import sys
from typing import NoReturn

from orchestrator.cli import main


def run() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is closed by now. A thread that still trains, or one of a library, must not turn the end into an abort:
    # torch ends a process so whose Python winds up meanwhile.
    os._exit(code)


if __name__ == "__main__":
    run()
