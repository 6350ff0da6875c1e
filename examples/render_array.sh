#!/bin/sh
# Render on many machines without Ray: a Slurm job array whose tasks share a folder. Each task takes pieces that no
# other has taken. If some are killed, submit the same again: it makes what is missing.
#
#     sbatch examples/render_array.sh prompts/ --output /shared/out --variations 16
#
#SBATCH --job-name=music-ar
#SBATCH --array=0-7
#SBATCH --gpus-per-task=1
#SBATCH --time=4:00:00
exec music-ar render "$@"
