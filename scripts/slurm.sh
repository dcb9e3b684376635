#!/usr/bin/env bash
# Train on the nodes of a Slurm job, one process per GPU:
#   sbatch --nodes 4 scripts/slurm.sh ds_configs/mask_rcnn_vitdet_large_64_adamw.json [key=value ...]
# Submit from the checkout, on a file system that all nodes share; options of sbatch override those below.
# Two minutes before the time limit every rank receives USR1. A job that was stopped in this way (exit code 5) or
# lost a rank (4) is requeued and resumes from the newest checkpoint; Slurm itself requeues after a node failure.
#SBATCH --job-name=giantdet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -uo pipefail

if [ $# = 0 ]; then
    echo "slurm.sh: give the run's JSON: sbatch scripts/slurm.sh ds_configs/X.json" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
restarts="${SLURM_RESTART_COUNT:-0}"
python="$PWD/.venv/bin/python"
[ -x "$python" ] || python=python
echo "slurm.sh: job ${SLURM_JOB_ID:-} on ${SLURM_JOB_NODELIST:-this host}, start $((restarts + 1))"

# --kill-on-bad-exit: if one rank fails, end the ranks that wait for it.
srun --kill-on-bad-exit=1 --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" \
    "$python" -u scripts/train.py --deepspeed_config "$@"
code=$?
if { [ $code = 4 ] || [ $code = 5 ]; } && [ "$restarts" -lt "${MAX_RESTARTS:-50}" ]; then
    echo "slurm.sh: exit code $code, requeued"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
