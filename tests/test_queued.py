"""Sweeps on Cloud TPU against a cloud that is none: no run is lost, none doubled, nothing left."""

import json
import random
import re
import threading
import time
from pathlib import Path

import fake_gcloud
import pytest

from eqst import config
from eqst.stopping import Interrupted
from eqst.sweeps import deletion, gcloud, orders, pool, queued
from eqst.sweeps.gcloud import Answer, PersonNeeded
from eqst.sweeps.members import Member
from eqst.sweeps.members import units as units_of

WORKDIR = "gs://bucket/sweep"
SITE = gcloud.Site("p", "us-east5-a", "v5p-16", "v2-alpha-tpuv5", True, (), ())
FIRST = queued.prefix(WORKDIR) + "0"
SECOND = queued.prefix(WORKDIR) + "1"


class Killed(BaseException):
    """kill -9: from here on the process does nothing more."""


class World:
    """A cloud, its time, and what is to happen in it."""

    def __init__(self, tmp_path: Path, count: int = 3, workers: int = 2):
        self.cloud = fake_gcloud.Cloud(workers)
        self.members = [Member(f"f/level/{i}", config.Config(seed=i), ()) for i in range(count)]
        self.files = [str(tmp_path / name) for name in (gcloud.ARCHIVE, gcloud.HOST_SCRIPT)]
        for file in self.files:
            Path(file).write_text("")
        self.events: list = []  # (time, what)
        self.said: list[str] = []
        self.calls = 0
        self.kill_at: int | None = None
        self.kill_before = True
        self.dead = False
        self.stops: list = []  # times at which a signal comes
        self.at_once = 1  # commands: in one order, which the tests can count in

    def run(self, words: list[str], seconds: float) -> Answer:
        if self.dead:
            raise Killed
        self.calls += 1
        self.dead = self.calls == self.kill_at
        if self.dead and self.kill_before:
            raise Killed
        self.cloud.now += 1.0
        answer = Answer(*self.cloud.run(words, seconds))
        if self.dead:
            raise Killed
        return answer

    def pause(self, seconds: float) -> None:
        if self.dead:
            raise Killed
        self.cloud.now += seconds
        for event in [x for x in self.events if x[0] <= self.cloud.now]:
            self.events.remove(event)
            event[1]()
        if self.cloud.now > 100_000:
            raise AssertionError(f"it never ends: {self.said[-20:]}")
        if self.stops and self.cloud.now >= self.stops[0]:
            self.stops.pop(0)
            raise Interrupted("SIGTERM: the same command goes on")

    def sweep(
        self, jobs: int = 1, keep: bool = False, clone: str = "c1", replicas: int = 1
    ) -> list[str]:
        """The same command, once more."""
        self.dead = False
        time = pool.Clock(lambda: self.cloud.now, self.pause)
        cloud = gcloud.Cloud(SITE, self.run, self.pause, self.said.append, self.at_once)
        done = self.cloud.done

        todo = [member for member in self.members if member.name not in done]
        units = units_of(todo, replicas)

        def words(name: str) -> list[str]:
            names = ",".join(member.name for member in units[name])
            return ["python", "launch/sweep.py", "--x=a b'c", f"--member={names}"]

        def is_done(first: Member) -> bool:
            return all(member.name in done for member in units[first.name])

        plan = orders.Plan(WORKDIR, clone, self.files, "echo 'a b'", units, words, is_done)
        first = [unit[0] for unit in units.values()]
        requests = pool.Pool(cloud, plan, first, time, self.said.append, jobs=jobs, keep=keep)
        return pool.run_all(requests, time, 30.0)

    def finished(self) -> bool:
        """Everything is done, nothing is there, and nothing was ever wrong."""
        self.cloud.forget()
        assert not self.cloud.wrong
        return self.cloud.done == {x.name for x in self.members} and not self.cloud.requests

    def count(self, *command: str) -> int:
        return sum(tuple(call[3:5]) == command for call in self.cloud.calls)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


# --- the policy


def slot_of(request: str, node: str = "READY", hosts: tuple = (), **facts) -> queued.Slot:
    made = tuple(queued.heard("".join(f"eqst h{i} {host}\n" for i, host in enumerate(hosts))))
    return queued.Slot("x", seen=queued.Seen(request, node, made), **facts)


def decision(slot: queued.Slot, wanted=True, free=True, now=0.0) -> str:
    return queued.decide(slot, wanted=wanted, free=free, clone="c", now=now).name


@pytest.mark.parametrize(
    ("state", "expected", "unwanted"),
    [
        ("", "CREATE", "REST"),
        ("CREATING", "WAIT", "DELETE"),
        ("ACCEPTED", "WAIT", "DELETE"),
        ("WAITING_FOR_RESOURCES", "WAIT", "DELETE"),
        ("PROVISIONING", "WAIT", "DELETE"),
        ("STATE_UNSPECIFIED", "WAIT", "DELETE"),
        ("A_STATE_OF_LATER_YEARS", "WAIT", "DELETE"),
        ("FAILED", "LOSE", "LOSE"),
        ("SUSPENDING", "WAIT", "WAIT"),
        ("SUSPENDED", "LOSE", "LOSE"),
        ("DELETING", "WAIT", "WAIT"),
    ],
)
def test_every_state_of_a_request(state: str, expected: str, unwanted: str) -> None:
    assert decision(slot_of(state)) == expected
    assert decision(slot_of(state), wanted=False) == unwanted
    if expected == "CREATE":
        assert decision(slot_of(state, not_before=10.0)) == "REST"
        assert decision(slot_of(state, not_before=10.0), now=10.0) == "CREATE"


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("", "LOSE"),  # deleted under its request
        ("STATE_UNSPECIFIED", "WAIT"),
        ("CREATING", "WAIT"),
        ("READY", "SHIP"),
        ("RESTARTING", "WAIT"),
        ("REIMAGING", "WAIT"),
        ("DELETING", "LOSE"),
        ("REPAIRING", "LOSE"),
        ("STOPPED", "LOSE"),
        ("STOPPING", "LOSE"),
        ("STARTING", "WAIT"),
        ("PREEMPTED", "LOSE"),
        ("TERMINATED", "LOSE"),
        ("HIDING", "LOSE"),
        ("HIDDEN", "LOSE"),
        ("UNHIDING", "WAIT"),
        ("UNKNOWN", "WAIT"),
    ],
)
def test_every_state_of_a_node(state: str, expected: str) -> None:
    hosts = ("bare idle",) if state == "READY" else ()
    assert decision(slot_of("ACTIVE", state, hosts)) == expected
    assert decision(slot_of("ACTIVE", state, hosts), wanted=False) == "DELETE"
    if expected == "WAIT":  # not for ever
        assert decision(slot_of("ACTIVE", state), now=1e4) == "LOSE"


@pytest.mark.parametrize(
    ("hosts", "job", "expected"),
    [
        ((), "", "WAIT"),  # they did not answer
        (("bare idle", "bare idle"), "", "SHIP"),
        (("ready:c idle", "bare idle"), "", "SHIP"),
        (("ready:old idle", "ready:old idle"), "", "SHIP"),
        (("failed:old idle", "ready:c idle"), "", "SHIP"),
        (("making:c idle", "ready:c idle"), "", "WAIT"),
        (("failed:c idle", "ready:c idle"), "", "SETUP_FAILED"),
        (("ready:c idle", "ready:c ended:k.1:0"), "", "START"),
        (("ready:c running:k.1", "ready:c idle"), "", "STOP"),
        (("ready:old running:k.1", "ready:old running:k.1"), "k.1", "WAIT"),
        (("ready:c running:k.1", "ready:c idle"), "k.1", "START"),
        (("ready:c running:k.1", "ready:c ended:k.0:0"), "k.1", "START"),
        (("ready:c running:k.1", "ready:c ended:k.1:1"), "k.1", "WAIT"),
        (("ready:c ended:k.1:0", "ready:c ended:k.1:0"), "k.1", "END"),
    ],
)
def test_what_hosts_say(hosts: tuple, job: str, expected: str) -> None:
    assert decision(slot_of("ACTIVE", hosts=hosts, job=job)) == expected


def test_what_does_not_go_on_for_ever() -> None:
    odd = slot_of("ACTIVE", hosts=("ready:c running:k.1", "ready:c ended:k.1:1"), job="k.1")
    assert decision(odd, now=queued.ODD_SECONDS + 1) == "HUNG"
    making = slot_of("ACTIVE", hosts=("making:c idle",))
    assert decision(making, now=queued.STUCK_SECONDS + 1) == "SETUP_FAILED"
    assert decision(slot_of("ACTIVE", deaf=queued.DEAF_LOOKS)) == "LOSE"
    assert decision(slot_of("ACTIVE", hosts=("bare idle",), refused=queued.DEAF_LOOKS)) == "LOSE"


def test_no_new_run_is_handed_out_while_one_may_run_unknown() -> None:
    ready = slot_of("ACTIVE", hosts=("ready:c idle",))
    assert decision(ready, free=False) == "WAIT" and decision(ready) == "START"


# --- whole sweeps


def test_three_runs_take_turns_on_one_request(world: World) -> None:
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 1
    assert world.count("tpu-vm", "scp") == 1  # set up once
    assert [line for line in world.said if re.match(r"\d/3  f/level/\d  \d+ s  left", line)]


def test_two_requests_at_a_time(world: World) -> None:
    assert world.sweep(jobs=2) == []
    assert world.finished() and world.cloud.made == 2
    assert {call[5] for call in world.cloud.calls if call[4] == "create"} == {FIRST, SECOND}


def test_no_more_requests_than_runs(world: World) -> None:
    world.members = world.members[:1]
    assert world.sweep(jobs=8) == []
    assert world.finished() and world.cloud.made == 1


def test_states_are_seen_in_turn(world: World) -> None:
    world.cloud.course = ((0, "CREATING"), (1, "ACCEPTED"), (10, "WAITING_FOR_RESOURCES"))
    world.sweep()
    states = [line.partition(": ")[2] for line in world.said if line.startswith(FIRST)]
    assert [x for x in states if "level" not in x] == [
        *("asking for v5p-16", "WAITING_FOR_RESOURCES", "ACTIVE, node CREATING"),
        *("ACTIVE, node READY", "gone"),
    ]


@pytest.mark.parametrize("seconds", [20, 70, 100, 150, 250, 500])
def test_preempted_at_any_stage(world: World, seconds: int) -> None:
    """Waiting, its node coming, being set up, running its first run and its second."""
    world.events.append((seconds, lambda: world.cloud.preempt(FIRST)))
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 2
    starts = [call for call in world.cloud.calls if "tpu_host.sh start" in call[-1]]
    jobs = {re.search(r"start (\S+)", call[-1])[1] for call in starts}
    assert len(jobs) == (4 if seconds >= 250 else 3)  # the run that was interrupted, once more


def test_preempted_again_and_again_is_no_failure_but_waits_longer(world: World) -> None:
    times: list[float] = []

    def hook(command, positional):
        if command == ("queued-resources", "create"):
            times.append(world.cloud.now)
            if len(times) < 8:
                at = world.cloud.now + 250
                world.events.append((at, lambda: world.cloud.preempt(FIRST)))

    world.cloud.hooks.append(hook)
    world.cloud.work = {x.name: 5000.0 for x in world.members}
    assert world.sweep() == []
    assert world.finished()
    gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
    assert len(gaps) == 7 and gaps[5] > gaps[0] + 500


def test_hosts_that_saved_and_left_are_a_preemption(world: World) -> None:
    world.cloud.codes = {"f/level/0": [75]}
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 2
    assert "f/level/0: interrupted and saved" in world.said


@pytest.mark.parametrize("node", ["", "PREEMPTED", "TERMINATED", "REPAIRING", "STOPPED", "HIDDEN"])
def test_a_node_lost_under_an_active_request(world: World, node: str) -> None:
    world.events.append((260, lambda: world.cloud.requests[FIRST].update(node=node)))
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 2


def test_a_request_that_fails_is_made_again(world: World) -> None:
    def fail() -> None:
        world.cloud.requests[FIRST].update(forced="FAILED", message="no capacity, try later")

    world.events.append((20, fail))
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 2


def test_a_quota_stops_at_once_and_leaves_nothing(world: World) -> None:
    world.cloud.quota = 1
    with pytest.raises(PersonNeeded, match=r"Quota limit .*: ask for more quota of v5p-16 \(pre"):
        world.sweep(jobs=2)
    world.cloud.forget()
    assert not world.cloud.requests
    assert world.count("queued-resources", "create") == 2  # it is not tried again
    world.cloud.quota = 0
    with pytest.raises(PersonNeeded, match="quota"):
        world.sweep()


def test_a_quota_that_is_found_later(world: World) -> None:
    message = "Quota 'IN_USE_ADDRESSES' exceeded. Limit: 8.0 in region us-east5."
    fail = lambda: world.cloud.requests[FIRST].update(forced="FAILED", message=message)  # noqa: E731
    world.events.append((20, fail))
    with pytest.raises(PersonNeeded, match="IN_USE_ADDRESSES.*ask for more quota"):
        world.sweep()
    world.cloud.forget()
    assert not world.cloud.requests


@pytest.mark.parametrize(
    ("error", "command"),
    [
        ("ERROR: (gcloud) UNAVAILABLE: The service is currently unavailable.", "list"),
        ("ERROR: gcloud crashed (ConnectionError): Connection aborted.", "describe"),
        ("ERROR: (gcloud) Quota exceeded for quota metric 'Requests' per minute", "create"),
        ("ERROR: (gcloud) HttpError 503", "delete"),
        ("ERROR: (gcloud) something new under the sun", "list"),
    ],
)
def test_what_passes_is_waited_for(world: World, error: str, command: str) -> None:
    seen = [0]

    def hook(words, positional):
        seen[0] += words[1] == command
        return (1, "", error) if words[1] == command and seen[0] <= 4 else None

    world.cloud.hooks.append(hook)
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 1
    assert any("again in 40 s" in line for line in world.said)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        ("ERROR: (gcloud.x) PERMISSION_DENIED: tpu.nodes.create", 1),
        (
            "ERROR: (gcloud.x) PERMISSION_DENIED: This command is authenticated as a@b which is "
            "the active account specified by the [core/account] property",
            1,
        ),
        ("ERROR: (gcloud.x) INVALID_ARGUMENT: no such runtime", 1),
        ("ERROR: (gcloud.x) unrecognized arguments: --nose", 2),
        ("ERROR: (gcloud.x) NOT_FOUND: network default was not found", 1),
    ],
)
def test_what_does_not_pass_is_one_line(world: World, error: str, code: int) -> None:
    def hook(command, positional):
        return (code, "", f"noise\n{error}\n") if command[1] == "create" else None

    world.cloud.hooks.append(hook)
    with pytest.raises(PersonNeeded) as caught:
        world.sweep()
    assert error in str(caught.value) and "\n" not in str(caught.value)
    assert world.count("queued-resources", "create") == 1


EXPIRED = (
    1, "",
    "ERROR: (gcloud.compute.tpus) There was a problem refreshing your current auth tokens: "
    "Reauthentication failed. cannot prompt during non-interactive execution.\n"
    "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials.",
)  # fmt: skip


def test_a_login_that_expires_is_waited_for(world: World) -> None:
    """Runs go on and end meanwhile; no TPU is deleted for it."""
    world.cloud.hooks.append(lambda *_: EXPIRED if 150 < world.cloud.now < 2000 else None)
    assert world.sweep(jobs=2) == []
    assert world.finished() and world.cloud.made == 2
    (line,) = [line for line in world.said if "Reauthentication" in line]
    assert "`gcloud auth login`" in line and "\n" not in line
    assert world.said.count("logged in again") == 1


def test_without_a_login_at_the_end_what_is_left_is_named(world: World) -> None:
    world.cloud.hooks.append(lambda *_: EXPIRED if world.cloud.now > 260 else None)
    world.stops = [500]
    left = f"NOT DELETED.*: {FIRST}, {SECOND} .*Reauthentication.*--cancel"
    with pytest.raises(PersonNeeded, match=left):
        world.sweep(jobs=2)
    assert world.cloud.state(FIRST) == world.cloud.state(SECOND) == "ACTIVE"
    world.cloud.hooks.clear()
    assert world.sweep(jobs=2) == [] and world.finished() and world.cloud.made == 2


def test_without_a_login_at_the_start_it_is_one_line(world: World) -> None:
    for error in (EXPIRED[2], "ERROR: (gcloud) You do not currently have an active account"):
        world.cloud.hooks[:] = [lambda *_, error=error: (1, "", error)]
        with pytest.raises(PersonNeeded, match=r"ERROR: \(gcloud.*: `gcloud auth login`"):
            world.sweep()
    assert world.calls == 2


def test_a_login_lost_at_every_single_command(tmp_path: Path) -> None:
    whole = World(tmp_path, count=2)
    whole.sweep(jobs=2)
    closing = next(i for i, call in enumerate(whole.cloud.calls) if call[4] == "delete")
    for at in range(2, closing + 1):
        world = World(tmp_path, count=2)
        world.cloud.hooks.append(
            lambda *_, world=world, at=at: EXPIRED if at <= world.calls < at + 3 else None
        )
        assert world.sweep(jobs=2) == [] and world.finished(), at
        assert world.cloud.made == 2, at


def test_hosts_are_asked_side_by_side() -> None:
    """In turn the first would wait for ever for the others; and answers are not mixed up."""
    names = ["a", "b", "c"]
    all_there = threading.Barrier(3)

    def run(words: list[str], seconds: float) -> Answer:
        all_there.wait(20)
        return Answer(0, json.dumps({"name": words[5]}), "")

    cloud = gcloud.Cloud(SITE, run, time.sleep, print, at_once=3)
    heard = cloud.hear(names, "echo")
    assert [json.loads(heard[name].out)["name"] for name in names] == names
    assert cloud.nodes(names) == {name: {"name": name} for name in names}


def test_an_error_of_one_call_leaves_none_behind() -> None:
    """What is not known to have ended might be done behind the caller's back."""
    ended = []

    def fail() -> Answer:
        raise PersonNeeded("no")

    def end() -> Answer:
        time.sleep(0.1)
        ended.append(True)
        return Answer(0, "", "")

    with pytest.raises(PersonNeeded, match="no"):
        gcloud.Cloud(SITE, gcloud.run, time.sleep, print).at_once([end, fail, end])
    assert len(ended) == 2


def test_one_that_does_not_answer_keeps_no_other_waiting(world: World, monkeypatch) -> None:
    """Its question stays open while others end their runs and begin new ones."""
    monkeypatch.setattr(gcloud, "HEAR_SECONDS", 0.05)
    world.at_once = 4
    world.cloud.work = {"f/level/0": 1e5}
    others_done = threading.Event()
    asked = []

    def hook(command, positional):
        if {"f/level/1", "f/level/2"} <= world.cloud.done:
            others_done.set()
        if command != ("tpu-vm", "ssh") or positional != [FIRST] or world.cloud.now < 250:
            return None
        if not others_done.is_set():
            asked.append(world.cloud.now)
            assert others_done.wait(60)
            world.cloud.requests[FIRST]["hosts"][0]["job"]["end"] = world.cloud.now
            return 124, "", "timed out"
        return None

    world.cloud.hooks.append(hook)
    assert world.sweep(jobs=2) == []
    assert world.finished() and world.cloud.made == 2
    assert len(asked) == 1  # and once is enough


def test_ssh_that_times_out_for_a_while(world: World) -> None:
    """While being set up and while running, for some looks: nothing is lost."""

    def hook(command, positional):
        away = 120 < world.cloud.now < 200 or 260 < world.cloud.now < 400
        return (124, "", "timed out") if command[0] == "tpu-vm" and away and command[1] in (
            "ssh", "scp",
        ) else None  # fmt: skip

    world.cloud.hooks.append(hook)
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 1


def test_ssh_that_never_answers_is_said(world: World) -> None:
    world.cloud.hooks.append(
        lambda command, _: (255, "", "Connection refused") if command[1] == "ssh" else None
    )
    with pytest.raises(PersonNeeded, match="never answered ssh"):
        world.sweep()
    world.cloud.forget()
    assert not world.cloud.requests and world.cloud.made == 2


def test_a_start_that_reaches_one_host_alone_is_given_again(world: World) -> None:
    lost = [True]
    real = world.cloud.on_host

    def on_host(name, i, line):
        if "tpu_host.sh start" in line and i == 1 and lost.pop():
            lost.append(False)
            return 255, "", "Connection closed"
        lost[:] = [False] if not lost else lost
        return real(name, i, line)

    world.cloud.on_host = on_host
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 1


def test_a_run_that_fails_twice_takes_no_other_down(world: World) -> None:
    world.cloud.codes = {"f/level/1": [1, 134]}
    assert world.sweep() == ["f/level/1"]
    world.cloud.forget()
    assert world.cloud.done == {"f/level/0", "f/level/2"} and not world.cloud.requests
    assert world.cloud.made == 1
    assert "f/level/1: failed (exit code 1: the last line of a log)" in world.said
    assert "f/level/1: FAILED (exit code 134: the last line of a log)" in world.said
    world.cloud.codes = {"f/level/1": [1]}  # and with one failure it is done
    assert world.sweep() == [] and world.finished()


def test_a_run_that_leaves_no_results_has_failed(world: World) -> None:
    world.cloud._finish = lambda job: None
    assert world.sweep() == [x.name for x in world.members]
    assert sum("it left no results" in line for line in world.said) == 6


def test_an_environment_that_cannot_be_made(world: World) -> None:
    world.cloud.setup_codes = [0, 1]  # on one host, once
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 2
    world.cloud.done.clear()
    world.cloud.setup_codes = [1] * 4
    with pytest.raises(PersonNeeded, match=r"environment cannot be made \(the last line of a log"):
        world.sweep()
    world.cloud.forget()
    assert not world.cloud.requests


def test_a_host_that_hangs(world: World) -> None:
    """One host's process has ended, another's does not: a failure, and the TPU is given back."""
    real = world.cloud._host_words
    jobs: list[str] = []

    def words(host):
        job = host["job"]
        if job and job["member"] == "f/level/0":
            jobs.append(job["id"]) if job["id"] not in jobs else None
            hosts = world.cloud.requests[FIRST]["hosts"]
            if job["id"] == jobs[0]:
                if host is hosts[1]:
                    return f"ready:c1 running:{job['id']}"
                job["code"] = 1
        return real(host)

    world.cloud._host_words = words
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 2
    assert "f/level/0: some of its hosts ended, others did not" in world.said


# --- being stopped


def test_a_signal_saves_deletes_and_says_so(world: World) -> None:
    world.stops = [260]
    with pytest.raises(Interrupted, match="the same command goes on"):
        world.sweep(jobs=2)
    world.cloud.forget()
    assert not world.cloud.requests
    stops = [call for call in world.cloud.calls if call[-1].endswith("tpu_host.sh stop")]
    assert len(stops) == 2 and world.cloud.work["f/level/0"] < fake_gcloud.RUN_SECONDS
    assert world.sweep(jobs=2) == [] and world.finished()


def test_a_second_signal_names_what_is_left(world: World) -> None:
    world.stops = [260, 261]
    with pytest.raises((PersonNeeded, Interrupted)):
        world.sweep()
    world.stops = [0]
    with pytest.raises(PersonNeeded, match=f"NOT DELETED.*{FIRST}.*--cancel"):
        time = pool.Clock(lambda: world.cloud.now, world.pause)
        world.cloud.requests.clear()
        world.dead = False
        world.cloud._queued_resources_create([FIRST], {"--accelerator-type": "v5p-16"})
        deletion.delete(gcloud.Cloud(SITE, world.run, world.pause, print, 1), [FIRST], time)


def test_keeping_leaves_them_at_work_and_says_so(world: World) -> None:
    world.stops = [260]
    with pytest.raises(Interrupted):
        world.sweep(keep=True)
    assert world.cloud.running(FIRST) and f"kept, and paid for: {FIRST}" in world.said[-1]
    assert world.sweep(keep=True) == []
    assert world.cloud.made == 1 and world.cloud.state(FIRST) == "ACTIVE"
    assert world.sweep() == [] and world.finished()  # without --keep it goes, though all is done


def refused_delete(name: str):
    """A hook: the one request that gcloud does not delete."""

    def hook(command, positional):
        if command == ("queued-resources", "delete") and positional == [name]:
            return 1, "", "ERROR: (gcloud) FAILED_PRECONDITION: it is being provisioned"
        return None

    return hook


def test_one_that_is_not_deleted_is_named_and_keeps_no_other(world: World) -> None:
    world.cloud.hooks.append(refused_delete(FIRST))
    world.stops = [260]
    with pytest.raises(PersonNeeded, match=rf"NOT DELETED.*: {FIRST} \(.*being provisioned"):
        world.sweep(jobs=3)
    world.cloud.forget()
    assert world.cloud.made == 3 and list(world.cloud.requests) == [FIRST]


def test_cancel_goes_past_one_that_is_not_deleted(world: World) -> None:
    for name in (FIRST, SECOND):
        world.cloud._queued_resources_create([name], {"--accelerator-type": "v5p-16"})
    world.cloud.hooks.append(refused_delete(FIRST))
    cloud = gcloud.Cloud(SITE, world.run, world.pause, print, 1)
    time = pool.Clock(lambda: world.cloud.now, world.pause)
    with pytest.raises(PersonNeeded, match=rf"NOT DELETED.*: {FIRST} \("):
        deletion.cancel(cloud, WORKDIR, time)
    tried = [call[5] for call in world.cloud.calls if call[4] == "delete"]
    assert tried[:3] == [FIRST, SECOND, FIRST]  # not first to the end with one
    world.cloud.forget()
    assert list(world.cloud.requests) == [FIRST]
    world.cloud.hooks.clear()  # it may be deleted now
    assert deletion.cancel(cloud, WORKDIR, time) == [FIRST]
    world.cloud.forget()
    assert not world.cloud.requests


def test_one_that_is_refused_for_a_while_is_deleted_in_the_end(world: World, monkeypatch) -> None:
    """While the other goes, it is tried again."""
    monkeypatch.setattr(fake_gcloud, "DELETED_AFTER", 300)
    for name in (FIRST, SECOND):
        world.cloud._queued_resources_create([name], {"--accelerator-type": "v5p-16"})
    hook = refused_delete(FIRST)
    world.cloud.hooks.append(lambda *words: hook(*words) if world.cloud.now < 170 else None)
    cloud = gcloud.Cloud(SITE, world.run, world.pause, print, 1)
    time = pool.Clock(lambda: world.cloud.now, world.pause)
    assert deletion.cancel(cloud, WORKDIR, time) == [FIRST, SECOND]
    world.cloud.forget()
    assert not world.cloud.requests


def test_cancel_deletes_what_is_of_this_workdir_alone(world: World) -> None:
    for name in (FIRST, SECOND, "eqst-0000000000-0", "someone-else"):
        world.cloud._queued_resources_create([name], {"--accelerator-type": "v5p-16"})
    world.cloud.requests[SECOND]["suspended"] = 0.0
    cloud = gcloud.Cloud(SITE, world.run, world.pause, print, 1)
    time = pool.Clock(lambda: world.cloud.now, world.pause)
    assert deletion.cancel(cloud, WORKDIR + "/", time) == [FIRST, SECOND]
    world.cloud.forget()
    assert set(world.cloud.requests) == {"eqst-0000000000-0", "someone-else"}


def test_fewer_jobs_than_before_give_back_what_is_too_much(world: World) -> None:
    world.stops = [260]
    with pytest.raises(Interrupted):
        world.sweep(jobs=3, keep=True)
    assert len(world.cloud.requests) == 3
    world.members += [Member(f"f/more/{i}", config.Config(seed=9 + i), ()) for i in range(3)]
    starts = len([call for call in world.cloud.calls if "tpu_host.sh start" in call[-1]])
    assert world.sweep(jobs=1) == []
    assert world.finished() and world.cloud.made == 3
    later = [call for call in world.cloud.calls if "tpu_host.sh start" in call[-1]][starts:]
    assert {call[5] for call in later} == {FIRST}


def test_a_quota_that_an_earlier_sweep_ran_into_does_not_stop_this_one(world: World) -> None:
    world.cloud._queued_resources_create([FIRST], {"--accelerator-type": "v5p-16"})
    world.cloud.requests[FIRST].update(forced="FAILED", message="Quota limit exceeded")
    assert world.sweep() == [] and world.finished()


def test_another_type_is_not_taken_over(world: World) -> None:
    world.cloud._queued_resources_create([FIRST], {"--accelerator-type": "v4-8"})
    assert world.sweep() == []
    assert world.finished() and world.cloud.made == 2


def test_a_changed_clone_is_shipped_again_and_what_runs_is_left_to_run(world: World) -> None:
    world.stops = [260]
    with pytest.raises(Interrupted):
        world.sweep(keep=True)
    assert world.sweep(clone="c2") == []
    assert world.finished() and world.cloud.made == 1 and world.count("tpu-vm", "scp") == 2


def test_a_run_that_is_no_more_asked_for_is_stopped(world: World) -> None:
    world.stops = [260]
    with pytest.raises(Interrupted):
        world.sweep(keep=True)
    world.members = world.members[1:]
    assert world.sweep() == []
    assert world.cloud.done == {"f/level/1", "f/level/2"} and world.cloud.made == 1
    assert not world.cloud.wrong


@pytest.mark.parametrize(("before", "now"), [(3, 1), (1, 3), (3, 2)])
def test_runs_in_other_units_than_before_have_one_writer(
    world: World, before: int, now: int
) -> None:
    """Killed while a program of three is at work, and given again with other --replicas."""
    world.events.append((260, lambda: setattr(world, "dead", True)))
    with pytest.raises(Killed):
        world.sweep(jobs=2, replicas=before)
    assert any(world.cloud.running(name) for name in world.cloud.requests)
    assert world.sweep(jobs=3, replicas=now) == []
    assert world.finished()
    stops = [call for call in world.cloud.calls if call[-1].endswith("tpu_host.sh stop")]
    assert stops


def test_while_one_is_not_heard_of_no_other_gets_its_run(world: World) -> None:
    """Killed while both were at work, and one does not answer when the command is given again."""
    world.cloud.work = dict.fromkeys(("f/level/0", "f/level/1"), 3000.0)
    world.events.append((400, lambda: setattr(world, "dead", True)))
    with pytest.raises(Killed):
        world.sweep(jobs=2)
    first = {job["member"]: name for name in (FIRST, SECOND) for job in world.cloud.running(name)}
    assert set(first) == {"f/level/0", "f/level/1"}
    world.cloud.work["f/level/0"] = 0.0  # its run ends, and FIRST is free for another
    world.cloud.requests[FIRST]["hosts"][0]["job"]["end"] = world.cloud.now
    until = world.cloud.now + 200

    def hook(command, positional):
        deaf = command == ("tpu-vm", "ssh") and positional == [SECOND] and world.cloud.now < until
        return (255, "", "Connection timed out") if deaf else None

    world.cloud.hooks.append(hook)
    assert world.sweep(jobs=2) == []
    assert world.finished() and world.cloud.made == 2


def test_a_request_that_nobody_lists_yet_is_deleted_too(world: World) -> None:
    """Stopped after a creation that took effect, though the answer was an error."""

    def hook(command, positional):
        if command[1] == "create":
            world.cloud._queued_resources_create(positional, {"--accelerator-type": "v5p-16"})
            return 1, "", "UNAVAILABLE"
        return (0, "[]", "") if command[1] == "list" else None

    world.cloud.hooks.append(hook)
    world.stops = [1]
    with pytest.raises(Interrupted):
        world.sweep()
    world.cloud.forget()
    assert world.cloud.made == 1 and not world.cloud.requests


@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_single_command(tmp_path: Path, before: bool) -> None:
    """kill -9 before and after each of them took effect; then the same command, to its end."""
    whole = World(tmp_path, count=2)
    whole.sweep(jobs=2)
    assert whole.finished() and whole.calls > 40
    for at in range(1, whole.calls + 1):
        world = World(tmp_path, count=2)
        world.kill_at, world.kill_before = at, before
        with pytest.raises(Killed):
            world.sweep(jobs=2)
        assert world.sweep(jobs=2) == [] and world.finished(), at
        assert world.cloud.made <= 3, at  # adopted, or already given back


@pytest.mark.parametrize("seed", range(40))
def test_killed_and_preempted_at_random(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    world = World(tmp_path, count=4, workers=chance.choice([1, 2, 4]))

    def preempt() -> None:
        alive = [name for name in world.cloud.requests if world.cloud.state(name) == "ACTIVE"]
        if alive:
            world.cloud.preempt(chance.choice(alive))

    world.events = [(chance.uniform(0, 3000), preempt) for _ in range(5)]
    world.cloud.hooks.append(lambda *_: (1, "", "UNAVAILABLE") if chance.random() < 0.03 else None)
    jobs = chance.choice([1, 2, 3])
    for _ in range(6):
        world.kill_at = world.calls + chance.randint(1, 120)
        world.kill_before = chance.random() < 0.5
        try:
            world.sweep(jobs=jobs)
            break
        except Killed:
            world.cloud.now += chance.uniform(0, 300)
        assert len(world.cloud.requests) <= jobs
    world.kill_at = None
    assert world.sweep(jobs=jobs) == []
    assert world.finished()


# --- words


def test_every_command_is_as_launch_md_has_it(world: World, capsys) -> None:
    """The fake takes no other words; here they stand in full."""
    world.sweep()
    found = {tuple(call[3:5]): call for call in world.cloud.calls}
    assert set(found) == set(fake_gcloud.GRAMMAR)
    where = ["--project=p", "--zone=us-east5-a", "--quiet"]
    assert found["queued-resources", "create"][5:] == [
        *(FIRST, *where, f"--node-id={FIRST}", "--accelerator-type=v5p-16"),
        *("--runtime-version=v2-alpha-tpuv5", "--spot", "--async"),
    ]
    assert found["queued-resources", "delete"][5:] == [FIRST, *where, "--force", "--async"]
    assert found["queued-resources", "list"][5:] == [*where, "--format=json"]
    assert found["tpu-vm", "scp"][5:] == [*world.files, f"{FIRST}:", *where, "--worker=all"]
    assert "--worker=all" in found["tpu-vm", "ssh"]
    more = SITE._replace(spot=False, create=("--internal-ips",), ssh=("--internal-ip",))
    assert "--internal-ips" in gcloud.create_words(more, "a") and "--spot" not in str(
        gcloud.create_words(more, "a")
    )
    assert "--internal-ip" in gcloud.copy_words(more, "a", ["f"])
    for words in (gcloud.create_words(more, "a"), gcloud.ssh_words(more, "a", "ls")):
        fake_gcloud.parse(words)
    tunnel = SITE._replace(ssh=("--tunnel-through-iap", "--batch-size=all"))
    for words in (gcloud.copy_words(tunnel, "a", ["f"]), gcloud.ssh_words(tunnel, "a", "ls")):
        assert fake_gcloud.parse(words) and words[1] == "alpha"
    with pytest.raises(ValueError, match="unrecognized"):
        fake_gcloud.parse([*gcloud.ssh_words(more, "a", "ls"), "--batch-size=all"])


def test_names_are_of_the_workdir() -> None:
    name = queued.prefix("gs://b/w") + "15"
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,59}[a-z0-9])?", name)
    assert queued.prefix("gs://b/w") == queued.prefix("gs://b/w/") != queued.prefix("gs://b/v")


def test_runtimes_are_known_or_asked_for() -> None:
    assert gcloud.runtime_of("v5litepod-16") == "v2-alpha-tpuv5-lite"
    assert gcloud.runtime_of("v4-8") == "tpu-ubuntu2204-base"
    with pytest.raises(ValueError, match="v9-8: its runtime .* give --runtime_version"):
        gcloud.runtime_of("v9-8")


def test_a_command_that_hangs_is_ended_with_its_children() -> None:
    answer = gcloud.run(["bash", "-c", "sleep 60 & sleep 60"], 0.5)
    assert answer.code == 124 and "timed out after 0.5 s" in answer.err
    with pytest.raises(PersonNeeded, match="no program gcloud-nowhere"):
        gcloud.run(["gcloud-nowhere"], 1.0)
