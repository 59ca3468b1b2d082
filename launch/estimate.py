"""python launch/estimate.py --recipe paper-instruct --cluster '2xH100-80,2xA100-40': memory, speed and hours, before a run."""

import sys

from proteingpt.cluster.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
