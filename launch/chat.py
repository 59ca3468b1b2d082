"""python launch/chat.py --model RUN/model [--structure FILE] [--sequence LETTERS] [--question "..."] [--web] ..."""

import sys

from proteingpt.console import run_command
from proteingpt.inference.chat import main

if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
