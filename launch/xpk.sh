#!/usr/bin/env bash
# Slices of TPU in a GKE cluster that xpk made (xpk cluster create, docs/pods.md).
#   launch/xpk.sh --name=NAME --cluster=NAME --zone=ZONE --image=IMAGE --topology=v5p:4x4x8 [--slices=N]
#     --config=FILE.py --workdir=gs://BUCKET/DIR [--config.key=value ...]
#     [--project=ID] [--restarts=100] [--priority=medium] [--dry-run: prints the command, runs nothing]
# A workdir that is a folder is on a storage that the cluster has (xpk storage attach, with auto-mount). The training is
# started again after every exit code but 2 (bad input).
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
name='' cluster='' zone='' image='' topology='' slices=1 project='' restarts=100 priority=medium
parse_flags "name cluster zone image topology slices project restarts priority" "" "$@"
need_name "$name"
need cluster zone image
need_number slices restarts
read_topology "$topology"
need_training
need_tool xpk "pip install xpk, and kubectl with it"

# exec: xpk sends its signals to a shell of its own, which has to be the trainer. 127 to 255 xpk starts again by itself.
flags=(--cluster="$cluster" --workload="$name" --zone="$zone" --docker-image="$image")
[ -z "$project" ] || flags+=(--project="$project")
flags+=(--tpu-type="$(accelerator_type)" --num-slices="$slices" --priority="$priority")
flags+=(--max-restarts="$restarts" --restart-on-exit-codes='1,75' --termination-grace-period-seconds=300)
command="exec $(quote python -m gigagan_jax.train "${train[@]}" --distributed)"
run xpk workload create "${flags[@]}" --command="${command//\$(/\$\$(}" # $( would be a variable to Kubernetes
