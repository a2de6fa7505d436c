"""Several processes as one: they train, stop, fail and evaluate as a single one does."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from test_train import CONFIGS, POOLED, TINY, losses, silent

from eqst import (
    batches,
    checkpoint,
    config,
    corpus,
    learner,
    mesh,
    predictor,
    processes,
    recipes,
    train,
)

STEPS = 48
CHANGES = {
    "train.steps": STEPS,
    "train.eval_every": 16,
    "train.eval_pairs": 7,  # divides by nothing
    "train.checkpoint_every": 1000,
    "train.learning_rate": 1e-3,  # what rounding differs by grows with it
}
MEL = {"data.rendering": "device", "data.pipeline": "tfdata", "features.mel_bands": 32}
# Sums over a batch in another order: 1e-7 a step, and the steps build on each other.
SAME_CURVE = 1e-5


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def environments(cache: Path, count: int, devices: int = 1) -> list[dict[str, str]]:
    """What each of `count` processes with so many devices has to know."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return [os.environ | shared | {"JAX_PROCESS_ID": str(index)} for index in range(count)]


@contextlib.contextmanager
def started(
    words: list[str], cache: Path, count: int = 2, devices: int = 1
) -> Iterator[list[subprocess.Popen]]:
    """The same command as several processes; none outlives the block."""
    processes = [
        subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for environment in environments(cache, count, devices)
    ]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def train_words(workdir: Path, cache: Path, changes: dict) -> list[str]:
    settings = TINY | CHANGES | {"data.cache_dir": str(cache)} | changes
    values = [f"--config.{key}={value}" for key, value in settings.items()]
    file = CONFIGS[0].with_name("db_mel_pm.py")
    return [sys.executable, "-m", "eqst.train", f"--config={file}", f"--workdir={workdir}", *values]


def settings_of(cache: Path, changes: dict) -> config.Config:
    """The settings of `train_words` for this process, on one device."""
    made = recipes.paper()
    made.update_from_flattened_dict(TINY | CHANGES | changes)
    made.data.cache_dir, made.train.devices = str(cache), 1
    return config.validate(made)


# Of several threads, so that the parts of two may lie between each other.
GREETING = re.compile(
    r"\[Gloo\] Rank |\d+ is connected to \d+ peer ranks\. |"
    r"Expected number of connected peer ranks is : \d+"
)


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """(exit code, stdout without gloo's greeting, stderr) of each."""
    found = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        said = [x for x in GREETING.sub("", out).splitlines(keepends=True) if x.strip()]
        found.append((process.returncode, "".join(said), err))
    return found


def wait_for_line(process: subprocess.Popen, start: str) -> None:
    """Reads what the process says up to a line that starts so."""
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if line.startswith(start):
            return
    raise AssertionError(f"it ended first: {''.join(seen)[-2000:]}")


def assert_same_curve(one: Path, other: Path) -> None:
    """Every figure of the two records but the times, step by step."""
    rows = [
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (one, other)
    ]
    for left, right in zip(*rows, strict=True):
        assert left.keys() == right.keys() and left["step"] == right["step"]
        for name in left.keys() - {"pairs_per_s", "input_wait"}:
            np.testing.assert_allclose(right[name], left[name], rtol=SAME_CURVE, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("changes", [POOLED, MEL], ids=["pooled-resident", "device-tfdata"])
def test_two_processes_train_as_one_does(changes, cache, tmp_path):
    if changes is MEL:
        pytest.importorskip("tensorflow", reason="tf.data needs the extra [data]")
    train.train(settings_of(cache, changes), tmp_path / "one", silent)
    with started(train_words(tmp_path / "two", cache, changes), cache) as processes:
        (first, out, err), (second, quiet, other) = ends(processes)
    assert (first, second) == (0, 0), err + other
    assert f"step {STEPS}/{STEPS}" in out and "2 cpu device(s)" in out
    assert quiet == ""
    assert "Traceback" not in err + other
    assert changes is MEL or err + other == ""  # TensorFlow has its own things to say
    assert len(losses(tmp_path / "two")) == STEPS
    assert_same_curve(tmp_path / "one", tmp_path / "two")
    # The one who looks at the run does not see how many trained it.
    one, two = (checkpoint.load(tmp_path / name) for name in ("one", "two"))
    assert one.step == two.step
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one.params, two.params
    )


@pytest.mark.long
def test_stopped_in_two_it_ends_in_one_and_the_other_way_round(cache, tmp_path):
    whole, down, up = (tmp_path / name for name in ("whole", "down", "up"))
    wide = POOLED | {"model.hidden": 64}
    made, split = settings_of(cache, wide), wide | {"train.fsdp": 2}  # as two, each has half
    train.train(made, whole, silent)

    with started(train_words(down, cache, split), cache) as processes:
        wait_for_line(processes[0], "step 24/")
        processes[1].send_signal(signal.SIGTERM)  # to one of them alone
        results = ends(processes)
    assert [code for code, _, _ in results] == [train.EXIT_INTERRUPTED] * 2, results
    stopped = checkpoint.load(down, which="last").step
    assert 24 <= stopped < STEPS
    for (_, _, err), who in zip(results, ("another process was stopped", "SIGTERM"), strict=True):
        assert err == f"{who}: saved at step {stopped}; the same command resumes\n"
    shutil.copytree(down, tmp_path / "again")
    lines: list[str] = []
    train.train(made, down, lines.append)
    assert f"resumed at step {stopped} of {STEPS}" in lines
    assert_same_curve(whole, down)

    def stop_at_24(line: str) -> None:
        if line.startswith("step 24/"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(train.Interrupted):
        train.train(made, up, stop_at_24)
    with started(train_words(up, cache, split), cache) as processes:
        results = ends(processes)
    assert [code for code, _, _ in results] == [0, 0], results
    assert HELD.search(results[0][1]) and "resumed at step 2" in results[0][1]
    assert_same_curve(whole, up)

    # One of two dies: the other does not wait for it, and says what to do.
    endless = POOLED | {"train.steps": 10**6, "train.eval_every": 10**6}
    with started(train_words(tmp_path / "lost", cache, endless), cache) as processes:
        wait_for_line(processes[0], "step 24/")
        processes[1].kill()
        (code, _, err), _ = ends(processes)
    assert code == train.EXIT_INTERRUPTED and len(err.splitlines()) == 1, err
    assert err.startswith("another process is gone (") and "start all of them" in err


@pytest.mark.long
def test_both_are_refused_and_neither_waits_for_the_other(cache, tmp_path):
    checkpoint.write_card(tmp_path, {"config": {"seed": 1}, "normalisation": {}, "band_table": []})
    with started(train_words(tmp_path, cache, POOLED), cache) as processes:
        results = ends(processes)
    for code, out, err in results:
        assert code == 1 and out == "" and "holds a run with other settings (" in err
        assert err.splitlines()[-1].startswith("eqst.train: ") and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


# What a device holds of the state where it is split, in MB.
HELD = re.compile(r"of ([\d.]+) MB of state a device holds ([\d.]+) MB")


@pytest.mark.long
@pytest.mark.parametrize(
    "processes, devices, fsdp", [(1, 8, 1), (1, 8, 4), (2, 2, 1), (2, 4, 2), (4, 2, 8)]
)
def test_the_loss_curve_does_not_depend_on_the_topology(
    processes, devices, fsdp, cache, tmp_path, tmp_path_factory
):
    changes = POOLED | {"train.steps": 50, "model.hidden": 64}
    whole = tmp_path_factory.getbasetemp() / "topology"
    if not whole.exists():  # once for all cases
        train.train(settings_of(cache, changes), whole, silent)
    words = train_words(tmp_path / "split", cache, changes | {"train.fsdp": fsdp})
    with started(words, cache, processes, devices) as children:
        results = ends(children)
    assert [code for code, _, _ in results] == [0] * processes, results
    out = results[0][1]
    assert f"{processes * devices} cpu device(s)" in out
    held = HELD.search(out)
    assert (held is None) == (fsdp == 1)
    if held:
        assert float(held[2]) < 1.3 * float(held[1]) / fsdp
    assert_same_curve(whole, tmp_path / "split")


EVALUATE = """
import sys
from test_processes import held_out_errors
from eqst import processes
from eqst.config import from_dict
import json
processes.join()
print(json.dumps(held_out_errors(from_dict(json.loads(sys.argv[1])), 0)))
"""
COUNTS = (5, 7)  # neither divides by 2


def held_out_errors(made, devices: int) -> list[float]:
    """The validation figure of fresh parameters for several numbers of pairs."""
    import dataclasses

    on = mesh.make_mesh(devices or None)
    recordings = corpus.open_corpus(made.data, "valid", silent)
    params = mesh.copied(on, jax.tree.map(np.asarray, predictor.init(made, jax.random.key(3))))
    normalisation = mesh.copied(on, predictor.Normalisation(np.float32(-30.0), np.float32(20.0)))
    found = []
    for count in COUNTS:
        one = dataclasses.replace(made, train=dataclasses.replace(made.train, eval_pairs=count))
        valid = batches.valid_pairs(one, recordings, on)
        error = jax.jit(learner.held_out_error_db, static_argnums=0)(
            one, params, normalisation, valid
        )
        found.append(float(error))
    return found


@pytest.mark.long
def test_the_validation_figure_is_exact_for_any_number_of_devices(cache):
    made = settings_of(cache, POOLED)
    recordings = corpus.open_corpus(made.data, "valid", silent)
    whole = batches.valid_pairs(made, recordings, mesh.make_mesh(1)).seen
    params = predictor.init(made, jax.random.key(3))
    normalisation = predictor.Normalisation(np.float32(-30.0), np.float32(20.0))
    each_B = learner.batch_terms(made, params, normalisation, whole, None).shape_db
    by_hand = [float(np.mean(each_B[:count])) for count in COUNTS]
    for devices in (1, 2, 4):
        np.testing.assert_allclose(held_out_errors(made, devices), by_hand, rtol=1e-6)


@pytest.mark.long
def test_the_validation_figure_is_exact_for_two_processes(cache):
    from eqst.config import as_dict

    made = settings_of(cache, POOLED)
    words = [sys.executable, "-c", EVALUATE, json.dumps(as_dict(made))]
    environment = os.environ["PYTHONPATH"] if "PYTHONPATH" in os.environ else ""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), environment])
    try:
        with started(words, cache) as processes:
            results = ends(processes)
    finally:
        os.environ["PYTHONPATH"] = environment
    for code, out, err in results:
        assert code == 0, err[-2000:]
        np.testing.assert_allclose(json.loads(out), held_out_errors(made, 1), rtol=1e-6)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES is set and JAX_COORDINATOR_ADDRESS, JAX_P"),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "is 'here': give host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "here:"}, "is 'here:': give host:port"),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID is '2' of JAX_NUM_PROCESSES '2'"),
        ({"JAX_PROCESS_ID": "-1"}, "JAX_PROCESS_ID is '-1' of JAX_NUM_PROCESSES '2'"),
        ({"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES 'two': the processes are numbered"),
    ],
)
def test_an_environment_that_is_no_whole_is_refused(given, said, monkeypatch):
    whole = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    for name, value in (given if "is set" in said else whole | given).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        processes.join()


# Nobody waits for anybody's numbers here, so that only looking finds out.
IDLE = """
import sys, time
from eqst import processes
processes.LOOK_SECONDS, processes.LOST_SECONDS = 0.5, 5.0
processes.join()
print("joined", flush=True)
time.sleep(300)
"""


@pytest.mark.long
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_missed_and_named_in_one_line(lost, how, cache):
    """Where process 0 is killed the others find each other no more, and JAX's own page is first."""
    with started([sys.executable, "-c", IDLE], cache, count=3) as children:
        for child in children:
            wait_for_line(child, "joined")
        before = time.monotonic()
        children[lost].send_signal(how)
        at_once = lost == 0 and how == signal.SIGKILL
        for child in (x for x in children if x is not children[lost]):
            _, err = child.communicate(timeout=60)
            assert child.returncode == processes.EXIT_INTERRUPTED, err
            line = f"process {lost} is gone: {processes.START_AGAIN}\n"
            assert err.endswith(line) if at_once else err == line
        assert (0.0 if at_once else 4.0) < time.monotonic() - before < 30.0


OWN_ABORT = IDLE.replace(
    "time.sleep(300)",
    """
import jax
if jax.process_index() == 1:
    import ctypes
    ctypes.CDLL(None).abort()
time.sleep(300)""",
)


@pytest.mark.long
def test_an_abort_of_a_process_itself_stays_one(cache):
    with started([sys.executable, "-c", OWN_ABORT], cache, count=2) as children:
        results = ends(children)
    assert [code for code, _, _ in results] == [processes.EXIT_INTERRUPTED, -signal.SIGABRT]


FAILS = IDLE.replace(
    "time.sleep(300)",
    """
import jax
if jax.process_index() == int(sys.argv[1]):
    time.sleep(2)
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    assert processes.part(error) is None  # its own
    sys.exit("mine")
time.sleep(300)""",
)


@pytest.mark.long
@pytest.mark.parametrize("who", [0, 2])
def test_one_that_fails_says_why_and_the_others_that_it_has(who, cache):
    with started([sys.executable, "-c", FAILS, str(who)], cache, count=3) as children:
        results = ends(children)
    for number, (code, _, err) in enumerate(results):
        said = "mine" if number == who else f"process {who} has failed and says why: "
        assert code == 1 and err.startswith(said) and len(err.splitlines()) == 1, results


SLOW_END = """
import sys, time
from eqst import processes
processes.SHUTDOWN_SECONDS = 3
processes.join()
import jax
time.sleep(8 * jax.process_index())
print("ended", flush=True)
"""


@pytest.mark.long
def test_one_that_is_done_waits_for_those_that_are_not(cache):
    """JAX would abort both, after what is 30 seconds elsewhere."""
    with started([sys.executable, "-c", SLOW_END], cache) as children:
        results = ends(children)
    assert results == [(0, "ended\n", "")] * 2


@pytest.mark.long
def test_sigterm_before_anything_listens_ends_both(cache):
    with started([sys.executable, "-c", IDLE], cache) as children:
        for child in children:
            wait_for_line(child, "joined")
        children[1].send_signal(signal.SIGTERM)
        results = ends(children)
    assert [code for code, _, _ in results] == [processes.EXIT_INTERRUPTED, -signal.SIGTERM]
    assert results[0][2] == f"process 1 is gone: {processes.START_AGAIN}\n"


@pytest.mark.long
def test_one_whose_others_are_not_there_says_that_it_waits(cache):
    words = IDLE.replace("processes.join()", "processes.WAIT_SECONDS = 1.0\nprocesses.join()")
    environment = environments(cache, 2)[0]
    child = subprocess.Popen(
        [sys.executable, "-c", words], env=environment, stderr=subprocess.PIPE, text=True
    )
    try:
        assert child.stderr is not None
        said = child.stderr.readline()
    finally:
        child.kill()
        child.communicate()
    address = environment["JAX_COORDINATOR_ADDRESS"]
    assert said == f"waiting for the other processes of 2 at {address}, 30 minutes at most\n"


STEP = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}


@pytest.mark.parametrize(
    "given, tpu, options",
    [
        ({}, False, None),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False, None),  # a batch script, no srun
        (STEP | {"SLURM_NTASKS": "1"}, False, None),
        (STEP, False, {"cluster_detection_method": "slurm"}),
        (
            STEP | {"SLURM_GPUS_ON_NODE": "4"},
            False,
            {"cluster_detection_method": "slurm", "local_device_ids": [0, 1, 2, 3]},
        ),
        (
            STEP | {"SLURM_GPUS_ON_NODE": "4", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"},
            False,
            {"cluster_detection_method": "slurm"},
        ),
        ({}, True, {}),
        (STEP, True, {"cluster_detection_method": "slurm"}),  # as JAX itself decides
        (
            STEP
            | {
                "JAX_COORDINATOR_ADDRESS": "a:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "1",
            },
            True,
            {
                "coordinator_address": "a:1",
                "num_processes": 2,
                "process_id": 1,
                "cluster_detection_method": "deactivate",
            },
        ),
    ],
)
def test_what_the_environment_says_is_what_jax_is_told(given, tpu, options, monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "JAX_COORD", "JAX_NUM_PROC", "JAX_PROCESS")):
            monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    told: list[dict] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **words: told.append(words))
    monkeypatch.setattr(processes, "_on_tpu", lambda: tpu)
    processes.join()
    times = {
        "initialization_timeout": processes.START_SECONDS,
        "heartbeat_timeout_seconds": processes.HEARTBEAT_SECONDS,
        "shutdown_timeout_seconds": processes.SHUTDOWN_SECONDS,
    }
    assert told == ([] if options is None else [options | times])


@pytest.mark.parametrize("own", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_is_taken_is_one_line(own, monkeypatch):
    """JAX's service would end process 0 by a signal, or share the port with another run's."""
    with socket.socket() as other:
        other.bind((own, 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in zip(processes.ENVIRONMENT, (f"h:{port}", "2", "0"), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match=f"cannot have port {port} here .* give another in"):
            processes.join()


def test_an_address_that_is_not_known_is_said_while_it_waits(capfd):
    processes._say_waiting("waiting", {"coordinator_address": "no-such-host.invalid:1"})
    processes._say_waiting("waiting", {"coordinator_address": "127.0.0.1:1"})
    assert capfd.readouterr().err.splitlines() == [
        "waiting; no-such-host.invalid is not known here, which is awaited too",
        "waiting",
    ]


@pytest.mark.long
def test_a_workdir_that_is_not_shared_is_refused(cache, tmp_path):
    """Here two folders of one name, by what is under it: `shared` in the current folder."""
    words = train_words(Path("shared"), cache, POOLED)
    environment = environments(cache, 2, 1)
    children = []
    for number in range(2):
        (tmp_path / str(number)).mkdir()
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", BLIND, *words[3:]],
                env=environment[number], cwd=tmp_path / str(number), text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    try:
        for code, _, err in ends(children):
            assert code == 1 and len(err.splitlines()) == 1, err
            assert "process 1 does not see what process 0 writes in shared: give a --work" in err
    finally:
        for child in children:
            child.kill()
            child.communicate()


BLIND = """
from eqst import command, train
train.SEEN_SECONDS = 2.0
command.start("eqst.train", train.define_flags, train.main)
"""


def test_processes_that_do_not_find_each_other_end_in_one_line(monkeypatch):
    def refuse(**_: object) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED: no answer\npage of frames")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    for name, value in zip(processes.ENVIRONMENT, ("h:1", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(
        ValueError, match="do not find each other .DEADLINE_EXCEEDED: no answer.: set "
    ):
        processes.join()


def test_one_process_alone_has_nothing_to_join_or_to_agree_on(monkeypatch):
    for name in processes.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    processes.join()
    assert jax.process_count() == 1
    assert processes.gathered(7).tolist() == [7]
    assert processes.together(lambda: 5, ValueError) == 5
    with pytest.raises(KeyError):
        processes.together(lambda: {}["x"], ValueError)
