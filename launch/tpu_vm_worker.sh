#!/usr/bin/env bash
# What launch/tpu_vm.sh has each machine of a slice do: install [DISK], start FLAGS, outcome, stop
set -euo pipefail
cd "$(dirname "$0")/.."
. launch/common.sh
code=$PWD python=$HOME/gigagan_venv/bin/python disk=/mnt/gigagan unit=/etc/systemd/system/gigagan.service

# The images bring Python 3.10; uv brings its own.
install_python() {
  local uv=$HOME/.local/bin/uv
  [ -x "$uv" ] || curl -LsSf https://astral.sh/uv/install.sh | sh
  "$uv" venv --quiet --clear --python 3.11 "$HOME/gigagan_venv"
  "$uv" pip install --quiet --python "$python" "${code}[tpu,gcs]"
}

# In /etc/fstab, for the disk to be there after a reboot too.
mount_disk() {
  local line apt=(sudo apt-get -qq -o DPkg::Lock::Timeout=600) packages=https://packages.cloud.google.com/apt
  case $1 in
    gs://*)
      curl -fsS "$packages/doc/apt-key.gpg" | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
      echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] $packages gcsfuse-$(lsb_release -cs) main" |
        sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      "${apt[@]}" update
      "${apt[@]}" install -y gcsfuse
      # No caching of names: what one machine has written, the others see at once.
      line="${1#gs://} $disk gcsfuse rw,_netdev,allow_other,implicit_dirs,metadata_cache_ttl_secs=0"
      line+=",uid=$(id -u),gid=$(id -g) 0 0"
      ;;
    *)
      "${apt[@]}" update
      "${apt[@]}" install -y nfs-common
      line="$1 $disk nfs rw,_netdev,hard 0 0"
      ;;
  esac
  sudo mkdir -p "$disk"
  { grep -v " $disk " /etc/fstab || true; echo "$line"; } | sudo tee /etc/fstab.new >/dev/null
  sudo mv /etc/fstab.new /etc/fstab
  mountpoint -q "$disk" || sudo mount "$disk"
  [ -w "$disk" ] || sudo chmod 1777 "$disk" # a new share belongs to root
}

# A service of the system: it outlives the connection, starts after a reboot, and systemd does the starting again.
write_service() {
  {
    echo "cd $(quote "$code")"
    # shellcheck disable=SC2016  # for the shell that runs it
    echo 'unset "${!MEGASCALE_@}"  # stale ones; how slices find each other is read from the machine'
    echo "exec $(quote "$python" -m gigagan_jax.train "$@" --distributed)"
  } >"$HOME/gigagan_run.sh"
  sudo tee "$unit" >/dev/null <<UNIT
[Unit]
Description=gigagan_jax training
Wants=network-online.target
After=network-online.target remote-fs.target
StartLimitIntervalSec=3600
StartLimitBurst=10

[Service]
User=$(id -un)
# Large pages: JAX asks for them, for start and end on newer chips.
ExecStartPre=-+/bin/sh -c "echo always >/sys/kernel/mm/transparent_hugepage/enabled"
ExecStart=/bin/bash $HOME/gigagan_run.sh
StandardOutput=append:$HOME/gigagan.log
StandardError=inherit
Restart=on-failure
RestartPreventExitStatus=2
# Stopped with its state saved is no failure; a signal before there is a state to save is no success.
SuccessExitStatus=75
RestartForceExitStatus=75 SIGTERM SIGHUP SIGINT SIGPIPE
RestartSec=15
KillMode=mixed
TimeoutStopSec=600
LimitMEMLOCK=infinity
LimitNOFILE=1048576

[Install]
WantedBy=multi-user.target
UNIT
}

case ${1:-} in
  install)
    install_python
    [ $# -lt 2 ] || mount_disk "$2"
    ;;
  start)
    shift
    [ -x "$python" ] || die "$(uname -n): nothing is installed: launch/tpu_vm.sh install"
    write_service "$@"
    sudo systemctl daemon-reload
    sudo systemctl enable --quiet gigagan
    sudo systemctl restart gigagan
    ;;
  stop) sudo systemctl disable --quiet --now gigagan ;;
  outcome)
    # One word: running, done, stopped, absent, or failed and the exit code.
    said() { systemctl show gigagan --property="$1" --value; }
    systemctl cat gigagan >/dev/null 2>&1 || { echo absent && exit; }
    case $(said ActiveState) in
      failed) echo "failed $(said ExecMainStatus)" ;;
      inactive) # exited (code 1) with 0; stopped, or not started since the machine was
        [ "$(said ExecMainCode) $(said ExecMainStatus)" = "1 0" ] && echo "done" || echo stopped
        ;;
      *) echo running ;;
    esac
    ;;
  *) die "install, start, outcome or stop" ;;
esac
