#!/bin/bash
# Train one stage on several nodes under SLURM. Run from the project's root:
#   sbatch --nodes 4 experiments/slurm.sh imagenet sr64 [--trainer.accumulate_grad_batches 4 ...]
# SLURM sends SIGUSR1 five minutes before the time limit. The run saves a checkpoint and exits with code 138; then this
# script requeues the job, which resumes from the checkpoint. docs/cluster.md explains how to choose the resources.
#SBATCH --job-name cdm
#SBATCH --nodes 4
#SBATCH --ntasks-per-node 8
#SBATCH --gpus-per-node 8
#SBATCH --cpus-per-task 9
#SBATCH --time 24:00:00
#SBATCH --signal USR1@300
#SBATCH --requeue
#SBATCH --open-mode append
#SBATCH --output slurm-%j.txt
set -u
experiment=$1 stage=$2
shift 2

# One task per GPU; Lightning reads ranks and addresses from SLURM. batch_size is the total over all GPUs.
srun --kill-on-bad-exit=0 .venv/bin/cdm fit --config experiments/defaults.yaml \
  --config "experiments/$experiment/defaults.yaml" --config "experiments/$experiment/$stage.yaml" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "${SLURM_NTASKS_PER_NODE%%(*}" --trainer.accelerator gpu \
  --trainer.strategy ddp "$@"
code=$?
if [ "$code" -eq 138 ]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
