#!/bin/bash
# Run one of the programs under mpirun, whichever it is (Open MPI, MPICH, Intel MPI), one rank per GPU. What stands
# before `--` goes to mpirun:
#
#   launch/mpi/run.sh -n 4 -- launch/train.py --ds_config ds_configs/zero2.json --recipe fast-align --data shards/x ...
#   launch/mpi/run.sh -n 6 --hostfile hosts -- launch/evaluate.py --model runs/align/model ...
#
# Over several nodes rank 0 must be on this one: start it on the first host of the list.
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MASTER_ADDR=${MASTER_ADDR:-$(hostname)}
PATH=$PATH:$(dirname "$PYTHON") # the environment's mpirun, where the system has none

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
if [ $# -lt 2 ]; then
    echo "usage: launch/mpi/run.sh -n RANKS [mpirun options] -- launch/PROGRAM.py [its options]" >&2
    exit 2
fi
shift

# Open MPI refuses root unless told otherwise, and hands ranks on other nodes only what it is told to; MPICH and Intel
# MPI hand on everything.
MPIRUN=${MPIRUN:-mpirun}
[ "$(id -u)" -ne 0 ] || export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
if "$MPIRUN" --version 2>/dev/null | grep -q "Open MPI"; then
    options+=(-x MASTER_ADDR -x OMP_NUM_THREADS)
fi
exec "$MPIRUN" "${options[@]}" "$PYTHON" "$@"
