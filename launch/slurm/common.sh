# What the batch scripts share; each begins with `source launch/slurm/common.sh`. Submit from the repository's root.
#
# launch/slurm/site.sh   read first where you made one, for what your cluster wants: module load, NCCL_SOCKET_IFNAME
# PYTHON                 the interpreter [.venv/bin/python if it is there, else python3]
# MAX_FRUITLESS          requeues in a row that bring nothing new before the job gives up [3]
#
# sbatch reads SBATCH_ACCOUNT and SBATCH_PARTITION, and its command line counts before a script's own lines.

[ ! -f launch/slurm/site.sh ] || source launch/slurm/site.sh
SAVED=85 # what a run exits with that has saved on a signal and wants to go on: proteingpt/training/signals.py
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
# Since SLURM 22.05 srun does not take --cpus-per-task over from sbatch: a task would have one core for all its threads.
cores=${SLURM_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK_HET_GROUP_0-}}
[ -z "$cores" ] || export SRUN_CPUS_PER_TASK=$cores
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${cores:-1}}

# value_of --option ARGUMENTS...: what stands behind `--option` or `--option=` among the arguments; fails without it.
value_of() {
    local name=$1
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        "$name") [ -n "${2-}" ] && echo "$2" && return ;;
        "$name"=?*) echo "${1#*=}" && return ;;
        esac
        shift
    done
    echo "give $name DIR: a job that comes back must find its work" >&2
    return 2
}

# restartable PLACE COMMAND...: for what keeps its work in PLACE as it goes. A minute before the job's time is over this
# script is told (#SBATCH --signal=B:USR1@60), and when the job is preempted the command is: then the job is requeued.
restartable() {
    local place=$1 told= code
    shift
    trap told=1 USR1
    "$@" &
    wait $!
    code=$?
    if [ -n "$told" ]; then # it may have ended of itself just now
        kill $! 2>/dev/null && told=ended
        wait $!
        code=$?
    fi
    # 143: of itself by SIGTERM.
    [ "$told" != ended ] && [ "$code" -ne 143 ] || code=$SAVED
    finish "$code" "$place"
}

# finish CODE PLACE: end the job with CODE, or put it back into the queue where it has saved itself and asks for it.
# `kept`, which each script defines, prints what changes whenever work is kept. A file beside the log holds that, as it
# was at the last requeue, and how often it has been so.
finish() {
    local code=$1 place=$2 notes=requeues-$SLURM_JOB_ID job=$SLURM_JOB_ID before= times=0 now
    [ "$code" -eq "$SAVED" ] || { rm -f "$notes" && exit "$code"; }
    now=$(kept 2>/dev/null | cksum)
    [ -f "$notes" ] && { read -r times && read -r before; } <"$notes"
    [ "$now" = "$before" ] && times=$((times + 1)) || times=1
    if [ "$times" -gt "${MAX_FRUITLESS:-3}" ]; then
        rm -f "$notes"
        echo "requeued $((times - 1)) times without anything new in $place: giving up. Is the time limit longer than" \
            "the start and the first piece of work (a step of training) take? The same command goes on from there." >&2
        exit 1
    fi
    printf '%s\n%s\n' "$times" "$now" >"$notes"
    # By its own number, the first task of an array would be requeued with all the others.
    [ -z "${SLURM_ARRAY_JOB_ID-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    echo "saved in $place; requeueing job $job"
    # The requeue ends this script: whatever it exits with before that would stand as the job's end.
    scontrol requeue "$job" && sleep 300
    echo "job $job was not requeued: submit the same command again, it goes on from there" >&2
    exit "$SAVED"
}
