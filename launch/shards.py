"""Checks and describes shards: python launch/shards.py verify DIR, python launch/shards.py info DIR"""

import argparse
import sys
from pathlib import Path

from proteingpt.console import run_command
from proteingpt.data.report import PICTURE_NAME, draw_info, format_info, read_info
from proteingpt.data.shards import ShardError, find_faults, replacing


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser("verify", help="compare every byte and count, decode every sample; 1 if any is broken")
    info = commands.add_parser("info", help="show funnel, chain lengths and questions, and draw them")
    for command in (verify, info):
        command.add_argument("directory", type=Path, metavar="DIR")
    info.add_argument("--picture", type=Path, metavar="FILE", help=f"where to draw (default: DIR/{PICTURE_NAME})")
    return parser.parse_args()


def verify(directory: Path) -> int:
    faults = find_faults(directory)
    print("\n".join(faults) or f"{directory}: whole")
    return 1 if faults else 0


def info(directory: Path, picture: Path | None) -> int:
    found, picture = read_info(directory), picture or directory / PICTURE_NAME
    print(format_info(found))
    with replacing(picture) as file:
        file.write(draw_info(found).encode())
    print(f"drawn: {picture}")
    return 0


def main() -> int:
    arguments = parse_arguments()
    try:
        if arguments.command == "verify":
            return verify(arguments.directory)
        return info(arguments.directory, arguments.picture)
    except (ShardError, OSError) as error:
        sys.exit(f"shards: {error}")


if __name__ == "__main__":
    sys.exit(run_command(main))
