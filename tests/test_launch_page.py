"""launch/README.md: its commands, its YAML and its numbers are what they say."""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import fake_gcloud
import jax
import numpy as np
import pytest
import soundfile

from eqst import pairs, shards
from eqst.processes import EXIT_INTERRUPTED

BASH = re.compile(r"^```bash\n(.*?)^```", re.M | re.S)


@pytest.fixture(scope="module")
def page(repo: Path) -> str:
    return (repo / "launch" / "README.md").read_text(encoding="utf-8")


def commands(page: str) -> list[list[str]]:
    text = "\n".join(BASH.findall(page)).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line]


def test_gcloud_takes_the_commands_of_the_page(page: str) -> None:
    found = [words for words in commands(page) if words[:3] == ["gcloud", "compute", "tpus"]]
    assert len(found) >= 4
    for words in found:
        if words[3] == "accelerator-types":  # asked by a person alone
            assert words[4:] == ["list", "--project=$PROJECT", "--zone=$ZONE"]
        else:
            fake_gcloud.parse(words)


def test_the_sweeps_of_the_page_are_the_programs(page: str, repo: Path) -> None:
    helped = subprocess.run(
        [sys.executable, "launch/sweep.py", "--help"], cwd=repo, capture_output=True, text=True
    ).stdout
    known = set(re.findall(r"--(?:\[no\])?(\w+)", helped))
    found = [words for words in commands(page) if words[:2] == ["python", "launch/sweep.py"]]
    assert len(found) >= 4
    for words in found:
        assert {word[2:].partition("=")[0] for word in words[2:]} <= known
    for flag in ("--keep", "--cancel", "--setup", "--ssh", "--create", "--jobs"):
        assert flag in page and flag[2:] in known


def test_what_the_page_builds_is_what_it_copies_and_reads(page: str, repo: Path) -> None:
    helped = subprocess.run(
        [sys.executable, "-m", "eqst.build", "--help"], cwd=repo, capture_output=True, text=True
    ).stdout
    builds, copies = (
        [x for x in commands(page) if x[: len(first)] == first]
        for first in (["python", "-m", "eqst.build"], ["gcloud", "storage", "cp"])
    )
    options = dict(word[2:].split("=") for word in builds[0][3:])
    assert len(builds) == 1 and set(options) <= set(re.findall(r"--(?:\[no\])?(\w+)", helped))
    assert copies == [
        ["gcloud", "storage", "cp", "-r", f"{options['output']}/{options['name']}", "gs://$BUCKET"]
    ]
    assert f"'tfds:gs://$BUCKET/{options['name']}/1.0.0'" in page
    assert f'"tfds:gs://BUCKET/{options["name"]}/1.0.0"' in page


def test_every_state_is_on_the_page(page: str) -> None:
    from eqst.sweeps import queued

    for state in queued.PENDING | queued.GOING | queued.LOST | {queued.ACTIVE, queued.READY}:
        assert state in page, state


def test_the_jobset_is_one(page: str) -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with flax and orbax")
    (text,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    jobset = yaml.safe_load(text)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", jobset["metadata"]["name"])
    policy = jobset["spec"]["failurePolicy"]
    assert policy["restartStrategy"] == "BlockingRecreate"
    assert policy["rules"] == [
        {
            "action": "RestartJobSetAndIgnoreMaxRestarts",
            "onJobFailureReasons": ["PodFailurePolicy"],
        }
    ]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    taken, saved = job["podFailurePolicy"]["rules"]
    assert taken["action"] == saved["action"] == "FailJob"
    assert taken["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert saved["onExitCodes"]["values"] == [EXIT_INTERRUPTED]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # what podFailurePolicy needs
    assert saved["onExitCodes"]["containerName"] == container["name"]
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    line = container["command"][2]
    assert container["command"][:2] == ["bash", "-c"] and line.startswith("exec .venv/bin/python ")
    assert "\n" not in line.strip() and "--member=variant/db_mel_pm/0" in line


def test_pods_are_the_account_that_has_the_bucket(page: str) -> None:
    (account,) = re.findall(r"^ +serviceAccountName: (\w+)", page, re.M)
    assert ["kubectl", "create", "serviceaccount", account] in commands(page)
    bound = [
        words
        for words in commands(page)
        if words[:4] == ["gcloud", "storage", "buckets", "add-iam-policy-binding"]
    ]
    members = [word for words in bound for word in words if word.startswith("--member=principal:")]
    assert len(members) == 1 and members[0].endswith(f"/subject/ns/default/sa/{account}")
    assert "roles/storage.objectAdmin" in " ".join(bound[-1])


def test_a_jobset_for_each_run(page: str, repo: Path, tmp_path: Path) -> None:
    """The page's loop, as bash runs it, with something that writes down in the place of kubectl."""
    yaml = pytest.importorskip("yaml", reason="PyYAML comes with flax and orbax")
    (loop,) = (text for text in BASH.findall(page) if text.startswith("for run in "))
    (jobset,) = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    (tmp_path / "jobset.yaml").write_text(jobset)
    stand_in = 'python() { "$PYTHON" "$@"; }; kubectl() { cat; echo ---; }; BUCKET=b\n'
    script = stand_in + loop.replace("jobset.yaml", shlex.quote(str(tmp_path / "jobset.yaml")))
    script = script.replace("--config=configs/ablation.py", "--config=configs/search.py")
    done = subprocess.run(
        ["bash", "-c", script], cwd=repo, env=os.environ | {"PYTHON": sys.executable},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    made = [x for x in yaml.safe_load_all(done.stdout) if x]
    names = [x["metadata"]["name"] for x in made]
    lines = [
        x["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
        for x in made
    ]
    members = [re.findall(r"--member=(\S+)", x["command"][2]) for x in lines]
    space = runpy.run_path(str(repo / "configs" / "search.py"))
    runs = {f"{factor}/{level}/{seed}" for factor, level, seed, _ in space["sweep"]()}
    assert len(made) > 4 and len(set(names)) == len(names) == len({x[0] for x in members})
    assert all(re.fullmatch(r"[a-z][-a-z0-9]{0,39}", name) for name in names)
    assert len(made) <= len(runs) and "variant/db_mel_pm/0" not in {x[0] for x in members}


@pytest.mark.parametrize("word", ["--hours=nan", "--bucket_gbit_s=inf"])
def test_a_plan_needs_numbers(word: str, repo: Path) -> None:
    words = [sys.executable, "launch/plan.py", word]
    done = subprocess.run(words, cwd=repo, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"launch/plan.py: {word}: give a number\n"


def plan_program(repo: Path) -> dict:
    return runpy.run_path(str(repo / "launch" / "plan.py"))


def results(repo: Path, name: str) -> dict:
    return json.loads((repo / "colab" / "results" / f"{name}.json").read_text())


GIVEN = (1e6, 64, 4096, 0.75, 200.0, 0.6)


def test_the_numbers_of_the_plan_are_the_programs(page: str, repo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launch/plan.py"], cwd=repo, capture_output=True, text=True, check=True
    )
    (text,) = re.findall(r"<!-- plan -->\n(.*?)<!-- /plan -->", page, re.S)
    assert text == done.stdout
    section = page[page.index("## A million hours on a v5p pod") :]
    program = plan_program(repo)
    made = program["plan"](program["Assumed"](*GIVEN))
    large = program["plan"](program["Assumed"](*GIVEN)._replace(batch_pairs=65536))
    assert f"{made.memory_hours:,.0f} hours at a time" in section
    fill_s = made.hosts * 448e9 * 0.6 * 8 / 200e9
    assert 150 < fill_s < 210  # three minutes
    assert 15.5 < made.from_network / made.from_bucket < 16.5  # sixteen times
    assert round(made.chips_training / made.from_bucket) == 64
    assert 3.8 < made.chips_training / made.from_network < 4.2  # four times
    assert 1.9 < large.chips_training / made.chips_training < 2.1  # twice as many
    rates = [made.from_bucket, made.from_network, made.host_rendering, made.host_reading]
    assert rates == sorted(rates) and rates[-1] < made.chips_training
    for share in (
        f"{made.host_rendering / made.chips_training:.2f} of what chips take in batches of 4,096",
        f"and {made.host_rendering / large.chips_training:.2f} in those of 65,536",
        f"{made.host_reading / made.chips_training:.2f} and "
        f"{made.host_reading / large.chips_training:.2f} of it",
    ):
        assert share in section, share
    used = 6 * 44_100 * 2 / (made.records * made.record_bytes)
    assert 0.19 < used < 0.22  # a fifth
    assert 27_500 < made.from_bucket * made.records < 28_500
    assert round(made.pairs / (16000 * 256)) == 146


def test_the_limits_of_the_index_on_the_page(page: str, repo: Path) -> None:
    section = page[page.index("### What a million hours would need") :]
    bound = (2**31 - 1) / 36_000  # a start each 100 ms
    assert f"{bound:,.0f} hours" in section and f"are {-(-1e6 // bound):.0f} sets" in section
    index = pairs.Index(*range(7))
    rows = sum(name.endswith("_V") for name in index._fields)  # int32 each
    assert f"{1e6 * 36_000 * 4 / 1e9:.0f} and {1e6 * 36_000 * 4 * rows / 1e9:.0f} GB" in section
    assert pairs.cumulative(np.ones(3)).dtype == np.float32
    # The number looked up takes 2**23 values.
    u = np.asarray(jax.random.uniform(jax.random.key(0), (10_000,)), np.float64)
    assert np.all(u * 2**23 == np.round(u * 2**23)) and np.any(u * 2**22 != np.round(u * 2**22))
    assert f"{2**23 / 1e6:.1f} million recordings" in section


def brute_force_records(seconds: float, context_seconds: float, count: int) -> float:
    """Records the reader itself asks for, from random starts of a recording without an end."""
    rate, chunk = 44_100, 441_000
    asked = []
    chunks = object.__new__(shards.Chunks)
    chunks._chunk = chunk
    chunks._read = lambda number: asked.append(number) or np.zeros(chunk, np.int8)
    hops = np.random.default_rng(0).integers(1000, 1_000_000, count)
    for hop in hops:
        begin = int(hop) * rate // 10 - round(context_seconds * rate)
        found = chunks[slice(begin, begin + round((seconds + context_seconds) * rate))]
        assert len(found) == round((seconds + context_seconds) * rate)
    return len(asked) / count


def test_records_are_counted_by_the_reader(repo: Path) -> None:
    made = plan_program(repo)["plan"](plan_program(repo)["Assumed"](*GIVEN))
    assert made.records == pytest.approx(2 * brute_force_records(3.0, 1.5, 3000), rel=0.02)
    assert made.dry_records == pytest.approx(2 * brute_force_records(3.0, 0.0, 3000), rel=0.02)
    assert made.record_bytes == 882_000


def test_a_device_has_its_part_of_the_batch(repo: Path) -> None:
    program = plan_program(repo)
    assumed = program["Assumed"](*GIVEN)
    steps = {(x["what"], x["batch"]): x["milliseconds"] for x in results(repo, "gpu")["steps"]}
    features = steps["features of both recordings alone", 1024]
    small = steps["step from features on, float32", 64] + features * 64 / 1024
    large = steps["full step, float32", 1024]
    a_chip = {64: 64 / small * 1e3, 1024: 1024 / large * 1e3}
    assert 20_000 < a_chip[64] < 22_000 < 42_000 < a_chip[1024]
    for part, rate in a_chip.items():
        made = program["plan"](assumed._replace(batch_pairs=64 * part))
        assert made.chip_batch == part
        assert made.chips_training == pytest.approx(64 * rate * 459 / 989, rel=1e-6)
        # The same batch on half the chips is twice as much for each.
        fewer = program["plan"](assumed._replace(batch_pairs=32 * part, chips=32))
        assert fewer.h100_step_s == pytest.approx(made.h100_step_s)
        assert program["step_is"](part).startswith("measured")
    between = program["plan"](assumed._replace(batch_pairs=64 * 544))  # in the middle of the two
    assert between.h100_step_s == pytest.approx((small + large) / 2e3)
    assert program["step_is"](544) == "between the two"
    assert "beyond" in program["step_is"](32) and "beyond" in program["step_is"](2048)


def test_the_plan_by_other_means(repo: Path) -> None:
    """launch.md's anchors, and the arithmetic done the other way round."""
    program = plan_program(repo)
    assumed = program["Assumed"](*GIVEN)
    made = program["plan"](assumed)
    assert made.corpus_tb == pytest.approx(318, rel=2e-3)  # 318 MB an hour
    assert made.hosts == 16 and 2 * made.pairs == pytest.approx(1.2e9)  # clips of 3 s
    assert made.steps * 4096 >= made.pairs > (made.steps - 1) * 4096
    assert made.from_network / made.from_bucket == pytest.approx(16)  # 3.2 Tb/s against 0.2
    assert made.from_bucket * made.records * 882_000 * 8 == pytest.approx(200e9)
    milliseconds = results(repo, "speed")["sections"]["host_pairs"]["rows"][0]["milliseconds"]
    rows = {
        x["context_seconds"]: x["cpu_milliseconds"] for x in results(repo, "shard_reads")["rows"]
    }
    a_pair_ms = 2 * milliseconds / 32 + 2 * rows[1.5]  # 32 pairs took two cores so long
    assert made.host_rendering == pytest.approx(16 * 208 * 0.75 * 1e3 / a_pair_ms, rel=1e-6)
    assert made.host_reading == pytest.approx(16 * 208 * 0.75 * 1e3 / (2 * rows[0.0]), rel=1e-6)
    # A chip's share of the hosts, and its own rate, cross where the page says they do.
    room = made.host_rendering / made.chips_training
    level = program["plan"](assumed._replace(core_share=0.75 / room))
    assert level.host_rendering == pytest.approx(level.chips_training)
    double = program["plan"](assumed._replace(hours=2e6, chips=128, batch_pairs=8192))
    assert double.pairs / double.chips_training == pytest.approx(made.pairs / made.chips_training)
    with pytest.raises(ValueError, match="--chips=6: give a multiple of 4"):
        program["plan"](assumed._replace(chips=6))
    with pytest.raises(ValueError, match="--batch=100: give a multiple of --chips=64"):
        program["plan"](assumed._replace(batch_pairs=100))


def test_reads_are_timed_from_a_set(
    repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorflow_datasets", reason="needs the extra [data]")
    pytest.importorskip("array_record", reason="needs the extra [data]")
    rate, sounds = 8000, tmp_path / "sounds"
    sounds.mkdir()
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        soundfile.write(sounds / f"{name}.wav", 0.1 * rng.standard_normal(6 * rate), rate)
    words = ["-m", "eqst.build", f"--data={sounds}", f"--output={tmp_path}", "--name=little"]
    words += [f"--sample_rate={rate}", "--chunk_seconds=2", "--dev_share=0", "--workers=1"]
    subprocess.run([sys.executable, *words], cwd=repo, check=True, capture_output=True)
    timed = plan_program(repo)["time_reads"](str(tmp_path / "little" / "1.0.0"), 2, 3)
    built = shards.load(tmp_path / "little" / "1.0.0")
    short = built.corpus._replace(length_R=np.full(2, round(4.4 * rate)))
    monkeypatch.setattr(shards, "load", lambda _: built._replace(corpus=short))
    with pytest.raises(ValueError, match="recording has 4.4 s; build a set of 4.5 s and more"):
        plan_program(repo)["time_reads"](str(tmp_path / "little" / "1.0.0"), 2, 3)
    stored = results(repo, "shard_reads")
    assert timed.keys() == stored.keys() and len(timed["rows"]) == len(stored["rows"]) == 2
    assert timed["hours"] == pytest.approx(12 / 3600) and timed["chunk_seconds"] == 2
    assert all(0 < row["cpu_least"] <= row["cpu_most"] for row in timed["rows"])
    assert stored["chunk_seconds"] == plan_program(repo)["RECORD_SECONDS"]
