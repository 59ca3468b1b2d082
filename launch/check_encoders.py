"""Checks encoder weights: python launch/check_encoders.py --esm2 FILE --esm-if FILE [--structure FILE --embedding FILE]

The published golden value: PDB entry 135L, chain A, and the 135L.pt of ProteinChat's or ProteinGPT's data.
"""

import argparse
import sys
from pathlib import Path

import torch

from proteingpt.console import run_command
from proteingpt.encoders.check import check_encoders, format_result


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--esm2", help="ESM-2: a published name, a fair-esm .pt file, or a Hugging Face directory")
    add("--esm-if", dest="esm_if1", help="ESM-IF1: the published name, or the fair-esm .pt file")
    add("--weights_dir", default="weights", help="where published names are looked for first [weights]")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 [cpu]")
    add("--dtype", default="float32", choices=("float32", "float16", "bfloat16"), help="precision to check [float32]")
    add("--structure", type=Path, help="structure file of the golden value, mmCIF, BinaryCIF or PDB, plain or .gz")
    add("--chain", default="A", help="its author chain id [A]")
    add("--embedding", type=Path, help="published ESM-IF1 embedding of that chain (.pt)")
    return parser.parse_args()


def main() -> int:
    options = vars(parse_arguments())
    options["dtype"] = getattr(torch, options["dtype"])
    all_passed = True
    try:
        for result in check_encoders(**options):
            print(format_result(result), flush=True)
            all_passed &= result.passed
    except ValueError as error:
        sys.exit(f"check_encoders: {error}")
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
