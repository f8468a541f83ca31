# shellcheck shell=bash
# What the launchers share: errors of one line, flags, quoting, commands printed instead of run, TPU topologies.

dry_run='' # not empty: print, run nothing
train=()   # what goes to the trainer

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the top of the launcher.
usage() {
  sed -n '2,$ { /^#/!q; s/^# \{0,1\}//p; }' "$0"
}

# quote WORD...: the words as one line that any shell reads as they are.
quote() {
  local LC_ALL=C word line='' mark="'\\''"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) word="'${word//\'/$mark}'" ;;
    esac
    line+="$word "
  done
  printf '%s\n' "${line% }"
}

# run COMMAND...: runs it, or prints it.
run() {
  if [ -n "$dry_run" ]; then
    quote "$@"
  else
    "$@"
  fi
}

# need_tool PROGRAM HOW: the program must be here, unless all is only printed.
need_tool() {
  [ -n "$dry_run" ] || command -v "$1" >/dev/null || die "$1 is not installed: $2; --dry-run prints what would be run"
}

# parse_flags "FLAGS WITH A VALUE" "SWITCHES" "$@": sets the variables of these names, and the array train.
parse_flags() {
  local values=" $1 " switches=" $2 " word key
  shift 2
  while [ $# -gt 0 ]; do
    word=$1
    shift
    case $word in
      --help | -h) usage && exit 0 ;;
      --dry-run | --dry_run) dry_run=yes && continue ;;
      --) train+=("$@") && break ;;
      --*) ;;
      *) die "$word: flags are written --NAME=VALUE (see --help)" ;;
    esac
    key=${word%%=*}
    key=${key#--}
    case $key in config | config.*) ;; *) key=${key//-/_} ;; esac
    if [[ $switches == *" $key "* ]]; then
      [ "$word" = "${word%%=*}" ] || die "--$key takes no value"
      printf -v "$key" yes
      continue
    fi
    case "$values config workdir heartbeat_seconds " in
      *" $key "*) ;;
      *) [[ $key == config.?* ]] || die "unknown flag --$key (see --help; the trainer's own flags come after --)" ;;
    esac
    if [ "$word" = "${word%%=*}" ]; then
      [ $# -gt 0 ] || die "--$key needs a value"
      word="$word=$1"
      shift
    fi
    case $key in
      config | config.* | workdir | heartbeat_seconds) train+=("$word") ;;
      *) printf -v "$key" %s "${word#*=}" ;;
    esac
  done
}

# need NAME...: flags without which there is nothing to do.
need() {
  local key
  for key in "$@"; do
    [ -n "${!key}" ] || die "--$key=... is needed (see --help)"
  done
}

# need_number NAME...: flags that are whole numbers from 1.
need_number() {
  local key
  for key in "$@"; do
    [[ ${!key} =~ ^[1-9][0-9]*$ ]] || die "--$key=${!key}: must be a whole number, 1 or more"
  done
}

# need_name NAME: of a machine, a job, and a file.
need_name() {
  local name=$1
  need name
  [[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--name=$name: at most 40 lower-case letters, digits and -, a letter first"
}

# need_training [DISK]: the trainer's flags, as far as several machines ask more of them than one; where their disk is.
need_training() {
  local disk=${1:-} word config='' workdir=''
  for word in ${train[@]+"${train[@]}"}; do
    case $word in
      *$'\n'*) die "a flag of the trainer with a line break in it cannot be passed on" ;;
      --config=*) config=${word#*=} ;;
      --workdir=*) workdir=${word#*=} ;;
    esac
  done
  [ -n "$config" ] || die "--config=FILE.py is needed, a path from the repository's root"
  case $workdir in
    '') die "--workdir=FOLDER is needed: on a disk that all machines have mounted" ;;
    *://*) die "--workdir=$workdir: only folders on a mounted disk can be used; mount the bucket" ;;
    "$disk"/*) ;;
    /*) die "--workdir=$workdir: the disk that all machines have is at $disk" ;;
    *) die "--workdir=$workdir: an absolute path is needed, on a disk that all machines have mounted" ;;
  esac
}

# read_topology v5p:4x4x8, as tools/plan.py takes it: sets generation, shape and chips.
read_topology() {
  local topology=$1 sides example
  [ -n "$topology" ] || die "--topology=... is needed, as in v5p:4x4x8 (see --help)"
  generation=${topology%%:*} shape=${topology#*:}
  case $generation in
    v4 | v5p) sides=2 example=4x4x8 ;;
    v5e | v6e) sides=1 example=8x16 ;;
    *) die "--topology=$topology: write v4, v5e, v5p or v6e, a colon and the shape, as in v5p:4x4x8" ;;
  esac
  [[ $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){$sides}$ ]] ||
    die "--topology=$topology: the shape of a $generation slice is written like $example"
  chips=$((${shape//x/*}))
}

# The name of a slice of that many chips: generations 4 and 5p count cores, two a chip.
accelerator_type() {
  case $generation in
    v5e) echo "v5litepod-$chips" ;;
    v6e) echo "v6e-$chips" ;;
    *) echo "$generation-$((2 * chips))" ;;
  esac
}
