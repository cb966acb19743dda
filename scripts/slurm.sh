#!/usr/bin/env bash
# A run on a SLURM cluster that outlives its time limit. Two minutes before the end SLURM sends SIGTERM, the run
# writes a checkpoint and calls itself preempted in status.json, and the job goes back into the queue, where the
# same command continues it bit for bit.
#
#   sbatch --gpus-per-node=4 --time=4:00:00 scripts/slurm.sh NAME [overrides]
#   sbatch --gpus-per-node=8 scripts/slurm.sh mine experiment=gsm8k_smollm2 output_root=/shared/outputs
#
#SBATCH --job-name=sft
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
name=${1:?the name of the run, then overrides}
shift
root=outputs
for word in "$@"; do [[ $word == output_root=* ]] && root=${word#output_root=}; done

srun "${PYTHON:-python}" -m torch.distributed.run --standalone --nproc_per_node "${SLURM_GPUS_ON_NODE:-1}" \
  -m cs336_alignment.cli train run_name="$name" "$@"
code=$?
# Launchers flatten statuses to 1; the run's own file tells a stop from a failure.
if grep -q '"state": "preempted"' "$root/$name/status.json"; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
