#!/usr/bin/env bash
# sbatch --nodes 2 configs/distributed/slurm.sh rl configs/llada/cj_gsm8k.yaml [flags]
# sbatch --nodes 1 configs/distributed/slurm.sh eval --model GSAI-ML/LLaDA-8B-Instruct --task gsm8k --limit None
#SBATCH --job-name unmask
#SBATCH --ntasks-per-node 1
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 32
#SBATCH --output unmask-%j.log
set -euo pipefail
if [ $# -lt 1 ]; then
  echo "give an unmask command: sbatch $0 rl CONFIG" >&2
  exit 2
fi
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# One launcher a node (srun does not take --cpus-per-task from sbatch by itself); it starts a process on every GPU. A job that was cut off goes on when it is submitted again.
srun --cpus-per-task "$SLURM_CPUS_PER_TASK" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
  --rdzv-endpoint "$first:29500" -m unmask "$@"
