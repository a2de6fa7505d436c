"""Several runs of a sweep as one program, of which some fail: the others are done all the same."""

import json
import socket
import sys
from pathlib import Path

import pytest
from etils import epath
from test_processes import ends, started
from test_sweep import CONFIG, members_of, run

from eqst import card, config
from eqst.sweeps import members, single

NAMES = [f"rate/{letter}/0" for letter in "abcd"]
RATES = (
    CONFIG.replace("recipes.paper()", "recipes.pooled()").replace("def sweep", "def no_sweep")
    + """
def sweep(argument=""):
    for i, level in enumerate("abcd"):
        yield "rate", level, 0, {"train.learning_rate": 1e-3 * (1 + i)}
"""
)


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "rates.py"
    path.write_text(RATES)
    return path


def refuse(folder: Path, member: members.Member) -> None:
    """Makes it the folder of a run with other settings."""
    plain = config.as_dict(member.config)
    plain["model"]["hidden"] *= 2
    folder.mkdir(parents=True)
    card.write_card(folder, {"config": plain, "normalisation": {}, "band_table": {}})


def spoil(workdir: Path, unit: list[members.Member]) -> None:
    """a's folder is another run's; b's results cannot be written; c and d have nothing."""
    refuse(workdir / unit[0].name, unit[0])
    (workdir / unit[1].name).mkdir(parents=True)
    (workdir / unit[1].name / "heldout").write_text("no folder")


def done(workdir: Path, unit: list[members.Member]) -> list[bool]:
    return [members.done(epath.Path(workdir), member) for member in unit]


def test_what_fails_is_left_out_and_the_others_are_done(
    tmp_path: Path, config_file: Path, capfd: pytest.CaptureFixture
) -> None:
    unit = members_of(config_file)
    assert [x.name for x in unit] == NAMES and len(members.units(unit, 4)) == 1
    spoil(tmp_path, unit)
    with pytest.raises(ValueError, match="^2 of 4 runs failed: ") as found:
        single.run_unit(epath.Path(tmp_path), unit, "", "")
    said = str(found.value)
    assert "rate/a/0: " in said and "holds a run with other settings (model.hidden: 16" in said
    assert f"rate/b/0: '{tmp_path}/rate/b/0/heldout': File exists" in said
    assert "3 of them in one program" in capfd.readouterr().out
    assert done(tmp_path, unit) == [False, False, True, True]
    assert not list(tmp_path.glob("rate/*/0/turn.json"))

    # One whose turn another process has, alive on this machine: it keeps it.
    (tmp_path / "rate/b/0/heldout").unlink()
    turn = {"host": socket.gethostname(), "process": 1, "attempt": "", "key": "other"}
    (tmp_path / "rate/c/0/turn.json").write_text(json.dumps(turn))
    (tmp_path / "rate/c/0/heldout/errors.csv").unlink()
    with pytest.raises(ValueError, match="^1 of 2 runs failed: rate/c/0: .* is in use by process"):
        single.run_unit(epath.Path(tmp_path), unit[1:3], "", "")
    assert done(tmp_path, unit) == [False, True, False, True]
    assert json.loads((tmp_path / "rate/c/0/turn.json").read_text()) == turn


def test_what_a_program_fails_of_its_runs_fail_of_alone(
    tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process is left waiting: of several only what all of them raise is passed over."""
    unit = members_of(config_file)[:3]
    trained: list[list[str]] = []

    def train_together(configs: list, folders: list, say: object) -> None:
        trained.append([folder.parent.name for folder in folders])
        if "b" in trained[-1]:
            raise card.CheckpointError("b's checkpoint is damaged")

    monkeypatch.setattr(single, "train_together", train_together)
    monkeypatch.setattr(single, "_judge", lambda folder, *_: folder.mkdir(exist_ok=True))
    with pytest.raises(ValueError, match="^1 of 3 runs failed: rate/b/0: b's checkpoint is damage"):
        single.run_unit(epath.Path(tmp_path), unit, "", "")
    assert trained == [["a", "b", "c"], ["a"], ["b"], ["c"]]
    monkeypatch.setattr(single.jax, "process_count", lambda: 2)
    monkeypatch.setattr(single.processes, "together", lambda act, *_: act())
    monkeypatch.setattr(single, "_take", lambda *_: None)
    with pytest.raises(card.CheckpointError, match="^b's"):
        single.run_unit(epath.Path(tmp_path), unit, "", "")


def test_a_single_run_fails_as_it_is(tmp_path: Path, config_file: Path) -> None:
    unit = members_of(config_file)[:1]
    refuse(tmp_path / unit[0].name, unit[0])
    with pytest.raises(config.ConfigError, match="^.*/rate/a/0 holds a run with other settings"):
        single.run_unit(epath.Path(tmp_path), unit, "", "")


@pytest.mark.long
def test_two_processes_leave_out_alike(
    repo: Path, tmp_path: Path, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What process 0 alone cannot write does not keep the other from what is next."""
    unit = members_of(config_file)
    spoil(tmp_path / "w", unit)
    monkeypatch.chdir(repo)
    sweep = ["launch/sweep.py", f"--config={config_file}", f"--workdir={tmp_path / 'w'}"]
    words = [sys.executable, *sweep, f"--member={','.join(NAMES)}"]
    with started(words, tmp_path / "cache") as children:
        (first, out, error), (second, _, other) = ends(children)
    assert (first, second) == (1, 1), (error, other)
    assert error.startswith("launch/sweep.py: 2 of 4 runs failed: rate/a/0: "), error
    assert len(other.strip().splitlines()) == 1 and "Traceback" not in other, other
    assert "3 of them in one program" in out
    assert done(tmp_path / "w", unit) == [False, False, True, True]


@pytest.mark.long
def test_a_sweep_of_programs_ends_with_all_but_what_fails(
    repo: Path, tmp_path: Path, config_file: Path
) -> None:
    unit = members_of(config_file)
    spoil(tmp_path / "w", unit)
    words = (f"--config={config_file}", f"--workdir={tmp_path / 'w'}", "--replicas=4")
    ended = run(repo, *words)
    assert ended.returncode == 1 and "2/4  rate/c/0 and 1 more  " in ended.stdout, ended
    assert ended.stderr == "launch/sweep.py: 2 of 4 runs failed: rate/a/0, rate/b/0\n"
    assert "rate/a/0: FAILED (launch/sweep.py: " in ended.stdout
    assert "other settings" in ended.stdout.partition("rate/a/0: FAILED ")[2]
    assert {x["name"] for x in json.loads((tmp_path / "w/sweep.json").read_text())["members"]} == {
        *NAMES[2:]
    }
    # Where nothing is done there is nothing to gather, and what has failed is said all the same.
    ended = run(repo, *words, "--only=rate/a")
    assert ended.returncode == 1 and "1 runs, 0 of them done" in ended.stdout
    assert ended.stderr == "launch/sweep.py: 1 of 1 runs failed: rate/a/0\n"
    for member in unit[2:]:
        (tmp_path / "w" / member.name / "heldout/errors.csv").unlink()
        refuse(tmp_path / "v" / member.name, member)
    ended = run(repo, words[0], f"--workdir={tmp_path / 'v'}", "--replicas=2", "--only=/[cd]/")
    assert "nothing is gathered: no run of the sweep is done yet" in ended.stdout, ended
    assert ended.stderr == "launch/sweep.py: 2 of 2 runs failed: rate/c/0, rate/d/0\n"
