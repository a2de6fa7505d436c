#!/usr/bin/env bash
# What `launch/sweep.py --backend=tpu` has each host of a TPU do. It is copied there beside the clone
# (eqst-sweep.tar.gz) and run over ssh; every call returns at once, the work goes on by itself:
#
#   setup CLONE LINE      unpacks the clone and makes its environment, after the shell line LINE
#   start JOB LOG WORD..  runs a command in the clone; LOG is where in a bucket its log goes
#   state                 prints "eqst HOST SETUP JOB": SETUP bare, making:CLONE, ready:CLONE or
#                         failed:CLONE; JOB idle, running:JOB or ended:JOB:CODE
#   stop                  SIGTERM to the command
#   last                  the last line of its log, or of the setup's
#
# All lies in ~/eqst-sweep: clone/, and of setup and job an .id, .pid (with the boot it is of), .log
# and, at its end, .exit. Calls may be repeated: a setup or job that has begun is not begun again.
set -u
trap '' HUP
home=$HOME/eqst-sweep
metadata=http://metadata.google.internal/computeMetadata/v1/instance
mkdir -p "$home"

boot() {
  cat /proc/sys/kernel/random/boot_id
}

# alive NAME: whether the process of setup or job runs still.
alive() {
  local pid="" of=""
  [ -f "$home/$1.pid" ] && read -r pid of <"$home/$1.pid"
  [ -n "$pid" ] && [ "$of" = "$(boot)" ] && kill -0 "$pid" 2>/dev/null
}

# launch NAME ID WORD..: has this script do WORD.., apart from everything, unless that of ID has begun.
launch() {
  local name=$1 id=$2
  shift 2
  exec 9>"$home/lock"
  flock 9
  if [ -f "$home/$name.id" ] && [ "$(cat "$home/$name.id")" = "$id" ]; then
    return
  fi
  if alive "$name"; then
    echo "eqst: $(hostname) is busy with $(cat "$home/$name.id")" >&2
    exit 3
  fi
  rm -f "$home/$name.id" "$home/$name.exit"
  setsid nohup bash "$0" "$@" </dev/null >"$home/$name.log" 2>&1 9>&- &
  echo "$! $(boot)" >"$home/$name.pid"
  echo "$id" >"$home/$name.id"
}

# ended NAME CODE: leaves the exit code, whole or not at all.
ended() {
  echo "$2" >"$home/$1.exit.tmp"
  mv "$home/$1.exit.tmp" "$home/$1.exit"
}

make() {
  local line=$1
  mkdir -p "$home/clone"
  cd "$home/clone" || exit 1
  # The environment stays: it knows by itself whether it still fits.
  find . -mindepth 1 -maxdepth 1 ! -name .venv -exec rm -rf {} + &&
    tar -xzf "$HOME/eqst-sweep.tar.gz" || exit 1
  # Recommended from v5e on; a host that does not let us is only slower.
  echo always | sudo -n tee /sys/kernel/mm/transparent_hugepage/enabled >/dev/null 2>&1 || true
  bash -c "$line" || exit 1
  . launch/environment.sh
  if ! (find_python) >/dev/null 2>&1; then # the image's own is 3.10
    curl -LsSf https://astral.sh/uv/install.sh | sh || exit 1
    PATH=$HOME/.local/bin:$PATH
    uv python install 3.12 || exit 1
    EQST_PYTHON=$(uv python find 3.12)
  fi
  set -o pipefail
  make_environment tpu data
}

upload() {
  timeout 120 gcloud storage cp --quiet "$home/job.log" "$1" >/dev/null 2>&1 || true
}

ask() {
  curl -s --max-time 2 -H 'Metadata-Flavor: Google' "$metadata/$1"
}

# A Spot VM that is taken back, and any that is stopped for maintenance of its host (a TPU is never
# moved while it runs), says so half a minute before or more: the command saves and leaves.
watch_preemption() {
  while sleep 5 && kill -0 "$1" 2>/dev/null; do
    if [ "$(ask preempted)" = TRUE ] ||
      [ "$(ask maintenance-event)" = TERMINATE_ON_HOST_MAINTENANCE ]; then
      touch "$home/job.preempted"
      kill -TERM "$1" 2>/dev/null
      return
    fi
  done
}

run() {
  local log=$1 child code
  shift
  cd "$home/clone" || exit 1
  rm -f "$home/job.preempted"
  setsid "$@" &
  child=$!
  # shellcheck disable=SC2064
  trap "kill -TERM $child 2>/dev/null" TERM
  watch_preemption "$child" &
  while sleep 300 && kill -0 "$child" 2>/dev/null; do upload "$log"; done &
  while :; do
    wait "$child"
    code=$?
    kill -0 "$child" 2>/dev/null || break
  done
  kill -KILL -- "-$child" 2>/dev/null # what it left: a TPU serves one program at a time
  trap '' TERM
  kill -TERM -- "-$$" # the two above, and what they wait in
  if [ "$code" != 0 ] && [ -f "$home/job.preempted" ]; then
    code=75
  fi
  upload "$log"
  ended job "$code"
}

# exit_of NAME: its exit code; one that is gone without a word was killed.
exit_of() {
  if [ -f "$home/$1.exit" ]; then cat "$home/$1.exit"; else echo 137; fi
}

state() {
  local setup=bare job=idle id
  if [ -f "$home/setup.id" ]; then
    id=$(cat "$home/setup.id")
    if alive setup; then
      setup=making:$id
    elif [ "$(exit_of setup)" = 0 ]; then
      setup=ready:$id
    else
      setup=failed:$id
    fi
  fi
  if [ -f "$home/job.id" ]; then
    id=$(cat "$home/job.id")
    if alive job; then job=running:$id; else job=ended:$id:$(exit_of job); fi
  fi
  echo "eqst $(hostname) $setup $job"
}

# In braces, so that all of it is read before any of it is done: another clone may bring another
# script while this one works.
{
  action=${1:-}
  [ $# -gt 0 ] && shift
  case $action in
    setup) launch setup "$1" _setup "$2" ;;
    _setup)
      (make "$1")
      ended setup $?
      ;;
    start)
      job=$1
      shift
      launch job "$job" _run "$@"
      ;;
    _run) run "$@" ;;
    state) state ;;
    stop) if alive job; then kill -TERM "$(cut -d' ' -f1 "$home/job.pid")"; fi ;;
    last)
      for name in job setup; do
        [ -s "$home/$name.log" ] && grep -v '^ *$' "$home/$name.log" | tail -n 1 && break
      done
      ;;
    *)
      echo "tpu_host.sh: give setup, start, state, stop or last" >&2
      exit 2
      ;;
  esac
  exit
}
