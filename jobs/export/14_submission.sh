#!/bin/bash

# Parameters
#SBATCH --cpus-per-task=1
#SBATCH --dependency=afterok:13
#SBATCH --error=/work/main/jobs/export/%j_0_log.err
#SBATCH --job-name=export
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/work/main/jobs/export/%j_0_log.out
#SBATCH --partition=main
#SBATCH --requeue
#SBATCH --signal=USR2@30
#SBATCH --time=30

# setup
export OMP_NUM_THREADS=1
export GLOO_SOCKET_IFNAME=lo
# Without it, a signal would end this script before what comes after srun.
trap : TERM USR2
# A training starts a save only if it fits into the time that is left.
export SLURM_JOB_END_TIME="${SLURM_JOB_END_TIME:-$(date -d "$(squeue --noheader --jobs "$SLURM_JOB_ID" --format %e)" +%s)}"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /work/main/jobs/export/%j_%t_log.out --error /work/main/jobs/export/%j_%t_log.err --wait=20 --kill-on-bad-exit=0 --cpus-per-task=1 /work/main/.venv/bin/python -u -m submitit.core._submit /work/main/jobs/export


# teardown
code=$?
state="$(scontrol --oneliner show job "$SLURM_JOB_ID")"
commands="$(/work/main/.venv/bin/python -m launchers.after /work/main/jobs/export --exit-code "$code" --state "$state" --restarts 3)"
eval "$commands"
exit "$code"
