"""The end of a sweep's requests on Cloud TPU: each is tried, and what stays is named.

A TPU that nobody deletes is paid for, so that no error with one keeps another from being deleted.
"""

from __future__ import annotations

from eqst.stopping import Interrupted
from eqst.sweeps.gcloud import Clock, Cloud, PersonNeeded
from eqst.sweeps.queued import GOING, prefix

GONE_SECONDS = 1800.0  # for requests to be gone after they are deleted


def delete(cloud: Cloud, names: list[str], time: Clock) -> None:
    """Deletes requests and waits until they are gone.

    Those that are refused are tried again for as long as others go.

    Raises:
      PersonNeeded: they do not go; the message names them.
    """
    left, going = list(names), set[str]()
    end = time.now() + GONE_SECONDS
    try:
        while left:
            # One that was suspended or failed meanwhile may have let the first call pass.
            why = cloud.delete_all([name for name in left if name not in going])
            entries = {name: cloud.request(name) for name in left}
            there = {name: entry for name, entry in entries.items() if entry is not None}
            left = list(there)
            going = {name for name in left if there[name]["state"]["state"] in GOING}
            if left and all(name in why for name in left):
                raise PersonNeeded(why[left[0]])
            if left and time.now() > end:
                raise PersonNeeded("they are still there")
            if left:
                time.pause(5.0)
    except (PersonNeeded, Interrupted) as error:
        raise PersonNeeded(
            f"NOT DELETED, and perhaps paid for: {', '.join(left)} ({error}); the same command "
            "with --cancel deletes them"
        ) from None


def cancel(cloud: Cloud, workdir: str, time: Clock) -> list[str]:
    """Deletes every request of a workdir; their names.

    Raises:
      PersonNeeded: they do not go; the message names them.
    """
    names = [name for name in cloud.requests() if name.startswith(prefix(workdir))]
    delete(cloud, names, time)
    return names
