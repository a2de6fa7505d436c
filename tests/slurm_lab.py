"""A Slurm of one machine, for tests: its daemons, in folders of their own, with two CPUs.

Needs root and Debian's packages slurm-wlm and munge. What it starts ends with it.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")
NICE = ["nice", "-n", "19"]

CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
SlurmctldTimeout=10
SlurmdTimeout=10
InactiveLimit=0
KillWait=20
MinJobAge=300
MaxArraySize=1001
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000 State=UNKNOWN
PartitionName=lab Nodes={host} Default=YES MaxTime=60 State=UP
"""


def missing() -> str:
    """Why it cannot run here, or ''."""
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"no {', '.join(absent)} here (Debian: slurm-wlm, munge)"
    if os.geteuid() != 0:
        return "its daemons run as root alone"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return f"the name of this machine, {socket.gethostname()}, does not resolve"
    return ""


@contextlib.contextmanager
def cluster() -> Iterator[dict[str, str]]:
    """A cluster with one idle node; gives the environment that its clients need."""
    folder = Path(tempfile.mkdtemp(prefix="eqst-slurm-"))  # short: a socket's path has 108 bytes
    conf = folder / "slurm.conf"
    environment = {**os.environ, "SLURM_CONF": str(conf)}
    started: list[subprocess.Popen] = []
    try:
        _write(folder, conf)
        for words in (
            ["munged", "--foreground", *_munge_words(folder)],
            ["slurmctld", "-D", "-c", "-i", "-f", str(conf)],
            ["slurmd", "-D", "-f", str(conf)],
        ):
            with open(folder / f"{words[0]}.out", "w") as out:
                started.append(
                    subprocess.Popen(
                        [*NICE, *words],
                        env=environment,
                        stdout=out,
                        stderr=out,
                        start_new_session=True,
                    )
                )
            time.sleep(1.5)
        _wait_for_idle(environment, folder)
        yield environment
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            subprocess.run(
                ["scancel", "--user=root"], env=environment, capture_output=True, timeout=30
            )
        _end(started, environment)
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, conf: Path) -> None:
    """Keys, folders and slurm.conf."""
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    with socket.socket() as one, socket.socket() as two:  # both at once: two ports
        for each in (one, two):
            each.bind(("127.0.0.1", 0))
        ports = [one.getsockname()[1], two.getsockname()[1]]
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=ports))


def _munge_words(folder: Path) -> list[str]:
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed"}
    words = [f"--{name}={folder}/munge.{end}" for name, end in files.items()]
    return [*words, f"--log-file={folder}/munge.log", "--force", "--num-threads=1"]


def _wait_for_idle(environment: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found = subprocess.run(
            ["sinfo", "-h", "-o", "%T"], env=environment, capture_output=True, text=True
        )
        if found.stdout.strip() == "idle":
            return
        time.sleep(0.5)
    logs = [path.read_text(errors="replace")[-800:] for path in sorted(folder.glob("*.[lo]*"))]
    raise RuntimeError("no idle node:\n" + "\n".join([found.stdout, found.stderr, *logs]))


def _own(environment: dict[str, str]) -> list[int]:
    """Processes that were started under this cluster, wherever they hang now."""
    mark = f"SLURM_CONF={environment['SLURM_CONF']}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
    return found


def _end(started: list[subprocess.Popen], environment: dict[str, str]) -> None:
    """Ends jobs, then the daemons, then whatever has not listened."""
    for process in reversed(started):  # munged last: the others need it to end
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
    for pid in _own(environment):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
    for process in started:
        process.wait()
