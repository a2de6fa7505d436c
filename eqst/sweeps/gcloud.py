"""Cloud TPU by the program gcloud: the words of each command, and what its answers mean.

A request is a queued resource with one node of the same name. No command of ours waits on a host
for longer than it takes to start something there, so that neither a dropped connection nor a pod of
more hosts than gcloud serves at a time matters (--batch-size of `tpu-vm ssh` is alpha's alone).
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

ASK_SECONDS, DO_SECONDS, COPY_SECONDS = 120.0, 300.0, 900.0  # a command may take
HEAR_SECONDS = 30.0  # for all hosts to answer at a look; one that does not keeps no other waiting
AT_ONCE = 16  # commands: each is a Python of its own, of some 100 MB
TRIES = 6  # of a command that fails in a way that is not known to pass by itself
PAUSES_SECONDS = (5, 10, 20, 40, 80, 160, 300)
# What each kind of TPU boots with (Cloud TPU, "TPU software versions").
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
HOST_SCRIPT, ARCHIVE = "tpu_host.sh", "eqst-sweep.tar.gz"  # as they lie in a host's home

# A rate limit passes; every other quota is for a person to raise.
_RATE = re.compile(r"per minute|rate.?limit|too many requests|\b429\b", re.I)
_QUOTA = re.compile(r"quota|PerProjectPerZone|IN_USE_ADDRESSES", re.I)
_ABSENT = re.compile(r"NOT_FOUND|was not found|\b404\b", re.I)
_THERE = re.compile(r"ALREADY_EXISTS|already exists|\b409\b", re.I)
_PERSON = re.compile(
    r"PERMISSION_DENIED|INVALID_ARGUMENT|SERVICE_DISABLED|has not been used in project|ssh-add",
    re.I,
)
# Words about the active account alone also stand where a right is missing.
_LOGIN = re.compile(
    r"UNAUTHENTICATED|not currently have an active account|gcloud auth login|auth tokens"
    r"|Reauthentication|invalid_grant",
    re.I,
)
_PASSING = re.compile(
    r"UNAVAILABLE|INTERNAL:|internal error|DEADLINE_EXCEEDED|ABORTED|timed? ?out|connection"
    r"|try again|temporar|name resolution|\b50[0234]\b",
    re.I,
)
_USAGE = "ERROR: (gcloud"  # with exit code 2: gcloud does not take these words


class PersonNeeded(OSError):
    """What no waiting mends: the message is one line for the user."""


class LoginNeeded(PersonNeeded):
    """The login has expired: what is there goes on, and can neither be seen nor deleted."""


class Answer(NamedTuple):
    """What a command came to; code 124 is ours, for one that took too long."""

    code: int
    out: str
    err: str


class Clock(NamedTuple):
    """Time as the sweep sees it: `pause` ends by an exception where the sweep is to end."""

    now: Callable[[], float]
    pause: Callable[[float], None]


class Site(NamedTuple):
    """Where requests are made, and of what.

    Attributes:
      project, zone: of the cloud.
      accelerator_type: such as "v5p-8".
      runtime_version: what the hosts boot with.
      spot: whether it may be taken back at any time, for a lower price.
      create: further words for `queued-resources create`.
      ssh: further words for `tpu-vm ssh` and `scp`.
    """

    project: str
    zone: str
    accelerator_type: str
    runtime_version: str
    spot: bool
    create: tuple[str, ...]
    ssh: tuple[str, ...]


def runtime_of(accelerator_type: str) -> str:
    """The runtime version of a type whose kind is known.

    Raises:
      ValueError: it is not.
    """
    kind = accelerator_type.partition("-")[0]
    if kind not in RUNTIMES:
        raise ValueError(
            f"--accelerator_type={accelerator_type}: its runtime is known for "
            f"{', '.join(RUNTIMES)} alone: give --runtime_version=.."
        )
    return RUNTIMES[kind]


# --- the words of each command -------------------------------------------------------------------


def create_words(site: Site, name: str) -> list[str]:
    """Asks for a TPU; comes back when the request is made, not when the TPU is there."""
    return [
        *_requests("create", site, name),
        f"--node-id={name}",
        f"--accelerator-type={site.accelerator_type}",
        f"--runtime-version={site.runtime_version}",
        *(["--spot"] if site.spot else []),
        *site.create,
        "--async",
    ]


def delete_words(site: Site, name: str) -> list[str]:
    """Gives it back; --force takes the node too, without which a live request is not deleted."""
    return [*_requests("delete", site, name), "--force", "--async"]


def describe_words(site: Site, name: str) -> list[str]:
    """One request."""
    return [*_requests("describe", site, name), "--format=json"]


def list_words(site: Site) -> list[str]:
    """All requests of the zone."""
    return [*_requests("list", site), "--format=json"]


def node_words(site: Site, name: str) -> list[str]:
    """The machine behind a request."""
    words = ["gcloud", "compute", "tpus", "tpu-vm", "describe", name]
    return [*words, *_where(site), "--format=json"]


def ssh_words(site: Site, name: str, command: str) -> list[str]:
    """Runs a shell line on all hosts of a TPU."""
    words = [*_hosts(site), "ssh", name, *_where(site), "--worker=all"]
    alive = ["--ssh-flag=-o ConnectTimeout=20", "--ssh-flag=-o ServerAliveInterval=30"]
    return [*words, *alive, *site.ssh, f"--command={command}"]


def copy_words(site: Site, name: str, files: list[str]) -> list[str]:
    """Copies files to the home of all hosts."""
    words = [*_hosts(site), "scp", *files, f"{name}:"]
    return [*words, *_where(site), "--worker=all", *site.ssh]


def _hosts(site: Site) -> list[str]:
    """What speaks to hosts; the tunnel to those without an external address is alpha's alone."""
    track = ["alpha"] if "--tunnel-through-iap" in site.ssh else []
    return ["gcloud", *track, "compute", "tpus", "tpu-vm"]


def _requests(action: str, site: Site, *name: str) -> list[str]:
    return ["gcloud", "compute", "tpus", "queued-resources", action, *name, *_where(site)]


def _where(site: Site) -> list[str]:
    return [f"--project={site.project}", f"--zone={site.zone}", "--quiet"]


# --- what an answer means ------------------------------------------------------------------------


def is_quota(text: str) -> bool:
    """Whether an error is of a quota that a person has to raise."""
    return bool(_QUOTA.search(text)) and not _RATE.search(text)


def is_absent(answer: Answer) -> bool:
    """Whether there is no such thing."""
    return answer.code != 0 and bool(_ABSENT.search(answer.err))


def is_there(answer: Answer) -> bool:
    """Whether what was to be made is there already."""
    return answer.code != 0 and bool(_THERE.search(answer.err))


def said(answer: Answer) -> str:
    """The last line of an error, in words for a person."""
    lines = [line.strip() for line in (answer.err or answer.out).splitlines() if line.strip()]
    error = [line for line in lines if line.startswith("ERROR:")]
    return (error or lines or ["no word"])[-1][:300]


def check(answer: Answer, site: Site) -> None:
    """Refuses an answer that no waiting mends.

    Raises:
      PersonNeeded: a quota, a right, an option; LoginNeeded, a login.
    """
    if answer.code == 0:
        return
    _check_login(answer)
    if is_quota(answer.err):
        raise PersonNeeded(
            f"{said(answer)}: ask for more quota of {site.accelerator_type}"
            f"{' (preemptible)' if site.spot else ''} in {site.zone}, or lower --jobs"
        )
    usage = answer.code == 2 and _USAGE in answer.err
    if usage or (_PERSON.search(answer.err) and not _passes(answer)):
        raise PersonNeeded(f"{said(answer)}: see launch/README.md")


def _check_login(answer: Answer) -> None:
    known = _PERSON.search(answer.err) or _passes(answer)
    if answer.code != 0 and _LOGIN.search(answer.err) and not known:
        raise LoginNeeded(
            f"{said(answer)}: `gcloud auth login` and `gcloud auth application-default login`"
        )


def _passes(answer: Answer) -> bool:
    """Whether waiting is known to help."""
    found = _PASSING.search(answer.err) or _RATE.search(answer.err)
    return answer.code == 124 or found is not None


class Cloud:
    """Runs commands for one site, again where that may help."""

    def __init__(
        self,
        site: Site,
        run: Callable[[list[str], float], Answer],
        pause: Callable[[float], None],
        say: Callable[[str], None],
        at_once: int = AT_ONCE,
    ):
        """Takes what it needs of the world.

        Args:
          site: where, and of what.
          run: takes words and a limit in seconds; the one that threads call.
          pause: waits, and may end it all.
          say: called with each line of progress.
          at_once: commands side by side.
        """
        self.site = site
        self._run, self._pause, self._say = run, pause, say
        self._threads = concurrent.futures.ThreadPoolExecutor(at_once)
        self._asked: dict[str, concurrent.futures.Future[Answer]] = {}

    def ask(
        self, words: list[str], seconds: float = ASK_SECONDS, first: Answer | None = None
    ) -> Answer:
        """The answer to a command that may be given any number of times.

        What is known to pass is waited for without end, longer each time.

        Args:
          words: of the command.
          seconds: that it may take.
          first: its answer, where it was given once already.

        Raises:
          PersonNeeded: it does not help to wait, or has not helped.
        """
        failures = unknown = 0
        while True:
            answer = first or self._run(words, seconds)
            first = None
            if answer.code == 0 or is_absent(answer) or is_there(answer):
                return answer
            check(answer, self.site)
            unknown = 0 if _passes(answer) else unknown + 1
            if unknown >= TRIES:
                raise PersonNeeded(f"gcloud fails again and again: {said(answer)}")
            seconds_off = PAUSES_SECONDS[min(failures, len(PAUSES_SECONDS) - 1)]
            failures += 1
            self._say(f"gcloud: {said(answer)}; again in {seconds_off} s")
            self._pause(seconds_off)

    def requests(self) -> dict[str, dict[str, Any]]:
        """All requests of the zone by name, as gcloud describes them."""
        answer = self.ask(list_words(self.site))
        if answer.code != 0:
            raise PersonNeeded(f"{said(answer)}: check --project and --zone")
        found = json.loads(answer.out or "[]")
        return {entry["name"].rpartition("/")[2]: entry for entry in found}

    def request(self, name: str) -> dict[str, Any] | None:
        """One request, or None."""
        answer = self.ask(describe_words(self.site, name))
        return json.loads(answer.out) if answer.code == 0 else None

    def nodes(self, names: list[str]) -> dict[str, dict[str, Any] | None]:
        """The machines behind requests by name, or None."""
        words = {name: node_words(self.site, name) for name in names}
        answers = {
            name: self.ask(words[name], first=first)
            for name, first in self._first(words, ASK_SECONDS).items()
        }
        return {k: json.loads(x.out) if x.code == 0 else None for k, x in answers.items()}

    def create(self, name: str) -> None:
        """Makes a request, which may be there already."""
        answer = self.ask(create_words(self.site, name), DO_SECONDS)
        if answer.code != 0 and not is_there(answer):  # a network, say, that is not found
            raise PersonNeeded(f"{said(answer)}: check --accelerator_type, --zone and --create")

    def delete(self, name: str) -> None:
        """Deletes a request, which may be gone already."""
        self.ask(delete_words(self.site, name), DO_SECONDS)

    def delete_all(self, names: list[str]) -> dict[str, str]:
        """Deletes requests, each whatever comes of another; why it was refused, by name."""
        words = {name: delete_words(self.site, name) for name in names}
        why = {}
        for name, first in self._first(words, DO_SECONDS).items():
            try:
                self.ask(words[name], DO_SECONDS, first)
            except PersonNeeded as error:
                why[name] = str(error)
        return why

    def _first(self, words: dict[str, list[str]], seconds: float) -> dict[str, Answer]:
        """By name the first answers, good or bad, to commands that are given side by side."""
        calls = [functools.partial(self._run, x, seconds) for x in words.values()]
        return dict(zip(words, self.at_once(calls), strict=True))

    def on_hosts(self, name: str, command: str) -> Answer:
        """Runs a shell line on all hosts, once: what a failure means is for the caller."""
        return self._once(ssh_words(self.site, name, command), ASK_SECONDS)

    def hear(self, names: list[str], command: str) -> dict[str, Answer | None]:
        """Runs a shell line on all hosts of some TPUs, side by side.

        Returns:
          by name what was answered within HEAR_SECONDS; None where it is awaited still, and will be
          at the next call, in place of another.
        """
        for name in names:
            if name not in self._asked:
                self._asked[name] = self._threads.submit(self.on_hosts, name, command)
        asked = {name: self._asked[name] for name in names}
        done, _ = concurrent.futures.wait(asked.values(), HEAR_SECONDS)
        # Of a TPU that was not asked for this time an answer would be of the past.
        self._asked = {name: x for name, x in asked.items() if x not in done}
        return {name: x.result() if x in done else None for name, x in asked.items()}

    def at_once(self, calls: Sequence[Callable[[], Answer]]) -> list[Answer]:
        """What calls come to that neither wait nor say anything, made side by side."""
        futures = [self._threads.submit(call) for call in calls]
        concurrent.futures.wait(futures)  # so that none goes on behind an error of another
        return [future.result() for future in futures]

    def copy(self, name: str, files: list[str]) -> Answer:
        """Copies files to all hosts, once."""
        return self._once(copy_words(self.site, name, files), COPY_SECONDS)

    def _once(self, words: list[str], seconds: float) -> Answer:
        answer = self._run(words, seconds)
        _check_login(answer)
        if "ssh-add" in answer.err or (answer.code == 2 and _USAGE in answer.err):
            check(answer, self.site)
        return answer


def run(words: list[str], seconds: float) -> Answer:
    """Runs a command; Ctrl-C does not reach it.

    Raises:
      PersonNeeded: there is no such program.
    """
    try:
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except FileNotFoundError:
        raise PersonNeeded(
            f"there is no program {words[0]}: install the Google Cloud CLI and `gcloud auth login`"
        ) from None
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # its ssh too, which would keep the pipes open
        process.communicate()
        return Answer(124, "", f"{' '.join(words[:5])} timed out after {seconds:g} s")
    return Answer(process.returncode, out, err)


def pause_until(stopped: Callable[[], None]) -> Callable[[float], None]:
    """A pause in which `stopped` is asked all the time; it ends the pause by raising."""

    def pause(seconds: float) -> None:
        end = time.monotonic() + seconds
        stopped()
        while time.monotonic() < end:
            time.sleep(min(0.2, max(end - time.monotonic(), 0.0)))
            stopped()

    return pause
