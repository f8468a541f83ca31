#!/usr/bin/env bash
# GPUs of one or several nodes by SLURM, one process a GPU: submits launch/slurm.sbatch.
#   launch/slurm.sh --name=NAME --nodes=4 --gpus=8 --config=FILE.py --workdir=DIR [--config.key=value ...]
#     [--cpus=N a GPU] [--time=1-00:00:00] [--partition=P] [--account=A] [--qos=Q] [--sbatch=FLAG, any of sbatch's own]
#     [--restarts=3 after a process that was lost, in the same allocation] [--dry-run: prints the command, runs nothing]
# PYTHON names the interpreter, on a disk that all nodes have mounted. DIR is on such a disk, or gs://BUCKET/PATH (the
# package's extra gcs). The job goes back into the queue when its time is over, when it is preempted, and when a node is
# lost, and goes on from where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
name='' nodes=1 gpus='' cpus='' time='' partition='' account='' qos='' sbatch='' restarts=3
parse_flags "name nodes gpus cpus time partition account qos sbatch restarts" "" "$@"
need_name "$name"
need gpus
need_number nodes gpus
[ -z "$cpus" ] || need_number cpus
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts=$restarts: must be a whole number"
need_training '' "$((nodes * gpus))"
need_tool sbatch "launch/slurm.sh runs on a login node of the cluster"

flags=(--job-name="$name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus")
[ -z "$cpus" ] || flags+=(--cpus-per-task="$cpus")
[ -z "$time" ] || flags+=(--time="$time")
[ -z "$partition" ] || flags+=(--partition="$partition")
[ -z "$account" ] || flags+=(--account="$account")
[ -z "$qos" ] || flags+=(--qos="$qos")
[ -z "$sbatch" ] || flags+=("$sbatch")
run env "RESTARTS=$restarts" "PYTHON=${PYTHON:-python}" sbatch "${flags[@]}" launch/slurm.sbatch "${train[@]}"
