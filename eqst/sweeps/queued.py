"""A Cloud TPU queued resource at work for a sweep: what is seen of it, and what to do about that.

`decide` is the whole policy, a function of one look; `eqst.sweeps.pool` looks and acts.
"""

from __future__ import annotations

import dataclasses
import enum
from typing import NamedTuple

from eqst.card import digest
from eqst.sweeps.gcloud import HOST_SCRIPT
from eqst.sweeps.members import Member, settings_hash

# A queued resource. One that is LOST keeps its name and its place in the quota until deleted.
PENDING = frozenset({"CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"})
ACTIVE = "ACTIVE"
GOING = frozenset({"SUSPENDING", "DELETING"})
LOST = frozenset({"SUSPENDED", "FAILED"})
ABSENT = ""
# Its node, which may be gone under an ACTIVE request. Whatever is in neither set is lost.
READY = "READY"
COMING = frozenset(
    {"CREATING", "STARTING", "RESTARTING", "REIMAGING", "UNHIDING", "UNKNOWN", "STATE_UNSPECIFIED"}
)

STUCK_SECONDS = 2400.0  # for a machine to come up, or an environment to be made
ODD_SECONDS = 600.0  # between the ends of one run's hosts, which end within a minute
DEAF_LOOKS = 10  # in a row at which the hosts did not answer, or did not do what they were told

STOP, LAST = f"bash {HOST_SCRIPT} stop", f"bash {HOST_SCRIPT} last"
STATE = f'test -f {HOST_SCRIPT} && bash {HOST_SCRIPT} state || echo "eqst $(hostname) bare idle"'


class Host(NamedTuple):
    """What one host says: `setup` and `job` are words, each followed by what it is of.

    setup is bare, making, ready or failed (of a clone), job idle, running or ended (of a job).
    """

    setup: str
    clone: str
    job: str
    of: str
    code: int


class Seen(NamedTuple):
    """One look at a request: `hosts` is empty where not all of them answered."""

    request: str
    node: str = ABSENT
    hosts: tuple[Host, ...] = ()


class Action(enum.Enum):
    """What is to be done about a request."""

    REST = "nothing, there is no work for it"
    WAIT = "nothing, it comes or runs"
    CREATE = "make it"
    SHIP = "copy the clone, make the environment"
    START = "start the run"
    END = "the run has ended"
    STOP = "tell what runs there to save and end"
    LOSE = "delete it, its run goes on elsewhere"
    HUNG = "some of its hosts have ended, others do not: the run has failed; delete it"
    SETUP_FAILED = "the environment cannot be made"
    DELETE = "delete it, it is not needed"


@dataclasses.dataclass
class Slot:
    """A request by its name, which may or may not be there, and the run it is for.

    Attributes:
      name: of the request and its node.
      member: the run it is at, or is for.
      job: under which the hosts know that run; "" before it is started.
      unknown: it was there before us, and what it is at has not been heard.
      losses: times in a row that it was taken away.
      deaf: looks in a row at which its hosts did not answer.
      refused: commands in a row that its hosts did not do.
      not_before: when it may be made again.
      seen, since: the last look, and when it first was so.
      started: when its run was.
    """

    name: str
    member: Member | None = None
    job: str = ""
    unknown: bool = False
    losses: int = 0
    deaf: int = 0
    refused: int = 0
    not_before: float = 0.0
    seen: Seen = Seen(ABSENT)
    since: float = 0.0
    started: float = 0.0


def decide(slot: Slot, *, wanted: bool, free: bool, clone: str, now: float) -> Action:
    """What is to be done about a request, from what was seen of it. Pure.

    Args:
      slot: with its last look.
      wanted: whether there is a run for it.
      free: whether a new run may be handed out: not while one may run unknown to us.
      clone: the name of the clone that hosts should have.
      now: seconds of the same clock as `since` and `not_before`.
    """
    seen, stuck = slot.seen, now - slot.since
    if seen.request == ABSENT:
        return Action.CREATE if wanted and now >= slot.not_before else Action.REST
    if seen.request in GOING:
        return Action.WAIT
    if seen.request in LOST:
        return Action.LOSE
    if not wanted and not slot.unknown:
        return Action.DELETE
    if seen.request != ACTIVE:
        return Action.WAIT
    if seen.node in COMING:
        return Action.LOSE if stuck > STUCK_SECONDS else Action.WAIT
    if seen.node != READY:
        return Action.LOSE
    if max(slot.deaf, slot.refused) >= DEAF_LOOKS:
        return Action.LOSE
    if not seen.hosts:
        return Action.WAIT
    if slot.job:
        return _about_job([host for host in seen.hosts if host.of == slot.job], seen, stuck)
    if any(host.job == "running" for host in seen.hosts):  # none of ours
        return Action.STOP
    if any(host[:2] == ("failed", clone) for host in seen.hosts):
        return Action.SETUP_FAILED
    if any(host[:2] not in (("making", clone), ("ready", clone)) for host in seen.hosts):
        return Action.SHIP
    if any(host.setup == "making" for host in seen.hosts):
        return Action.SETUP_FAILED if stuck > STUCK_SECONDS else Action.WAIT
    return Action.START if slot.member or free else Action.WAIT


def _about_job(own: list[Host], seen: Seen, stuck: float) -> Action:
    """The same for one whose run was started; `own` are the hosts that know of it."""
    if len(own) < len(seen.hosts):  # it did not reach them all
        return Action.START
    if all(host.job == "ended" for host in own):
        return Action.END
    odd = any(host.job == "ended" for host in own)
    return Action.HUNG if odd and stuck > ODD_SECONDS else Action.WAIT


def prefix(workdir: str) -> str:
    """What the names of all requests of a workdir begin with."""
    return f"eqst-{digest(workdir.rstrip('/'))[:10]}-"


def job_key(unit: list[Member]) -> str:
    """What the names of the jobs of runs that are one program begin with.

    It is of them all, so that a program of these and others is never taken for one of these.
    """
    return digest(" ".join(f"{x.name} {settings_hash(x)}" for x in unit))[:12]


def heard(text: str) -> tuple[Host, ...]:
    """The hosts' lines (launch/tpu_host.sh, state) in what they all printed."""
    hosts = []
    for line in text.splitlines():
        words = line.split()
        if len(words) == 4 and words[0] == "eqst":
            setup, _, clone = words[2].partition(":")
            job, *rest = words[3].split(":")
            code = int(rest[1]) if len(rest) > 1 else 0
            hosts.append(Host(setup, clone, job, rest[0] if rest else "", code))
    return tuple(hosts)
