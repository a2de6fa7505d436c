"""launch/sweep.py: what it expands to, that it goes on, that one failure takes no other down."""

import csv
import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import config_dict

from eqst import card, config
from eqst.sweeps import members, outcomes

CONFIG = """
from eqst import recipes

def get_config(argument=""):
    settings = recipes.paper()
    settings.data.synthetic_talkers = 8
    settings.data.synthetic_seconds = 8.0
    settings.data.folds = 2
    settings.data.segment_seconds = (1.5,)
    settings.train.steps, settings.train.batch_size = 4, 4
    settings.train.eval_every = settings.train.checkpoint_every = 2
    settings.train.eval_pairs = 4
    settings.model.channels, settings.model.hidden = 2, 8
    settings.evaluation.seconds, settings.evaluation.pairs = (1.5,), 8
    return settings

def sweep(argument=""):
    for seed in range(2):
        yield "head", "grid", seed, {"data.fold": seed}
        yield "head", "continuous", seed, {"data.fold": seed, "model.head": "continuous"}
        yield "again", "the same", seed, {"data.fold": seed}
    if argument == "broken":
        yield "again", "broken", 0, {"data.min_loudness_lufs": 0.0}
"""


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.py"
    path.write_text(CONFIG)
    return path


def run(repo: Path, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "launch/sweep.py", *words]
    return subprocess.run(command, cwd=repo, capture_output=True, text=True, timeout=900)


def members_of(path: Path, argument: str = "") -> list:
    namespace: dict = {}
    exec(path.read_text(), namespace)
    base = namespace["get_config"](argument)
    return members.expand(f"{path}:{argument}" if argument else str(path), base)


def test_equal_settings_are_one_run(config_file: Path) -> None:
    runs = members_of(config_file)
    assert [member.name for member in runs] == [
        "head/grid/0",
        "head/continuous/0",
        "head/grid/1",
        "head/continuous/1",
    ]
    assert [place[:3] for place in runs[0].places] == [
        ("head", "grid", 0),
        ("again", "the same", 0),
    ]
    assert [member.config.seed for member in runs] == [0, 0, 1, 1]
    assert runs[1].config.model.head == "continuous"


def test_the_ablation_expands_with_and_without_recordings(repo: Path) -> None:
    path = repo / "configs" / "ablation.py"
    plain, real = members_of(path), members_of(path, "some/folder")
    factors = {place[0] for member in real for place in member.places}
    assert factors >= {"variant", "head", "loss", "ranges", "protocol", "mel bands", "data"}
    assert "data" not in {place[0] for member in plain for place in member.places}
    assert len({member.name for member in real}) == len(real)
    first = real[:15]
    assert {m.places[0][:2] for m in first} == {
        ("variant", v) for v in ("db_mel_pm", "db_mel_bl", "linear_mel_bl")
    }
    assert {m.config.data.fold for m in first} == set(range(5))  # each seed another fold
    assert all(m.config.data.permissive_only for m in first)


def test_two_runs_of_one_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "same.py"
    path.write_text(
        CONFIG + "\ndef sweep(argument=''):\n"
        "    yield 'a b', 'c', 0, {}\n    yield 'a_b', 'c', 0, {'model.hidden': 16}\n"
    )
    with pytest.raises(config.ConfigError, match="a b/c and a_b/c of seed 0 .* a_b/c/0: rename"):
        members_of(path)


def test_wrong_changes_are_one_line(repo: Path, tmp_path: Path, config_file: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        CONFIG + "\ndef sweep(argument=''):\n    yield 'a', 'b', 0, {'model.nose': 1}\n"
    )
    for words, said in (
        ([f"--config={wrong}"], "a/b cannot be set: config: no setting"),
        (["--config=configs/smoke.py"], "no generator sweep()"),
        ([f"--config={config_file}", "--only=nothing"], "fits none of the 4 runs"),
        ([f"--config={config_file}", "--only=("], "no regular expression"),
        ([f"--config={config_file}", f"--known={config_file}"], "is no sweep.json"),
        ([f"--config={config_file}", "--gather"], "no run of the sweep is done yet"),
        ([f"--config={config_file}", "--jobs=0"], "--jobs=0"),
        ([f"--config={config_file}", "--member=no/1"], "--member=no/1: the sweep has no such run"),
        ([f"--config={config_file}", "--dry_run", "--member=no/1"], "--member=no/1"),
        (  # an element of an array, after the file was edited
            [f"--config={config_file}", "--member=head/grid/0", "--settings=0123456789abcdef"],
            f"{config_file} has changed what this run is since it was submitted",
        ),
    ):
        done = run(repo, *words, f"--workdir={tmp_path / 'none'}")
        assert done.returncode == 1, words
        assert said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
        assert not (tmp_path / "none").exists()


def test_dry_run_names_what_changes(repo: Path, tmp_path: Path, config_file: Path) -> None:
    words = (f"--config={config_file}", f"--workdir={tmp_path / 'none'}", "--dry_run")
    done = run(repo, *words, "--only=continuous/1", "--config.train.steps=7")
    assert done.returncode == 0, done.stderr
    line, command = done.stdout.strip().splitlines()
    assert command.endswith("--only=continuous/1 --config.train.steps=7 --member=head/continuous/1")
    assert line.startswith("head/continuous/1: ") and "model.head: grid -> continuous" in line
    assert "steps" not in line  # that is the base's
    # The command is no dry run, however this one was said to be.
    for spelling in ("--dry_run=true", "--dry_run=1", "-dry_run", "-dry_run=True"):
        again = run(repo, *words[:2], spelling, "--only=continuous/1", "--config.train.steps=7")
        assert again.stdout.strip().splitlines() == [line, command], again.stderr
    assert not (tmp_path / "none").exists()


def write_member(folder: Path, member, errors: list[float], valid: float) -> None:
    """What a finished run leaves, made by hand."""
    (folder / "heldout").mkdir(parents=True)
    card.write_card(
        folder, {"config": config.as_dict(member.config), "normalisation": {}, "band_table": {}}
    )
    rows = [f"plain,3,{i},talker{i // 2},model,{x}" for i, x in enumerate(errors)]
    text = "protocol,seconds,pair,talker,method,shape_rmse_db\n" + "\n".join(rows) + "\n"
    (folder / "heldout" / "errors.csv").write_text(text)
    facts = {"commit": "c", "machine": "m", "step": 4}
    (folder / "heldout" / "results.json").write_text(json.dumps(facts))
    metrics = [{"step": 2, "valid_shape_db": valid + 1}, {"step": 4, "valid_shape_db": valid}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))


def test_gathering_by_hand_and_from_another_machine(tmp_path: Path, config_file: Path) -> None:
    runs = members_of(config_file)
    errors = {"head/grid/0": [1.0, 2.0, 3.0, 4.0], "head/grid/1": [1.1, 2.1, 3.1, 4.1]}
    errors |= {"head/continuous/0": [2.0, 3.0, 4.0, 5.0]}
    by_name = {member.name: member for member in runs}
    for name, values in errors.items():
        write_member(tmp_path / "a" / name, by_name[name], values, 2.0)
    found = {
        member.name: outcomes.outcome(tmp_path / "a", member)
        for member in runs
        if members.done(tmp_path / "a", member)
    }
    content = outcomes.gather(runs, found)
    head, again = content["tables"]["head"], content["tables"]["again"]
    assert [row["level"] for row in head] == ["grid", "continuous"]
    assert [row["seeds"] for row in head] == [2, 1]
    assert head[0]["figures"]["plain 3 s"]["mean"] == pytest.approx(2.55)
    assert head[1]["differences"]["plain 3 s"]["mean"] == pytest.approx(1.0)  # seed 0 alone
    assert head[1]["differences"]["cross-validation"]["mean"] == pytest.approx(0.0)
    assert again[0]["figures"]["plain 3 s"]["mean"] == pytest.approx(2.55)

    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(content))
    stored = outcomes.read_known(str(path))
    known = outcomes.known_outcomes(stored, runs)
    assert set(known) == set(errors)
    assert outcomes.gather(runs, known)["tables"] == content["tables"]
    # Other settings are another run.
    other = [m._replace(config=m.config.__class__(**{**vars(m.config), "seed": 9})) for m in runs]
    assert not outcomes.known_outcomes(stored, other)
    assert outcomes.known_line(stored, 0, other).endswith("this one's in seed: 0 -> 9")
    assert outcomes.known_line(stored, 3, runs).startswith("known: 3 of the ")


def test_a_run_of_other_settings_is_not_done(tmp_path: Path, config_file: Path) -> None:
    member = members_of(config_file)[0]
    write_member(tmp_path / member.name, member, [1.0, 2.0], 2.0)
    train = dataclasses.replace(member.config.train, checkpoint_every=7)  # changes no result
    assert members.done(
        tmp_path, member._replace(config=dataclasses.replace(member.config, train=train))
    )
    train = dataclasses.replace(member.config.train, steps=5)
    assert not members.done(
        tmp_path, member._replace(config=dataclasses.replace(member.config, train=train))
    )


def test_a_missing_first_run_costs_its_differences_alone(tmp_path: Path, config_file: Path) -> None:
    runs = {member.name: member for member in members_of(config_file)}
    for name in ("head/grid/1", "head/continuous/0"):
        write_member(tmp_path / name, runs[name], [1.0, 2.0], 2.0)
    found = {
        name: outcomes.outcome(tmp_path, x) for name, x in runs.items() if members.done(tmp_path, x)
    }
    grid, continuous = outcomes.gather(list(runs.values()), found)["tables"]["head"]
    assert grid["figures"].keys() == continuous["figures"].keys() and not continuous["differences"]


def test_other_pairs_are_not_compared(tmp_path: Path, config_file: Path):
    """Another number of pairs costs a level its difference, and of two seeds the command."""
    runs = {member.name: member for member in members_of(config_file)}
    write_member(tmp_path / "head/grid/0", runs["head/grid/0"], [1.0, 2.0], 2.0)
    other = "head/continuous/0"
    write_member(tmp_path / other, runs[other], [1.0, 2.0, 3.0, 4.0], 2.0)
    found = {
        name: outcomes.outcome(tmp_path, x) for name, x in runs.items() if members.done(tmp_path, x)
    }
    content = outcomes.gather(list(runs.values()), found)
    grid, continuous = content["tables"]["head"]
    assert continuous["figures"]["plain 3 s"]["mean"] == 2.5
    assert list(continuous["differences"]) == ["cross-validation"]
    path = tmp_path / "sweep.json"
    path.write_text(json.dumps(content))
    known = outcomes.known_outcomes(outcomes.read_known(str(path)), list(runs.values()))
    assert outcomes.gather(list(runs.values()), known)["tables"] == content["tables"]
    write_member(tmp_path / "head/grid/1", runs["head/grid/1"], [1.0, 2.0, 3.0, 4.0], 2.0)
    found["head/grid/1"] = outcomes.outcome(tmp_path, runs["head/grid/1"])
    with pytest.raises(ValueError, match="head/grid/0 and head/grid/1 .* different pairs"):
        outcomes.gather(list(runs.values()), found)


@pytest.mark.parametrize(
    "changes, own, folder",
    [
        ({"data.min_loudness_lufs": -30.0}, False, False),
        ({"eq_table": "practical"}, False, False),
        ({"evaluation.seed": 9}, False, False),
        ({"data.synthetic_seconds": 50.0}, False, True),  # --data has no synthetic talkers
        ({"data.protocol": "plain", "train.steps": 3}, True, True),
    ],
)
def test_levels_with_other_held_out_material_have_no_difference(
    changes: dict, own: bool, folder: bool, tmp_path: Path, config_file: Path
) -> None:
    """Talkers and numbers of pairs are alike here: the settings alone tell."""
    runs = {member.name: member for member in members_of(config_file)}
    settings = config_dict.ConfigDict(config.as_dict(runs["head/continuous/0"].config))
    settings.update_from_flattened_dict(changes)
    other = runs["head/continuous/0"]._replace(config=config.validate(settings))
    runs["head/continuous/0"] = other
    for name in ("head/grid/0", "head/continuous/0"):
        write_member(tmp_path / name, runs[name], [1.0, 2.0, 3.0], 2.0)
    found = {name: outcomes.outcome(tmp_path, runs[name]) for name in ("head/grid/0", other.name)}
    for data, compared in (("", own), ("recordings", folder)):
        _, row = outcomes.gather(list(runs.values()), found, data)["tables"]["head"]
        assert ("plain 3 s" in row["differences"]) == compared, data


@pytest.mark.long
def test_a_sweep_runs_goes_on_and_survives_a_failure(repo: Path, tmp_path: Path, config_file: Path):
    words = (f"--config={config_file}:broken", f"--workdir={tmp_path / 'w'}", "--jobs=2")
    first = run(repo, *words, "--only=grid")
    assert first.returncode == 0, first.stderr + first.stdout
    assert "2 runs, 0 of them done" in first.stdout
    kept = (tmp_path / "w/head/grid/0/heldout/errors.csv").stat().st_mtime_ns
    second = run(repo, *words)
    assert second.returncode == 1
    assert "1 of 5 runs failed: again/broken/0" in second.stderr
    assert "once more later" in second.stdout and "5 runs, 2 of them done" in second.stdout
    content = json.loads((tmp_path / "w/sweep.json").read_text())
    assert {m["name"] for m in content["members"]} == {
        f"head/{level}/{seed}" for level in ("grid", "continuous") for seed in (0, 1)
    }
    assert (tmp_path / "w/head/grid/0/heldout/errors.csv").stat().st_mtime_ns == kept
    table = (tmp_path / "w/table.md").read_text()
    assert table.count("continuous (2)") == 1 and table.startswith("# Small\n\nMade by `")
    assert (tmp_path / "w/sweep.png").read_bytes().startswith(b"\x89PNG")
    # The mean in the table is that of what every run wrote for itself.
    own = [
        [
            float(line.split(",")[-1])
            for line in path.read_text().splitlines()[1:]
            if "plain" in line
        ]
        for path in sorted((tmp_path / "w/head/continuous").glob("*/heldout/errors.csv"))
    ]
    row = content["tables"]["head"][1]
    assert row["figures"]["plain 1.5 s"]["mean"] == pytest.approx(np.mean(own), abs=1e-3)
    # Another machine takes over what is known: nothing is left to do.
    third = run(
        repo, *words[:1], f"--workdir={tmp_path / 'v'}", f"--known={tmp_path / 'w/sweep.json'}",
        "--only=head",
    )  # fmt: skip
    assert third.returncode == 0 and "4 runs, 4 of them done" in third.stdout, third.stderr
    again = json.loads((tmp_path / "v/sweep.json").read_text())
    assert again["tables"] == content["tables"]


def test_one_of_other_recordings_or_a_damaged_card_is_not_done(
    tmp_path: Path, config_file: Path
) -> None:
    member = members_of(config_file)[0]
    write_member(tmp_path / member.name, member, [1.0, 2.0], 2.0)
    results = tmp_path / member.name / "heldout" / "results.json"
    assert members.done(tmp_path, member, data="any")  # an older one does not say on which
    facts = json.loads(results.read_text()) | {"recordings": ["here", "list.csv"]}
    results.write_text(json.dumps(facts))
    assert members.done(tmp_path, member, data="here", manifest="list.csv")
    assert not members.done(tmp_path, member, data="there", manifest="list.csv")
    (tmp_path / member.name / card.CARD_NAME).write_text("{")
    assert not members.done(tmp_path, member, data="here", manifest="list.csv")


def test_what_a_run_holds_out_does_not_depend_on_later_lengths(repo: Path) -> None:
    """It is pairs of the first length, of one recording: mixed lengths are compared by it."""
    runs = members_of(repo / "configs" / "ablation.py")
    pairs = {place[:2]: outcomes._pairs_of(member) for member in runs for place in member.places}
    first = pairs["variant", "db_mel_pm"]
    for level in (
        ("segment length", "3, 10, 1.5 and 6 s"),
        ("protocol", "different recordings"),
        ("mel bands", "64"),
    ):
        assert pairs[level] == first, level
    for level in (("segment length", "6 s"), ("protocol", "plain"), ("ranges", "practical")):
        assert pairs[level] != first, level


@pytest.mark.long
def test_a_sweep_that_is_killed_or_stopped_goes_on(
    repo: Path, tmp_path: Path, config_file: Path
) -> None:
    """kill -9 of the sweep: its run saves itself and leaves, and the same command resumes it."""
    words = [
        *(f"--config={config_file}", f"--workdir={tmp_path / 'w'}", "--only=grid/0"),
        *("--config.train.steps=100000", "--config.train.log_every=2"),
    ]
    log = tmp_path / "w/head/grid/0/log.txt"

    def wait_for(pattern: str) -> str:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            found = re.search(pattern, log.read_text() if log.exists() else "")
            if found:
                return found[1]
            time.sleep(0.2)
        raise AssertionError(f"no {pattern} in {log.read_text()}")

    sweep = subprocess.Popen(
        [sys.executable, "launch/sweep.py", *words], cwd=repo, stdout=subprocess.DEVNULL
    )
    wait_for(r"step (\d+)/100000")
    sweep.kill()
    sweep.wait()
    step = wait_for(r"saved at step (\d+)")
    stopped = run(repo, *words, "--minutes=0.5")
    assert stopped.returncode == 75, stopped.stderr
    assert "the 0.5 minutes are over: 0 of 1 done; the same command goes on" in stopped.stderr
    assert wait_for(r"resumed at step (\d+)") == step
    assert log.read_text().count("saved at step") == 2
    assert not (tmp_path / "w/head/grid/0/heldout").exists()


@pytest.mark.long
def test_a_member_of_two_processes(repo: Path, tmp_path: Path, config_file: Path) -> None:
    """What each host of a TPU is told to run: one training, one evaluation written by one."""
    words = ["launch/sweep.py", f"--config={config_file}", "--member=head/grid/0"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    two = [
        subprocess.Popen(
            [sys.executable, *words, f"--workdir={tmp_path / 'two'}"], cwd=repo, text=True,
            env=os.environ | own | {"JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=600)[0] for process in two]
    assert [process.returncode for process in two] == [0, 0], said
    assert "2 cpu device(s)" in said[0] and "shape error" in said[0]
    assert "device(s)" not in said[1] and "shape error" not in said[1]
    one = run(repo, *words[1:], f"--workdir={tmp_path / 'one'}")
    assert one.returncode == 0, one.stderr
    errors = []
    for name in ("one", "two"):
        with open(tmp_path / name / "head/grid/0/heldout/errors.csv", newline="") as file:
            errors.append([float(row["shape_rmse_db"]) for row in csv.DictReader(file)])
    assert len(errors[0]) == 16  # two protocols of eight pairs
    assert np.allclose(*errors, atol=0.02)


RATES = (
    CONFIG.replace("def sweep", "def other_sweep")
    + """
def sweep(argument=""):
    seeds = 1 if argument == "short" else 2
    for seed in range(seeds):
        for rate in (1e-3, 3e-3):
            yield "rate", str(rate), seed, {"train.learning_rate": rate}
    if argument != "short":
        yield "rate", "continuous", 0, {"model.head": "continuous"}
    if argument:
        wild = {"train.learning_rate": 9.0, "train.weight_decay": 9.0, "train.warmup_steps": 0}
        yield "rate", "wild", 0, wild | {"train.steps": 40}
        yield "rate", "tame", 0, {"train.warmup_steps": 0, "train.steps": 40}
"""
)


def test_units_are_of_runs_that_can_share_a_program(tmp_path: Path) -> None:
    path = tmp_path / "rates.py"
    path.write_text(RATES)
    runs = members_of(path, "wild")
    names = {first: [x.name for x in unit] for first, unit in members.units(runs, 3).items()}
    assert names == {
        "rate/0.001/0": ["rate/0.001/0", "rate/0.003/0", "rate/0.001/1"],
        "rate/0.003/1": ["rate/0.003/1"],
        "rate/continuous/0": ["rate/continuous/0"],
        "rate/wild/0": ["rate/wild/0", "rate/tame/0"],
    }
    assert all(len(unit) == 1 for unit in members.units(runs, 1).values())


@pytest.mark.long
def test_a_sweep_of_programs_gives_what_a_sweep_of_runs_does(repo: Path, tmp_path: Path) -> None:
    path = tmp_path / "rates.py"
    path.write_text(RATES)
    common = (f"--config={path}:short", "--jobs=2")
    alone = run(repo, *common, f"--workdir={tmp_path / 'alone'}")
    together = run(repo, *common, f"--workdir={tmp_path / 'together'}", "--replicas=4")
    for done in (alone, together):
        assert done.returncode == 1 and "1 of 4 runs failed: rate/wild/0" in done.stderr, done
    tables = [
        json.loads((tmp_path / name / "sweep.json").read_text())["tables"]["rate"]
        for name in ("alone", "together")
    ]
    for left, right in zip(*tables, strict=True):
        assert (left["level"], left["seeds"]) == (right["level"], right["seeds"])
        for name, figure in left["figures"].items():
            assert right["figures"][name]["mean"] == pytest.approx(figure["mean"], abs=2e-3)
    log = (tmp_path / "together/rate/0.001/0/log.txt").read_text()
    assert (
        "2 of them in one program" in log
        and not (tmp_path / "together/rate/0.003/0/log.txt").exists()
    )
