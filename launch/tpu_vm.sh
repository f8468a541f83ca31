#!/usr/bin/env bash
# A TPU VM, a slice of many, or several slices, by gcloud.
#   launch/tpu_vm.sh VERB --name=NAME --zone=ZONE [flags] [--config=FILE.py --workdir=DIR --config.key=value ...]
# Verbs
#   create    asks for the machines     --topology=v5p:4x4x8 [--slices=N] [--spot | --reserved] [--runtime=VERSION]
#             (in a queue; --direct: at once or not at all) [--service_account=EMAIL] [--network=N] [--subnetwork=N]
#   wait      until they are there
#   install   the code of a commit and its dependencies [--commit=REV] [--repo=URL to clone instead of copying]
#             and a disk at /mnt/gigagan if you want it [--mount=gs://BUCKET | --mount=ADDRESS:/SHARE]
#   start     the training on all machines, as a service that outlives the connection and reboots, starts again
#             after exit code 75 and after a lost machine, and not after 2 (bad input)
#   log       follows the first machine's;   status   of the machines and of the training
#   stop      saves and stops the training;  delete   gives the machines back
#   run       create, wait, install, start, log
#   keep      run without log, then looks every minute: makes machines that were taken away anew and goes on,
#             until the training is done
# DIR is gs://BUCKET/PATH, which needs no disk, or a folder on one that all machines have mounted.
# Everywhere: [--project=ID] [--direct] [--dry-run: prints the commands, runs nothing]
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh

verb=${1:-}
case $verb in
  create | wait | install | start | log | status | stop | delete | run | keep) shift ;;
  --help | -h) usage && exit 0 ;;
  *) die "a verb comes first (create, wait, install, start, log, status, stop, delete, run, keep), not '$verb'" ;;
esac
name='' zone='' project='' topology='' slices=1 spot='' reserved='' direct='' runtime='' service_account='' network=''
subnetwork='' commit=HEAD repo='' mount=''
parse_flags "name zone project topology slices runtime service_account network subnetwork commit repo mount" \
  "spot reserved direct" "$@"
need_name "$name"
need zone
need_number slices
[ -z "$spot" ] || [ -z "$reserved" ] || die "--spot and --reserved exclude each other"
[ -z "$direct" ] || [ "$slices" = 1 ] || die "--slices=$slices needs the queue: leave out --direct"
case $mount in
  '' | gs://?* | ?*:/?*) ;;
  *) die "--mount=$mount: write gs://BUCKET, or ADDRESS:/SHARE of an NFS server" ;;
esac
case $verb in create | run | keep) read_topology "$topology" ;; esac
case $verb in start | run | keep) need_training ${mount:+/mnt/gigagan} ;; esac
need_tool gcloud "it comes with the Google Cloud CLI"

where=(--zone="$zone")
[ -z "$project" ] || where+=(--project="$project")
if [ -n "$direct" ]; then
  tpus=(gcloud compute tpus tpu-vm) state='value(state)'
else
  tpus=(gcloud compute tpus queued-resources) state='value(state.state)'
fi

# Sets machines: the flags that say all of them, or the first.
choose() {
  local which=all
  [ "$1" = everywhere ] || which=0
  machines=(--worker="$which")
  [ -n "$direct" ] || machines=(--node="$which" --worker="$which")
}

# on everywhere|first COMMAND: the words of the command reach the machines as they are.
on() {
  choose "$1"
  shift
  run "${tpus[@]}" ssh "$name" "${where[@]}" "${machines[@]}" --command="$(quote "$@")"
}

worker() {
  local which=$1
  shift
  on "$which" bash gigagan_jax/launch/tpu_vm_worker.sh "$@"
}

# Of the training on the first machine: running, done, stopped, absent, or failed and the exit code.
outcome() {
  on first bash -c "[ -e gigagan_jax ] || exec echo absent; exec bash gigagan_jax/launch/tpu_vm_worker.sh outcome"
}

create() {
  local version=$runtime flags=(--accelerator-type="$(accelerator_type)")
  if [ -z "$version" ]; then
    case $generation in
      v4) version=tpu-ubuntu2204-base ;;
      v5e) version=v2-alpha-tpuv5-lite ;;
      v5p) version=v2-alpha-tpuv5 ;;
      v6e) version=v2-alpha-tpuv6e ;;
    esac
  fi
  if [ -n "$direct" ]; then
    flags+=(--version="$version")
  elif [ "$slices" = 1 ]; then
    flags+=(--runtime-version="$version" --node-id="$name")
  else
    flags+=(--runtime-version="$version" --node-count="$slices" --node-prefix="$name")
  fi
  [ -z "$spot" ] || flags+=(--spot)
  [ -z "$reserved" ] || flags+=(--reserved)
  [ -z "$service_account" ] || flags+=(--service-account="$service_account")
  [ -z "$network" ] || flags+=(--network="$network")
  [ -z "$subnetwork" ] || flags+=(--subnetwork="$subnetwork")
  # What a service account may do is said by its roles; the narrower default could not write to a bucket.
  flags+=(--scopes=https://www.googleapis.com/auth/cloud-platform)
  run "${tpus[@]}" create "$name" "${where[@]}" "${flags[@]}"
}

# ACTIVE (queued) or READY (direct), SUSPENDED or PREEMPTED when taken away; empty when there is nothing of that name,
# UNREACHABLE when nobody can tell (no network, a login that is over).
state_now() {
  local ask=("${tpus[@]}" describe "$name" "${where[@]}" --format="$state") why
  if "${ask[@]}" 2>/dev/null; then
    return
  fi
  why=$("${ask[@]}" 2>&1) || true
  if [[ ! $why =~ NOT_FOUND|[Nn]ot\ found|does\ not\ exist ]]; then
    echo "$why" >&2
    echo UNREACHABLE
  fi
}

wait_for_machines() {
  local now
  if [ -n "$dry_run" ]; then
    echo "# until this says ACTIVE or READY:"
    run "${tpus[@]}" describe "$name" "${where[@]}" --format="$state"
    return
  fi
  while :; do
    now=$(state_now)
    case $now in
      ACTIVE | READY) return ;;
      '' | FAILED | SUSPENDED | SUSPENDING | PREEMPTED)
        echo "error: $name is ${now:-not there}: delete it and create it again" >&2
        return 1
        ;;
    esac
    echo "$(date +%T) $name is $now" >&2
    sleep 30
  done
}

install() {
  local archive folder=gigagan_jax
  if [ -n "$repo" ]; then
    on everywhere rm -rf "$folder"
    on everywhere git clone --quiet "$repo" "$folder"
    on everywhere git -C "$folder" checkout --quiet "$commit"
  else
    git rev-parse --quiet --verify "$commit^{commit}" >/dev/null || die "--commit=$commit: there is no such commit here"
    [ -n "$dry_run" ] || [ -z "$(git status --porcelain)" ] || echo "changes that are not committed stay here" >&2
    archive=${TMPDIR:-/tmp}/$name.tar.gz
    [ -z "$dry_run" ] || archive=/tmp/$name.tar.gz
    run git archive --format=tar.gz --prefix="$folder/" --output="$archive" "$commit"
    choose everywhere
    run "${tpus[@]}" scp "$archive" "$name:gigagan_jax.tar.gz" "${where[@]}" "${machines[@]}"
    on everywhere rm -rf "$folder"
    on everywhere tar -xzf gigagan_jax.tar.gz
  fi
  worker everywhere install ${mount:+"$mount"}
}

start() {
  worker everywhere start "${train[@]}"
}

anew() {
  create
  wait_for_machines
  install
  start
}

# in_order FUNCTION...: the first command that fails ends them, and not the launcher.
in_order() {
  set +e
  (
    set -e
    local step
    for step in "$@"; do $step; done
  )
  set -e
}

keep() {
  local now ended first=yes
  if [ -n "$dry_run" ]; then
    anew
    echo "# every minute:"
    run "${tpus[@]}" describe "$name" "${where[@]}" --format="$state"
    outcome
    echo "# when they were taken away, this and all of the above again:"
    remove --quiet
    return
  fi
  while :; do
    now=$(state_now)
    case $now in
      ACTIVE | READY)
        ended=$(outcome) || ended=unknown # not reached this time
        case $ended in
          done)
            echo "the training is done; launch/tpu_vm.sh delete gives the machines back" >&2
            return 0
            ;;
          failed* | stopped)
            if [ -n "$first" ]; then # of an earlier start: this one has flags that may mend it
              in_order start
              first=''
              continue
            fi
            [ "$ended" != stopped ] || { echo "the training was stopped; start or keep goes on" >&2 && return 0; }
            echo "error: the training ended with exit code ${ended#failed }: see launch/tpu_vm.sh log" >&2
            return 1
            ;;
          absent) in_order install start ;;
        esac
        [ "$ended" = unknown ] || first=''
        ;;
      '' | FAILED | SUSPENDED | PREEMPTED)
        if [ -n "$now" ]; then
          echo "$(date +%T) $name is $now: made anew" >&2
          remove --quiet || { sleep "${LOOK_SECONDS:-60}" && continue; }
        fi
        first=''
        in_order anew # what is not given this time is asked for again in a minute
        ;;
    esac
    sleep "${LOOK_SECONDS:-60}"
  done
}

remove() {
  if [ -n "$direct" ]; then
    run "${tpus[@]}" delete "$name" "${where[@]}" "$@"
  else
    run "${tpus[@]}" delete "$name" "${where[@]}" --force "$@"
  fi
}

log() {
  on first tail -n 100 -F gigagan.log
}

case $verb in
  create) create ;;
  wait) wait_for_machines ;;
  install) install ;;
  start) start ;;
  log) log ;;
  status)
    run "${tpus[@]}" describe "$name" "${where[@]}" --format="$state"
    worker everywhere outcome
    ;;
  stop) worker everywhere stop ;;
  delete) remove ;;
  run)
    anew
    log
    ;;
  keep) keep ;;
esac
