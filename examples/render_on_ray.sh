#!/bin/sh
# Render on a Ray cluster that lives as long as this Slurm job: one decoder on each GPU, files and manifest written by
# the first node. The output may be a bucket. If the job is killed, submit the same again: it makes what is missing.
#
#     sbatch examples/render_on_ray.sh prompts/ --output s3://bucket/out --variations 16
#
#SBATCH --job-name=music-ar
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=4:00:00
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun ray symmetric-run --address "$head:${RAY_PORT:-6379}" --min-nodes "$SLURM_JOB_NUM_NODES" -- \
    music-ar render "$@" --ray auto
