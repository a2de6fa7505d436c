"""A sweep on Slurm: one job array over the runs that are neither done nor in the queue.

What was submitted stands in WORKDIR/slurm.json before sbatch is called, and each submission's job
name is its own, so that whatever is killed when, squeue and the file say together which run is in
which job. An element of the array is one run, or several that are trained as one program
(launch/slurm_member.sh): it requeues itself when it was interrupted or has crashed, and writes its
starts and ends into its runs' slurm.log.
"""

from __future__ import annotations

import collections
import json
import pathlib
import re
import shlex
import subprocess
from collections.abc import Callable, Iterable
from typing import NamedTuple

from etils import epath

from eqst import card, files, lock
from eqst.sweeps import members, progress
from eqst.sweeps.local import TRIES
from eqst.sweeps.members import Member

RECORD_NAME = "slurm.json"
LOG_NAME = "slurm.log"
MAX_RESTARTS = 100  # of an element, by preemption, time limit or a lost node
MAX_CRASHES = 2  # after which an element starts again: killed or aborted, out of memory say
SIGNAL = "TERM@120"  # before the time limit: seconds to finish a step, save and leave
CALL_SECONDS = 120.0
# What an element may have come to; all else is still to come, or happens.
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED "
    "TIMEOUT".split()
)
CLUSTERS = ("--cluster", "-M")  # sbatch would send jobs where squeue does not look
OURS = ("--array", "-a", "--job-name", "-J", "--wrap", "--parsable", "--test-only")


class Sweep(NamedTuple):
    """What is submitted, and how.

    Attributes:
      workdir: of the sweep, absolute, on storage that all nodes share.
      words: the command that runs a member, but for its --member.
      body: of the batch script.
      sbatch: more words for sbatch.
      srun: more words for srun.
      jobs: elements at a time; None leaves it to Slurm.
      settings: `members.settings_hash` of every run, by name.
    """

    workdir: pathlib.Path
    words: list[str]
    body: str
    sbatch: list[str]
    srun: list[str]
    jobs: int | None
    settings: dict[str, str]


class Submission(NamedTuple):
    """One job array; element i is `members[i]`, a run's name, or several with commas between them
    (which no name has) as one program. `job` is "" until sbatch has answered."""

    name: str
    job: str
    members: list[str]

    def names(self) -> list[str]:
        """Of all its runs."""
        return ",".join(self.members).split(",")


class Element(NamedTuple):
    """What Slurm says of a run: its job, its state in capitals and the reason for it."""

    job: str
    state: str
    reason: str


class Silent(ValueError):
    """Slurm does not answer, or is not here."""


def options(flag: str, text: str) -> list[str]:
    """The words of --sbatch or --srun.

    Raises:
      ValueError: a quote is open, or an option is the sweep's own, or of all of Slurm's commands.
    """
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ValueError(f"--{flag}={text}: {error}") from None
    for word in words:
        if word.startswith(OURS) if word.startswith("--") else word[:2] in OURS:
            raise ValueError(f"--{flag}={text}: {word} is the sweep's own: leave it out")
        if word.startswith(CLUSTERS):
            raise ValueError(
                f"--{flag}={text}: {word} must hold for all of Slurm's commands: leave it out, and "
                "set SLURM_CLUSTERS"
            )
    return words


# --- what was submitted


def submissions(workdir: pathlib.Path) -> list[Submission]:
    """What slurm.json has; none where there is no such file.

    Raises:
      ValueError: the file is damaged.
    """
    path = workdir / RECORD_NAME
    if not path.exists():
        return []
    try:
        return [Submission(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): see with squeue that nothing runs, and remove it"
        ) from None


def _write(workdir: pathlib.Path, record: list[Submission]) -> None:
    files.write_json(workdir / RECORD_NAME, [entry._asdict() for entry in record])


def script(sweep: Sweep, names: list[str]) -> str:
    """The batch script of a submission."""

    def array(name: str, words: Iterable[str]) -> str:
        return f"{name}=(\n" + "".join(f"  {shlex.quote(word)}\n" for word in words) + ")"

    lines = [
        "#!/bin/bash",
        array("members", names),
        array("settings", [",".join(sweep.settings[x] for x in y.split(",")) for y in names]),
        f"workdir={shlex.quote(str(sweep.workdir))}",
        array("command", sweep.words),
        array("srun_options", sweep.srun),
        f"max_restarts={MAX_RESTARTS}",
        f"max_crashes={MAX_CRASHES}",
        "",
        sweep.body,
    ]
    return "\n".join(lines)


def sbatch_words(sweep: Sweep, number: int, count: int) -> list[str]:
    """The command that submits submission `number` with `count` elements; the user's words come
    last, so that they prevail."""
    limit = f"%{sweep.jobs}" if sweep.jobs else ""
    stem = sweep.workdir / f"slurm-{number}"
    return [
        *("sbatch", "--parsable", f"--job-name={_name(sweep.workdir, number)}"),
        *(f"--array=0-{count - 1}{limit}", "--requeue", f"--signal={SIGNAL}"),
        *(f"--output={stem}.out", "--open-mode=append", f"--chdir={pathlib.Path.cwd()}"),
        *(*sweep.sbatch, f"{stem}.sh"),
    ]


def dry_text(sweep: Sweep, names: list[str]) -> str:
    """The sbatch command, and the script under it."""
    number = len(submissions(sweep.workdir)) + 1
    return f"{shlex.join(sbatch_words(sweep, number, len(names)))}\n\n{script(sweep, names)}"


def _name(workdir: pathlib.Path, number: int) -> str:
    return f"eqst-{card.digest(str(workdir))[:8]}-{number}"


def unit_name(unit: list[Member]) -> str:
    """What stands for runs that are one program, here and as --member."""
    return ",".join(member.name for member in unit)


def ask(sweep: Sweep, names: list[str]) -> None:
    """Has Slurm judge what `submit` would submit, before anything is made for it.

    Raises:
      ValueError: Slurm would not take it, or is not there.
    """
    words = _scripted(sweep, len(submissions(sweep.workdir)) + 1, names)
    try:
        call([words[0], "--test-only", *words[1:]])
    except Silent:
        raise
    except ValueError as error:
        # It says no as well where nodes are down just now, for which sbatch lets a job wait: of
        # such an answer sbatch has the last word.
        if not re.search("not available|busy|policy", str(error)):
            raise


def _scripted(sweep: Sweep, number: int, names: list[str]) -> list[str]:
    """Writes the script of a submission; the words of sbatch for it."""
    words = sbatch_words(sweep, number, len(names))
    sweep.workdir.mkdir(parents=True, exist_ok=True)
    files.write_text(pathlib.Path(words[-1]), script(sweep, names))
    return words


def submit(sweep: Sweep, names: list[str]) -> Submission:
    """Submits members as one array, an element for each of `names` (as `Submission.members`).

    Raises:
      ValueError: Slurm takes it not, or is not there.
    """
    record = submissions(sweep.workdir)
    number = len(record) + 1
    words = _scripted(sweep, number, names)
    entry = Submission(_name(sweep.workdir, number), "", names)
    _write(sweep.workdir, [*record, entry])
    # Of a call that fails the entry stays, without a job: sbatch may have been heard all the same.
    entry = entry._replace(job=call(words).strip().partition(";")[0])
    _write(sweep.workdir, [*record, entry])
    return entry


# --- what Slurm says


def call(words: list[str]) -> str:
    """Runs one of Slurm's commands; what it prints.

    Raises:
      Silent: it is not there, or Slurm does not answer.
      ValueError: it refuses.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=CALL_SECONDS)
    except FileNotFoundError:
        raise Silent(
            f"there is no {words[0]} here: start --backend=slurm where Slurm's commands are, on a "
            "login node as a rule"
        ) from None
    except subprocess.TimeoutExpired:
        raise Silent(_down(words[0], f"no answer in {CALL_SECONDS:.0f} s")) from None
    if done.returncode == 0:
        return done.stdout
    lines = [re.sub(r"^\w+: (error|fatal): ", "", x) for x in done.stderr.splitlines() if x.strip()]
    said = "; ".join(dict.fromkeys(lines[-3:])) or f"exit {done.returncode}"
    if re.search(r"contact slurm controller|configuration source|timed out|connection", said, re.I):
        raise Silent(_down(words[0], said))
    way_out = "mend --sbatch, or take less by --only" if words[0] == "sbatch" else "see its manual"
    raise ValueError(f"{words[0]} refuses ({said}): {way_out}")


def _down(program: str, said: str) -> str:
    return (
        f"{program}: Slurm does not answer ({said}): try the same command later; what is in the "
        "queue or runs is not affected"
    )


def elements(record: list[Submission]) -> dict[str, Element]:
    """What Slurm knows of members, by name, from their newest submission that it knows."""
    if not record:
        return {}
    by_name = {entry.name: entry for entry in record}
    text = call(
        [
            *("squeue", "--noheader", "--array", "--states=all", f"--name={','.join(by_name)}"),
            "--format=%j|%F|%K|%T|%r",
        ]
    )
    found: dict[str, tuple[int, Element]] = {}
    rank = {entry.name: i for i, entry in enumerate(record)}
    for line in text.splitlines():
        if line.count("|") < 4:  # of SLURM_CLUSTERS: which one
            continue
        name, job, index, state, reason = line.strip().split("|", 4)
        if name not in by_name or not index.isdecimal():
            continue
        for member in by_name[name].members[int(index)].split(","):
            if member not in found or rank[name] >= found[member][0]:
                found[member] = (rank[name], Element(job, state, reason))
    return {member: element for member, (_, element) in found.items()}


def active(found: dict[str, Element]) -> dict[str, Element]:
    """Those that wait in the queue, run, or are about to end or start."""
    return {name: element for name, element in found.items() if element.state not in ENDED}


def failures(workdir: pathlib.Path, name: str) -> int:
    """How many submissions of a member have ended in failure."""
    return len(_failures(workdir, name))


def _failures(workdir: pathlib.Path, name: str) -> list[str]:
    path = workdir / name / LOG_NAME
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return re.findall(r"^\S+ \S+ failed (.*)$", text, re.MULTILINE)


def words(workdir: pathlib.Path) -> dict[str, tuple[str, str]]:
    """What `progress.told` takes: Slurm's word on members, and what is known of their failures."""
    record = submissions(workdir)
    found = elements(record)
    said: dict[str, tuple[str, str]] = {}
    # The log of a program is that of its first run.
    first = {
        name: unit.partition(",")[0]
        for entry in record
        for unit in entry.members
        for name in unit.split(",")
    }
    for name in first:
        element = found[name] if name in found else None
        if element is not None and element.state not in ENDED:
            said[name] = _word(element)
            continue
        failed = _failures(workdir, name)
        if failed and _last_event(workdir, name) == "failed":
            last = progress.last_words(workdir / first[name])
            said[name] = ("failed", last or f"exit {failed[-1]}")
        elif element is not None and element.state != "COMPLETED":
            said[name] = ("", f"Slurm: {element.state.lower()}")
    return said


def _word(element: Element) -> tuple[str, str]:
    """A state and a note, of an element that has not ended."""
    reason = "" if element.reason in ("None", "") else element.reason
    if element.state in ("RUNNING", "COMPLETING"):
        return "running", "" if element.state == "RUNNING" else "ending"
    if element.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_FED"):
        return "queued", reason
    return element.state.lower(), reason


def _last_event(workdir: pathlib.Path, name: str) -> str:
    """start, end or failed: what a member's slurm.log says last."""
    lines = (workdir / name / LOG_NAME).read_text(encoding="utf-8", errors="replace").splitlines()
    parts = lines[-1].split()
    return parts[2] if len(parts) > 2 else ""


def cancel(record: list[Submission]) -> list[str]:
    """Cancels the sweep's own jobs that are in the queue or run; the numbers of these."""
    jobs = sorted({element.job for element in active(elements(record)).values()}, key=int)
    if jobs:
        call(["scancel", *jobs])
    return jobs


class Array:
    """Members of a sweep on their way through Slurm, for one command that submits them."""

    def __init__(
        self,
        sweep: Sweep,
        members: list[Member],
        is_done: Callable[[Member], bool],
        prepare: Callable[[list[Member]], None],
        say: Callable[[str], None],
        *,
        retry: bool,
        replicas: int = 1,
    ) -> None:
        """`prepare` makes once what all of them would make; with `retry` those that have failed
        too often get another chance; up to `replicas` runs that can share a program do so."""
        self._sweep, self._members, self._is_done = sweep, members, is_done
        self._replicas = replicas
        self._prepare, self._say, self._retry = prepare, say, retry
        self._tries: collections.Counter[str] = collections.Counter()  # of this command

    def submit(self) -> list[str]:
        """Submits what is not done, not in the queue, and has not failed too often.

        Returns:
          the names of those that have.

        Raises:
          ValueError: Slurm takes it not, or another command submits here.
        """
        workdir = self._sweep.workdir
        workdir.mkdir(parents=True, exist_ok=True)
        held = lock.hold(epath.Path(workdir))
        try:
            waiting = self._active()
            left = [x for x in self._members if x.name not in waiting and not self._is_done(x)]
            spent = [x.name for x in left if self._is_spent(x.name)]
            fresh = [x for x in left if x.name not in spent]
            if waiting:
                self._say(f"{len(waiting)} runs are in the queue or run")
            if fresh:
                units = self._units(fresh)
                if not self._tries:  # later ones of this command are alike, and find all made
                    ask(self._sweep, units)
                    self._say(f"corpora of {len(fresh)} runs: stores that are not there are made")
                self._prepare(fresh)
                entry = submit(self._sweep, units)
                self._tries.update(entry.names())
                programs = f" as {len(units)} program(s)" if len(units) < len(fresh) else ""
                self._say(f"submitted {len(fresh)} runs{programs}: job {entry.job}, {entry.name}")
        finally:
            if held is not None:
                held.close()
        return spent

    def goes_on(self) -> bool:
        """Whether some are still in the queue or run; those that have failed are tried again."""
        if self._active():
            return True
        self.submit()
        return bool(self._active())

    def _units(self, fresh: list[Member]) -> list[str]:
        """The elements of an array. A run that has failed goes alone, and takes no other down."""
        failed = {
            x.name for x in fresh if self._tries[x.name] or failures(self._sweep.workdir, x.name)
        }
        together = [x for x in fresh if x.name not in failed]
        return [
            *(unit_name(unit) for unit in members.units(together, self._replicas).values()),
            *(x.name for x in fresh if x.name in failed),
        ]

    def _active(self) -> set[str]:
        found = active(elements(submissions(self._sweep.workdir)))
        return {x.name for x in self._members} & found.keys()

    def _is_spent(self, name: str) -> bool:
        tries = self._tries[name]
        if not self._retry:
            tries = max(tries, failures(self._sweep.workdir, name))
        return tries >= TRIES
