"""launch/sweep.py --backend=tpu as a person starts it, and launch/tpu_host.sh, in real processes.

The cloud is tests/fake_gcloud.py as a program on PATH; its hosts are folders in which the host's
script really runs, with stand-ins for what would need a network or a TPU.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_gcloud
import pytest
from test_sweep import members_of, write_member

from eqst.sweeps import clone, queued

WORKDIR = "gs://bucket/sweep"
NAMES = ("variant/db_mel_pm/0", "variant/db_mel_pm/1")
FIRST = queued.prefix(WORKDIR) + "0"

GCLOUD = """#!{python}
import os, shutil, sys
sys.path.insert(0, {tests!r})
if sys.argv[1:3] == ["storage", "cp"]:
    target = {bucket!r} + "/" + sys.argv[-1].removeprefix("gs://")
    os.makedirs(os.path.dirname(target), exist_ok=True)
    shutil.copyfile(sys.argv[-2], target)
    sys.exit()
import fake_gcloud
sys.exit(fake_gcloud.main({state!r}, sys.argv[1:]))
"""
# Makes environments of nothing, and of launch/sweep.py does what a run leaves.
PYTHON = """#!/bin/bash
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && exec cp "$0" "$3/bin/python" ;;
  "-m pip") exit 0 ;;
  "-u launch/sweep.py") exec {python} {member} "$@" ;;
esac
exec {python} "$@"
"""
# A host's metadata server: whether a Spot VM is taken back, and whether its host is maintained.
CURL = """#!/bin/bash
case "${@: -1}" in
  */instance/preempted) [ -f "$HOME/preempted" ] && echo TRUE || echo FALSE ;;
  */instance/maintenance-event) cat "$HOME/maintenance-event" 2>/dev/null || echo NONE ;;
  *) exit 22 ;;
esac
"""
MEMBER = """
import os, shutil, signal, sys, time
from pathlib import Path

def leave(*_):
    print("saved", flush=True)
    sys.exit(75)

signal.signal(signal.SIGTERM, leave)
words = dict(word[2:].partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
name, prepared = words["member"], Path({prepared!r})
print("at", name, os.environ["EQST_COMMIT"], flush=True)
assert Path("launch/sweep.py").is_file() and Path("said-by-setup").is_file()
once = prepared / name / "fail-once"
if once.exists() and os.environ["EQST_FAKE_HOST"].endswith("-0"):
    once.unlink()
    sys.exit("it fails, once")
time.sleep(float((prepared / "seconds").read_text()))
if os.environ["EQST_FAKE_HOST"].endswith("-0"):
    target = Path({bucket!r}) / words["workdir"].removeprefix("gs://") / name
    shutil.copytree(prepared / name, target, dirs_exist_ok=True)
"""


class Place:
    """A folder with a cloud in it."""

    def __init__(self, folder: Path, repo: Path):
        self.repo, self.bucket, self.prepared = repo, folder / "bucket", folder / "prepared"
        self.state, programs = folder / "state.json", folder / "bin"
        for made in (self.bucket, self.prepared, programs, folder / "hosts"):
            made.mkdir()
        self.change(
            requests={}, quota=4, made=0, workers=2, calls=[],
            epoch=time.time(), folder=str(folder / "hosts"),
        )  # fmt: skip
        (self.prepared / "seconds").write_text("0.5")
        for member in members_of(repo / "configs" / "ablation.py"):
            if member.name in NAMES:
                write_member(self.prepared / member.name, member, [1.0, 2.0], 2.0)
        facts = {
            "python": sys.executable, "tests": str(repo / "tests"), "bucket": str(self.bucket),
            "state": str(self.state), "member": str(folder / "member.py"),
            "prepared": str(self.prepared),
        }  # fmt: skip
        (folder / "member.py").write_text(MEMBER.format(**facts))
        for name, text in (
            ("gcloud", GCLOUD.format(**facts)),
            ("python3", PYTHON.format(**facts)),
            ("curl", CURL),
            ("sudo", "#!/bin/bash\ncat >/dev/null\n"),
            ("hostname", '#!/bin/bash\necho "${EQST_FAKE_HOST:-here}"\n'),
        ):
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        own = {"PATH": f"{programs}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(folder / "cache")}
        self.environment = os.environ | own | {"PYTHONPATH": str(repo)}

    def change(self, **facts) -> None:
        known = json.loads(self.state.read_text()) if self.state.exists() else {}
        self.state.write_text(json.dumps(known | facts))

    def read(self) -> dict:
        return json.loads(self.state.read_text())

    def left(self) -> list[str]:
        """Requests that are there still."""
        stored = self.read()
        cloud = fake_gcloud.Cloud()
        cloud.requests, cloud.now = stored["requests"], 100 * (time.time() - stored["epoch"])
        cloud.forget()
        return list(cloud.requests)

    def words(self, *more: str) -> list[str]:
        where = ["--project=p", "--zone=us-east5-a", "--accelerator_type=v5p-16", "--spot"]
        return [
            *(sys.executable, "tests/bucket.py", str(self.bucket), "launch/sweep.py"),
            *("--config=configs/ablation.py", f"--workdir={WORKDIR}", "--backend=tpu", *where),
            *("--only=db_mel_pm/[01]", "--setup=touch said-by-setup", "--poll_seconds=0.2", *more),
        ]

    def sweep(self, *more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.words(*more), cwd=self.repo, env=self.environment, capture_output=True, text=True,
            timeout=300,
        )  # fmt: skip

    def begin(self, *more: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.words(*more), cwd=self.repo, env=self.environment, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, repo: Path) -> Place:
    return Place(tmp_path, repo)


# --- the host's script


class Host:
    """One host: a home, and what is said to it over ssh."""

    def __init__(self, place: Place, tmp_path: Path):
        self.home, self.place = tmp_path / "home", place
        self.home.mkdir()
        shutil.copy(place.repo / "launch" / "tpu_host.sh", self.home)
        clone = tmp_path / "clone"
        (clone / "launch").mkdir(parents=True)
        for name in ("launch/environment.sh", "launch/constraints.txt", "pyproject.toml"):
            shutil.copy(place.repo / name, clone / name)
        tar = ["tar", "-czf", str(self.home / "eqst-sweep.tar.gz"), "-C", str(clone), "."]
        subprocess.run(tar, check=True)

    def say(self, line: str, code: int = 0) -> str:
        environment = self.place.environment | {"HOME": str(self.home), "EQST_FAKE_HOST": "w-0"}
        done = subprocess.run(
            ["bash", "-c", line], cwd=self.home, env=environment, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout

    def state(self) -> str:
        (host,) = queued.heard(self.say(queued.STATE))
        return f"{host.setup}:{host.clone} {host.job}:{host.of}:{host.code}"

    def wait_for(self, state: str) -> None:
        deadline = time.monotonic() + 60
        while (seen := self.state()) != state:
            assert time.monotonic() < deadline, (seen, state)
            time.sleep(0.05)


@pytest.fixture
def host(place: Place, tmp_path: Path) -> Host:
    return Host(place, tmp_path)


def test_a_host_is_set_up_and_runs_what_it_is_told_to(host: Host, place: Place) -> None:
    host.say("mv tpu_host.sh away")
    assert host.state() == "bare: idle::0"
    host.say("mv away tpu_host.sh")
    assert host.state() == "bare: idle::0"
    host.say("bash tpu_host.sh setup c1 'echo \"a  b\" > said; sleep 1'")
    assert host.state() == "making:c1 idle::0"
    host.say("bash tpu_host.sh setup c1 'exit 1'")  # it has begun
    host.say("bash tpu_host.sh setup c2 :", code=3)
    host.wait_for("ready:c1 idle::0")
    clone = host.home / "eqst-sweep" / "clone"
    assert (clone / "said").read_text() == "a  b\n" and (clone / ".venv/bin/python").exists()

    line = "bash tpu_host.sh start {} gs://b/logs/{}.txt bash -c 'echo \"it  says\"; pwd; {}'"
    host.say(line.format("k.1", "k.1", "sleep 1"))
    assert host.state() == "ready:c1 running:k.1:0"
    host.say(line.format("k.1", "k.1", "exit 9"))  # once is enough
    host.say(line.format("k.2", "k.2", "exit 9"), code=3)  # one at a time
    host.wait_for("ready:c1 ended:k.1:0")
    assert (place.bucket / "b/logs/k.1.txt").read_text() == f"it  says\n{clone}\n"
    host.say(line.format("k.2", "k.2", "echo no luck; exit 7"))
    host.wait_for("ready:c1 ended:k.2:7")
    assert host.say("bash tpu_host.sh last") == "no luck\n"

    host.say("bash tpu_host.sh setup c3 'echo it cannot be; false'")
    host.wait_for("failed:c3 ended:k.2:7")
    assert not (clone / "said").exists() and (clone / ".venv/bin/python").exists()


def test_a_host_stops_what_runs_and_sees_what_was_killed(host: Host) -> None:
    (host.home / "eqst-sweep" / "clone").mkdir(parents=True)
    trap = 'trap "sleep 0.2; exit 75" TERM; for i in {1..400}; do sleep 0.05; done'
    host.say(f"bash tpu_host.sh start k.1 gs://b/1.txt bash -c '{trap}'")
    time.sleep(0.5)
    host.say("bash tpu_host.sh stop")
    host.wait_for("bare: ended:k.1:75")
    host.say(f"bash tpu_host.sh start k.2 gs://b/2.txt bash -c '{trap}'")
    pid = int((host.home / "eqst-sweep/job.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)  # as a host that is restarted; its boot would be another too
    host.wait_for("bare: ended:k.2:137")
    # What a run leaves behind goes with it: it would keep the TPU.
    host.say("bash tpu_host.sh start k.3 gs://b/3.txt bash -c 'sleep 300 & echo $! > ../../left'")
    host.wait_for("bare: ended:k.3:0")
    left = (host.home / "left").read_text().strip()
    stat = Path(f"/proc/{left}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"


@pytest.mark.parametrize(
    "file, content", [("preempted", ""), ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE\n")]
)
def test_a_host_that_is_taken_back_has_its_run_save(file: str, content: str, host: Host) -> None:
    (host.home / "eqst-sweep" / "clone").mkdir(parents=True)
    trap = 'trap "exit 1" TERM; for i in {1..400}; do sleep 0.05; done'
    host.say(f"bash tpu_host.sh start k.1 gs://b/1.txt bash -c '{trap}'")
    (host.home / file).write_text(content)
    host.wait_for("bare: ended:k.1:75")  # whatever it says of it itself


def test_the_archive_is_what_git_would_have(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    subprocess.run(["git", "-C", str(root), "init", "-q"], check=True)
    (root / ".gitignore").write_text("big\n")
    (root / "a b.sh").write_text("1")
    (root / "a b.sh").chmod(0o755)
    (root / "big").write_text("2")
    one = clone.archive(root, tmp_path / "1.tar.gz")
    os.utime(root / "a b.sh", (1, 1))
    assert clone.archive(root, tmp_path / "2.tar.gz") == one
    (root / "a b.sh").write_text("3")
    assert clone.archive(root, tmp_path / "2.tar.gz") != one
    listing = subprocess.run(
        ["tar", "-tvzf", str(tmp_path / "2.tar.gz")], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert [line.split(None, 5)[5] for line in listing] == [".gitignore", "a b.sh"]
    assert listing[1].startswith("-rwxr-xr-x")
    with pytest.raises(ValueError, match="is no git clone"):
        clone.archive(tmp_path, tmp_path / "3.tar.gz")


# --- the command


def test_a_dry_run_prints_every_command_and_gives_none(place: Place) -> None:
    done = place.sweep("--dry_run", "--create=--internal-ips --network=lab")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("gcloud")]
    import shlex

    kinds = [fake_gcloud.parse(shlex.split(line))[0] for line in lines]
    assert set(kinds) == set(fake_gcloud.GRAMMAR)
    (create,) = [line for line in lines if " create " in line]
    assert create.endswith("--spot --internal-ips --network=lab --async")
    assert "--runtime-version=v2-alpha-tpuv5 " in create and f"--node-id={FIRST} " in create
    (start,) = [shlex.split(line)[-1] for line in lines if "tpu_host.sh start" in line]
    assert start.endswith(f"--member={NAMES[0]}") and ".venv/bin/python -u launch/sweep.py" in start
    assert "# 1 more runs follow" in done.stdout
    assert not place.read()["calls"] and not list(place.bucket.iterdir())


@pytest.mark.long
def test_what_is_missing_is_one_line(place: Place) -> None:
    for words, said in (
        (["--workdir=runs/a"], "--workdir=runs/a: with --backend=tpu every host writes there"),
        (["--zone=", "--project="], "is empty"),
        (["--accelerator_type=v9-8"], "--accelerator_type=v9-8: its runtime is known for v4"),
        ([f"--config={place.repo}/configs/ablation.py"], "start from its root"),
        (["--backend=cloud"], "--backend=cloud"),
    ):
        done = place.sweep("--dry_run", *words)
        assert done.returncode == 1 and said in done.stderr, (done.stdout, done.stderr)
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.long
def test_a_sweep_on_tpus_from_its_start_to_its_table(place: Place) -> None:
    (place.prepared / NAMES[1] / "fail-once").touch()
    done = place.sweep()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 runs, 0 of them done" in done.stdout and f"2/2  {NAMES[1]}  " in done.stdout
    assert f"{NAMES[1]}: failed (exit code 1: it fails, once" in done.stdout
    assert place.read()["made"] == 1 and not place.left()
    root = place.bucket / "bucket" / "sweep"
    content = json.loads((root / "sweep.json").read_text())
    assert [member["name"] for member in content["members"]] == list(NAMES)
    assert content["tables"]["variant"][0]["seeds"] == 2
    assert (root / "table.md").read_text().startswith("# Ablation")
    assert (root / "sweep.png").read_bytes().startswith(b"\x89PNG")
    logs = sorted((root / NAMES[1] / "logs").iterdir())
    assert len(logs) == 4 and logs[0].read_text().startswith(f"at {NAMES[1]} ")  # 2 hosts, twice
    again = place.sweep()  # nothing is left to do, and no TPU is asked for
    assert again.returncode == 0 and place.read()["made"] == 1, again.stderr


@pytest.mark.long
def test_a_quota_is_one_line_and_leaves_nothing(place: Place) -> None:
    place.change(quota=0)
    done = place.sweep()
    assert done.returncode == 1 and not place.left()
    assert len(done.stderr.splitlines()) == 1 and "ask for more quota of v5p-16" in done.stderr


@pytest.mark.long
def test_sigterm_saves_deletes_and_the_same_command_goes_on(place: Place) -> None:
    (place.prepared / "seconds").write_text("30")
    sweep = place.begin("--jobs=2")
    assert sweep.stdout is not None
    for line in sweep.stdout:
        if "variant/db_mel_pm/1" in line:  # both are started, one just now
            break
    time.sleep(2.0)
    second = place.sweep()  # two of them would delete each other's requests
    assert second.returncode == 1 and "is in use by process" in second.stderr
    sweep.send_signal(signal.SIGTERM)
    rest = sweep.stdout.read()
    sweep.stdout.close()
    assert sweep.wait(60) == 75 and "SIGTERM: the same command goes on" in rest, rest
    assert not place.left()
    logs = list((place.bucket / "bucket" / "sweep").rglob("logs/*.txt"))
    assert logs and all("saved" in path.read_text() for path in logs)
    (place.prepared / "seconds").write_text("0.2")
    done = place.sweep("--jobs=2")
    assert done.returncode == 0 and not place.left(), done.stdout + done.stderr


@pytest.mark.long
def test_killed_with_9_it_takes_its_requests_over(place: Place) -> None:
    (place.prepared / "seconds").write_text("4")
    chance = random.Random(5)
    for _ in range(5):
        sweep = place.begin("--jobs=2")
        assert sweep.stdout is not None
        sweep.stdout.readline()
        time.sleep(chance.uniform(0.0, 8.0))
        sweep.kill()
        sweep.wait()
        sweep.stdout.close()
        assert len(place.left()) <= 2
    done = place.sweep("--jobs=2")
    assert done.returncode == 0 and not place.left(), done.stdout + done.stderr
    assert place.read()["made"] <= 6
    cancelled = place.sweep("--cancel")
    assert cancelled.stdout == "deleted: nothing, there was none\n", cancelled.stderr
