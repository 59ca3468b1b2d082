"""deepspeed launch/preflight.py [--data DIR] [--output DIR], or under torchrun, mpirun, srun: is this cluster fit?"""

import sys

from proteingpt.cluster.preflight import main
from proteingpt.console import run_command

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
