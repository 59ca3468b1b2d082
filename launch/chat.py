"""python launch/chat.py --model RUN/model [--structure FILE] [--sequence LETTERS] [--question "..." [--json]] [--web]"""

import sys

from proteingpt.inference.chat import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
