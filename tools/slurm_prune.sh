#!/usr/bin/env bash
#SBATCH --job-name=flap-stream
#SBATCH --gres=gpu:1 --cpus-per-task=8 --mem=48G --time=04:00:00
#SBATCH --requeue --open-mode=append --signal=B:TERM@30
# Prune on a cluster whose jobs are preempted or run out of time; all arguments are those of `flap-stream prune`:
#
#     sbatch tools/slurm_prune.sh Qwen/Qwen2.5-7B /scratch/pruned --ratio 0.2 --run /scratch/pruned.run
#
# SIGTERM, 30 s before the end, ends flap-stream at once with everything stored that is complete. The job is then put
# back into the queue, and the same command goes on to the same bytes. OUT and the run directory must be on a disk that
# all nodes see and that has file locks (`flap-stream doctor DIR`).
set -u
flap-stream prune "$@" &
pruning=$!
trap 'kill -TERM "$pruning" 2>/dev/null' TERM
wait "$pruning"
code=$?
while kill -0 "$pruning" 2>/dev/null; do # the trap ended the first wait
  wait "$pruning"
  code=$?
done
if [ "$code" -eq 130 ] || [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
