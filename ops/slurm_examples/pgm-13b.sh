#!/bin/bash
# pgm-scale launch train configs/scale/pgm-13b.yaml folder=/shared/runs/pgm-13b --cluster
# configs/clusters/h100-8x.yaml --nodes 16 --name pgm-13b
# submits this, and with --dry-run prints it; without slurm.python, the interpreter is the one that launches.
# Written by `python -m ops.slurm_examples`. The command itself is in the pickle that launch writes into the run
# folder: to use the text alone, put `-m pgm_scale.cli train CONFIG ...` in the place of `-u -m
# submitit.core._submit FOLDER`.

# Parameters
#SBATCH --account=my-project
#SBATCH --cpus-per-task=12
#SBATCH --error=/shared/runs/pgm-13b/jobs/%j_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=pgm-13b
#SBATCH --mem=0
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/pgm-13b/jobs/%j_0_log.out
#SBATCH --partition=gpu
#SBATCH --qos=normal
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
# Neither a signal nor an exit code may end this script before what comes after srun.
trap : TERM USR2
set +eu
# The number alone may be that of a whole array.
job="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_JOB_ID:+_$SLURM_ARRAY_TASK_ID}"
# A training starts a save only if it fits into the time that is left.
end="$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs "$job" --format %e)"
if [ -n "$end" ]; then export SLURM_JOB_END_TIME="$(date -d "$end" +%s)"; fi
# Rank 0 runs on this node.
MASTER_ADDR="$SLURMD_NODENAME"; getent hosts "$MASTER_ADDR" > /dev/null || MASTER_ADDR="$(hostname)"
# A port that nobody listens on, another one after each restart.
port="$(( 20000 + (SLURM_JOB_ID * 131 + ${SLURM_RESTART_COUNT:-0} * 7919) % 12000 ))"
while (exec 3<> "/dev/tcp/127.0.0.1/$port") 2> /dev/null; do port="$(( port + 1 ))"; done
export MASTER_ADDR MASTER_PORT="$port"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /shared/runs/pgm-13b/jobs/%j_%t_log.out --error /shared/runs/pgm-13b/jobs/%j_%t_log.err --wait=120 --kill-on-bad-exit=0 --cpus-per-task=12 /shared/pgm-scale/.venv/bin/python -u -m submitit.core._submit /shared/runs/pgm-13b/jobs


# teardown
code=$?
state="$(scontrol --oneliner show job "$job")"
commands="$(/shared/pgm-scale/.venv/bin/python -m launchers.after /shared/runs/pgm-13b/jobs --exit-code "$code" --state "$state" --restarts 3)"
eval "$commands"
exit "$code"
