#!/usr/bin/env bash
# Several machines under SLURM: sbatch --nodes 2 --gpus-per-node 8 examples/slurm.sh
#SBATCH --job-name=sp-attention
#SBATCH --ntasks-per-node=1
set -euo pipefail

# torchrun starts a process for each GPU of a machine; the first machine is where they meet.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
srun torchrun \
    --nnodes "$SLURM_NNODES" \
    --nproc-per-node "${SLURM_GPUS_ON_NODE:-2}" \
    --rdzv-backend c10d \
    --rdzv-id "$SLURM_JOB_ID" \
    --rdzv-endpoint "$first:${PORT:-29500}" \
    examples/trainer.py
