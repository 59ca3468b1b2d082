"""python launch/evaluate.py --model RUN/model --data shards/NAME --split test --out report/"""

import sys

from proteingpt.console import run_command
from proteingpt.evaluation.run import main

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
