"""The open benchmark: whoever answers gets the score that an independent count gives."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys

import joblib
import numpy as np
import pytest
import scipy.signal
import soundfile
from absl import flags

from eqst import baselines, benchmark, biquad, contestants, eq, leaderboard, tasks, trials
from eqst import command as commands

RATE = tasks.SAMPLE_RATE
GRID_HZ_F = eq.curve_grid_hz(RATE)
PAIRS = 6
ONE, FLAT = "mine-3s-coloured", "mine-3s-coloured-flat"


@pytest.fixture(scope="module")
def command():
    """Runs the benchmark as its `__main__` does, here: a process takes seconds to start."""

    def run(*words: object, code: int = 0) -> str:
        said, before = io.StringIO(), set(flags.FLAGS)
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setattr(sys, "argv", ["eqst.benchmark", *map(str, words)])
            patch.setattr(commands, "keep_compiled", lambda: None)  # it is for all of a process
            try:
                with joblib.parallel_config(backend="sequential"):
                    commands.start("eqst.benchmark", benchmark.define_flags, benchmark.main)
            except SystemExit as end:
                assert code == 1 and isinstance(end.code, str)
                return end.code
            finally:
                for name in set(flags.FLAGS) - before:
                    delattr(flags.FLAGS, name)
                flags.FLAGS.unparse_flags()
        assert code == 0
        return said.getvalue()

    return run


@pytest.fixture(scope="module")
def folder(bursts, tmp_path_factory):
    """Recordings of six people, three of them for tuning, and their list."""
    folder = tmp_path_factory.mktemp("recordings")
    rows = ["path,speaker,split"]
    for number in range(6):
        soundfile.write(folder / f"{number}.wav", bursts(number, 8.0, RATE), RATE, "PCM_16")
        rows.append(f"{number}.wav,person {number},{'dev' if number < 3 else 'train'}")
    (folder / "list.csv").write_text("\n".join(rows))
    return folder


@pytest.fixture(scope="module")
def manifest(folder, command):
    path = folder / "mine.json"
    said = command(
        f"--new_manifest={path}", f"--list={folder / 'list.csv'}", f"--data={folder}",
        f"--pairs={PAIRS}",
    )  # fmt: skip
    assert "mine-10s-coloured: left out, no pair of 10 s" in said
    return path


@pytest.fixture(scope="module")
def here(folder, manifest):
    return [f"--manifest={manifest}", f"--data={folder}", f"--pairs={PAIRS}"]


@pytest.fixture(scope="module")
def exported(here, command, tmp_path_factory):
    """Pairs and truth, as people with other tools get them."""
    out = tmp_path_factory.mktemp("exported")
    command(*here, f"--export={out}", f"--tasks={ONE}")
    return out


@pytest.fixture(scope="module")
def scored(here, command, tmp_path_factory):
    """A leaderboard with four rows, made by the command."""
    out = tmp_path_factory.mktemp("board")
    rows = "do_nothing,oracle,oracle_grid,packaged"
    said = command(*here, f"--predictor={rows}", f"--output={out}", "--tasks=mine-3s")
    assert "mine-3s-coloured-different: done" in said
    return out


def board_of(out) -> dict:
    return json.loads((out / "leaderboard.json").read_text())


def sections(bands: list[dict]) -> np.ndarray:
    columns = [[band[key] for band in bands] for key in ("frequency_hz", "gain_db", "q")]
    return biquad.sos(*columns, kinds=eq.KINDS, sample_rate=RATE)


def true_curves(exported) -> np.ndarray:
    """By scipy from the exported settings."""
    truth = json.loads((exported / ONE / "truth.json").read_text())
    responses = [
        scipy.signal.sosfreqz(sections(pair["bands"]), GRID_HZ_F, fs=RATE)[1]
        for pair in truth["pairs"]
    ]
    return 20 * np.log10(np.abs(responses))


# ---- the command


def test_as_a_process(here, repo, scored, tmp_path):
    words = [*here, "--predictor=do_nothing", f"--output={tmp_path / 'made'}", f"--tasks={ONE}"]
    environment = os.environ | {"PYTHONPATH": str(repo)}
    done = subprocess.run(
        [sys.executable, "-m", "eqst.benchmark", *words],
        capture_output=True, text=True, env=environment, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and f"{ONE}: done; about 0 min left" in done.stdout
    (row,) = board_of(tmp_path / "made")["leaderboard"]
    other = {row["method"]: row for row in board_of(scored)["leaderboard"]}["do_nothing"]
    assert row["figures"][ONE] == other["figures"][ONE]


def test_rows_have_the_errors_that_the_exported_truth_gives(scored, exported):
    board = board_of(scored)
    errors = np.array(board["methods"]["do_nothing"]["scores"][ONE]["errors_db"].split(), float)
    np.testing.assert_allclose(errors, true_curves(exported).std(axis=1), atol=2e-3)
    rows = {row["method"]: row for row in board["leaderboard"]}
    assert list(rows)[-2:] == ["oracle", "oracle_grid"] and rows["packaged"]["kind"] == "model"
    assert [rows[x]["kind"] for x in ("do_nothing", "oracle")] == ["baseline", "oracle"]
    assert rows["do_nothing"]["figures"][ONE]["mean"] == pytest.approx(errors.mean(), abs=1e-3)
    assert rows["do_nothing"]["figures"][FLAT]["mean"] == 0
    assert (
        rows["oracle"]["figures"][ONE]["mean"] < 0.2 < rows["oracle_grid"]["figures"][ONE]["mean"]
    )
    packaged = rows["packaged"]
    assert packaged["figures"][FLAT]["mean"] > 0 and packaged["seconds_per_pair"] > 0
    for row in rows.values():
        assert set(row["figures"]) == {f"mine-3s-{x}" for x in ENDS}
        assert all(x["low"] <= x["mean"] <= x["high"] for x in row["figures"].values())
    task = {row["name"]: row for row in board["tasks"]}[ONE]
    assert task["about"].startswith("mine, 3 s") and task["talkers"] == "0 1 2 0 1 2"
    text = (scored / "leaderboard.txt").read_text()
    assert "mine" in text and "packaged" in text and ")*" not in text


ENDS = ("coloured", "plain", "coloured-different", "coloured-flat")


def test_what_is_scored_is_skipped_and_done_anew_by_overwrite(scored, here, command):
    before = (scored / "leaderboard.json").read_bytes()
    same = [*here, "--predictor=do_nothing,oracle", f"--output={scored}", f"--tasks={ONE}"]
    assert f"{ONE}: scored already" in command(*same)
    fewer = [word for word in same if "--pairs" not in word] + ["--pairs=2"]
    assert f"{ONE}: scored already" in command(*fewer)
    assert (scored / "leaderboard.json").read_bytes() == before
    assert f"{ONE}: do_nothing" in command(*same, "--overwrite")
    after = board_of(scored)["methods"]["do_nothing"]["scores"][ONE]
    assert (
        after["errors_db"]
        == json.loads(before)["methods"]["do_nothing"]["scores"][ONE]["errors_db"]
    )


def test_check_says_what_is_not_as_published(here, manifest, command, tmp_path):
    assert f"{ONE}: {PAIRS} pairs" in command(*here, "--check", f"--tasks={ONE}")
    content = json.loads(manifest.read_text())
    stored = content["pairs"][ONE].split()
    content["pairs"][ONE] = " ".join([*stored[:-1], "0" * tasks.HASH_DIGITS])
    changed = tmp_path / "mine.json"
    changed.write_text(json.dumps(content))
    words = [f"--manifest={changed}", *here[1:], f"--tasks={ONE}"]
    assert f"--check: pairs of {ONE} are not the published" in command(*words, "--check", code=1)
    said = command(*words, "--predictor=do_nothing", f"--output={tmp_path}")
    assert f"{ONE}: 1 of {PAIRS} pairs are not the published ones" in said
    assert board_of(tmp_path)["methods"]["do_nothing"]["scores"][ONE]["differing_pairs"] == 1
    assert ")*" in (tmp_path / "leaderboard.txt").read_text()


def test_leaderboards_are_merged_and_methods_compared(scored, here, command, tmp_path):
    command(*here, "--predictor=do_nothing", f"--output={tmp_path}", f"--tasks={ONE}")
    said = command(f"--merge={scored / 'leaderboard.json'}", f"--output={tmp_path}",
                   "--compare=packaged,do_nothing")  # fmt: skip
    board = board_of(tmp_path)
    assert {row["method"] for row in board["leaderboard"]} == {
        "packaged", "do_nothing", "oracle", "oracle_grid"
    }  # fmt: skip
    scores = [board["methods"][x]["scores"][ONE]["errors_db"] for x in ("packaged", "do_nothing")]
    difference = np.subtract(*(np.array(x.split(), float) for x in scores)).mean()
    assert f"packaged - do_nothing: {difference:+.3f} dB" in said
    assert set(board["methods"]["packaged"]["scores"]) == {f"mine-3s-{x}" for x in ENDS}


def test_a_leaderboard_of_other_pairs_is_not_merged(scored):
    """Their errors would be compared pair by pair; pairs marked as not the manifest's are known."""
    board, other = board_of(scored), board_of(scored)
    assert leaderboard.merge(board, board_of(scored), overwrite=False) == []
    scores = [method["scores"][ONE] for method in other["methods"].values()]
    for score in scores:
        score["sha256"], score["differing_pairs"] = "0" * 64, 1
    assert len(leaderboard.merge(board, other, overwrite=False)) == len(scores)
    for score in scores:
        score["differing_pairs"] = 0
    with pytest.raises(tasks.TasksError, match="has other pairs there.*000000000000"):
        leaderboard.merge(board, other, overwrite=True)


def test_a_row_is_never_taken_for_another_models(scored, repo):
    """The seeds of a sweep's models all lie in folders called 0."""
    assert trials.name_of("runs/a/variant/db_mel_pm/0") == "variant/db_mel_pm/0"
    assert trials.name_of("runs/mine") == trials.name_of("runs/mine/") == "mine"
    weights = repo / "colab" / "weights"
    models = [contestants.of_workdir("", str(weights / x)) for x in ("db_mel_pm", "db_mel_bl")]
    assert [model.name for model in models] == ["db_mel_pm", "db_mel_bl"]
    facts = [model.facts for model in models]
    assert facts[0]["weights"] != facts[1]["weights"]
    board = board_of(scored)
    own = board["methods"]["packaged"]["scores"][ONE]["facts"]
    leaderboard.check_same(board, "packaged", own)
    leaderboard.check_same(board, "not there", facts[0])
    with pytest.raises(tasks.TasksError, match="'packaged' is of another .*--name"):
        leaderboard.check_same(board, "packaged", facts[0])


# ---- outside programs


# Settings, or late, quiet stereo, from what the test has put into a table.
ANSWER = """
import json, sys
table, index, output, kind, input = sys.argv[1:6]
pair = json.load(open(table))[int(index)]
if output.endswith(".json"):
    json.dump({"sample_rate": 44100, "preamp_db": 0.0, "bands": pair["bands"]}, open(output, "w"))
else:
    import numpy as np, scipy.signal, soundfile
    samples, rate = soundfile.read(input)
    moved = np.concatenate([np.zeros(321), 0.1 * scipy.signal.sosfilt(pair["sos"], samples)])
    soundfile.write(output, np.stack([moved, moved], 1), rate, kind)
"""


@pytest.mark.long
def test_programs_by_settings_and_by_audio(exported, here, command, tmp_path):
    script, table = tmp_path / "answer.py", tmp_path / "table.json"
    script.write_text(ANSWER)
    truth = json.loads((exported / ONE / "truth.json").read_text())["pairs"]
    rows = [{"bands": x["bands"], "sos": sections(x["bands"]).tolist()} for x in truth]
    table.write_text(json.dumps(rows))
    for name, output, kind, bound in (
        ("settings", "{output}.json", "-", 0.002),
        ("audio16", "{output}.wav", "PCM_16", 0.35),
    ):
        program = (
            f"{sys.executable} {script} {table} {{index}} {output} {kind} {{input}} {{reference}}"
        )
        command(*here, f"--program={program}", f"--name={name}", f"--output={tmp_path}",
                f"--tasks={ONE}")  # fmt: skip
        found = board_of(tmp_path)["methods"][name]
        assert found["kind"] == "program" and found["scores"][ONE]["failures"] == 0
        errors = np.array(found["scores"][ONE]["errors_db"].split(), float)
        assert errors.mean() < bound
        assert ("gain_db_error" in found["scores"][ONE]["figures"]) == (name == "settings")


@pytest.mark.long
def test_eqst_match_as_a_program_is_the_packaged_predictor(scored, here, command, tmp_path):
    program = (
        f"{sys.executable} -m eqst.match --input={{input}} --reference={{reference}} "
        "--settings={output}.json"
    )
    words = [word for word in here if "--pairs" not in word]
    command(*words, f"--program={program}", "--name=match", f"--output={tmp_path}", "--pairs=2",
            f"--tasks={ONE}")  # fmt: skip
    score = board_of(tmp_path)["methods"]["match"]["scores"][ONE]
    model = board_of(scored)["methods"]["packaged"]["scores"][ONE]["errors_db"].split()[:2]
    np.testing.assert_allclose(
        np.array(score["errors_db"].split(), float), np.array(model, float), atol=0.05
    )


def pair_of(seed: int = 0) -> tasks.Pair:
    rng = np.random.default_rng(seed)
    sounds = (rng.integers(-9000, 9000, RATE).astype(np.int16) for _ in range(2))
    return tasks.Pair(seed, "a", "a", rng.uniform(size=(4, 3)).astype(np.float32), *sounds)


FAILURES = {
    "exit code": ("import sys; sys.exit('no idea')", "exit code 1: no idea"),
    "silent end": ("import sys; sys.exit(3)", "exit code 3"),
    "no file": ("pass", "it wrote no output.json"),
    "no JSON": ("open(out, 'w').write('{')", "'output.json' is not JSON"),
    "no settings": ("open(out, 'w').write('{}')", "'output.json' is not a settings file"),
    "endless": ("import time; time.sleep(60)", "no answer within 1 s .--timeout."),
    "other rate": (
        "from eqst import eq, settings as s; import numpy as np; "
        "s.save(out, s.from_params(eq.from_unit(eq.PAPER, np.full((4, 3), .4)), 48000))",
        "settings are for 48000 Hz, not 44100",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_program_that_fails_has_no_answer(case, repo, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(repo))
    body, expected = FAILURES[case]
    code = f"import sys; out = sys.argv[1]; {body}"
    command = f"{sys.executable} -c {shlex.quote(code)} {{output}}.json"
    timeout_s = 1.0 if case == "endless" else 60.0
    listener = contestants.program("program", command, timeout_s)
    with pytest.raises(contestants.AnswerError, match=expected) as caught:
        listener.answer(pair_of(), tasks.HEADLINE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        ("soundfile.write(out, np.zeros(44100), 44100)", "the output is silent"),
        ("soundfile.write(out, np.ones(48000), 48000)", "audio is at 48000 Hz, not 44100"),
        ("open(out, 'w').write('no audio')", "'output.wav'"),
    ],
)
def test_audio_that_says_nothing(write, expected):
    code = f"import sys, soundfile, numpy as np; out = sys.argv[1]; {write}"
    command = f"{sys.executable} -c {shlex.quote(code)} {{output}}.wav"
    with pytest.raises(contestants.AnswerError, match=expected):
        contestants.program("program", command, 60.0).answer(pair_of(), tasks.HEADLINE)


def test_what_a_program_started_ends_with_it(tmp_path):
    """A child that would write later must not."""
    late = tmp_path / "late"
    child = f"import time; time.sleep(2); open({str(late)!r}, 'w')"
    start = f"subprocess.Popen([sys.executable, '-c', {child!r}])"
    code = f"import subprocess, sys, time; {start}; time.sleep(9)"
    command = f"{sys.executable} -c {shlex.quote(code)} {{output}}.json"
    with pytest.raises(contestants.AnswerError, match="no answer within"):
        contestants.program("program", command, 1.0).answer(pair_of(), tasks.HEADLINE)
    subprocess.run([sys.executable, "-c", "import time; time.sleep(2.5)"], check=True)
    assert not late.exists()


def listener(answer) -> contestants.Listener:
    return contestants.Listener("other", "program", {}, answer)


def test_missing_answers_count_as_flat_and_are_told():
    def sometimes(pair, task):
        if pair.number % 2:
            raise contestants.AnswerError("not today")
        params = eq.from_unit(tasks.TABLE, pair.unit_KP.astype(float))
        return contestants.Answer(params, None)

    made = [pair_of(seed) for seed in range(4)]
    asked = benchmark.ask(tasks.HEADLINE, made, [listener(sometimes)], hear=False)
    assert asked.failures["other"] == ["pair 1: not today", "pair 3: not today"]
    answer = contestants.gather(asked.answers["other"])
    lines = asked.failures["other"]
    entry = leaderboard.score(
        answer, asked.unit_nKP, list("abab"), failures=lines, seconds_per_pair=1.0
    )
    errors = np.array(entry["errors_db"].split(), float)
    assert entry["failures"] == 2 and np.all(errors[::2] < 1e-3) and np.all(errors[1::2] > 0.5)


def test_rows_of_fewer_pairs_are_marked_and_come_after_the_full_ones():
    """Few pairs may be easy ones: two that are right do not make a first place."""
    made, board = [pair_of(seed) for seed in range(4)], leaderboard.empty()
    facts = {"facts": {}, "command": "", "commit": "", "machine": "", "differing_pairs": 0}

    def answered(name: str, gain: float, count: int, task: tasks.Task) -> None:
        def answer(pair, task):
            params = eq.from_unit(tasks.TABLE, pair.unit_KP.astype(float))
            return contestants.Answer(params._replace(gain_db=gain * params.gain_db), None)

        asked = benchmark.ask(task, made[:count], [listener(answer)], hear=False)
        entry = leaderboard.score(
            contestants.gather(asked.answers["other"]), asked.unit_nKP, list("abab")[:count],
            failures=[], seconds_per_pair=1.0,
        )  # fmt: skip
        leaderboard.add(board, name, "program", task, asked.pairs, entry | facts)

    answered("worse", 0.5, 4, tasks.HEADLINE)
    answered("better", 0.9, 4, tasks.HEADLINE)
    answered("right on two", 1.0, 2, tasks.HEADLINE)
    answered("right elsewhere", 1.0, 4, tasks.TASKS[1])
    names = [row["method"] for row in board["leaderboard"]]
    assert names == ["better", "worse", "right on two", "right elsewhere"]
    text = leaderboard.table_text(board)
    (two,) = [
        line for line in text.splitlines()[2:] if line.startswith("right on two") and ")" in line
    ]
    assert two.rstrip().endswith(")~") and text.count(")~") == 1


def test_a_program_that_never_answers_ends_the_run():
    def never(pair, task):
        raise contestants.AnswerError("exit code 1")

    made = [pair_of(seed) for seed in range(4)]
    with pytest.raises(
        tasks.TasksError, match="none of the first 3 pairs of .*; pair 0: exit code 1"
    ):
        benchmark.ask(tasks.HEADLINE, made, [listener(never)], hear=False)


# ---- baselines


@pytest.mark.long
def test_baselines_are_tuned_on_pairs_of_the_same_kind(bursts, corpus_of, monkeypatch):
    """Different recordings for a task of different recordings, train talkers, 16 bits; once."""
    recordings = corpus_of([bursts(seed, 5.0, RATE) for seed in range(5)], RATE)
    seen: list[baselines.TrainSet] = []
    monkeypatch.setattr(baselines, "fit", lambda train, **_: seen.append(train))
    monkeypatch.setattr(tasks, "open_recordings", lambda *_, **__: recordings)
    source = benchmark.Source(tasks.Manifest("x", (), {}), "", 2, lambda line: None)
    monkeypatch.setattr(contestants.tune, "__kwdefaults__", {"count": 20})
    task = tasks.Task("x", 1.0, "coloured")
    for one in (task, task._replace(different=True), task._replace(equalised=False)):
        source.tuned(one)
    same, apart = seen  # the task without EQ has the tuning of the first
    assert len(same.talker_n) == 20 and set(same.talker_n) == set(range(5))
    np.testing.assert_array_equal(same.evidence_input.power_db, apart.evidence_input.power_db)
    assert np.all(np.abs(same.plain_reference.power_db - apart.plain_reference.power_db).max(1) > 1)
    # without its EQ a reference differs from the input less than with it
    spread = [
        np.std(x.power_db - same.evidence_input.power_db)
        for x in (same.plain_reference, same.evidence_reference)
    ]
    assert spread[0] < spread[1]


@pytest.mark.long
def test_every_baseline_answers(bursts, corpus_of, monkeypatch):
    recordings = corpus_of([bursts(seed, 5.0, RATE) for seed in range(6)], RATE)
    monkeypatch.setattr(tasks, "open_recordings", lambda *_, **__: recordings)
    task = tasks.Task("x", 1.0, "coloured")
    manifest = tasks.Manifest("x", (), {task.name: ("0" * tasks.HASH_DIGITS,) * 8})
    source = benchmark.Source(manifest, "", 2, lambda line: None)
    kept = {}

    def keep(name, kind, found, entry):
        kept[name] = kind, entry["figures"]["shape_rmse_db"]["mean"]

    names = list(contestants.BASELINES)
    benchmark.score_task(source, task, [], names, 8, keep, lambda line: None)
    assert list(kept) == names
    assert kept["oracle"] == ("oracle", pytest.approx(0, abs=0.2))
    assert all(
        kind == ("oracle" if "oracle" in name else "baseline") for name, (kind, _) in kept.items()
    )
    assert all(0 < mean < 12 for _, mean in kept.values())


def test_too_few_train_talkers_leave_the_tuned_ones_out(here, command, tmp_path):
    said = command(*here, "--predictor=ridge,do_nothing", f"--output={tmp_path}", f"--tasks={ONE}")
    assert "no tuned baselines, they need 5 train talkers at least, 3 give pairs" in said
    assert [row["method"] for row in board_of(tmp_path)["leaderboard"]] == ["do_nothing"]
