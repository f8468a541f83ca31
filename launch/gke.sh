#!/usr/bin/env bash
# Slices of TPU in any GKE cluster with JobSet: fills in launch/gke.yaml and hands it to kubectl.
#   launch/gke.sh --name=NAME --image=IMAGE --topology=v5p:4x4x8 [--slices=N] [--claim=NAME | --bucket=NAME]
#     --config=FILE.py --workdir=gs://BUCKET/DIR [--config.key=value ...]
#     [--namespace=default] [--service_account=default] [--chips_per_host=4] [--spot] [--restarts=100]
#     [--dry-run: prints the manifest, runs nothing]
# --claim mounts a PersistentVolumeClaim at /mnt/gigagan, --bucket a bucket by Cloud Storage FUSE: for
# --workdir=/mnt/gigagan/DIR, or for files that are only read. --workdir=gs://... needs neither.

# shellcheck disable=SC2034  # the manifest reads the variables by their names
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
name='' image='' topology='' slices=1 claim='' bucket='' namespace=default service_account=default chips_per_host=4
spot='' restarts=100
parse_flags "name image topology slices claim bucket namespace service_account chips_per_host restarts" "spot" "$@"
need_name "$name"
need image
need_number slices restarts chips_per_host
read_topology "$topology"
mount=/mnt/gigagan disk=''
need_training "$mount"
for flag in image claim bucket namespace service_account; do
  [[ ${!flag} =~ ^[A-Za-z0-9_./:@-]*$ ]] || die "--$flag=${!flag}: letters, digits and _./:@- only"
done
case ${claim:+claim}${bucket:+bucket} in
  claim) disk="persistentVolumeClaim: {claimName: $claim}" ;;
  bucket)
    # No caching of names: what one machine has written, the others see at once.
    options='"implicit-dirs,metadata-cache:ttl-secs:0"'
    disk="{bucketName: $bucket, mountOptions: $options}"
    disk="csi: {driver: gcsfuse.csi.storage.gke.io, volumeAttributes: $disk}"
    ;;
  '')
    [[ $workdir == gs://* ]] ||
      die "--workdir=$workdir needs --claim=NAME or --bucket=NAME, the disk at $mount; gs://BUCKET/DIR needs neither"
    ;;
  *) die "--claim and --bucket exclude each other: there is one disk at $mount" ;;
esac
[ "$chips" -ge "$chips_per_host" ] || chips_per_host=$chips
[ $((chips % chips_per_host)) = 0 ] || die "--chips_per_host=$chips_per_host does not divide the $chips chips of it"
need_tool kubectl "it comes with the Google Cloud CLI"

case $generation in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
esac
hosts=$((chips / chips_per_host)) gcsfuse=${bucket:+true}
gcsfuse=${gcsfuse:-false}

# A YAML string; \$( would be a variable to Kubernetes.
yaml() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  printf '"%s"' "${text//\$(/\$\$(}"
}

manifest() {
  local line key word
  while IFS= read -r line; do
    case $line in
      *"# --spot") [ -n "$spot" ] || continue && line=${line%" # --spot"} ;;
      *"# a disk") [ -n "$disk" ] || continue && line=${line%" # a disk"} ;;
      *"{{args}}")
        for word in "${train[@]}" --distributed; do
          printf '%s%s\n' "${line%"{{args}}"}" "$(yaml "$word")"
        done
        continue
        ;;
    esac
    while [[ $line =~ \{\{([a-z_]+)\}\} ]]; do
      key=${BASH_REMATCH[1]}
      line=${line/"{{$key}}"/"${!key}"}
    done
    printf '%s\n' "$line"
  done <launch/gke.yaml
}

if [ -n "$dry_run" ]; then
  manifest
else
  manifest | kubectl apply -f -
fi
