"""Several processes as one: how they find each other, agree, and end together.

One process per host, as a rule, runs the same program on its own devices: `join` makes them one,
and from then on what is collective here is called by all of them, in the same order. JAX's
multi-controller runtime is the engine; nothing here talks to another process but through it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import glob
import importlib.util
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

# JAX itself reads the first of these alone.
ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# A pod's hosts may start many minutes apart; a run that has lost one should not wait for long.
START_SECONDS, HEARTBEAT_SECONDS, SHUTDOWN_SECONDS = 1800, 55, 30
# Our own look at whether all are there is quicker than JAX's heartbeat, and ends in a line.
LOOK_SECONDS, LOST_SECONDS = 3.0, 30.0
DONE = "done"  # what a process that has come to its end says in place of a count
EXIT_INTERRUPTED = 75  # "the same command goes on", to whatever starts processes
# Without process 0 the others cannot speak; it leaves after them.
LAST_WORDS_SECONDS = 3 * LOOK_SECONDS
PARTING_SECONDS = 1.0  # from a process's last word to its exit, on a busy machine
GONE, LEAVES, FAILED = "is gone", "leaves, as another is gone", "has failed and says why"
START_AGAIN = "start all of them again, they go on from the last checkpoint"

# A JaxRuntimeError of these is the program's own; others come of a broken connection.
_OWN_ERRORS = ("RESOURCE_EXHAUSTED", "INVALID_ARGUMENT")
WAIT_SECONDS = 10.0  # before it is said that others are waited for
DAY_MS = 24 * 3600 * 1000  # a host may evaluate for longer than another; who is gone is seen

_parting = threading.Event()  # this process has an error of its own to tell
_on_abort: Any = None  # C keeps no reference to it

Result = TypeVar("Result")


def join() -> None:
    """Makes this process one of several, where the environment says so; call it before all else.

    - JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    - Slurm: a step of several tasks (`srun --ntasks=8 ..`). A single task on a node gets all GPUs
      of its allocation there; with several, task i of a node gets GPU i.
    - Cloud TPU, as a VM or in GKE: JAX finds the hosts of the slice.

    Otherwise it does nothing. On a CPU the processes talk by gloo, JAX's default. A process that
    dies takes the others with it within a minute (see `_watch`); one that comes to its end waits
    for the others there. SIGTERM ends a process, as it does one alone, but where `Signals` listens.

    Raises:
      ValueError: some of the three variables are set and not all, or they are no such numbers; the
        cluster cannot be joined.
    """
    options: dict[str, Any] | None = _explicit()
    if options is None:
        options = _slurm()
    if options is None and _on_tpu():
        options = {}
    if options is None:
        return
    where = ""
    if "num_processes" in options:
        where = f" of {options['num_processes']} at {options['coordinator_address']}"
    line = f"waiting for the other processes{where}, {START_SECONDS // 60} minutes at most"
    patience = threading.Timer(WAIT_SECONDS, _say_waiting, (line, options))
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes do not find each other ({str(error).splitlines()[0][:200]}): set "
            f"{', '.join(ENVIRONMENT)} on each, or unset what names a cluster"
        ) from None
    finally:
        patience.cancel()
    if jax.process_count() > 1:
        # JAX has begun to listen to it, for its own way to stop, which is not ours.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if jax.process_index():
            _catch_abort()
        ends = threading.Event()
        watcher = threading.Thread(target=_watch, args=(ends,), daemon=True)
        watcher.start()

        # A thread that is still in JAX's C++ when Python goes takes the process down with SIGABRT.
        def stop() -> None:
            with contextlib.suppress(Exception):  # who is gone is seen meanwhile
                _client().wait_at_barrier("eqst/end", DAY_MS)
            ends.set()
            watcher.join(SHUTDOWN_SECONDS)

        atexit.register(stop)


def _say_waiting(line: str, options: dict[str, Any]) -> None:
    """Says that others are waited for, and of an address that leads nowhere that it does not."""
    if "coordinator_address" in options:
        host = options["coordinator_address"].rpartition(":")[0]
        try:
            socket.getaddrinfo(host.strip("[]"), None)
        except OSError:
            line += f"; {host} is not known here, which is awaited too"
    os.write(2, f"{line}\n".encode())


def _check_free(port: int) -> None:
    """Refuses a port that is taken: JAX would crash, or share it with the first of another run."""
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # of the run before
        try:
            own.bind(("", port))
        except (OSError, OverflowError) as error:
            raise ValueError(
                f"process 0 cannot have port {port} here ({getattr(error, 'strerror', error)}): "
                "give another in JAX_COORDINATOR_ADDRESS, the same on all"
            ) from None


def _explicit() -> dict[str, Any] | None:
    """What the three variables say; None without any of them."""
    given = {name: os.environ[name] for name in ENVIRONMENT if os.environ.get(name)}
    if not given:
        return None
    absent = [name for name in ENVIRONMENT if name not in given]
    if absent:
        raise ValueError(
            f"{', '.join(given)} {'are' if len(given) > 1 else 'is'} set and {', '.join(absent)} "
            f"{'are' if len(absent) > 1 else 'is'} not: set all or none"
        )
    address, *numbers = given.values()
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal()):
        raise ValueError(f"JAX_COORDINATOR_ADDRESS is {address!r}: give host:port of process 0")
    if not all(number.isdecimal() for number in numbers) or int(numbers[1]) >= int(numbers[0]):
        raise ValueError(
            f"JAX_PROCESS_ID is {numbers[1]!r} of JAX_NUM_PROCESSES {numbers[0]!r}: the processes "
            "are numbered from 0"
        )
    if int(numbers[1]) == 0:
        _check_free(int(port))
    return {
        "coordinator_address": address,
        "num_processes": int(numbers[0]),
        "process_id": int(numbers[1]),
        # Else JAX looks for a cluster all the same, and in Slurm takes all GPUs but one away.
        "cluster_detection_method": "deactivate",
    }


def _slurm() -> dict[str, Any] | None:
    """A Slurm step of several tasks; a batch script without srun has no step, and is alone."""
    environ = os.environ
    if "SLURM_STEP_NODELIST" not in environ or int(environ.get("SLURM_NTASKS", "1")) < 2:
        return None
    options: dict[str, Any] = {"cluster_detection_method": "slurm"}
    alone = re.fullmatch(r"1(\(x\d+\))?", environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    if alone and environ.get("SLURM_GPUS_ON_NODE", "").isdecimal():
        options["local_device_ids"] = list(range(int(environ["SLURM_GPUS_ON_NODE"])))
    return options


def _on_tpu() -> bool:
    """Whether this is a host of a TPU; looked for without starting anything."""
    if importlib.util.find_spec("libtpu") is None:
        return False
    return any(glob.glob(pattern) for pattern in ("/dev/accel*", "/dev/vfio/[0-9]*"))


def _watch(ends: threading.Event) -> None:
    """Ends this process, with one line, when another has not been heard of for LOST_SECONDS.

    JAX's own heartbeat does so too, with a page of C++ frames, and at once where process 0 is lost
    (see `_catch_abort`); where a process waits for numbers of a lost one, gloo may raise first.
    Every process counts up in the coordination service of process 0, which alone reads the counts,
    so that a pod of a thousand hosts costs it a thousand small requests each time; the others read
    whom it misses.
    """
    client, me = _client(), jax.process_index()
    heard = dict.fromkeys(map(str, range(jax.process_count())), ("", time.monotonic()))
    for count in itertools.count():
        word = DONE if ends.wait(LOOK_SECONDS) else str(count)
        # Where process 0 stands still, or its machine is gone, no call of the service comes back.
        patience = threading.Timer(LOST_SECONDS, _leave_without_first)
        patience.daemon = True
        patience.start()
        try:
            _say(word)
            if word == DONE:
                return
            if me == 0:
                for key, value in client.key_value_dir_get("eqst/alive/"):
                    name = key.rpartition("/")[2]
                    if value == DONE:
                        heard.pop(name, None)
                    elif heard[name][0] != value:
                        heard[name] = (value, time.monotonic())
                late = time.monotonic() - LOST_SECONDS
                for name in [name for name, (_, when) in heard.items() if when < late]:
                    client.key_value_set(f"eqst/lost/{name}", GONE, allow_overwrite=True)
            lost = client.key_value_dir_get("eqst/lost/")
        except Exception:  # the service has ended, or ends: JAX says so
            return
        finally:
            patience.cancel()
        # Of two that fail alike each has a moment to say so itself.
        if lost and not _parting.wait(LOOK_SECONDS / 3):
            line, code = _told(lost)
            os.write(2, f"{line}\n".encode())
            _leave(code)


def _catch_abort() -> None:
    """Has what JAX does at the loss of process 0, an abort, end in our line and our exit code.

    The coordination service is then gone, and a thread of JAX's writes a page and aborts; the
    callback that it offers in place of that cannot be called from Python (jaxlib 0.10). Python's
    own handlers come too late: they run in the main thread, and an abort does not return.
    """
    global _on_abort
    from jax._src import distributed  # there is no public name for it

    host, _, port = str(distributed.global_state.coordinator_address).rpartition(":")

    def on_abort(number: int) -> None:
        try:
            socket.create_connection((host.strip("[]"), int(port)), LOOK_SECONDS).close()
        except OSError:
            _leave_without_first()
        # Another abort: it goes on when this returns.

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int)
    _on_abort = kind(on_abort)
    c_signal = ctypes.CDLL(None).signal
    c_signal.argtypes, c_signal.restype = [ctypes.c_int, kind], ctypes.c_void_p
    c_signal(signal.SIGABRT, _on_abort)


def _leave_without_first() -> None:
    """Ends this process, with the line of a lost process 0, which cannot be told of it."""
    line, code = _told([("0", GONE)])
    os.write(2, f"{line}\n".encode())
    os._exit(code)


def _told(lost: list[tuple[str, str]]) -> tuple[str, int]:
    """What is said of processes that are gone, and the exit code: of one that failed, 1."""
    key, how = min(lost, key=lambda x: (FAILED, GONE, LEAVES).index(x[1]))
    line = f"process {key.rpartition('/')[2]} {how}: {START_AGAIN}"
    return line, 1 if how == FAILED else EXIT_INTERRUPTED


def part(error: BaseException) -> tuple[str, int] | None:
    """Lets this process end by itself, by an error, and tells the others that it does.

    JAX would wait minutes for the others to end too, and then abort with a page of C++ frames.

    Returns:
      where the error comes of another process: what to say in its place, and the exit code, which
      is EXIT_INTERRUPTED but where the other has failed by itself.
    """
    if not jax.distributed.is_initialized():
        return None
    _parting.set()
    found = None
    runtime = isinstance(error, jax.errors.JaxRuntimeError) and jax.process_count() > 1
    if runtime and not any(word in str(error) for word in _OWN_ERRORS):
        said = " ".join(str(error).split())[:120]
        found = f"another process is gone ({said}): {START_AGAIN}", EXIT_INTERRUPTED
    with contextlib.suppress(Exception):  # the service may be what is gone
        lost = _client().key_value_dir_get("eqst/lost/")
        if found and lost:
            found = _told(lost)
        how = LEAVES if found else FAILED
        _client().key_value_set(f"eqst/lost/{jax.process_index()}", how)
    # Before Python waits for its threads, and atexit comes after: Orbax's may wait for a process
    # that is gone. There is no public name for it.
    threading._register_atexit(_leave, found[1] if found else 1)  # type: ignore[attr-defined]
    return found


def _leave(code: int) -> None:
    """Ends this process at once; process 0 when the others have ended, or after a while."""
    sys.stdout.flush()
    sys.stderr.flush()
    # All is said; that a connection breaks from here on JAX would write all the same.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with contextlib.suppress(Exception):
        _say(DONE)
        if jax.process_index() == 0:
            late = time.monotonic() + LAST_WORDS_SECONDS
            while _others() and time.monotonic() < late:
                time.sleep(0.1)
            time.sleep(PARTING_SECONDS)
    os._exit(code)


def _others() -> set[str]:
    """Of the other processes, as process 0 knows them, those that are yet to end."""
    alive = dict(_client().key_value_dir_get("eqst/alive/"))
    lost = dict(_client().key_value_dir_get("eqst/lost/"))
    ended = {key.rpartition("/")[2] for key, word in alive.items() if word == DONE}
    gone = {key.rpartition("/")[2] for key, how in lost.items() if how == GONE}
    return set(map(str, range(1, jax.process_count()))) - ended - gone


def _say(word: str) -> None:
    """Tells process 0 how far this one has counted, or that it is done."""
    _client().key_value_set(f"eqst/alive/{jax.process_index()}", word, allow_overwrite=True)


def _client() -> Any:
    """Of the coordination service in process 0."""
    from jax._src import distributed  # there is no public name for it

    assert distributed.global_state.client is not None
    return distributed.global_state.client


def of_first(say: Callable[[str], None]) -> Callable[[str], None]:
    """`say` on process 0; on the others what says nothing."""
    return say if jax.process_index() == 0 else _nothing


def _nothing(_: str) -> None:
    pass


def together(act: Callable[[], Result], *kinds: type[Exception]) -> Result:
    """`act()` on every process; where it fails on one it fails on all, and none is left waiting.

    Args:
      act: must not wait for other processes itself.
      kinds: the errors that may come of one process alone; the first is raised on the others.
    """
    if jax.process_count() == 1:
        return act()
    result: Any = None
    failure: Exception | None = None
    try:
        result = act()
    except kinds as error:
        failure = error
    failed = np.flatnonzero(gathered(int(failure is not None)))
    if failure is not None:
        raise failure
    if len(failed):
        raise kinds[0](f"process {failed[0]} of {jax.process_count()} failed and says why")
    return result


def gathered(number: int) -> np.ndarray:
    """[processes] int32: every process's number, in their order."""
    if jax.process_count() == 1:
        return np.array([number], np.int32)
    return _gather(np.int32(number))


def alike(content: Any) -> bool:
    """Whether it is the same on every process, by a checksum of it as JSON."""
    return len(set(gathered(zlib.crc32(json.dumps(content).encode()) >> 1))) == 1


def on_host(array: jax.Array) -> np.ndarray:
    """The whole of an array that may be split over processes."""
    return np.asarray(array) if array.is_fully_addressable else _gather(array, tiled=True)


def wait_for_all(what: str) -> None:
    """Returns once every process has come here; `what` is the same on all, and said of no other."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        with _as_jax_says():
            multihost_utils.sync_global_devices(what)


def _gather(value: Any, *, tiled: bool = False) -> np.ndarray:
    from jax.experimental import multihost_utils

    with _as_jax_says():
        return np.asarray(multihost_utils.process_allgather(value, tiled=tiled))


@contextlib.contextmanager
def _as_jax_says() -> Iterator[None]:
    """That a process is gone is told alike on a CPU, where gloo raises a ValueError of its own."""
    try:
        yield
    except ValueError as error:
        raise jax.errors.JaxRuntimeError(str(error)) from None
