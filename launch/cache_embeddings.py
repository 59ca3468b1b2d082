"""Writes what the frozen encoders make of every protein: python launch/cache_embeddings.py --data DIR --out DIR-esm

Under deepspeed, torchrun, srun or mpirun every rank encodes. The same command goes on where a killed one was, and helps
one that is at work, from any node that sees the directory. Training with --embeddings DIR-esm then loads no encoder.
--estimate says what it costs, and whether it pays.
"""

import argparse
import sys

from proteingpt.cluster.spec import ClusterError, parse_cluster
from proteingpt.console import run_command
from proteingpt.encoders.cache_command import main


def cluster(text: str):
    try:
        return parse_cluster(text)
    except ClusterError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def rates(text: str) -> list[float]:
    return [float(rate) for rate in text.split(",")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory of data shards; all its splits are encoded")
    parser.add_argument("--out", help="directory for the embeddings, seen by every rank, as in shards/NAME-esm")
    parser.add_argument("--overwrite", action="store_true", help="remove other embeddings from --out")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it

    add = parser.add_argument_group("encoders").add_argument
    where = "published name, .pt file, or none [%(default)s]"
    add("--esm2", default="esm2_t36_3B_UR50D", help=f"Hugging Face directory, {where}")
    add("--esm-if", dest="esm_if1", default="esm_if1_gvp4_t16_142M_UR50", help=where)
    add("--weights_dir", default="weights", help="where published names are looked for first [%(default)s]")
    add("--esm2_layer", type=int, help="ESM-2's layer whose rows are kept [the last]")
    dtypes = ("bfloat16", "float16", "float32")
    add("--dtype", default="bfloat16", choices=dtypes, help="of encoders and rows [%(default)s]")
    add("--backend", default="fast", choices=("fast", "reference"), help="our own forward, or fair-esm's [%(default)s]")
    add("--together", action="store_true", help="several proteins in a forward: faster, equal but for rounding")
    add("--from-published", metavar="DIR", help="rows from published ESM-IF1 files ID.pt instead: structure only")

    add = parser.add_argument_group("estimate").add_argument
    add("--estimate", action="store_true", help="write nothing: say bytes and hours, and which is better")
    add("--cluster", type=cluster, help="2xH100-80,2xA100-40 (count, name, GiB), or .yaml [the ranks started]")
    add("--rates", type=rates, metavar="R,...", help="residues/s of each rank, or kind of --cluster [measured now]")
    add("--ranks", type=int, help="ranks like this one [those that were started]")
    add("--epochs", type=int, default=10, help="epochs of training [%(default)s]")
    add("--readings", type=float, default=1, help="times that an epoch reads a protein: its groups of questions [1]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_command(main, parse_arguments()))
