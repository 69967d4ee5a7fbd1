"""The command line as a process: `python -m orchestrator`, and `dino` where it is installed."""

import os
import sys
from typing import NoReturn

from orchestrator.cli import FAILED, INTERRUPTED, main


def run() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    code = main()
    if code in (FAILED, INTERRUPTED):
        # A thread may still train, and torch aborts a process whose Python winds up meanwhile.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run()
