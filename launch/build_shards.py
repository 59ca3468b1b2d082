"""Builds shards from structure files: python launch/build_shards.py --structures DIR --out shards/NAME

From RCSB: python launch/build_shards.py --rcsb all --require_abstract --standard_letters_only --out shards/pdb
Under mpirun or srun every rank parses. The same command goes on where a killed one was.
"""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from proteingpt.console import run_command
from proteingpt.data.build import BuildError, build, format_report
from proteingpt.data.rcsb import Addresses
from proteingpt.data.shards import ShardError


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="directory for the shards, as in shards/NAME")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards that lie in --out")
    parser.add_argument(
        "--workers", type=int, default=1, help="processes that parse; under mpirun leave it at 1, the ranks parse"
    )

    add = parser.add_argument_group("where entries come from").add_argument
    add("--structures", type=Path, help="directory of mmCIF, BinaryCIF and PDB files, sub-folders included")
    add("--rcsb", metavar="all|IDS|FILE", help="fetch from RCSB: all, ids such as 1cbs,2hhb, or a file of ids")
    add("--released_until", metavar="DATE", help="with --rcsb all: entries released until then (paper: 2023-05-17)")
    add("--alphafold", metavar="DIR|ACCESSIONS", help="AlphaFold DB: a directory, or accessions to fetch")
    add("--embeddings", type=Path, metavar="DIR", help="published embeddings ID.pt, for lack of structures")
    add("--cache", type=Path, help="where fetched files are kept (default: rcsb-cache beside --out)")
    add("--requests_per_second", type=float, default=10.0, help="at most so many requests (default: 10)")
    for field in fields(Addresses):
        add(f"--{field.name}_url", default=field.default, metavar="URL", help=f"default: {field.default}")

    add = parser.add_argument_group("what is known of them beside their files").add_argument
    add("--facts", type=Path, metavar="DIR", help="mirror of RCSB's entry annotations, ID.json")
    add("--abstracts", type=Path, metavar="FILE|DIR", help="abstract.json as published, or a directory of ID.txt")
    add("--qa", type=Path, nargs="+", default=(), metavar="FILE", help="questions: qa.json as published, or generated")

    add = parser.add_argument_group("which are taken").add_argument
    add("--chain", default="A", help="author chain id (default: A), label:X for a label id, first, or all")
    add("--require_abstract", action="store_true", help="only entries with an abstract, as the paper")
    add("--standard_letters_only", action="store_true", help="only chains of the 20 standard letters, as the paper")
    add("--min_residues", type=int, default=1, help="skip chains with fewer residues")
    add("--max_residues", type=int, help="skip chains with more residues")
    add("--max_resolution", type=float, metavar="ANGSTROM", help="skip entries with a worse resolution, or none")
    add("--methods", nargs="+", default=(), metavar="METHOD", help="only these: x-ray nmr em neutron ... predicted")
    add("--seconds_per_file", type=float, default=300.0, help="skip a file that takes longer to read (default: 300)")
    add("--max_failed_share", type=float, help="stop if a larger share of entries fails, 0 to 1 (default: never)")

    add = parser.add_argument_group("what is held out for testing").add_argument
    add("--split", default="paper", help="paper (by lot, the default), date, cluster or published")
    add("--test_fraction", type=float, default=0.2, help="share of the entries that is held out (default: 0.2)")
    add("--test_from", metavar="DATE", help="with --split date: hold out entries released then or later")
    add("--clusters", type=Path, metavar="FILE", help="RCSB's clusters-by-entity-30.txt")
    add("--dataset", type=Path, metavar="FILE", help="dataset.json as published, for --split published")
    add("--seed", type=int, default=42, help="draws the lots (default: 42)")

    add = parser.add_argument_group("how they are written").add_argument
    add("--samples_per_shard", type=int, default=1000, help="samples in one tar (default: 1000)")
    add("--shard_mb", type=float, metavar="MB", help="end a tar at this size, if it comes first")
    return parser.parse_args()


def main() -> None:
    arguments = vars(parse_arguments())
    urls = {field.name: arguments.pop(f"{field.name}_url") for field in fields(Addresses)}
    arguments["cache"] = arguments["cache"] or arguments["out"].absolute().parent / "rcsb-cache"
    try:
        report = build(**arguments, addresses=urls, progress=sys.stderr)
    except (BuildError, ShardError, OSError) as error:
        sys.exit(f"build_shards: {error}")
    except KeyboardInterrupt:
        print("build_shards: interrupted; what was read is kept, the same command goes on", file=sys.stderr)
        sys.exit(130)
    if report is not None:
        print(format_report(report))


if __name__ == "__main__":
    sys.exit(run_command(main))
