"""A Cloud TPU that is none: what `gcloud` would answer, from a state that a test can change.

In a test it is asked in the process, in a time of the test's own. As a program (a file `gcloud` on
PATH that calls `main`) it keeps its state in a JSON file, lives in real time, and its hosts are
folders in which commands really run. It takes the words that launch.md and `gcloud --help` (GA, SDK
528) allow, and nothing else.
"""

import contextlib
import fcntl
import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

TPUS = ("gcloud", "compute", "tpus")
WHERE = {"--project": True, "--zone": True, "--quiet": False}
# Options by command, and whether each takes a value; how many positional words.
GRAMMAR = {
    ("queued-resources", "create"): (1, WHERE | dict.fromkeys(
        ("--node-id", "--accelerator-type", "--runtime-version", "--valid-until-duration",
         "--valid-after-duration", "--service-account", "--scopes", "--network", "--subnetwork",
         "--labels", "--metadata", "--metadata-from-file", "--data-disk", "--tags", "--description",
         "--node-count", "--node-prefix"), True,
    ) | dict.fromkeys(("--spot", "--reserved", "--guaranteed", "--internal-ips", "--async"), 0)),
    ("queued-resources", "delete"): (1, WHERE | {"--force": False, "--async": False}),
    ("queued-resources", "describe"): (1, WHERE | {"--format": True}),
    ("queued-resources", "list"): (0, WHERE | {"--format": True, "--filter": True}),
    ("tpu-vm", "describe"): (1, WHERE | {"--format": True}),
    ("tpu-vm", "ssh"): (1, WHERE | {"--worker": True, "--command": True, "--ssh-flag": True,
                                    "--internal-ip": False, "--output-directory": True}),
    ("tpu-vm", "scp"): (None, WHERE | {"--worker": True, "--recurse": False, "--scp-flag": True,
                                       "--internal-ip": False, "--compress": False}),
}  # fmt: skip
REQUIRED = {
    ("queued-resources", "create"): ("--node-id", "--accelerator-type", "--runtime-version"),
}
# After so many seconds a new request is: what a patient caller sees.
COURSE = ((0, "CREATING"), (2, "ACCEPTED"), (4, "WAITING_FOR_RESOURCES"), (30, "PROVISIONING"))
ACTIVE_AFTER, NODE_AFTER, DELETED_AFTER, SETUP_SECONDS, RUN_SECONDS = 60, 90, 40, 50, 200
QUOTA = (
    "ERROR: (gcloud.compute.tpus.queued-resources.create) RESOURCE_EXHAUSTED: Quota limit "
    "'TPUV5PPreemptiblePerProjectPerZoneForTPUAPI' has been exceeded. Limit: 8 in zone us-east5-a."
)


def parse(words: list[str]) -> tuple[tuple[str, str], list[str], dict[str, list[str]]]:
    """The command, its positional words and its options; ValueError as gcloud's usage errors."""
    alpha = words[1:2] == ["alpha"]
    words = [words[0], *words[2:]] if alpha else words
    if tuple(words[:3]) != TPUS or tuple(words[3:5]) not in GRAMMAR:
        raise ValueError(f"Invalid choice: {words[:5]}")
    command = (words[3], words[4])
    count, known = GRAMMAR[command]
    if alpha and command in (("tpu-vm", "ssh"), ("tpu-vm", "scp")):
        known = known | {"--tunnel-through-iap": False, "--batch-size": True}
    positional, options = [], {}
    for word in words[5:]:
        name, equals, value = word.partition("=")
        if not word.startswith("--"):
            positional.append(word)
        elif name not in known or known[name] != bool(equals):
            raise ValueError(f"unrecognized arguments: {word}")
        else:
            options.setdefault(name, []).append(value)
    missing = {"--project", "--zone", *REQUIRED.get(command, ())} - set(options)
    if missing or (count is not None and len(positional) != count):
        raise ValueError(f"argument {sorted(missing)} {positional}: Must be specified.")
    return command, positional, options


class Cloud:
    """The state, and what each command does to it.

    `hooks` are asked before every command, with its two words, and may answer in its place.
    """

    def __init__(self, workers: int = 2):
        self.workers = workers
        self.now = 0.0
        self.requests: dict[str, dict] = {}
        self.calls: list[list[str]] = []
        self.hooks: list = []
        self.quota = 100  # requests that may be there at a time
        self.course = COURSE
        self.codes: dict[str, list[int]] = {}  # how the attempts of a member end; then with 0
        self.work: dict[str, float] = {}  # seconds that a member still takes
        self.done: set[str] = set()
        self.made = 0
        self.wrong: list[str] = []  # what must never be
        self.setup_codes: list[int] = []
        self.folder: Path | None = None  # of real hosts

    # --- what time does

    def state(self, name: str) -> str:
        """Of a request: "" once it is gone."""
        entry = self.requests[name]
        if entry["forced"]:
            return entry["forced"]
        if entry["deleted"] is not None:
            return "DELETING" if self.now < entry["deleted"] + DELETED_AFTER else ""
        if entry["suspended"] is not None:
            return "SUSPENDING" if self.now < entry["suspended"] + 20 else "SUSPENDED"
        age = self.now - entry["made"]
        if age >= ACTIVE_AFTER:
            return "ACTIVE"
        return [state for after, state in self.course if age >= after][-1]

    def node(self, name: str) -> str:
        """Of its node: "" where there is none."""
        entry = self.requests[name]
        if entry["node"] is not None:
            return entry["node"]
        state = self.state(name)
        if state in ("SUSPENDING", "SUSPENDED"):
            return "PREEMPTED"
        if state == "DELETING":
            return "DELETING"
        if state != "ACTIVE":
            return ""
        return "READY" if self.now >= entry["made"] + NODE_AFTER else "CREATING"

    def forget(self) -> None:
        for name in [name for name in self.requests if not self.state(name)]:
            del self.requests[name]

    def preempt(self, name: str) -> None:
        """Takes a TPU back; what its run has done is saved."""
        for job in self.running(name):
            self.work[job["member"]] -= self.now - job["start"]
        self.requests[name]["suspended"] = self.now

    def running(self, name: str) -> list[dict]:
        """The jobs that run on a request's hosts now, one for each job."""
        if self.node(name) not in ("READY", "DELETING") or name not in self.requests:
            return []
        jobs = [host["job"] for host in self.requests[name]["hosts"] if host["job"]]
        return list({job["id"]: job for job in jobs if self.now < job["end"]}.values())

    # --- commands

    def run(self, words: list[str], seconds: float) -> tuple[int, str, str]:
        """As eqst.sweeps.gcloud.run: code, stdout, stderr."""
        self.calls.append(words)
        self.forget()
        try:
            command, positional, options = parse(words)
        except ValueError as error:
            return 2, "", f"ERROR: (gcloud.{'.'.join(words[1:5])}) {error}"
        for hook in self.hooks:
            answer = hook(command, positional)
            if answer is not None:
                return answer
        act = getattr(self, "_" + "_".join(command).replace("-", "_"))
        return act(positional, {name: values[0] for name, values in options.items()})

    def _absent(self, name: str) -> tuple[int, str, str]:
        return 1, "", f"ERROR: (gcloud) NOT_FOUND: Resource '{name}' was not found"

    def _queued_resources_create(self, positional, options):
        (name,) = positional
        if not re.fullmatch(r"[a-z]([-a-z0-9]{0,59}[a-z0-9])?", name):
            return 1, "", "ERROR: (gcloud) INVALID_ARGUMENT: name"
        if name in self.requests:
            return 1, "", f"ERROR: (gcloud) ALREADY_EXISTS: Resource '{name}' already exists"
        if len(self.requests) >= self.quota:
            return 1, "", QUOTA
        self.made += 1
        hosts = [{"files": False, "setup": None, "job": None} for _ in range(self.workers)]
        self.requests[name] = {
            "made": self.now, "deleted": None, "suspended": None, "forced": "", "node": None,
            "type": options["--accelerator-type"], "hosts": hosts, "message": "",
        }  # fmt: skip
        return 0, "", f"Create request issued for: [{name}]"

    def _queued_resources_delete(self, positional, options):
        (name,) = positional
        if name not in self.requests:
            return self._absent(name)
        entry = self.requests[name]
        if "--force" not in options:
            return 1, "", "ERROR: (gcloud) FAILED_PRECONDITION: nodes exist, use --force"
        if entry["deleted"] is None:
            entry["deleted"], entry["forced"] = self.now, ""
        return 0, "", ""

    def _entry(self, name: str) -> dict:
        entry = self.requests[name]
        state: dict = {"state": self.state(name)}
        if entry["message"]:
            state["failedData"] = {"error": {"message": entry["message"]}}
        spec = {"node": {"acceleratorType": entry["type"]}, "nodeId": name}
        full = f"projects/p/locations/z/queuedResources/{name}"
        return {"name": full, "state": state, "tpu": {"nodeSpec": [spec]}}

    def _queued_resources_describe(self, positional, options):
        (name,) = positional
        if name not in self.requests:
            return self._absent(name)
        return 0, json.dumps(self._entry(name)), ""

    def _queued_resources_list(self, positional, options):
        return 0, json.dumps([self._entry(name) for name in self.requests]), ""

    def _tpu_vm_describe(self, positional, options):
        (name,) = positional
        if name not in self.requests or not self.node(name):
            return self._absent(name)
        ends = [{"ipAddress": f"10.0.0.{i}"} for i in range(self.workers)]
        facts = {"name": name, "state": self.node(name), "networkEndpoints": ends}
        return 0, json.dumps(facts), ""

    def _unreachable(self, name: str) -> tuple[int, str, str] | None:
        if name not in self.requests or not self.node(name):
            return self._absent(name)
        if self.node(name) != "READY":
            return 1, "", f'ERROR: This TPU has terminal state "{self.node(name)}"'
        return None

    def _tpu_vm_scp(self, positional, options):
        *files, to = positional
        name = to.removesuffix(":")
        for file in files:
            if not Path(file).is_file():
                return 1, "", f"{file}: No such file or directory"
        if wrong := self._unreachable(name):
            return wrong
        for i, host in enumerate(self.requests[name]["hosts"]):
            host["files"] = True
            if self.folder:
                home = self.home(name, i)
                for file in files:
                    (home / Path(file).name).write_bytes(Path(file).read_bytes())
        return 0, "", ""

    def _tpu_vm_ssh(self, positional, options):
        (name,) = positional
        if wrong := self._unreachable(name):
            return wrong
        if options["--worker"] != "all":
            return 1, "", "the tests know no other workers"
        answers = [
            self.really(name, i, options["--command"])
            if self.folder
            else self.on_host(name, i, options["--command"])
            for i in range(self.workers)
        ]
        worst = max(code for code, _, _ in answers)
        return worst, "".join(x[1] for x in answers), "".join(x[2] for x in answers)

    # --- hosts

    def home(self, name: str, i: int) -> Path:
        assert self.folder is not None
        path = self.folder / f"{name}-{self.requests[name]['made']:.0f}-{i}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def really(self, name: str, i: int, line: str) -> tuple[int, str, str]:
        """Runs a line in a host's folder, as that host."""
        home = self.home(name, i)
        host = os.environ | {"HOME": str(home), "EQST_FAKE_HOST": f"{name}-w-{i}"}
        done = subprocess.run(
            ["bash", "-c", line], cwd=home, env=host, capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    def on_host(self, name: str, i: int, line: str) -> tuple[int, str, str]:
        """What launch/tpu_host.sh does, in the time of the test."""
        host = self.requests[name]["hosts"][i]
        if line.startswith("test -f"):
            assert shlex.split(line)[:7] == "test -f tpu_host.sh && bash tpu_host.sh state".split()
            return 0, f"eqst {name}-{i} {self._host_words(host)}\n", ""
        bash, script, action, *rest = shlex.split(line)
        if (bash, script) != ("bash", "tpu_host.sh") or not host["files"]:
            return 127, "", "bash: tpu_host.sh: No such file or directory"
        if action == "setup":
            clone, _ = rest
            if host["setup"] is None or host["setup"]["clone"] != clone:
                code = self.setup_codes.pop(0) if self.setup_codes else 0
                host["setup"] = {"clone": clone, "end": self.now + SETUP_SECONDS, "code": code}
        elif action == "start":
            return self._start(name, host, rest)
        elif action == "stop":
            job = host["job"]
            if job and self.now < job["end"]:
                if job["stopped"] is None:
                    self.work[job["member"]] -= (self.now - job["start"]) / self.workers
                job.update(end=min(job["end"], self.now + 2), code=75, stopped=True)
        elif action == "last":
            return 0, "the last line of a log\n", ""
        else:
            return 2, "", "tpu_host.sh: give .."
        return 0, "", ""

    def _host_words(self, host: dict) -> str:
        setup, job, now = host["setup"], host["job"], self.now
        words = ["bare", "idle"]
        if setup:
            kind = "making" if now < setup["end"] else "failed" if setup["code"] else "ready"
            words[0] = f"{kind}:{setup['clone']}"
        if job:
            self._finish(job)
            running = now < job["end"]
            words[1] = f"running:{job['id']}" if running else f"ended:{job['id']}:{job['code']}"
        return " ".join(words)

    def _finish(self, job: dict) -> None:
        if self.now >= job["end"] and job["code"] == 0:
            self.done.update(job["member"].split(","))

    def _start(self, name: str, host: dict, rest: list[str]) -> tuple[int, str, str]:
        job, log, *words = rest
        member = words[-1].removeprefix("--member=")  # or several, "A,B"
        names = set(member.split(","))
        assert log.startswith(f"gs://bucket/sweep/{member.partition(',')[0]}/logs/{job}-"), log
        if host["job"] and host["job"]["id"] == job:
            return 0, "", ""
        if host["job"] and self.now < host["job"]["end"]:
            return 3, "", "eqst: busy"
        for other in self.requests:
            for running in self.running(other):
                if names & set(running["member"].split(",")) and running["id"] != job:
                    self.wrong.append(f"{member} on {other} and {name} at {self.now}")
        same = [
            x["job"] for x in self.requests[name]["hosts"] if x["job"] and x["job"]["id"] == job
        ]
        if same:  # on another host of this TPU: they begin and end together
            host["job"] = same[0]
            return 0, "", ""
        if not host["setup"] or self.now < host["setup"]["end"]:
            self.wrong.append(f"{member} started on {name} before it was set up")
        codes = self.codes.get(member, [])
        code = codes.pop(0) if codes else 0
        left = max(self.work.setdefault(member, RUN_SECONDS), 1)
        host["job"] = {
            "id": job, "member": member, "start": self.now, "end": self.now + left, "code": code,
            "stopped": None,
        }  # fmt: skip
        return 0, "", ""


def main(path: str, words: list[str]) -> int:
    """The program: one command, on the state in a file."""
    cloud = Cloud()
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        stored = json.loads(Path(path).read_text())
        for name in ("requests", "quota", "made", "workers"):
            setattr(cloud, name, stored[name])
        cloud.course = ((0, "CREATING"),)
        # Real time is a hundred times as fast here.
        cloud.now, cloud.folder = 100 * (time.time() - stored["epoch"]), Path(stored["folder"])
        code, out, err = cloud.run(["gcloud", *words], 60.0)
        stored |= {name: getattr(cloud, name) for name in ("requests", "made")}
        stored["calls"].append(words)
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path}.tmp").unlink()
        Path(f"{path}.tmp").write_text(json.dumps(stored))
        os.replace(f"{path}.tmp", path)
    sys.stdout.write(out)
    sys.stderr.write(err)
    return code
