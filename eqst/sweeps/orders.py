"""What the hosts of a TPU are told in a sweep, and every command that this takes."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from eqst.sweeps import gcloud
from eqst.sweeps.gcloud import HOST_SCRIPT, Site
from eqst.sweeps.members import Member
from eqst.sweeps.queued import LAST, STATE, STOP, job_key, prefix


class Plan(NamedTuple):
    """What the requests are to do.

    Attributes:
      workdir: of the sweep, in a bucket.
      clone: the name of the clone in `files`.
      files: what is copied to each host: the archive and the host's script.
      setup: a shell line that each host runs in the clone before its environment is made.
      units: the runs that are one program, by the name of the first, which stands for them.
      words: the command of the unit of a name.
      is_done: whether a unit has left all that it should.
    """

    workdir: str
    clone: str
    files: list[str]
    setup: str
    units: Mapping[str, list[Member]]
    words: Callable[[str], list[str]]
    is_done: Callable[[Member], bool]


def setup_line(plan: Plan) -> str:
    """The shell line that makes a host's environment, of the clone that was copied there."""
    return shlex.join(["bash", HOST_SCRIPT, "setup", plan.clone, plan.setup])


def start_line(plan: Plan, job: str, name: str) -> str:
    """The shell line that starts a run on a host."""
    log = shlex.quote(f"{plan.workdir}/{name}/logs/{job}")
    words = shlex.join(plan.words(name))
    return f'bash {HOST_SCRIPT} start {job} {log}-"$(hostname)".txt {words}'


def dry_lines(site: Site, plan: Plan, members: list[Member]) -> Iterator[str]:
    """Every command that the first run takes, in their order, and how many runs follow."""
    name = f"{prefix(plan.workdir)}0"
    job = f"{job_key(plan.units[members[0].name])}.0"
    for about, words in (
        ("what is there", gcloud.list_words(site)),
        ("a request of its own", gcloud.create_words(site, name)),
        ("is it gone", gcloud.describe_words(site, name)),
        ("its machine", gcloud.node_words(site, name)),
        ("what its hosts are at", gcloud.ssh_words(site, name, STATE)),
        ("the clone", gcloud.copy_words(site, name, plan.files)),
        ("its environment", gcloud.ssh_words(site, name, setup_line(plan))),
        (members[0].name, gcloud.ssh_words(site, name, start_line(plan, job, members[0].name))),
        ("where it fails", gcloud.ssh_words(site, name, LAST)),
        ("where it is to stop", gcloud.ssh_words(site, name, STOP)),
        ("at the end", gcloud.delete_words(site, name)),
    ):
        yield f"# {about}\n{shlex.join(words)}"
    yield f"# {len(members) - 1} more runs follow on the same requests"
