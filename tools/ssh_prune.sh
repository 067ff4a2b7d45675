#!/usr/bin/env bash
# Prune on a machine that is reached by SSH and may go away; arguments after HOST and DIR are those of `flap-stream prune`,
# with paths as seen from DIR on that machine:
#
#     tools/ssh_prune.sh me@spot-gpu /data/job Qwen/Qwen2.5-7B pruned --ratio 0.2 --calibration text.txt
#
# When the connection is lost, or the machine ends the job as it is preempted, the same command is run again once the
# machine is back; the job goes on where it was, to the same bytes. Any other failure ends this script.
set -u
host=$1 place=$2
shift 2
command="cd $(printf '%q' "$place") && exec flap-stream prune $(printf '%q ' "$@")"
# A terminal there ends the job with the connection, so that nothing holds the run directory when the next one begins.
until ssh -tt -o ServerAliveInterval=15 "$host" "$command"; do
  code=$?
  case $code in
    129 | 130 | 137 | 143 | 255) sleep "${RETRY_SECONDS:-30}" ;; # a signal; 255: ssh itself
    *) exit "$code" ;;
  esac
done
