#!/usr/bin/env bash
# Slurm: one torchrun on every node of the job, RANKS ranks on each.
# usage: sbatch --nodes 2 scripts/torchrun_slurm.sh MODEL --placement p.json --prompts FILE --json
#SBATCH --job-name=moe-runtime
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
set -euo pipefail

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# At the end of its time Slurm sends SIGTERM, and the ranks end at their next token.
exec srun --ntasks-per-node 1 torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "${RANKS:-2}" \
    --rdzv-backend c10d --rdzv-endpoint "$head:${PORT:-29500}" --rdzv-id "$SLURM_JOB_ID" \
    -m moe_runtime generate "$@"
