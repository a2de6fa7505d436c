# The body of a batch script of `launch/sweep.py --backend=slurm` (eqst/sweeps/slurm.py), one element
# of its job array: one run of the sweep, or several as one program (A,B), from wherever it stopped.
# Above stand the variables: members, settings, workdir, command, srun_options, max_restarts,
# max_crashes.
# shellcheck shell=bash disable=SC2154
member=${members[SLURM_ARRAY_TASK_ID]}
unset SLURM_CLUSTERS SBATCH_CLUSTERS # where this is, Slurm's commands mean the job's own
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID # of this element alone: the bare number may be all
restart=${SLURM_RESTART_COUNT:-0}
IFS=, read -ra names <<<"$member"
folder=$workdir/${names[0]}
export EQST_ATTEMPT="slurm $task $restart" # eqst/sweeps/turn.py: it takes over from earlier ones
# Since Slurm 22.05 srun takes no --cpus-per-task from its job.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

note() {
  local name line
  line="$(date +%FT%T) $task $*"
  for name in "${names[@]}"; do
    echo "$line" >>"$workdir/$name/slurm.log"
  done
}
# Exits with a code that no RequeueExit of the cluster will have.
fail() {
  note "failed $*"
  exit 1
}

for name in "${names[@]}"; do
  mkdir -p "$workdir/$name" || exit 1
done
[ "$restart" -le "$max_restarts" ] || fail "after $max_restarts restarts"
note "start $restart on ${SLURM_JOB_NODELIST:-?}"

# Slurm tells the step itself of a time limit (--signal), a preemption or a requeue. Where only this
# script is told (--signal=B:..), the step has to hear of it. Not through srun, which on SIGTERM kills.
forward() {
  told=yes
  scancel --quiet --signal=TERM "$task.0" 2>/dev/null
}
trap forward TERM
srun --kill-on-bad-exit=1 "${srun_options[@]}" "${command[@]}" --member="$member" \
  --settings="${settings[SLURM_ARRAY_TASK_ID]}" >>"$folder/log.txt" 2>&1 &
step=$!
while
  told=
  wait "$step"
  code=$?
  [ -n "$told" ]
do :; done
note "end $code"
[ "$code" -ne 0 ] || exit 0

# What Slurm makes of this element by now. It may have lost this node and have started it elsewhere;
# or be ending it, where scontrol requeue would bring back what was cancelled, and is not needed for
# what is requeued anyway: but for one whose time was over before it had saved.
read -r state left count < <(
  squeue --noheader --array --jobs="$task" --Format=State:24,TimeLeft:24,RestartCnt:12 2>/dev/null
)
if [ "${count:-$restart}" != "$restart" ]; then
  note "left to restart $count"
  exit 1
fi
case $code in
  75 | 143) ;; # saved; or told to stop before it could listen
  134 | 137)
    crashes=$(grep -c " $task end 13[47]$" "$folder/slurm.log")
    [ "$crashes" -le "$max_crashes" ] || fail "$code, $crashes times"
    ;;
  *) fail "$code" ;;
esac
[ "$restart" -lt "$max_restarts" ] || fail "$code, after $max_restarts restarts"
case ${state-}/${left-} in
  COMPLETING/0:00) ;;
  COMPLETING/* | CANCELLED/*) exit 1 ;;
esac
scontrol requeue "$task" || {
  note "scontrol requeue refuses"
  exit "$code" # the cluster's RequeueExit may have it
}
