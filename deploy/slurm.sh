#!/bin/sh
# Train on four hosts of a Slurm cluster until the model is there, from the top of the repository:
#
#     sbatch deploy/slurm.sh /shared/runs/small --data /shared/maestro --minutes 600 --batch-size 256
#
# Two minutes before the time limit, the run saves a checkpoint and queues itself again.
#SBATCH --job-name=music-ar
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=4:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
srun sh deploy/train_until_done.sh "$@"
code=$?
[ "$code" -eq 75 ] && exec scontrol requeue "$SLURM_JOB_ID"
exit "$code"
