"""Writes what the frozen encoders make of every protein: python launch/cache_embeddings.py --data DIR --out DIR-esm

Under deepspeed, torchrun, srun or mpirun every rank encodes. The same command goes on where a killed one was. Training
with --embeddings DIR-esm then loads no encoder. --estimate says what it costs, and whether it pays.
"""

import argparse
import sys

from proteingpt.encoders.cache_command import main


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="directory of data shards; all its splits are encoded")
    parser.add_argument("--out", help="directory for the embeddings, seen by every rank, as in shards/NAME-esm")
    parser.add_argument("--overwrite", action="store_true", help="replace the embeddings that lie in --out")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it

    add = parser.add_argument_group("encoders").add_argument
    add("--esm2", default="esm2_t36_3B_UR50D", help="published name, .pt file, Hugging Face directory, or none [%(default)s]")
    add("--esm-if", dest="esm_if1", default="esm_if1_gvp4_t16_142M_UR50", help="published name, .pt file, or none [%(default)s]")
    add("--weights_dir", default="weights", help="where published names are looked for first [%(default)s]")
    add("--esm2_layer", type=int, help="ESM-2's layer whose rows are kept [the last]")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"), help="of encoders and rows [%(default)s]")
    add("--backend", default="fast", choices=("fast", "reference"), help="our own forward, or fair-esm's [%(default)s]")
    add("--together", action="store_true", help="several proteins in a forward: faster, equal to training's but for rounding")
    add("--from-published", metavar="DIR", help="rows from published ESM-IF1 files ID.pt instead: structure only")

    add = parser.add_argument_group("estimate").add_argument
    add("--estimate", action="store_true", help="write nothing: say bytes and hours, and which is better")
    add("--rates", metavar="R,R,...", help="residues/s of each rank [measured now]")
    add("--ranks", type=int, help="ranks like this one [those that were started]")
    add("--epochs", type=int, default=10, help="epochs of training [%(default)s]")
    add("--readings", type=float, default=1, help="times that an epoch reads a protein: its groups of questions [%(default)s]")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main(parse_arguments()))
