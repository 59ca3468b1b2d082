"""python launch/estimate.py --recipe paper-instruct --cluster 2xH100-80,2xA100-40: memory, speed, hours, beforehand."""

import sys

from proteingpt.cluster.command import main
from proteingpt.console import run_command

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
