"""Builds shards from structure files: python launch/build_shards.py --structures DIR --out shards/NAME"""

import argparse
import sys
from pathlib import Path

from proteingpt.data.build import BuildError, build, format_report
from proteingpt.data.shards import ShardError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--structures", type=Path, required=True, help="directory of mmCIF, BinaryCIF and PDB files, plain or .gz")
    add("--out", type=Path, required=True, help="directory for the shards, as in shards/NAME")
    add("--chain", default="A", help="author chain id, label:X for a label id, first, or all")
    add("--test_fraction", type=float, default=0.2, help="share of the entries that is held out for testing")
    add("--seed", type=int, default=42, help="decides which entries are held out")
    add("--samples_per_shard", type=int, default=1000, help="samples in one tar")
    add("--min_residues", type=int, default=1, help="skip chains with fewer residues")
    add("--max_residues", type=int, default=None, help="skip chains with more residues (None: no limit)")
    add("--max_failed_share", type=float, help="stop if a larger share of entries fails, 0 to 1 (None: never)")
    add("--overwrite", action="store_true", help="replace the shards that lie in --out")
    add("--workers", type=int, default=1, help="processes that parse; under mpirun leave it at 1, the ranks parse")
    return parser.parse_args()


def main() -> None:
    try:
        report = build(**vars(parse_arguments()), progress=sys.stderr)
    except (BuildError, ShardError) as error:
        sys.exit(f"build_shards: {error}")
    if report is not None:
        print(format_report(report))


if __name__ == "__main__":
    main()
