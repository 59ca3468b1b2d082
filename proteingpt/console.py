"""Commands whose output may be piped into `head`: they end without a word when nobody reads on, as other tools do.

Not by the signal SIGPIPE, which would end a command at a lost network connection as well.
"""

import os
import sys
from collections.abc import Callable

# As a shell reports a program that SIGPIPE (13) ended.
NOBODY_READS = 128 + 13


class _Output:
    """Standard output, whose closed pipe ends the command; an OSError would be taken for a fault of its work."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._or_end(self._stream.write, text)

    def flush(self) -> None:
        self._or_end(self._stream.flush)

    def _or_end(self, call: Callable, *args):
        try:
            return call(*args)
        except BrokenPipeError:
            # What is still buffered must have somewhere to go when Python closes the stream.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
            raise SystemExit(NOBODY_READS) from None


def run_command(main: Callable, *args):
    """What main(*args) returns, for sys.exit; SystemExit(141) if the reader of its output goes away."""
    if sys.stdout is None:  # started without one
        return main(*args)
    sys.stdout = _Output(sys.stdout)
    try:
        return main(*args)
    finally:
        sys.stdout.flush()
