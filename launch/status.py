"""python launch/status.py RUN [--json] [--watch SECONDS]: where a run is, and what is wrong with it"""

import sys

from proteingpt.console import run_command
from proteingpt.training.status import main

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
