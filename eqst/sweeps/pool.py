"""The runs of a sweep on Cloud TPU: some queued resources at a time, each serves run after run.

What is the case is asked of the cloud and of the hosts at every look, and nothing is written down
here: whenever the sweep is killed, the same command finds its requests by their names, hears from
their hosts which run each is at, and goes on (`eqst.sweeps.queued` has the policy). A run is given
to another TPU only when the one before is known to be gone.
"""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

from eqst.processes import EXIT_INTERRUPTED
from eqst.record import clock
from eqst.stopping import Interrupted
from eqst.sweeps import gcloud
from eqst.sweeps.deletion import delete
from eqst.sweeps.gcloud import (
    Answer,
    Clock,
    Cloud,
    LoginNeeded,
    PersonNeeded,
    said,
)
from eqst.sweeps.local import TRIES
from eqst.sweeps.members import Member
from eqst.sweeps.orders import Plan, setup_line, start_line
from eqst.sweeps.queued import (
    ABSENT,
    ACTIVE,
    DEAF_LOOKS,
    LAST,
    PENDING,
    READY,
    STATE,
    STOP,
    Action,
    Host,
    Seen,
    Slot,
    decide,
    heard,
    job_key,
    prefix,
)

STOP_SECONDS = 120.0  # for runs to save themselves before their TPUs are deleted
BACKOFF_SECONDS, MOST_BACKOFF_SECONDS = 30.0, 900.0


class Errand(NamedTuple):
    """What hosts are to be told, by a call of their own thread, and in words what they `cannot`."""

    slot: Slot
    call: Callable[[], Answer]
    what: str


class Pool:
    """The requests of one sweep."""

    def __init__(
        self,
        cloud: Cloud,
        plan: Plan,
        waiting: list[Member],
        time: Clock,
        say: Callable[[str], None],
        *,
        jobs: int,
        keep: bool,
    ):
        """Takes over the requests that are there.

        Args:
          cloud: of the site.
          plan: what to do.
          waiting: the runs, in this order.
          time: its clock.
          say: called with each line of progress.
          jobs: requests at a time, but for those that are there and at work.
          keep: what is not needed is left, not deleted.
        """
        self._cloud, self._plan, self._time, self._say = cloud, plan, time, say
        self._keep, self._waiting = keep, list(waiting)
        self._every, self._finished = len(waiting), 0
        self._tries = dict.fromkeys((member.name for member in waiting), 0)
        self._given_up: list[Member] = []
        self._setup_failures = self._deaf_losses = 0
        self._ever_heard, self._logged_out = False, False
        self._began = time.now()
        found = self._found()
        self._names = [f"{prefix(plan.workdir)}{i}" for i in range(jobs)]
        wrong = [name for name, entry in found.items() if self._other_kind(entry)]
        if wrong:
            say(f"{', '.join(wrong)}: of another type than {cloud.site.accelerator_type}, deleted")
            delete(cloud, wrong, time)
            found = self._found()
        names = dict.fromkeys([*self._names, *found])
        self.slots = [Slot(name, unknown=name in found) for name in names]
        if found:
            say(f"found {', '.join(found)}")

    def _found(self) -> dict[str, Any]:
        start = prefix(self._plan.workdir)
        return {k: v for k, v in sorted(self._cloud.requests().items()) if k.startswith(start)}

    def _other_kind(self, entry: dict[str, Any]) -> bool:
        specs = entry["tpu"]["nodeSpec"] if "tpu" in entry else []
        kinds = {x["node"]["acceleratorType"] for x in specs if "acceleratorType" in x["node"]}
        return bool(kinds - {self._cloud.site.accelerator_type})

    def _key(self, member: Member) -> str:
        return job_key(self._plan.units[member.name])

    def failed(self) -> list[str]:
        """The runs that failed as often as they may."""
        return [member.name for member in self._given_up]

    def step(self) -> bool:
        """Looks at every request and does what is to be done; whether there is anything left.

        Without a login there is, and nothing is done: every part of it may be done once more.
        """
        try:
            left = self._step()
        except LoginNeeded as error:
            if not self._logged_out:
                self._say(f"{error}; until then runs go on, unseen and paid for")
            self._logged_out = True
            return True
        if self._logged_out:
            self._say("logged in again")
        self._logged_out = False
        return left

    def _step(self) -> bool:
        looks = self._looks()
        for slot in self.slots:
            seen = looks[slot.name]
            if seen != slot.seen:
                self._tell(slot, seen)
                slot.seen, slot.since = seen, self._time.now()
            self._settle(slot)
        errands: list[Errand] = []
        for slot in self.slots:
            wanted = slot.member is not None or slot in self._useful()
            if self._keep and not wanted and not slot.unknown:
                continue
            free = bool(self._waiting) and not any(other.unknown for other in self.slots)
            action = decide(
                slot, wanted=wanted, free=free, clone=self._plan.clone, now=self._time.now()
            )
            errands += self._act(slot, action)
        answers = self._cloud.at_once([errand.call for errand in errands])
        for errand, answer in zip(errands, answers, strict=True):
            self._note(errand, answer)
        there = any(slot.seen.request != ABSENT for slot in self.slots) and not self._keep
        return bool(self._waiting) or there or any(slot.member for slot in self.slots)

    # --- looking

    def _looks(self) -> dict[str, Seen]:
        """What is the case with every request, by name."""
        listed = self._cloud.requests()
        states = {slot.name: self._state(slot, listed) for slot in self.slots}
        nodes = self._cloud.nodes([name for name, state in states.items() if state == ACTIVE])
        there = {name: node for name, node in nodes.items() if node is not None}
        ready = [name for name, node in there.items() if node["state"] == READY]
        answers = self._cloud.hear(ready, STATE)
        looks = {name: Seen(state) for name, state in states.items()}
        looks |= {name: Seen(ACTIVE, node["state"]) for name, node in there.items()}
        for slot in self.slots:
            if slot.name in answers:
                count = len(there[slot.name]["networkEndpoints"])
                hosts = self._hosts(slot, count, answers[slot.name])
                looks[slot.name] = Seen(ACTIVE, READY, hosts)
        return looks

    def _state(self, slot: Slot, listed: dict[str, Any]) -> str:
        entry = listed[slot.name] if slot.name in listed else None
        if entry is None and slot.seen.request != ABSENT:
            entry = self._cloud.request(slot.name)  # that it is gone, a list alone does not prove
        if entry is None:
            return ABSENT
        state = entry["state"]["state"]
        if state == "FAILED" and "failedData" in entry["state"] and not slot.unknown:
            why = entry["state"]["failedData"]["error"]["message"]
            if gcloud.is_quota(why):
                raise PersonNeeded(f"{slot.name}: {why}: ask for more quota, or lower --jobs")
        return state

    def _hosts(self, slot: Slot, count: int, answer: Answer | None) -> tuple[Host, ...]:
        """The hosts of a TPU that has so many, if all of them answered."""
        if answer is None:  # it is awaited still
            return ()
        hosts = heard(answer.out)
        if len(hosts) != count:
            slot.deaf += 1
            self._say(f"{slot.name}: its hosts do not answer ({said(answer)})")
            return ()
        slot.deaf, self._ever_heard = 0, True
        return tuple(sorted(hosts))

    def _tell(self, slot: Slot, seen: Seen) -> None:
        """A line where a request has come to another state."""
        if (seen.request, seen.node) != (slot.seen.request, slot.seen.node):
            state = f"{seen.request or 'gone'}{seen.node and f', node {seen.node}'}"
            self._say(f"{slot.name}: {state}")

    def _settle(self, slot: Slot) -> None:
        """Learns what an unknown request is at; takes back the run of one that is gone."""
        seen = slot.seen
        if seen.request == ABSENT and slot.member:
            self._waiting.insert(0, slot.member)
            slot.member, slot.job = None, ""
        if not slot.unknown:
            return
        if seen.request == ABSENT or seen.request in PENDING:
            slot.unknown = False
        elif seen.hosts:
            running = {host.of for host in seen.hosts if host.job == "running"}
            keys = {self._key(member): member for member in self._waiting}
            job = running.pop() if len(running) == 1 else ""
            key = job.partition(".")[0]
            if key in keys:
                slot.member, slot.job, slot.started = keys[key], job, self._time.now()
                self._waiting.remove(slot.member)
                self._say(f"{slot.name}: is at {slot.member.name}")
            slot.unknown = bool(not slot.job and (job or running))

    def _useful(self) -> list[Slot]:
        """The requests without a run that will get one: as many as wait, the nearest first.

        Those of an earlier command with more --jobs get none.
        """
        idle = [slot for slot in self.slots if not slot.member and slot.name in self._names]
        idle.sort(key=lambda slot: (slot.seen.request == ABSENT, slot.seen.request != ACTIVE))
        return idle[: len(self._waiting)]

    # --- acting

    def _act(self, slot: Slot, action: Action) -> list[Errand]:
        """Does it, but for what hosts are told, which is left to be told to all at once."""
        if action is Action.CREATE:
            self._say(f"{slot.name}: asking for {self._cloud.site.accelerator_type}")
            # Whatever will be answered, it may be there from now on.
            slot.seen, slot.since = Seen("CREATING"), self._time.now()
            self._cloud.create(slot.name)
        elif action is Action.SHIP:
            return [Errand(slot, functools.partial(self._ship, slot.name), "be set up")]
        elif action is Action.START:
            return [Errand(slot, self._start(slot), "be started")]
        elif action is Action.END:
            self._end(slot)
        elif action is Action.STOP:
            return [Errand(slot, self._telling(slot, STOP), "be stopped")]
        elif action is Action.LOSE:
            self._lose(slot)
        elif action is Action.HUNG:
            self._hang(slot)
        elif action is Action.SETUP_FAILED:
            why = f"{slot.name}: its environment cannot be made ({self._last_lines(slot)})"
            self._setup_failures += 1
            if self._setup_failures >= TRIES:
                raise PersonNeeded(f"{why}: mend --setup or the clone")
            self._say(f"{why}; once more on another")
            self._lose(slot)
        elif action is Action.DELETE:
            self._cloud.delete(slot.name)
            slot.seen, slot.since = Seen("DELETING"), self._time.now()
        return []

    def _telling(self, slot: Slot, line: str) -> Callable[[], Answer]:
        return functools.partial(self._cloud.on_hosts, slot.name, line)

    def _ship(self, name: str) -> Answer:
        answer = self._cloud.copy(name, self._plan.files)
        return answer if answer.code else self._cloud.on_hosts(name, setup_line(self._plan))

    def _start(self, slot: Slot) -> Callable[[], Answer]:
        self._setup_failures = 0
        if slot.member is None:
            slot.member = self._waiting.pop(0)
        if not slot.job:
            self._tries[slot.member.name] += 1
            # No two jobs have one name, so that a host never takes a new one for the last.
            slot.job = f"{self._key(slot.member)}.{secrets.token_hex(4)}"
            slot.started = self._time.now()
            self._say(f"{slot.name}: {slot.member.name}")
        return self._telling(slot, start_line(self._plan, slot.job, slot.member.name))

    def _note(self, errand: Errand, answer: Answer) -> None:
        """A failed command is given again at the next look, some times."""
        slot = errand.slot
        slot.refused = slot.refused + 1 if answer.code else 0
        if answer.code:
            self._say(f"{slot.name}: cannot {errand.what} yet ({said(answer)})")

    def _end(self, slot: Slot) -> None:
        """Every host's part of the run has ended."""
        member = slot.member
        assert member is not None
        codes = {host.code for host in slot.seen.hosts}
        if codes <= {0, EXIT_INTERRUPTED} and EXIT_INTERRUPTED in codes:
            self._say(f"{member.name}: interrupted and saved")
            self._lose(slot)
            return
        if codes != {0}:
            worst = max(codes - {0, EXIT_INTERRUPTED})
            self._fail(slot, f"exit code {worst}: {self._last_lines(slot)}")
        elif not self._is_done(member):
            self._fail(slot, "it left no results")
        else:
            slot.member, slot.job, slot.losses = None, "", 0
            self._finished += 1
            left = (self._time.now() - self._began) / self._finished
            left *= len(self._waiting) + sum(other.member is not None for other in self.slots)
            took = f"{self._time.now() - slot.started:.0f} s  left {clock(left)}"
            self._say(f"{self._finished}/{self._every}  {member.name}  {took}")

    def _fail(self, slot: Slot, why: str) -> None:
        """The run has failed by itself: once more at the end, or not again."""
        member = slot.member
        assert member is not None
        again = self._tries[member.name] < TRIES
        self._say(f"{member.name}: {'failed' if again else 'FAILED'} ({why})")
        (self._waiting if again else self._given_up).append(member)
        slot.member, slot.job = None, ""

    def _hang(self, slot: Slot) -> None:
        """The run has failed, and may be given to another only when this TPU is gone."""
        assert slot.member is not None
        tries = self._tries[slot.member.name]
        self._say(f"{slot.member.name}: some of its hosts ended, others did not")
        self._lose(slot)
        self._tries[slot.member.name] = tries
        if tries >= TRIES:
            self._given_up.append(slot.member)
            slot.member = None

    def _lose(self, slot: Slot) -> None:
        """Deletes a request; the run it was at waits until it is gone."""
        if slot.deaf >= DEAF_LOOKS:
            self._deaf_losses += 1
            if self._deaf_losses >= TRIES and not self._ever_heard:
                raise PersonNeeded(
                    f"{slot.name}: its hosts never answered ssh: try `gcloud compute tpus tpu-vm "
                    f"ssh {slot.name}` by hand, see launch/README.md"
                )
        self._cloud.delete(slot.name)
        slot.losses, slot.deaf, slot.refused, slot.job = slot.losses + 1, 0, 0, ""
        wait = min(BACKOFF_SECONDS * 2 ** (slot.losses - 1), MOST_BACKOFF_SECONDS)
        slot.not_before = self._time.now() + wait
        if slot.member and self._tries[slot.member.name]:  # it is no failure of the run
            self._tries[slot.member.name] -= 1
        slot.seen, slot.since = Seen("DELETING"), self._time.now()

    def _is_done(self, member: Member) -> bool:
        """Whether it is, by a bucket that may be out of reach for a while."""
        for seconds in (5.0, 30.0, 120.0):
            try:
                return self._plan.is_done(member)
            except Exception as error:  # of whichever library reads buckets here
                self._say(f"{member.name}: cannot be read ({str(error)[:200]})")
                self._time.pause(seconds)
        return self._plan.is_done(member)

    def _last_lines(self, slot: Slot) -> str:
        """What the hosts said last, each different line once."""
        answer = self._cloud.on_hosts(slot.name, LAST)
        lines = [line.strip()[:200] for line in answer.out.splitlines() if line.strip()]
        return " / ".join(list(dict.fromkeys(lines))[:3]) or said(answer)

    # --- ending

    def leave(self) -> None:
        """Has every run save itself and end, so that its TPU can be deleted."""
        busy = [slot for slot in self.slots if slot.job and slot.seen.hosts and not self._keep]
        self._cloud.at_once([self._telling(slot, STOP) for slot in busy])
        end = self._time.now() + STOP_SECONDS
        while busy and self._time.now() < end:
            self._time.pause(5.0)
            answers = self._cloud.hear([slot.name for slot in busy], STATE)
            busy = [slot for slot in busy if _runs(answers[slot.name])]

    def close(self) -> None:
        """Deletes all requests of the sweep and waits until they are gone.

        Raises:
          PersonNeeded: they do not go; the message names them.
        """
        names = [x.name for x in self.slots if x.seen.request != ABSENT or x.unknown]
        try:
            found = list(self._found())
            names = found if self._keep else list(dict.fromkeys([*found, *names]))
        except (PersonNeeded, Interrupted) as error:
            if not names:
                raise
            self._say(f"requests cannot be listed ({error})")
        if not self._keep:
            delete(self._cloud, names, self._time)
        elif names:
            self._say(f"kept, and paid for: {', '.join(names)}; --cancel deletes them")


def _runs(answer: Answer | None) -> bool:
    """Whether hosts that said this, or are to answer yet, may be at a run still."""
    return answer is None or any(host.job == "running" for host in heard(answer.out))


def run_all(pool: Pool, time: Clock, poll_seconds: float) -> list[str]:
    """Runs what waits in a pool; the names of the runs that failed.

    However it ends, requests are deleted (or, if they are to be kept, named).

    Raises:
      Interrupted: the sweep was told to stop; the same command goes on.
      PersonNeeded: a quota, a right, an option: in one line.
    """
    try:
        while pool.step():
            time.pause(poll_seconds)
    except BaseException:
        pool.leave()
        raise
    finally:
        pool.close()
    return pool.failed()
