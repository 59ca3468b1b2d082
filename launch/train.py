"""deepspeed launch/train.py --ds_config ds_configs/zero2.json [--recipe R] [--data DIR] [--output DIR] ..."""

import sys

from proteingpt.training.restarts import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
