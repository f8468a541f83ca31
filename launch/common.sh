# shellcheck shell=bash
# What the launchers share: errors of one line, flags, quoting, commands printed instead of run, TPU topologies.

dry_run='' # not empty: print, run nothing
train=()   # what goes to the trainer
workdir=''  # where the run lives, of these flags
# Flags of the trainer that are passed on; others come after --.
trainer_flags=" config workdir heartbeat_seconds join_seconds stall_seconds maintenance_url compilation_cache"
trainer_flags+=" profile_steps "

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# The comment at the top of the launcher.
usage() {
  sed -n '2,$ { /^#/!q; s/^# \{0,1\}//p; }' "launch/${0##*/}" # from the repository's root, where launchers go
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
    [[ $values$trainer_flags == *" $key "* || $key == config.?* ]] ||
      die "unknown flag --$key (see --help; other flags of the trainer come after --)"
    if [ "$word" = "${word%%=*}" ]; then
      [ $# -gt 0 ] || die "--$key needs a value"
      word="$word=$1"
      shift
    fi
    if [[ $values == *" $key "* ]]; then
      printf -v "$key" %s "${word#*=}"
    else
      train+=("$word")
    fi
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

# need_training [DISK] [PROCESSES]: checks the trainer's flags, as far as several machines ask more of them than one; sets
# workdir. DISK is the folder of a disk that the launcher mounts, PROCESSES how many the run has, where that is known.
need_training() {
  local disk=${1:-} processes=${2:-several} word config=''
  for word in ${train[@]+"${train[@]}"}; do
    case $word in
      *$'\n'*) die "a flag of the trainer with a line break in it cannot be passed on" ;;
      --config=*) config=${word#*=} ;;
      --workdir=*) workdir=${word#*=} ;;
    esac
  done
  [ -n "$config" ] || die "--config=FILE.py is needed, a path from the repository's root"
  case $workdir in
    '') die "--workdir=gs://BUCKET/DIR is needed, or a folder on a disk that all machines have mounted" ;;
    gs://?*/?*) ;;
    s3://?*/?*)
      [ "$processes" = 1 ] || die "--workdir=$workdir: at s3:// only a run of one process can keep checkpoints;" \
        "use gs://BUCKET/DIR, or a folder on a disk that all machines have mounted"
      ;;
    gs://* | s3://*) die "--workdir=$workdir: name a folder in the bucket too, as in gs://BUCKET/runs/1" ;;
    *://*) die "--workdir=$workdir: use gs://BUCKET/DIR or a folder on a disk that all machines have mounted" ;;
    "$disk"/*) ;;
    /*) die "--workdir=$workdir: the disk that all machines have is at $disk" ;;
    *) die "--workdir=$workdir: write gs://BUCKET/DIR, or the whole path on a disk that all machines have mounted" ;;
  esac
}

# read_topology v5p:4x4x8, or v5p-256 as slices are sold, as tools/plan.py takes it: sets generation, shape and chips.
read_topology() {
  local topology=$1 sides example
  [ -n "$topology" ] || die "--topology=... is needed, as in v5p:4x4x8 (see --help)"
  [[ $topology =~ ^([a-z0-9]+)[:-]([0-9x]+)$ ]] ||
    die "--topology=$topology: write v4, v5e, v5p or v6e, a colon and the shape, as in v5p:4x4x8"
  generation=${BASH_REMATCH[1]} shape=${BASH_REMATCH[2]}
  case $generation in
    v4 | v5p) sides=2 example=4x4x8 ;;
    v5e | v5litepod | v6e) sides=1 example=8x16 ;;
    *) die "--topology=$topology: unknown chip $generation; known: v4, v5e, v5p, v6e" ;;
  esac
  [ "$generation" != v5litepod ] || generation=v5e
  [[ $topology == *:* ]] || shape=$(shape_as_sold "$shape" $sides)
  [[ $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){$sides}$ ]] ||
    die "--topology=$topology: the shape of a $generation slice is written like $example, its size is a power of two"
  chips=$((${shape//x/*}))
}

# shape_as_sold SIZE SIDES: of a power of two, with sides as equal as can be; nothing of any other size.
shape_as_sold() {
  local size=$1 k=0
  [[ $size =~ ^[1-9][0-9]*$ ]] || return 0
  if [ "$2" = 2 ]; then # TensorCores, two a chip
    [ $((size % 2)) = 0 ] || return 0
    size=$((size / 2))
  fi
  while [ $((1 << k)) -lt "$size" ]; do k=$((k + 1)); done
  [ $((1 << k)) = "$size" ] || return 0
  if [ "$2" = 1 ]; then
    echo "$((1 << k / 2))x$((1 << (k + 1) / 2))"
  elif [ "$size" = 4 ]; then
    echo 2x2x1 # one machine
  else
    echo "$((1 << k / 3))x$((1 << (k + 1) / 3))x$((1 << (k + 2) / 3))"
  fi
}

# The name of a slice of that many chips: generations 4 and 5p count cores, two a chip.
accelerator_type() {
  case $generation in
    v5e) echo "v5litepod-$chips" ;;
    v6e) echo "v6e-$chips" ;;
    *) echo "$generation-$((2 * chips))" ;;
  esac
}
