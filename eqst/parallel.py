"""Independent tasks over the cores of this machine: what is read, synthesised or written alike."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator


def results(
    function: Callable,
    tasks: list,
    name: str,
    progress: Callable,
    workers: int = 0,
    things: str = "recordings",
) -> Iterator:
    """Results in order from `workers` processes (0: one per core), with a line every tenth.

    The processes end with the results. They hold this one's stdout, and would for five minutes,
    also where it is killed or leaves by `os._exit`: whoever reads it to its end would wait.

    Raises:
      ChildProcessError: a process was killed, or died of itself.
    """
    import joblib  # its workers, unlike multiprocessing's, do not import the caller's script
    from joblib.externals import loky
    from joblib.externals.loky import process_executor

    if not tasks:
        return
    # A worker whose memory has grown is replaced, and nothing is lost. Of that joblib warns, in the
    # thread that all others wait for: where warnings are errors, they would wait for ever.
    warnings.filterwarnings("ignore", "A worker stopped while some jobs", UserWarning)
    count, done = min(workers or os.cpu_count() or 1, len(tasks)), 0
    jobs = joblib.Parallel(n_jobs=count, return_as="generator")
    found = jobs(joblib.delayed(function)(task) for task in tasks)
    try:
        for done, result in enumerate(found, start=1):
            if done % max(1, len(tasks) // 10) == 0 or done == len(tasks):
                progress(f"{name}: {done} of {len(tasks)} {things}")
            yield result
    except process_executor.BrokenProcessPool:
        raise ChildProcessError(
            f"{name}: one of {count} worker processes was killed, out of memory most likely: take "
            "fewer (--workers, where the command has it) or a machine of more memory; the same "
            "command goes on"
        ) from None
    finally:
        if count > 1:
            executor = loky.get_reusable_executor(reuse=True)
            executor.shutdown(kill_workers=done < len(tasks))
            # joblib has named folders that it has not made, and forgets such ones at exit alone:
            # where this process leaves by `os._exit` it would warn of them.
            with contextlib.suppress(AttributeError):  # another backend, or other internals
                for folder in executor._temp_folder_manager._cached_temp_folders.values():
                    os.makedirs(folder, exist_ok=True)
                executor.terminate()
