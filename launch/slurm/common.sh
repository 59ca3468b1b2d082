# What the batch scripts share; each begins with `source launch/slurm/common.sh`. Submit from the repository's root.
#
# PYTHON            the interpreter [.venv/bin/python if it is there, else python3]
# MAX_FRUITLESS     requeues in a row that bring no new checkpoint before the job gives up [3]

SAVED=85 # what a run exits with that has saved on a signal and wants to go on: proteingpt/training/signals.py
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || command -v python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

# value_of --option ARGUMENTS...: what stands behind `--option` or `--option=` among the arguments; empty where nothing does.
value_of() {
    local name=$1
    shift
    while [ $# -gt 0 ]; do
        case $1 in
        "$name") echo "${2-}" && return ;;
        "$name"=*) echo "${1#*=}" && return ;;
        esac
        shift
    done
}

# progress RUN: changes whenever a stage has saved.
progress() {
    cat "$1"/*/latest "$1"/report.json 2>/dev/null | cksum
}

# finish CODE RUN: end the job with CODE, or put it back into the queue where the run has saved itself and asks for it.
# RUN/requeues holds the progress at the last requeue and how often it has stood there.
finish() {
    local code=$1 run=$2 before= times=0 now
    [ "$code" -eq "$SAVED" ] || exit "$code"
    now=$(progress "$run")
    [ -f "$run/requeues" ] && { read -r times && read -r before; } <"$run/requeues"
    [ "$now" = "$before" ] && times=$((times + 1)) || times=1
    printf '%s\n%s\n' "$times" "$now" >"$run/requeues"
    if [ "$times" -gt "${MAX_FRUITLESS:-3}" ]; then
        echo "requeued $((times - 1)) times without a new checkpoint in $run: giving up. Is the time limit longer than" \
            "start, checkpoint.every_steps and one step? Remove $run/requeues to try again." >&2
        exit 1
    fi
    echo "saved in $run; requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
    sleep 60 # the requeue ends this script: whatever it exits with first would stand as the job's end
}
