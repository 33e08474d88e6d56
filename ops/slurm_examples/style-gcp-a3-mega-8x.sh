#!/bin/bash
# pgm-scale launch train configs/owt.yaml folder=/shared/runs/style-gcp-a3-mega-8x --cluster
# configs/clusters/gcp-a3-mega-8x.yaml --nodes 2 --name style-gcp-a3-mega-8x
# submits this, and with --dry-run prints it; without slurm.python, the interpreter is the one that launches.
# Written by `python -m ops.slurm_examples`. The command itself is in the pickle that launch writes into the run
# folder: to use the text alone, put `-m pgm_scale.cli train CONFIG ...` in the place of `-u -m
# submitit.core._submit FOLDER`.

# Parameters
#SBATCH --cpus-per-task=96
#SBATCH --error=/shared/runs/style-gcp-a3-mega-8x/jobs/%j_0_log.err
#SBATCH --exclusive
#SBATCH --gpus-per-node=8
#SBATCH --job-name=style-gcp-a3-mega-8x
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/shared/runs/style-gcp-a3-mega-8x/jobs/%j_0_log.out
#SBATCH --partition=a3mega
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=2880

# setup
export GLOO_SOCKET_IFNAME=enp0s12
export NCCL_LIB_DIR=/var/lib/tcpxo/lib64
source $NCCL_LIB_DIR/nccl-env-profile.sh
export LD_LIBRARY_PATH=$NCCL_LIB_DIR:${LD_LIBRARY_PATH:-}
export NCCL_SOCKET_IFNAME=enp0s12 NCCL_FASTRAK_CTRL_DEV=enp0s12
export NCCL_FASTRAK_IFNAME=enp6s0,enp7s0,enp13s0,enp14s0,enp134s0,enp135s0,enp141s0,enp142s0
export NCCL_FASTRAK_LLCM_DEVICE_DIRECTORY=/dev/aperture_devices
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
srun --unbuffered --output /shared/runs/style-gcp-a3-mega-8x/jobs/%j_%t_log.out --error /shared/runs/style-gcp-a3-mega-8x/jobs/%j_%t_log.err --wait=120 --kill-on-bad-exit=0 --cpus-per-task=96 /shared/pgm-scale/.venv/bin/python -u -m submitit.core._submit /shared/runs/style-gcp-a3-mega-8x/jobs


# teardown
code=$?
state="$(scontrol --oneliner show job "$job")"
commands="$(/shared/pgm-scale/.venv/bin/python -m launchers.after /shared/runs/style-gcp-a3-mega-8x/jobs --exit-code "$code" --state "$state" --restarts 3)"
eval "$commands"
exit "$code"
