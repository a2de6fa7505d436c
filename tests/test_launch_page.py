"""launch/README.md: its commands, its YAML and its numbers are what they say."""

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import fake_gcloud
import pytest

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


def plan_program(repo: Path) -> dict:
    return runpy.run_path(str(repo / "launch" / "plan.py"))


def test_the_numbers_of_the_plan_are_the_programs(page: str, repo: Path) -> None:
    done = subprocess.run(
        [sys.executable, "launch/plan.py"], cwd=repo, capture_output=True, text=True, check=True
    )
    (text,) = re.findall(r"<!-- plan -->\n(.*?)<!-- /plan -->", page, re.S)
    assert text == done.stdout
    program = plan_program(repo)
    assumed = program["Assumed"](1e6, 64, 4096, 0.75, 200.0, 0.6)
    made = program["plan"](assumed)
    assert f"{made.memory_hours:,.0f} hours at a time" in page
    fill_s = made.hosts * 448e9 * 0.6 * 8 / 200e9
    assert 150 < fill_s < 210  # three minutes
    assert 15.5 < made.from_network / made.from_bucket < 16.5  # sixteen times
    assert 37 < made.chips_training / made.from_bucket < 43  # some forty times
    assert made.from_network < made.host_rendering < made.chips_training
    for word in ("(measured on one H100)", "(guess for v5p)"):
        assert word in text
    assert round(made.pairs / (16000 * 256)) == 146


def test_the_plan_by_other_means(repo: Path) -> None:
    """launch.md's anchors, and the arithmetic done the other way round."""
    program = plan_program(repo)
    made = program["plan"](program["Assumed"](1e6, 64, 4096, 0.75, 200.0, 0.6))
    assert made.corpus_tb == pytest.approx(318, rel=2e-3)  # 318 MB an hour
    assert made.hosts == 16 and 2 * made.pairs == pytest.approx(1.2e9)  # clips of 3 s
    assert made.steps * 4096 >= made.pairs > (made.steps - 1) * 4096
    assert made.pair_bytes == 2 * 2 * 4.5 * 44_100
    assert made.from_network / made.from_bucket == pytest.approx(16)  # 3.2 Tb/s against 0.2
    speed = json.loads((repo / "colab/results/speed.json").read_text())
    milliseconds = speed["sections"]["host_pairs"]["rows"][0]["milliseconds"]  # 32 pairs, 2 cores
    a_core = 32 / (milliseconds / 1000) / 2
    assert made.host_rendering == pytest.approx(a_core * 16 * 208 * 0.75, rel=1e-6)
    # 1,024 pairs in 23.8 ms on an H100 of 989 TFLOP/s; 64 chips of 459.
    assert made.chips_training == pytest.approx(64 * 43_025 * 459 / 989, rel=1e-4)
    # A chip's share of the hosts, and its own rate, cross where the page says they do.
    room = made.host_rendering / made.chips_training
    less = program["plan"](program["Assumed"](1e6, 64, 4096, 0.75 / room, 200.0, 0.6))
    assert less.host_rendering == pytest.approx(less.chips_training)
    double = program["plan"](program["Assumed"](2e6, 128, 4096, 0.75, 200.0, 0.6))
    assert double.pairs / double.chips_training == pytest.approx(made.pairs / made.chips_training)
    with pytest.raises(ValueError, match="--chips=6: give a multiple of 4"):
        program["plan"](program["Assumed"](1e6, 6, 4096, 0.75, 200.0, 0.6))
