#!/bin/bash
# Pretraining under SLURM, in several jobs if necessary: sbatch launch/slurm/pretrain.sh RECIPE run.out=runs/mine ...
#
# SLURM starts one process for each GPU, without torchrun or accelerate launch, so signals reach the processes and their
# exit status reaches this script. Two minutes before the time limit SLURM sends SIGUSR1: the run
# saves and ends with exit status 75, and this script requeues the job. Status 0 is a finished run; any other status is
# an error that a new attempt would not solve.
#SBATCH --job-name=selfvil
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=10
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append

export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK

# --wait: when one process has ended, the others get two minutes to save before SLURM ends them.
srun --wait=120 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
    export LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES))
    exec python launch/pretrain.py "$@"' selfvil "$@"
status=$?

if [ $status -eq 75 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
